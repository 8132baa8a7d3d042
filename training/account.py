"""The account of a configuration's cost (`training/cost.py` counts it): what follows from the count, and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from runtime import launch
from runtime.text import aligned


@dataclass(frozen=True)
class Part:
    """One line of the account. FLOPs are of one training step, per image of the batch (a multiply-add is two)."""

    name: str
    parameters: int
    trained: bool
    flops: float
    stop: int | None = None
    """The step after which it is gone, None for never."""


@dataclass(frozen=True)
class Cost:
    """The account of one configuration; memory in bytes on each process."""

    parts: list[Part]
    steps: int
    epoch_steps: int
    batch_size: int
    micro_batch: int
    accumulation: int
    kept: float
    """Activations kept for the backward pass, per image, and those of the one block that is being computed again."""
    casts: float
    """Copies of weights in lower precision, kept for the backward pass."""
    recomputed: float
    """FLOPs per image that activation checkpointing adds."""
    dtype: torch.dtype | None
    held: Mapping[str, int]
    """Bytes of what is held from step to step, but for frozen networks, by what it is."""

    @property
    def plain(self) -> float:
        """FLOPs per image of plain training."""
        return self.parts[0].flops

    def ratio(self, step: int = 0) -> float:
        """FLOPs of step `step` (from 0) in units of a plain step."""
        return sum(part.flops for part in self.parts if part.stop is None or step < part.stop) / self.plain

    def mean_ratio(self) -> float:
        """FLOPs of the whole run in units of a plain run of as many steps."""
        return (
            sum(
                part.flops * min(1.0, (self.steps if part.stop is None else part.stop) / self.steps)
                for part in self.parts
            )
            / self.plain
        )

    def flops(self, step: int) -> float:
        """FLOPs of the run up to `step`."""
        return self.batch_size * sum(
            part.flops * (step if part.stop is None else min(step, part.stop)) for part in self.parts
        )

    def memory(self) -> dict[str, float]:
        """Bytes at the peak of a step: what is held, frozen networks, and the activations. The allocator's slack, workspaces and
        frozen networks' passing activations are left out; compilation keeps less."""
        frozen = sum(part.parameters for part in self.parts if not part.trained)
        return {
            **self.held,
            "frozen networks": (2.0 if self.dtype else 4.0) * frozen,
            "activations": self.kept * self.micro_batch + self.casts,
        }

    def largest(self, gigabytes: float) -> int | None:
        """The largest micro-batch that divides a process's share of the batch and leaves a tenth of the memory free, None if none."""
        share = self.micro_batch * self.accumulation
        fixed = sum(self.memory().values()) - self.kept * self.micro_batch
        fitting = [
            size
            for size in range(1, share + 1)
            if share % size == 0 and fixed + self.kept * size <= 0.9 * gigabytes * 1e9
        ]
        return max(fitting, default=None)

    def hours(self, rate: float) -> tuple[float, float]:
        """Hours at `rate` images per second: throughout, and if the rate grows as the FLOPs fall after a stop."""
        slow = self.steps * self.batch_size / rate / 3600
        return slow, slow * self.mean_ratio() / self.ratio()


def report(cost: Cost, rate: float | None = None) -> str:
    """The account as aligned text; with `rate`, images per second measured at the start of such a run, the hours too."""
    lines = [["", "parameters", "GFLOP per image", "of a plain step"]]
    lines += [
        [part.name, f"{part.parameters / 1e6:.2f}M", f"{part.flops / 1e9:.2f}", f"{part.flops / cost.plain:.4f}"]
        for part in cost.parts
    ]
    lines.append(
        [
            "total",
            f"{sum(part.parameters for part in cost.parts) / 1e6:.2f}M",
            f"{cost.ratio() * cost.plain / 1e9:.2f}",
            f"{cost.ratio():.4f}",
        ]
    )
    for stop in sorted({part.stop for part in cost.parts if part.stop is not None and part.stop < cost.steps}):
        lines.append(
            [f"from step {stop} on", "", f"{cost.ratio(stop) * cost.plain / 1e9:.2f}", f"{cost.ratio(stop):.4f}"]
        )
    lines.append(["mean over the run", "", f"{cost.mean_ratio() * cost.plain / 1e9:.2f}", f"{cost.mean_ratio():.4f}"])
    text = [aligned(lines, rule=False)]
    memory = cost.memory()
    text += [
        f"steps: {cost.epoch_steps} per epoch, {cost.steps} in all = {cost.steps / cost.epoch_steps:.1f} epochs",
        f"memory per process, {launch.precision_name(cost.dtype)}, {cost.micro_batch} images at once: "
        f"{sum(memory.values()) / 2**30:.2f} GiB = "
        + " + ".join(f"{value / 2**30:.2f} {name}" for name, value in memory.items() if value)
        + " (eager; counted from tensor shapes, without the allocator's slack and workspaces)",
    ]
    if cost.recomputed:
        text.append(
            f"computed twice in the backward pass: {cost.recomputed / 1e9:.2f} GFLOP per image, "
            f"{cost.recomputed / cost.plain:.4f} of a plain step"
        )
    text.append(
        "largest micro-batch that fits, a tenth of the memory left free: "
        + ", ".join(_fits(cost, size) for size in memories())
    )
    if rate is not None:
        slow, fast = cost.hours(rate)
        text.append(
            f"time at {rate:g} images per second: {slow:.2f} hours"
            + (f", or {fast:.2f} if the rate grows as the FLOPs fall" if fast < slow else "")
        )
    return "\n".join(text)


CARDS = (24, 40, 80, 141)
"""Gigabytes of memory of common GPUs."""


def memories() -> tuple[float, ...]:
    """Gigabytes of this machine's GPU, of common ones where there is none."""
    return (torch.cuda.get_device_properties(0).total_memory / 1e9,) if torch.cuda.is_available() else CARDS


def _fits(cost: Cost, gigabytes: float) -> str:
    size = cost.largest(gigabytes)
    if size is None:
        return f"{gigabytes:.0f} GB none"
    return f"{gigabytes:.0f} GB {size} (--gradient-accumulation-steps {cost.micro_batch * cost.accumulation // size})"
