"""The training loop of both stages and of every baseline.

A run is a folder: `checkpoints/`, `samples/`, `log.jsonl`, `run.json`. The same command continues it from its latest
checkpoint. A run is cut into segments at the steps where an alignment ends; each segment builds its learner as a resume
at that step would, so an alignment that has ended is gone: no teacher pass, no head, no optimiser state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from loss import Batch
from runtime import files, signals
from runtime.errors import LostContact, contact_lost
from runtime.options import as_dict
from training import balance, preflight
from training.between import ENDED_EARLY, Between, Callback
from training.log import Meter, RunLog
from training.muon import Muon
from training.run import Run


def update(
    learner: nn.Module,
    micros: list[Batch],
    weights: dict[str, float],
    optimizer: torch.optim.Optimizer | Muon,
    max_grad_norm: float,
    meter: Meter | None = None,
) -> Tensor:
    """One optimiser step: L = L_diff + sum over alignments of weight x loss, averaged over the micro-batches.

    Returns the gradient norm before clipping. Where it is not finite, the step is not taken, by any process: they share the
    gradient. Nothing here waits for the device.
    """
    for number, batch in enumerate(micros, start=1):
        last = number == len(micros)
        with nullcontext() if last or not hasattr(learner, "no_sync") else learner.no_sync():
            losses = learner(batch)
            total = losses["diffusion"].mean() + sum(
                weights[name] * losses[name] for name in losses if name != "diffusion"
            )
            (total / len(micros)).backward()
        if meter is not None:
            meter.add(losses, batch.t, len(micros))
    parameters = list(learner.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_grad_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    if norm.is_cuda:
        optimizer.found_inf = (~norm.isfinite()).float()  # the fused kernel looks at it, so that the host need not
    if norm.is_cuda or norm.isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if meter is not None:
        meter.step(norm)
    return norm


def steps(run: Run, end: int, meter: Meter | None = None) -> Iterator[int]:
    """Optimiser steps up to `end` with the alignments that live now; yields the number of each when it is done."""
    learner = run.learner()
    for micros in run.batches(end):
        if not run.skips_step(run.step + 1):
            run.set_rate()
            if meter is not None and run.alignments and run.logs_grad_ratio_at(run.step + 1):
                meter.ratios = balance.ratios(learner, micros, run.weights(), run.accelerator)
            update(learner, micros, run.weights(), run.optimizer, run.config.max_grad_norm, meter)
            for average in run.averages.values():
                average.update(run.step + 1)
        run.step += 1
        yield run.step
    run.accelerator.free_memory()  # lets go of the DDP wrapper and of its hooks


def train(run: Run, callbacks: Sequence[Callback] = ()) -> Path:
    """Train to the last step; returns the run's folder. `callbacks` act between steps (previews, scores)."""
    config = run.config
    if run.accelerator.is_main_process:
        (run.folder / ENDED_EARLY).unlink(missing_ok=True)
        files.write_json(run.folder / "run.json", {"train": as_dict(config), "align": run.resolved})
    log = RunLog(
        run.folder,
        run.accelerator,
        run.step,
        config.max_train_steps,
        run.settings(),
        config.report_to,
        run.introduction(),
    )
    try:
        if run.step < config.max_train_steps:
            preflight.check(run, callbacks)
        with signals.noted() as asked:
            _segments(run, log, Between(run, log, callbacks, asked))
    except RuntimeError as error:
        if contact_lost(error):
            raise LostContact(run.lost_contact()) from error
        raise
    finally:
        log.close()
    return run.folder


def _segments(run: Run, log: RunLog, between: Between) -> None:
    """Train to the last step, cut where alignments end."""
    config = run.config
    while run.step < config.max_train_steps:
        stops = [run.setup.stops[name] for name in run.alignments if run.setup.stops[name] is not None]
        end = min([config.max_train_steps, *stops])
        meter = Meter(run.accelerator)
        for _ in steps(run, end, meter):
            between(meter, end)
        for name in run.end_alignments():
            log.say(f"step {run.step}: alignment {name} has ended, plain training from here")
