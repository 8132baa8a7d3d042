"""Logs: losses summed on the device, a JSON-lines file, a progress bar, and an optional tracker (`tracker.py`)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from runtime import jsonlines, progress
from training.tracker import Tracker

QUARTERS = ("t 0-1/4", "t 1/4-1/2", "t 1/2-3/4", "t 3/4-1")


class Meter:
    """Sums losses over steps on the device, and reads them once per report.

    The flow-matching loss is also summed by quarter of t (t = 1 is noise). A step whose gradient is not finite is not
    taken: its losses are left out, and the step is counted.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._now: dict[str, Tensor] = {}
        self._quarters_now = torch.zeros(2, 4, device=accelerator.device)
        self._sums: dict[str, Tensor] = {}
        self._quarters = torch.zeros_like(self._quarters_now)
        # steps taken; steps skipped; skipped in a row until now; longest such row; steps since its end
        self._counts = torch.zeros(5, device=accelerator.device)
        # a report resets all of them but the current row
        self._carried = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], device=accelerator.device)
        # Gradient-norm ratio of each alignment, if it was measured in this step (`training.balance`).
        self.ratios: dict[str, Tensor] = {}
        self._steps = 0
        self._seconds = 0.0
        self._start = time.perf_counter()
        # At the last report: steps skipped in a row at its end; the longest such row, and the steps since it ended.
        self.streak = self.longest = self.ago = 0

    def add(self, losses: dict[str, Tensor], t: Tensor, parts: int) -> None:
        """One micro-batch out of `parts`: `diffusion` (N,) per sample, the others scalars; t (N,)."""
        diffusion = losses["diffusion"].detach()
        index = (t * 4).long().clamp_(max=3)
        self._quarters_now[0].index_add_(0, index, diffusion)
        self._quarters_now[1].index_add_(0, index, torch.ones_like(diffusion))
        for name, value in losses.items():
            value = value.detach().mean().float() / parts
            self._now[f"loss/{name}"] = self._now[f"loss/{name}"] + value if f"loss/{name}" in self._now else value

    def step(self, grad_norm: Tensor) -> None:
        """The end of an optimiser step."""
        self._steps += 1
        self._seconds += time.perf_counter() - self._start
        self._start = time.perf_counter()
        taken = grad_norm.detach().isfinite()
        for name, value in {**self._now, "grad_norm": grad_norm.detach().float()}.items():
            value = value.where(taken, 0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._quarters += self._quarters_now.where(taken, 0)
        self._now = {}
        self._quarters_now.zero_()
        # counted on the device, so that no step waits for the host
        good = taken.float()
        _, _, streak, longest, ago = self._counts
        streak = (streak + 1) * (1 - good)
        ago = (ago + 1).where(taken | (streak < longest), 0)
        self._counts = torch.stack(
            [self._counts[0] + good, self._counts[1] + 1 - good, streak, longest.maximum(streak), ago]
        )

    def take_ratios(self) -> dict[str, float]:
        """The gradient-norm ratios that this step measured, by alignment; if there are any, waits for the device."""
        measured = {name: ratio.item() for name, ratio in self.ratios.items()}
        self.ratios = {}
        # at initialisation it divides by 0
        return {name: ratio for name, ratio in measured.items() if math.isfinite(ratio)}

    def report(self, batch_size: int) -> dict[str, float]:
        """Means since the last report over all processes; waits for the device."""
        names = list(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])
        packed = self._accelerator.reduce(torch.cat([sums, self._counts, self._quarters.flatten()]), "sum")
        sums, quarters = packed[:-8] / self._accelerator.num_processes, packed[-8:].view(2, 4)
        *totals, taken, skipped, streak, longest, ago = sums.tolist()
        self.streak, self.longest, self.ago = round(streak), round(longest), round(ago)
        values = dict(zip(names, (total / taken for total in totals), strict=True)) if taken else {}
        for name, total, count in zip(QUARTERS, *quarters.tolist(), strict=True):
            if count:
                values[f"loss/{name}"] = total / count
        if skipped:
            values["skipped_steps"] = round(skipped)
        values["images_per_second"] = self._steps * batch_size / (self._seconds + time.perf_counter() - self._start)
        self._sums, self._steps, self._seconds = {}, 0, 0.0
        self._quarters.zero_()
        self._counts = self._counts * self._carried
        return values

    def restart_clock(self) -> None:
        """Leave out of the rate what has passed since the last step: reports, grids, checkpoints."""
        self._start = time.perf_counter()


class RunLog:
    """`log.jsonl` of a run, one line per report, and the progress bar; both on the main process alone.

    A resume drops the lines of steps that run again, so that every step has one line.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        start: int,
        total: int,
        settings: dict[str, Any],
        tracker: str,
        introduction: Sequence[str] = (),
    ) -> None:
        self.path = folder / "log.jsonl"
        self._accelerator = accelerator
        self._tracker = Tracker(accelerator, tracker, folder, start, settings)
        if accelerator.is_main_process:
            print(*introduction, sep="\n", flush=True)
        self._bar = progress.bar(
            total=total, initial=start, desc=folder.name, unit="step", main=accelerator.is_main_process
        )
        if accelerator.is_main_process:
            jsonlines.cut(self.path, start)

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line; also to the tracker and the bar."""
        self._tracker.log(step, values)
        if not self._accelerator.is_main_process:
            return
        jsonlines.append(self.path, step, values)
        self._bar.set_postfix(
            {
                name.removeprefix("loss/"): f"{value:.4g}"
                for name, value in values.items()
                if name.startswith("loss/") and " " not in name
            },
            refresh=False,
        )

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show the picture in the file `path` to the tracker."""
        self._tracker.picture(step, name, path)

    def say(self, text: str) -> None:
        """Print a line above the bar, on the main process."""
        if self._accelerator.is_main_process:
            self._bar.write(text)

    def close(self) -> None:
        """End the bar and the tracker."""
        self._bar.close()
        self._tracker.close()
