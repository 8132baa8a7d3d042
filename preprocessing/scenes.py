"""Scenes: coloured pictures of handwritten digits whose difficulty is a set of dials, with the mask of the ink known.

    python -m preprocessing.scenes --out data/scenes

Each scene sets one or two of the embedded real digits (`preprocessing.digits`) on a coloured paper: ink and paper
colours, a gradient across the paper, jitter, size and faint strokes as clutter. A class is a digit, or a pair of them.
Every scene is a function of (dials, seed, its index), so any machine can make the same set again.

The latent set in --out holds pixels. Beside the shards lies `masks.npz`: `masks` uint8 (N, H, W), 1 where ink covers at
least half of a pixel, and `groups` int64 (N,). The real digits are dealt into five groups, and all digits of a scene
come from one of them: to hold out a group is to hold out handwriting, not only scenes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from preprocessing import digits, job
from runtime import errors, files, progress
from runtime.errors import require
from runtime.options import group, option, read
from runtime.streams import Stream

MASKS = "masks.npz"
# Scenes in a set, at most.
MOST = 10_000_000
# Parts into which the real digits are dealt; the last is held out to measure on unseen handwriting.
GROUPS = 5


@dataclass(frozen=True, kw_only=True)
class Dials:
    """What makes a scene easy or hard. The defaults were chosen by measurement (docs/study.md)."""

    resolution: int = option(16, help="side of a scene, in pixels", heading="dials")
    digits: int = option(1, help="digits in a scene: 1, or 2 side by side")
    classes: int = option(10, help="classes: digits (at most 10), or pairs of digits (at most 100)")
    colours: float = option(
        0.3, within="[0, 1]", help="0: black ink on white paper; 1: any two colours, the ink darker by 0.4 or more"
    )
    gradient: float = option(
        0.2, within="[0, 1]", help="the paper's brightness changes by at most half of this across a scene"
    )
    jitter: float = option(0.5, help="how far a digit is moved, in pixels")
    clutter: int = option(1, within="[0, 100]", help="faint strokes behind the digits")
    size: tuple[float, ...] = option((0.95, 1.05), help="smallest and largest size, as a share of a digit's place")

    def __post_init__(self) -> None:
        require(
            8 <= self.resolution <= 1024 and self.resolution % 2 == 0,
            f"--resolution {self.resolution} must be even, at least 8 and at most 1024",
        )
        require(self.digits in (1, 2), f"--digits {self.digits} must be 1 or 2")
        require(
            2 <= self.classes <= 10**self.digits, f"--classes {self.classes} must lie between 2 and {10**self.digits}"
        )
        require(
            0 <= self.jitter <= self.resolution,
            f"--jitter {self.jitter} must lie between 0 and --resolution {self.resolution}",
        )
        require(
            len(self.size) == 2 and 0.1 <= self.size[0] <= self.size[1] <= 10,
            f"--size {' '.join(map(str, self.size))}: give the smallest and the largest, between 0.1 and 10",
        )

    def pair(self, label: int) -> tuple[int, ...]:
        """The digits of a class, from left to right. With 20 pairs or more, each digit is in at least two of them."""
        if self.digits == 1:
            return (label,)
        left, turn = label % 10, label // 10
        return left, (3 * left + 7 * turn + 1) % 10


class Scenes:
    """Scenes by index, as an image set.

    Args:
        dials: what they look like.
        count: how many scenes; their labels run through the classes again and again.
        seed: of everything drawn.
        groups: groups of handwriting to draw from (0 .. 4); None draws from all.
    """

    description = "scenes made of UCI optical recognition of handwritten digits, doi 10.24432/C50P49"

    def __init__(self, dials: Dials, count: int, seed: int = 0, groups: Sequence[int] | None = None) -> None:
        self.dials, self.seed, self._groups = dials, seed, tuple(range(GROUPS) if groups is None else groups)
        ink, labels = digits.load()
        # A margin of one pixel of paper.
        self._ink = np.pad(ink[..., 0] / np.float32(255), ((0, 0), (1, 1), (1, 1)))
        dealt = Stream(0, "scenes/groups").permutation(len(labels))
        self._pools = {
            (digit, part): np.sort(dealt[part::GROUPS][labels[dealt[part::GROUPS]] == digit])
            for digit in range(10)
            for part in range(GROUPS)
        }
        self.labels = np.arange(count) % dials.classes
        self.names = [f"scene-{index:06d}" for index in range(count)]
        self.class_names = ["".join(map(str, dials.pair(label))) for label in range(dials.classes)]
        settings = json.dumps([dataclasses.asdict(dials), count, seed, self._groups])
        self.photographs: list[str] = []
        self.fingerprint = hashlib.sha256(settings.encode() + ink.tobytes()).hexdigest()
        self.summary = f"scenes of {dials.digits} digit(s): {count:,} images, {dials.classes} classes"

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.draw(index)[0])

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Scene `index`: picture uint8 (H, W, 3), mask uint8 (H, W) of the ink, and the group of its handwriting."""
        random = Stream(self.seed, "scene", index).host
        dials, side = self.dials, self.dials.resolution
        part = self._groups[random.integers(len(self._groups))]
        y, x = np.mgrid[:side, :side].astype(np.float32) + 0.5
        # The digits, side by side: how much ink covers each pixel.
        coverage = np.zeros((side, side), np.float32)
        chosen = dials.pair(int(self.labels[index]))
        place = side / len(chosen)
        for position, digit in enumerate(chosen):
            pool = self._pools[digit, part]
            height, width = (
                side * 0.8 * random.uniform(dials.size[0], dials.size[1], 2) * (1.0, 1.0 if len(chosen) == 1 else 0.65)
            )
            down, right = random.uniform(-dials.jitter, dials.jitter, 2)
            middle = (side / 2 + down, place * (position + 0.5) + right)
            ink = self._ink[pool[random.integers(len(pool))]]
            coverage = np.maximum(
                coverage, _sampled(ink, (y - middle[0]) / height * 8 + 5, (x - middle[1]) / width * 8 + 5)
            )
        # The paper, with a gradient and strokes, and the ink on it.
        paper, ink_colour = self._colours(random)
        angle = random.uniform(0, 2 * np.pi)
        slope = (
            dials.gradient
            * random.uniform(-0.5, 0.5)
            * ((x - side / 2) * np.cos(angle) + (y - side / 2) * np.sin(angle))
            / side
        )
        picture = paper + slope[..., None]
        for _ in range(dials.clutter):
            stroke = _stroke(random, x, y, side)[..., None]
            picture = picture + 0.4 * stroke * (random.uniform(0, 1, 3) - picture)
        picture = picture + coverage[..., None] * (ink_colour - picture)
        return np.round(255 * picture.clip(0, 1)).astype(np.uint8), (coverage >= 0.5).astype(np.uint8), part

    def _colours(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Paper and ink (3,), at least 0.4 apart in brightness."""
        paper = 1 - self.dials.colours * random.uniform(0, 1, 3)
        ink = self.dials.colours * random.uniform(0, 1, 3)
        short = 0.4 - (paper.mean() - ink.mean())
        if short > 0:
            paper, ink = paper + short / 2, ink - short / 2
        return paper.astype(np.float32), ink.astype(np.float32)


def _sampled(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`image` at the points (y, x), bilinear and 0 outside; its pixels have their centres at halves."""
    from scipy.ndimage import map_coordinates

    return map_coordinates(image, [y - 0.5, x - 0.5], order=1, mode="constant", cval=0.0, output=np.float32)


def _stroke(random: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """Coverage of a straight stroke one pixel wide, between two random points."""
    (x0, y0), (x1, y1) = random.uniform(0, side, (2, 2))
    along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-6), 0, 1)
    return np.clip(1.0 - np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)), 0, 1)


