"""What a row costs before anything of it exists: FLOPs, hours at a measured rate, disk; from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from models.latents import LatentSpace
from recipes import chain, rows
from recipes.row import Row
from recipes.scale import Scale, find
from runtime import files
from runtime.peaks import PEAKS, SHARE

if TYPE_CHECKING:
    from dataset import LatentSet
    from models import ModelSpec
    from training.cost import Cost

# What a GPU is assumed to sustain, for hours: an H100.
TERAFLOPS = SHARE * PEAKS["H100"] / 1e12
# FLOPs of every row at the paper's scale; made by `python -m recipes.costs`.
COUNTED = Path(__file__).with_name("costs.json")
IMAGENET = 1_281_167
# Options on which no step's FLOPs depend, with the value that stands for any.
UNCOUNTED = {
    "--max-train-steps": "1000000",
    **dict.fromkeys(("--output-dir", "--exp-name", "--guiding-ckpt", "--branch-from"), "x"),
}


@dataclass(frozen=True)
class Sketch:
    """The facts of a latent set that does not exist yet, as `dataset.LatentSet` has them."""

    channels: int
    latent_size: int
    num_classes: int
    count: int
    resolution: int
    views: int
    parts: int

    @property
    def space(self) -> LatentSpace:
        return LatentSpace(name="sketch", channels=self.channels, stride=1, shift=(0.0,), scale=(1.0,))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts, self.channels, self.latent_size, self.latent_size)

    def __len__(self) -> int:
        return self.count

    def images(self, indices: Any, views: Any = None) -> np.ndarray:
        return np.zeros((len(indices), self.resolution, self.resolution, 1 if self.channels == 1 else 3), np.uint8)

    @property
    def bytes(self) -> int:
        """On disk, in float16 (float32 for pixels), without the images."""
        return self.count * self.views * int(np.prod(self.shape)) * (4 if self.channels in (1, 3) else 2)


DIGITS = Sketch(1, 8, 10, 1_797, 8, 1, 1)
# By scale; the paper's depend on the row.
SKETCHES = {
    "digits": DIGITS,
    "tiny": DIGITS,
    "photographs": Sketch(4, 8, 10, 60_000, 32, 1, 2),
}


def sketch(row: Row, scale: Scale) -> Sketch:
    """The latent set of a row at a scale."""
    if scale.name in SKETCHES:
        return SKETCHES[scale.name]
    if row.family == "lightningdit":
        return Sketch(32, 16, 1000, IMAGENET, 256, 2, 1)
    return Sketch(4, row.resolution // 8, 1000, IMAGENET, row.resolution, 2 if "flips" in row.extras else 1, 2)


@functools.cache
def parameters(row: Row, scale: Scale) -> float:
    """Millions of parameters of the row's network, without heads."""
    import models

    data = sketch(row, scale)
    spec = models.spec(
        scale.model(row), in_channels=data.channels, input_size=data.latent_size, num_classes=data.num_classes
    )
    return sum(value.numel() for value in models.outline(spec).parameters()) / 1e6


def _teacher(spec: ModelSpec, space: LatentSpace) -> Any:
    """A stand-in for the teacher's checkpoint, of which only shapes are read."""
    from training import cost

    return SimpleNamespace(
        spec=spec,
        space=space,
        has_null=True,
        path="sketch",
        digest="",
        step=0,
        epochs=None,
        network=lambda weights, depth=None: cost.empty_network(spec, depth),
    )


def training_cost(row: Row, scale: Scale) -> Cost:
    """The account of the row's training command, without its teacher's."""
    return replace(_cost_of(_counted_words(row, scale), sketch(row, scale)), steps=scale.steps(row, row.epochs))


def _counted_words(row: Row, scale: Scale) -> tuple[str, ...]:
    """The row's training command. Rows that differ in length and names alone share one count."""
    plan = chain.build(row, scale, 0, Path("work"))
    link = next(link for link in reversed(plan.links) if link.name == "train")
    return tuple(UNCOUNTED.get(flag, word) for flag, word in zip(("", *link.words), link.words, strict=False))


