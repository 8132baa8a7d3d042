"""Milliseconds of one optimiser step: AdamW fused and by loop, Muon by stacks of one shape and matrix by matrix.

    python -m benchmarks.optimizer --model SiT-S/2 --out benchmarks/results/optimizer.json

Gradients are random and stay the same; the ways take turns. The stacks of `training.muon` are those that runs use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import models
from benchmarks import measure
from config import TrainConfig
from runtime import errors
from runtime.options import build, option
from training import optimizers
from training.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    model: str = option("SiT-S/2", help="network")
    steps: int = option(3, within="[1, inf)", help="timed steps per repetition")
    repetitions: int = option(5, within="[1, inf)", help="repetitions")
    out: str | None = option(None, help="result file")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    return measure.run("optimizer", OptimizerConfig, argv, __doc__, rows, report)


class Single(Muon):
    """Muon that orthogonalises one matrix at a time."""

    def _step(self, matrices: list[torch.Tensor]) -> None:
        for matrix in matrices:
            super()._step([matrix])


def rows(config: OptimizerConfig, folder: Path, known: Mapping[str, Any]) -> measure.Rows:
    """The rows that are not known yet."""
    if known:
        return
    network = models.build(models.spec(config.model, in_channels=4, input_size=32, num_classes=1000))
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) for p in network.parameters()]

    def adamw(fused: bool) -> torch.optim.AdamW:
        return torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=fused, foreach=False)

    muon = build(TrainConfig, {"data_dir": ".", "exp_name": "run", "optimizer": "muon"})
    stacked, single = (optimizers.build(muon, network, {}) for _ in range(2))
    single.__class__ = Single
    ways: dict[str, Callable[[], Any]] = {
        "AdamW, fused": adamw(True).step,
        "AdamW, loop": adamw(False).step,
        "Muon, stacked": stacked.step,
        "Muon, by matrix": single.step,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(config.repetitions + 1):
        for name, step in ways.items():
            started = time.perf_counter()
            for _ in range(config.steps):
                # Muon's own parts lose their gradients after each step
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                step()
            if repetition:  # the first makes the state
                times[name].append((time.perf_counter() - started) / config.steps * 1e3)
    for name, values in times.items():
        yield name, {"milliseconds": measure.spread(values)}


def report(rows: Mapping[str, Any]) -> str:
    """The table of a result."""
    return measure.table(
        rows, {"milliseconds": lambda row: "{median:.1f} ({low:.1f} to {high:.1f})".format(**row["milliseconds"])}
    )


if __name__ == "__main__":
    errors.run(main)
