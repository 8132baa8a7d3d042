"""The training loop of both stages and of every baseline.

A run is a folder: `checkpoints/`, `samples/`, `log.jsonl`, `run.json`. The same command continues it from its latest
checkpoint. A segment of a run ends where an alignment ends. Each segment builds its learner as a resume at that step
would, so an alignment that has ended is gone: no teacher pass, no head, no optimiser state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from loss import Batch
from runtime import files, launch, signals
from runtime.errors import LostContact, contact_lost
from runtime.options import as_dict
from training import balance, introduction, preflight
from training.between import ENDED_EARLY, Between, Callback
from training.log import Meter, RunLog
from training.muon import Muon
from training.release import Residuals, decide
from training.run import Run


def update(
    learner: nn.Module,
    micros: list[Batch],
    weights: dict[str, float],
    optimizer: torch.optim.Optimizer | Muon,
    max_grad_norm: float,
    meter: Meter | None = None,
    residuals: Residuals | None = None,
) -> Tensor:
    """One optimiser step: L = L_diff + sum over alignments of weight x loss, averaged over the micro-batches.

    Returns the gradient norm before clipping. If it is not finite, no process takes the step: they share the gradient.
    Nothing here waits for the device.
    """
    for number, batch in enumerate(micros, start=1):
        last = number == len(micros)
        with nullcontext() if last or not hasattr(learner, "no_sync") else learner.no_sync():  # type: ignore[operator]
            losses = learner(batch)
            total = losses["diffusion"].mean() + sum(
                weights[name] * losses[name] for name in losses if name != "diffusion"
            )
            (total / len(micros)).backward()
        if meter is not None:
            meter.add(losses, batch.t, len(micros))
        if residuals is not None:
            residuals.add(batch)
    parameters = list(learner.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_grad_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    if norm.is_cuda:
        # the fused kernel reads it, so the host does not wait
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[union-attr]
    if norm.is_cuda or norm.isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if meter is not None:
        meter.step(norm)
    if residuals is not None:
        residuals.step(norm)
    return norm


def steps(run: Run, end: int, meter: Meter | None = None) -> Iterator[int]:
    """Optimiser steps up to `end` with the alignments that act now; yields the number of each when it is done."""
    config, stops = run.config, run.setup.stops
    learner = run.learner()
    residuals = Residuals(run.alignments, run.accelerator)
    for micros in run.batches(end):
        number = run.step + 1
        if config.skip_steps is None or not config.skips(number):
            _set_rate(run)
            weights = {
                name: alignment.options.weight_at(run.step, run.setup.stops[name], run.epoch_steps)
                for name, alignment in run.alignments.items()
            }
            if meter is not None and weights and config.compares_gradients_at(number):
                meter.ratios = balance.ratios(learner, micros, weights, run.accelerator)
                meter.restart_clock()
            update(learner, micros, weights, run.optimizer, config.max_grad_norm, meter, residuals)
            for average in run.averages.values():
                average.update(number)
        run.step = number
        yield number
        # what was measured between two steps may have brought the end nearer
        if run.setup.stops != stops and number == run.end():
            break
    run.accelerator.free_memory()  # lets go of the DDP wrapper and of its hooks


def _set_rate(run: Run) -> None:
    """Give the optimiser the learning rate of the current step, if it changes at all."""
    if run.config.lr_warmup_steps or run.config.lr_scheduler != "constant":
        for group in run.optimizer.param_groups:
            group["lr"] = run.config.learning_rate_at(run.step)


def train(run: Run, callbacks: Sequence[Callback] = ()) -> Path:
    """Train to the last step; returns the run's folder. `callbacks` act between steps (previews, scores)."""
    config = run.config
    if run.accelerator.is_main_process:
        (run.folder / ENDED_EARLY).unlink(missing_ok=True)
    _record(run)
    log = RunLog(
        run.folder,
        run.accelerator,
        run.step,
        config.max_train_steps,
        introduction.settings(run),
        config.report_to,
        introduction.introduction(run),
    )
    try:
        # what would fail at the first save or score fails here, before hours of training
        if run.step < config.max_train_steps:
            preflight.check(run, callbacks)
        with signals.noted() as asked:
            _segments(run, log, Between(run, log, callbacks, asked))
    except RuntimeError as error:
        if contact_lost(error):
            raise LostContact(
                f"lost contact with another process near step {run.step}; its own messages say why it ended, and "
                f"{run.folder / 'log.jsonl'} how far the run came; the same command continues from the last checkpoint"
            ) from error
        raise
    finally:
        log.close()
    return run.folder


def _record(run: Run) -> None:
    """Write the run's options and resolved choices to its folder, on the main process."""
    if run.accelerator.is_main_process:
        options = {name: as_dict(chosen) for name, chosen in run.setup.options.items()}
        record = {"train": as_dict(run.config), "align": options, "resolved": run.resolved, "machine": launch.machine()}
        files.write_json(run.folder / "run.json", record)


def _segments(run: Run, log: RunLog, between: Between) -> None:
    """Train to the last step, in segments that end where an alignment ends."""
    config = run.config
    while run.step < config.max_train_steps:
        meter = Meter(run.accelerator)
        for _ in steps(run, run.end(), meter):
            if lines := decide(run):
                log.say("\n".join(lines))
                _record(run)
            between(meter, run.end())
        for name in run.end_alignments():
            log.say(f"step {run.step}: alignment {name} has ended, plain training from here")
