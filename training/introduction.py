"""Lines that a run prints before its first step: the facts in which runs of one name could differ, then warnings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

import models
from alignment import Context
from alignment.interval import ALL
from alignment.release import rule
from models import published
from runtime import launch
from runtime.options import as_dict
from training.run import Run

# Batches whose targets are measured.
BATCHES = 4
# A run of more epochs gets a warning. The longest run on ImageNet has 1,400.
MANY_EPOCHS = 3000


def introduction(run: Run) -> list[str]:
    """Facts, then notes and warnings, one line each."""
    return [*facts(run), *warnings(run), *_progress(run)]


def facts(run: Run) -> Iterator[str]:
    """Network, data, batch, the checkpoint that the run starts from, and each alignment."""
    config, data = run.config, run.data
    world, accumulation = run.accelerator.num_processes, config.gradient_accumulation_steps
    yield (
        f"{config.model}: {models.parameter_count(run.network) / 1e6:.1f}M parameters, {run.spec.depth} blocks; "
        f"{launch.precision_name(run.dtype, run.tf32)} on {run.device.type}, compile {run.compile_note}, "
        f"attention {run.attention_note}"
    )
    yield (
        f"data: {len(data)} latents {data.channels}x{data.latent_size}x{data.latent_size} ({data.space.name}), "
        f"{data.num_classes} classes, {run.epoch_steps} steps per epoch"
    )
    yield (
        f"batch {config.batch_size} = {world} process(es) x {accumulation} micro-batch(es) x {run.micro_batch}; "
        f"{config.max_train_steps} steps = {config.max_train_steps / run.epoch_steps:.1f} epochs"
    )
    # where the weights come from: a checkpoint, and what changed on the way
    yield from run.origin
    for name, choices in run.resolved.items():
        # fields without metadata are internals that presets set
        internal = {field.name for field in dataclasses.fields(run.setup.options[name]) if not field.metadata}
        shown = {key: value for key, value in choices.items() if key not in internal | {"taps"}}
        yield f"alignment {name}: {', '.join(_choices(shown))}"
    for name, alignment in run.alignments.items():
        if alignment.release is not None:
            yield f"{name} {rule(alignment.options.ramp, run.setup.stops[name])}"
        yield from alignment.notes()
        if alignment.coupled and run.micro_batch == 1:
            yield (
                f"warning: {name} compares the samples that a process sees at once, here one: it does nothing; "
                "raise --batch-size"
            )
        # as in a step; the teacher's weights may be in bf16
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
            sizes = alignment.sizes(_contexts(run, name))
        yield from sizes


def _contexts(run: Run, name: str) -> Iterator[Context]:
    """What alignment `name` sees of the next few batches, without the student's features."""
    for batch, *_ in run.batches(min(run.step + BATCHES, run.config.max_train_steps)):
        yield batch.selections.get(name, ALL).take(batch.context(name, {}))


def _choices(choices: dict[str, Any]) -> Iterator[str]:
    """The options of an alignment as words; nested records have lines of their own (`Alignment.notes`)."""
    for key, value in choices.items():
        if value is None or value == [] or isinstance(value, dict):
            continue
        label = key.replace("_", " ")
        if isinstance(value, float):
            yield f"{label} {value:.4g}"
        elif isinstance(value, list):
            yield f"{label} {' '.join(map(str, value))}"
        else:
            yield f"{label} {value}"


def warnings(run: Run) -> Iterator[str]:
    """What may not be as the user expects."""
    config, data = run.config, run.data
    if run.device.type == "cpu" and run.dtype is None and launch.native_bf16(run.device):
        yield "note: this CPU multiplies bf16 natively: --mixed-precision bf16 is faster, but for tiny networks"
    if run.tf32_note:
        yield run.tf32_note
    # a published number holds for its authors' data: flips double the images
    for name in run.resolved:
        authors = published.first(method=name, variant="", model=config.model, guidance="none", samples=50_000)
        if authors and authors.flips not in (None, data.views == 2):
            yield (
                f"note: the published {name} of {config.model} trained with{'' if authors.flips else 'out'} flips; "
                f"this latent set has {'no flips' if authors.flips else 'flips'}"
            )
    # an average of decay d spans about 1 / (1 - d) steps
    if not config.ema_warmup and config.max_train_steps < 5 / (1 - config.ema_decay):
        yield (
            f"warning: {config.max_train_steps} steps are few for EMA decay {config.ema_decay}; EMA weights stay near "
            f"initialisation: add --ema-warmup"
        )
    if (epochs := config.max_train_steps / run.epoch_steps) > MANY_EPOCHS:
        yield (
            f"warning: {epochs:,.0f} epochs of {len(data):,} items: the network will memorise a set this small; give "
            f"--batch-size 32 --max-train-steps {1000 * max(1, len(data) // 32)} or fewer (docs/data.md)"
        )


def _progress(run: Run) -> Iterator[str]:
    if run.step >= run.config.max_train_steps:
        yield f"finished: step {run.step} is done; to go on, give a larger --max-train-steps"
    elif run.step:
        yield f"continuing from step {run.step}"


def settings(run: Run) -> dict[str, Any]:
    """All options of the run and what they resolved to, laid flat for a tracker."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    return {
        **as_dict(run.config),
        "device": device,
        "processes": run.accelerator.num_processes,
        "precision": launch.precision_name(run.dtype, run.tf32),
        "commit": launch.commit(),
        **{f"{name}/{key}": value for name, choices in run.resolved.items() for key, value in choices.items()},
    }
