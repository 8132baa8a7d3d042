"""What happens between two steps: the report to the log, previews and scores, and the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from models import Backbone
from runtime.errors import require
from training.log import Meter, RunLog
from training.run import Run


class Callback(Protocol):
    """Something that is done every so many steps with the networks. Every process calls it at the same steps."""

    every: int

    def __call__(self, step: int, networks: Mapping[str, Backbone], dtype: torch.dtype | None) -> dict[str, float | Path]:
        """Act; returns numbers for the log, on every process, and pictures by their path, on the main one.

        `networks` are "ema" (in eval mode) and "raw" (the trained one, in training mode: nothing in it depends on the mode).
        `dtype` is that of the run's autocast, None for float32.
        """
        ...


class Between:
    """Called after each step of a run."""

    def __init__(self, run: Run, log: RunLog, callbacks: Sequence[Callback]) -> None:
        self.run, self.log, self.callbacks = run, log, callbacks

    def __call__(self, meter: Meter, end: int) -> None:
        """The end of a step; `end` is the last one of the segment, which is always reported."""
        run, config, step = self.run, self.run.config, self.run.step
        self.log.advance()
        values: dict[str, float] = {}
        saves = step % config.checkpointing_steps == 0 or step == config.max_train_steps
        if step % config.log_steps == 0 or step == end or saves:
            values = {**meter.report(config.batch_size), "learning_rate": run.optimizer.param_groups[0]["lr"]}
            self._require_finite(name for name, value in values.items() if not math.isfinite(value))
        due = [callback for callback in self.callbacks if step % callback.every == 0]
        pictures: dict[str, Path] = {}
        for callback in due:
            found = callback(step, {"ema": run.ema.network, "raw": run.network}, run.dtype)
            pictures |= {name: value for name, value in found.items() if isinstance(value, Path)}
            if measured := {name: value for name, value in found.items() if name not in pictures}:
                self.log.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
            values |= measured
        if values:
            self.log.write(step, values)
        for name, path in pictures.items():
            self.log.picture(step, name, path)
        if saves:
            self._require_finite(name for name, value in run.network.named_parameters() if not torch.isfinite(value).all())
            run.save()
        if values or due or saves:
            meter.restart_clock()

    def _require_finite(self, not_finite: Iterable[str]) -> None:
        """Stop the run if anything is not finite; names the first."""
        bad = next(iter(not_finite), None)
        require(bad is None, f"{bad} is not finite near step {self.run.step}: the run stops before a checkpoint takes it in; continue "
                             f"from the last one with --mixed-precision no, or train with --qk-norm")