@functools.cache
def _cost_of(command_line: tuple[str, ...], data: Sketch) -> Cost:
    """The account of a training command on `data`."""
    from training import command, cost
    from training.setup import spec_of

    program, *words = command_line
    guided = program == "train_guide.py"
    for place, flag in enumerate(words[:-1], 1):
        if flag == "--align-encoder" and "/" in words[place]:  # the chain makes it; one of its shape costs the same
            words[place] = "test_vit"
    config, options = command.resolve(words, program, None, ("guided",) if guided else ())
    latents = cast("LatentSet", data)
    spec = spec_of(config, latents)
    return cost.estimate(config, options, data=latents, load=lambda path: _teacher(spec, data.space))


def flops(row: Row, scale: Scale, epochs: float | None = None) -> float:
    """FLOPs of the row's steps up to `epochs` (default: all), its teacher's included."""
    total = training_cost(row, scale).flops(scale.steps(row, row.epochs if epochs is None else epochs))
    return total if row.teacher is None else total + flops(row.of_teacher(), scale)


def encoding(row: Row, scale: Scale) -> float:
    """FLOPs before the row's first step: an encoder's pass over the set, where its output is kept."""
    # most rows keep nothing, and counting takes seconds for large networks
    return training_cost(row, scale).once if "--align-cache" in _counted_words(row, scale) else 0.0


def whole(row: Row, scale: Scale, epochs: float | None = None) -> float:
    """FLOPs of the row's training up to `epochs` (default: all), with its teacher's and an encoder's pass before it."""
    return encoding(row, scale) + flops(row, scale, epochs)


def checkpoint_bytes(row: Row, scale: Scale) -> int:
    """Of one checkpoint: network, its average and two moments, in float32."""
    return 16 * sum(part.parameters for part in training_cost(row, scale).parts if part.trained)


def summary(row: Row, scale: Scale, images_per_second: float | None) -> str:
    """What a row costs, as two lines of comment."""
    account, data = training_cost(row, scale), sketch(row, scale)
    checkpoint = checkpoint_bytes(row, scale)
    hours = "hours: unmeasured here; give --images-per-second as printed by such a run"
    if images_per_second is not None:
        slow, fast = account.hours(images_per_second)
        hours = (
            f"{slow:.1f} hours of training at {images_per_second:g} images per second, "
            f"or {fast:.1f} if the rate grows as the FLOPs fall"
        )
    return (
        f"# {whole(row, scale):.3g} FLOPs in all, {account.mean_ratio():.3f} of plain training per step"
        f"{', the teacher counted' if row.teacher else ''}; latents {data.bytes / 2**30:.1f} GiB on disk, "
        f"each checkpoint {checkpoint / 2**30:.1f} GiB\n# {hours}"
    )


def outstanding(chosen: Sequence[Row], scale: Scale) -> float:
    """FLOPs of one seed of `chosen` with their teachers. A run that rows share counts once, to its longest use."""
    runs: dict[Path, float] = {}
    for row in chosen:
        for training in (row, *([row.of_teacher()] if row.teacher is not None else [])):
            run, account = chain.build(training, scale, 0, Path("work")).run, training_cost(training, scale)
            # the steps before a branch belong to the run that it branches from
            shared = account.flops(scale.steps(training, training.trunk)) if training.trunk else 0.0
            runs[run] = max(runs.get(run, 0.0), account.flops(scale.steps(training, training.epochs)) - shared)
    return sum(runs.values())


def paper_hours() -> dict[str, float]:
    """Row -> hours of one GPU at `TERAFLOPS` at the paper's scale, its teacher's included, from the committed FLOPs."""
    return {row: flops / TERAFLOPS / 1e12 / 3600 for row, flops in files.read_json(COUNTED).items()}


if __name__ == "__main__":
    # counts every row at the paper's scale, which takes minutes
    files.write_json(
        COUNTED, {name: flops(row, find("paper")) for name, row in rows.rows().items() if row.table in rows.PAPER}
    )
