"""Alignments that end by measurement (`alignment.release`): their residuals over all processes, and the decision."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from alignment import Alignment
from alignment.base import not_none
from alignment.interval import ALL
from alignment.release import EVERY, flat
from loss import Batch
from training.run import Run


class Residuals:
    """Gives each measured alignment the mean residual of every step; every process computes the same averages."""

    def __init__(self, alignments: Mapping[str, Alignment], accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._measured = {name: alignment for name, alignment in alignments.items() if alignment.release is not None}
        self._sums: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        """The residuals of the forward pass that has just been made, of one micro-batch."""
        if self._measured:
            sums = [
                batch.selections.get(name, ALL).sums(not_none(alignment.residual))
                for name, alignment in self._measured.items()
            ]
            self._sums.append(torch.stack(sums))

    def step(self, grad_norm: Tensor) -> None:
        """The end of an optimiser step. If its gradient is not finite, or no sample was chosen, it does not count."""
        if not self._measured:
            return
        sums, counts = self._accelerator.reduce(torch.stack(self._sums).sum(0), "sum").unbind(1)
        self._sums = []
        taken = grad_norm.isfinite() & (counts > 0)
        for alignment, residual, counted in zip(self._measured.values(), sums / counts, taken, strict=True):
            not_none(alignment.release).update(residual, counted)


def decide(run: Run) -> list[str]:
    """Read the averages if it is time, and set the end of each alignment that has reached its plateau.

    Called after every step, before its checkpoint. Returns lines for the log.
    """
    lines = []
    for name, alignment in run.alignments.items():
        if alignment.release is None:
            continue
        ramp, stop, step = alignment.options.ramp, run.setup.stops[name], run.step
        if step % EVERY == 0 and step >= ramp and (stop is None or step < stop - ramp):
            fast, slow = alignment.release.read()
            if flat(fast, slow):
                run.end_at(name, step + ramp)
                lines.append(
                    f"step {step}: the residual of {name} has stopped falling ({fast:.4g}, over a longer time "
                    f"{slow:.4g}): its weight falls to 0 at step {step + ramp}"
                )
        elif stop is not None and step == stop - ramp:
            lines.append(
                f"step {step}: the residual of {name} still falls, but its latest end is near: its weight falls"
            )
    return lines
