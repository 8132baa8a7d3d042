"""Logs: losses summed on the device, a JSON-lines file always, a progress bar, and an optional tracker (`tracker.py`)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from runtime import files, progress
from training.tracker import Tracker

QUARTERS = ("t 0-1/4", "t 1/4-1/2", "t 1/2-3/4", "t 3/4-1")


class Meter:
    """Sums losses over steps on the device, and reads them once per report.

    The flow-matching loss is kept by quarter of t as well (t = 1 is noise).
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        self._quarters = torch.zeros(2, 4, device=accelerator.device)
        self._steps = 0
        self._seconds = 0.0
        self._start = time.perf_counter()

    def add(self, losses: dict[str, Tensor], t: Tensor, parts: int) -> None:
        """One micro-batch out of `parts`: `diffusion` (N,) per sample, the others scalars; t (N,)."""
        diffusion = losses["diffusion"].detach()
        index = (t * 4).long().clamp_(max=3)
        self._quarters[0].index_add_(0, index, diffusion)
        self._quarters[1].index_add_(0, index, torch.ones_like(diffusion))
        for name, value in losses.items():
            self._add(f"loss/{name}", value.detach().mean() / parts)

    def step(self, grad_norm: Tensor | None) -> None:
        """The end of an optimiser step."""
        self._steps += 1
        self._seconds += time.perf_counter() - self._start
        self._start = time.perf_counter()
        if grad_norm is not None:
            self._add("grad_norm", grad_norm.detach())

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value.float()

    def report(self, batch_size: int) -> dict[str, float]:
        """Means since the last report over all processes; the only place where the host waits for the device."""
        names = list(self._sums)
        packed = torch.cat([torch.stack([self._sums[name] for name in names]) / self._steps, self._quarters.flatten()])
        packed = self._accelerator.reduce(packed, "sum")
        means, quarters = packed[: len(names)] / self._accelerator.num_processes, packed[len(names):].view(2, 4)
        values = dict(zip(names, means.tolist(), strict=True))
        for name, total, count in zip(QUARTERS, *quarters.tolist(), strict=True):
            if count:
                values[f"loss/{name}"] = total / count
        values["images_per_second"] = self._steps * batch_size / (self._seconds + time.perf_counter() - self._start)
        self._sums, self._quarters, self._steps, self._seconds = {}, torch.zeros_like(self._quarters), 0, 0.0
        return values

    def restart_clock(self) -> None:
        """Leave out of the rate what has passed since the last step: reports, grids, checkpoints."""
        self._start = time.perf_counter()


class RunLog:
    """`log.jsonl` of a run, one line per report, and the progress bar; both on the main process alone.

    On resume the lines of steps that are run again are dropped, so that every step has one line.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, start: int, total: int, settings: dict[str, Any],
                 tracker: str, introduction: Sequence[str] = ()) -> None:
        self.path = folder / "log.jsonl"
        self._accelerator = accelerator
        self._tracker = Tracker(accelerator, tracker, folder, start, settings)
        if accelerator.is_main_process:
            print(*introduction, sep="\n", flush=True)
        self._bar = progress.bar(total=total, initial=start, desc=folder.name, unit="step", main=accelerator.is_main_process)
        if accelerator.is_main_process:
            kept = [line for line in read(self.path) if line["step"] <= start]
            with files.replacing(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def advance(self) -> None:
        """One step done."""
        self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line; also to the tracker and the bar."""
        self._tracker.log(step, values)
        if not self._accelerator.is_main_process:
            return
        line = {"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}}
        with files.writing(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        self._bar.set_postfix({name.removeprefix("loss/"): f"{value:.4g}" for name, value in values.items()
                               if name.startswith("loss/") and " " not in name}, refresh=False)

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


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a log, [] where there is none; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
