"""What happens between two steps: the report to the log, previews and scores, the checkpoint, and an end on request."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from models import Backbone
from runtime import files, launch
from runtime.errors import EndedEarly, UserError
from runtime.signals import Asked
from training import balance, health
from training.log import Meter, RunLog
from training.run import Run
from training.vote import Vote

ENDED_EARLY = "ended-early.json"
"""In the run's folder while the run waits to be continued: what a batch script may look at under `accelerate launch`, whose own
exit code is 1 whatever its processes say."""


class Callback(Protocol):
    """Something that is done every so many steps with the networks. Every process calls it at the same steps."""

    every: int

    def __call__(
        self, step: int, networks: Mapping[str, Backbone], dtype: torch.dtype | None
    ) -> dict[str, float | Path]:
        """Act; returns numbers for the log, on every process, and pictures by their path, on the main one.

        `networks` are "ema" (in eval mode) and "raw" (the trained one, in training mode: nothing in it depends on the mode).
        `dtype` is that of the run's autocast, None for float32.
        """
        ...

    def rehearse(self, network: Backbone, dtype: torch.dtype | None) -> None:
        """Act at tiny size and leave nothing: called by every process before the first step."""
        ...


class Between:
    """Called after each step of a run.

    Args:
        asked: whether this process was asked to end.
    """

    def __init__(self, run: Run, log: RunLog, callbacks: Sequence[Callback], asked: Asked) -> None:
        self.run, self.log, self.callbacks, self.asked = run, log, callbacks, asked
        self.vote = Vote(run.accelerator)
        self.ratio_monitor = balance.RatioMonitor()
        self.launcher = os.getppid()
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0  # of the longest save so far
        self.owed = False  # a checkpoint that was due while gradients were not finite

    def __call__(self, meter: Meter, end: int) -> None:
        """The end of a step; `end` is the last one of the segment, which is always reported."""
        run, config, step = self.run, self.run.config, self.run.step
        self.log.advance()
        run.seen(step)
        granted = self.vote(step, end=self.reason() is not None, save=self._overdue())
        last = step == config.max_train_steps
        ends = "end" in granted and not last
        saves = step % config.checkpointing_steps == 0 or last or ends or self.owed or "save" in granted
        values: dict[str, float] = {}
        if step % config.log_steps == 0 or step == end or saves:
            values = {**meter.report(config.batch_size), "learning_rate": run.optimizer.param_groups[0]["lr"]}
            health.require_healthy(run, meter, last)
            self._require_finite(name for name, value in values.items() if not math.isfinite(value))
        for warning in self.ratio_monitor(values):
            self.log.say(warning)
        due = [callback for callback in self.callbacks if step % callback.every == 0]
        pictures: dict[str, Path] = {}
        for callback in due:
            returned = callback(step, {"ema": run.ema.network, "raw": run.network}, run.dtype)
            pictures |= {name: value for name, value in returned.items() if isinstance(value, Path)}
            if measured := {name: value for name, value in returned.items() if name not in pictures}:
                self.log.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
            values |= measured
        if values:
            self.log.write(step, values)
        for name, path in pictures.items():
            self.log.picture(step, name, path)
        self.owed = saves and meter.streak > 0  # weights that led to no finite gradient are not kept
        if config.keeps_averages_at(step):
            run.keep_averages()
        if saves and not self.owed:
            self._save()
        if ends:
            self._end()
        if values or due or saves:
            meter.restart_clock()

    def reason(self) -> str | None:
        """Why this process should end early, in words; None where it should not."""
        if self.asked.by is not None:
            return f"asked to end by {self.asked.by}"
        if launch.orphaned(self.launcher):
            return "the launcher is gone"
        limit = self.run.config.max_hours
        if limit is not None and self.run.accelerator.is_main_process:
            reserve = (
                min(60.0, 360 * limit) + 2 * self.save_seconds
            )  # a tenth of the time at most, and twice the longest save
            if time.monotonic() - self.run.began > 3600 * limit - reserve:
                return f"--max-hours {limit:g} are nearly over"
        return None

    def _overdue(self) -> bool:
        minutes = self.run.config.checkpointing_minutes
        return (
            bool(minutes) and self.run.accelerator.is_main_process and time.monotonic() - self.saved_at > 60 * minutes
        )

    def _save(self) -> None:
        run, began = self.run, time.monotonic()
        run.data.require_intact(wait=10.0)
        weights = {
            "": run.network,
            **{f"the head of {name}: ": alignment for name, alignment in run.alignments.items()},
            **{
                "EMA of " if name == "ema" else f"{name} of ": average.network for name, average in run.averages.items()
            },
        }
        self._require_finite(
            prefix + name
            for prefix, module in weights.items()
            for name, value in module.named_parameters()
            if not torch.isfinite(value).all()
        )
        run.save()
        self.saved_at = time.monotonic()
        self.save_seconds = max(self.save_seconds, self.saved_at - began)

    def _end(self) -> None:
        """End the run early, in every process."""
        run, config = self.run, self.run.config
        why = self.reason() or "another process was asked to end"
        done = (
            f"step {run.step} of {config.max_train_steps} is saved"
            if not self.owed
            else f"step {run.step} was not saved, as its gradient is not finite; the last checkpoint is"
        )
        if run.accelerator.is_main_process:
            files.write_json(run.folder / ENDED_EARLY, {"step": run.step, "of": config.max_train_steps, "why": why})
        raise EndedEarly(f"{why}: {done} in {run.folder}; the same command continues it")

    def _require_finite(self, not_finite: Iterable[str]) -> None:
        """Stop the run if anything is not finite; names the first."""
        bad = next(iter(not_finite), None)
        if bad is not None:
            raise UserError(
                f"{bad} is not finite near step {self.run.step}: the run stops before saving it to a checkpoint; "
                f"{health.remedy(self.run, self.run.step, self.run.step)}"
            )
