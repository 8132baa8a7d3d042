"""What a row costs before any of it exists: FLOPs, hours at a measured rate, disk; from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import models
from models.latents import LatentSpace
from recipes import chain, rows
from recipes.rows import Row
from recipes.scale import Scale
from runtime import files
from training import command, cost
from training.cost import Cost

TERAFLOPS = 396.0
"""What a GPU is taken to sustain where hours are computed: 40 % of an H100's dense bf16 peak."""
COUNTED = Path(__file__).with_name("costs.json")
"""FLOPs of every row at the paper's scale; made by `python -m recipes.costs`."""
IMAGENET = 1_281_167
DIGITS = 1_797
SCENES = 8_000


@dataclass(frozen=True)
class Sketch:
    """What a latent set says of itself, without the set."""

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
        """On disk, in float16 (float32 for pixels), without kept images."""
        return self.count * self.views * int(np.prod(self.shape)) * (4 if self.channels in (1, 3) else 2)


def sketch(row: Row, scale: Scale) -> Sketch:
    """The latent set of a row at a scale."""
    if scale.name == "tiny":
        return Sketch(1, 8, 10, DIGITS, 8, 1, 1)
    if scale.name == "study":
        return Sketch(3, 16, 10, SCENES, 16, 1, 1)
    if row.family == "lightningdit":
        return Sketch(32, 16, 1000, IMAGENET, 256, 2, 1)
    return Sketch(4, row.resolution // 8, 1000, IMAGENET, row.resolution, 2 if "flips" in scale.data(row) else 1, 2)


def _teacher(spec: models.ModelSpec, space: LatentSpace) -> Any:
    """A teacher's checkpoint as far as its shapes go."""
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


@functools.cache
def training_cost(row: Row, scale: Scale) -> Cost:
    """The account of the row's training command, without memory (not of its teacher's)."""
    plan = chain.build(row, scale, 0, Path("work"))
    link = next(link for link in reversed(plan.links) if link.name == "train")
    guided = link.words[0] == "train_guide.py"
    words = list(link.words[1:])
    if "--align-encoder" in words:  # the tiny encoder is made by the chain; its cost is that of a network of its shape
        place = words.index("--align-encoder")
        words[place + 1] = "test_vit"
    config, options = command.resolve(words, link.words[0], None, ("guided",) if guided else ())
    data = sketch(row, scale)
    spec = models.spec(
        config.model,
        in_channels=data.channels,
        input_size=data.latent_size,
        num_classes=data.num_classes,
        qk_norm=config.qk_norm,
    )
    return cost.estimate(config, options, data=data, load=lambda path: _teacher(spec, data.space))


def flops(row: Row, scale: Scale, epochs: float | None = None) -> float:
    """FLOPs of the row's training up to `epochs` (default: all), its teacher's counted."""
    total = training_cost(row, scale).flops(scale.steps(row, row.epochs if epochs is None else epochs))
    return total if row.teacher is None else total + flops(row.of_teacher(), scale)


def outstanding(chosen: Sequence[Row], scale: Scale) -> float:
    """FLOPs of one seed of `chosen`, their teachers' counted, where runs that rows share are counted once, to their longest use."""
    runs: dict[Path, float] = {}
    for row in chosen:
        for training in (row, *([row.of_teacher()] if row.teacher is not None else [])):
            run, account = chain.build(training, scale, 0, Path("work")).run, training_cost(training, scale)
            shared = (
                account.flops(scale.steps(training, training.trunk)) if training.trunk else 0.0
            )  # steps of the run it branches from
            runs[run] = max(runs.get(run, 0.0), account.flops(scale.steps(training, training.epochs)) - shared)
    return sum(runs.values())


def paper_hours() -> dict[str, float]:
    """Row -> hours of one GPU at `TERAFLOPS` at the paper's scale, its teacher's counted, as they were last counted."""
    return {row: flops / TERAFLOPS / 1e12 / 3600 for row, flops in files.read_json(COUNTED).items()}


def count_all() -> None:
    """Count every row at the paper's scale into the file beside this one: minutes."""
    from recipes.scale import find

    files.write_json(COUNTED, {name: flops(row, find("paper")) for name, row in rows.rows().items()})


if __name__ == "__main__":
    count_all()