@dataclass(frozen=True, kw_only=True)
class Options:
    out: str = option("data/scenes", help="folder of the latent set to write", heading="latent set")
    count: int = option(8000, help="scenes")
    seed: int = option(0, help="seed of the scenes")
    dials: Dials = group(Dials)

    def __post_init__(self) -> None:
        require(
            self.dials.classes <= self.count <= MOST,
            f"--count {self.count} must be at least --classes {self.dials.classes} and at most {MOST:,}",
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Write scenes as a latent set, and their masks, unless both are there already."""
    options = read(Options, argv, prog="python -m preprocessing.scenes", description=__doc__)
    from preprocessing.encoding import encode

    scenes = Scenes(options.dials, options.count, options.seed)
    encode(
        scenes,
        job.Options(
            images="scenes",
            vae="pixels",
            resolution=options.dials.resolution,
            dtype="float32",
            batch_size=256,
            workers=0,
            seed=options.seed,
            out=options.out,
        ),
    )
    target = Path(options.out) / MASKS
    if not target.exists():
        drawn = [scenes.draw(index)[1:] for index in progress.bar(range(options.count), desc="masks", unit="image")]
        masks, groups = zip(*drawn, strict=True)
        with files.replacing(target) as temporary, open(temporary, "wb") as handle:
            np.savez_compressed(handle, masks=np.stack(masks), groups=np.array(groups, np.int64))


if __name__ == "__main__":
    errors.run(main)
