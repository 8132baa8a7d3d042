"""Between two steps: the report to the log, previews and scores, the checkpoint, stopping on request."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from models import Backbone
from runtime import files, launch
from runtime.errors import EndedEarly, UserError
from runtime.signals import Asked
from training import balance, health, saving
from training.log import Meter, RunLog
from training.run import Run
from training.vote import Vote

# File in the run's folder while the run waits to be continued. A batch script can look for it under `accelerate
# launch`, which exits with 1 whatever its processes exit with.
ENDED_EARLY = "ended-early.json"


class Callback(Protocol):
    """Acts on the networks every `every` steps. Every process calls it at the same steps."""

    every: int

    def __call__(
        self, step: int, networks: Mapping[str, Backbone], dtype: torch.dtype | None
    ) -> Mapping[str, float | Path]:
        """Returns numbers for the log, on every process, and paths of pictures, on the main process.

        Args:
            networks: "ema" (in eval mode) and "raw" (the trained one, in training mode, which changes nothing).
            dtype: of the run's autocast, None for float32.
        """
        ...

    def rehearse(self, network: Backbone, dtype: torch.dtype | None) -> None:
        """Act at tiny size without a trace. Every process calls it before the first step."""
        ...


class Between:
    """Called after each step of a run.

    Args:
        asked: whether this process was asked to end.
    """

    def __init__(self, run: Run, log: RunLog, callbacks: Sequence[Callback], asked: Asked) -> None:
        self.run, self.log, self.callbacks, self.asked = run, log, callbacks, asked
        self.vote = Vote(run.accelerator)
        self.ratio_monitor = balance.RatioMonitor({name: options.weight for name, options in run.setup.options.items()})
        self.launcher = os.getppid()
        self.saved_at = time.monotonic()
        # Of the longest save so far.
        self.save_seconds = 0.0
        # A checkpoint was due while gradients were not finite.
        self.postponed = False

    def __call__(self, meter: Meter, end: int) -> None:
        """Report, measure, save and end, in this order, as due. `end` is the last step of the segment."""
        config, step = self.run.config, self.run.step
        self.log.advance()
        last = step == config.max_train_steps
        granted = self.vote(step, end=self.reason() is not None, save=self._overdue())
        ending = "end" in granted and not last
        scheduled = last or step % config.checkpointing_steps == 0
        saves = scheduled or self.postponed or bool(granted)
        reports = saves or step == end or step % config.log_steps == 0

        losses = self._report(meter, last) if reports else {}
        # a line of their own between reports, so that means are over the same steps with and without them
        ratios = self._ratios(meter)
        scores, pictures = self._measure()
        self._write(losses | ratios, scores, pictures)
        if config.keeps_averages_at(step):
            saving.save_averages(self.run)
        if saves:
            # weights whose last gradient was not finite are not saved
            self.postponed = meter.streak > 0
            if not self.postponed:
                self._save()
        if ending:
            self._end()
        if reports or ratios or scores or pictures:
            meter.restart_clock()  # the rate leaves out what happened here

    def _write(self, losses: dict[str, float], scores: dict[str, float], pictures: dict[str, Path]) -> None:
        """Log what a step brought."""
        if losses or scores:
            self.log.write(self.run.step, losses | scores)
        for name, path in pictures.items():
            self.log.picture(self.run.step, name, path)

    def _report(self, meter: Meter, last: bool) -> dict[str, float]:
        """Losses since the last report. Stops the run if they, or too many gradients in a row, are not finite."""
        rate = self.run.optimizer.param_groups[0]["lr"]
        values = {**meter.report(self.run.config.batch_size), "learning_rate": rate}
        health.require_healthy(self.run, meter, last)
        self._require_finite(name for name, value in values.items() if not math.isfinite(value))
        return values

    def _ratios(self, meter: Meter) -> dict[str, float]:
        """The gradient-norm ratios that the step measured; warns of those outside the band."""
        ratios = meter.take_ratios()
        for warning in self.ratio_monitor(self.run.step, ratios):
            self.log.say(warning)
        return {f"{balance.PREFIX}{name}": ratio for name, ratio in ratios.items()}

    def _measure(self) -> tuple[dict[str, float], dict[str, Path]]:
        """Numbers of the callbacks that are due, printed too, and the paths of their pictures."""
        networks = {"ema": self.run.ema.network, "raw": self.run.network}
        due = [callback for callback in self.callbacks if self.run.step % callback.every == 0]
        numbers: dict[str, float] = {}
        pictures: dict[str, Path] = {}
        for callback in due:
            results = callback(self.run.step, networks, self.run.dtype)
            pictures |= {name: value for name, value in results.items() if isinstance(value, Path)}
            scores = {name: value for name, value in results.items() if not isinstance(value, Path)}
            if scores:
                shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                self.log.say(f"step {self.run.step}: {shown}")
            numbers |= scores
        return numbers, pictures

    def reason(self) -> str | None:
        """Why this process should end early, None if it should not."""
        if self.asked.by is not None:
            return f"asked to end by {self.asked.by}"
        if launch.orphaned(self.launcher):
            return "the launcher is gone"
        limit = self.run.config.max_hours
        if limit is not None and self.run.accelerator.is_main_process:
            # time for a last save: at most a tenth of the limit and a minute, and twice the longest save
            reserve = min(60.0, 360 * limit) + 2 * self.save_seconds
            if time.monotonic() - self.run.began > 3600 * limit - reserve:
                return f"--max-hours {limit:g} are nearly over"
        return None

    def _overdue(self) -> bool:
        minutes = self.run.config.checkpointing_minutes
        return (
            bool(minutes) and self.run.accelerator.is_main_process and time.monotonic() - self.saved_at > 60 * minutes
        )

    def _save(self) -> None:
        """Write a checkpoint, after a check that all weights are finite."""
        run, began = self.run, time.monotonic()
        run.data.require_intact(wait=10.0)
        weights: dict[str, nn.Module] = {"": run.network}
        weights |= {f"the head of {name}: ": alignment for name, alignment in run.alignments.items()}
        for name, average in run.averages.items():
            weights["EMA of " if name == "ema" else f"{name} of "] = average.network
        self._require_finite(
            prefix + name
            for prefix, module in weights.items()
            for name, value in module.named_parameters()
            if not torch.isfinite(value).all()
        )
        saving.save(run)
        self.saved_at = time.monotonic()
        self.save_seconds = max(self.save_seconds, self.saved_at - began)

    def _end(self) -> None:
        """End the run early, in every process."""
        self.asked.answered = True
        run, config = self.run, self.run.config
        reason = self.reason() or "another process was asked to end"
        state = (
            f"step {run.step} was not saved, as its gradient is not finite; the last checkpoint is"
            if self.postponed
            else f"step {run.step} of {config.max_train_steps} is saved"
        )
        if run.accelerator.is_main_process:
            record = {"step": run.step, "of": config.max_train_steps, "why": reason}
            files.write_json(run.folder / ENDED_EARLY, record)
        raise EndedEarly(f"{reason}: {state} in {run.folder}; the same command continues it")

    def _require_finite(self, not_finite: Iterable[str]) -> None:
        """Stop the run if `not_finite` has any name; the message gives the first."""
        name = next(iter(not_finite), None)
        if name is not None:
            raise UserError(
                f"{name} is not finite near step {self.run.step}: the run stops before saving it to a checkpoint; "
                f"{health.remedy(self.run, self.run.step, self.run.step)}"
            )
