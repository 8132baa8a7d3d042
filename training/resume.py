"""Continue a run: find its checkpoint, refuse one that does not fit, and restore it.

A run continues under the same options, data and precision; `config.FREE_ON_RESUME` lists the options that may change. A
branch (`--branch-from RUN@STEP`) is a new run that continues another one under other options of its alignments.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import models
from alignment import AlignOptions
from alignment.release import AVERAGES
from config import FREE_ON_RESUME
from models import checkpoint
from models.checkpoint import Checkpoint
from runtime import files, launch
from runtime.errors import UserError, note, require
from runtime.options import as_dict, build
from training import optimizers
from training.muon import Muon
from training.setup import Setup


def find(folder: Path, setup: Setup, precision: str, accelerator: Accelerator, tidy: bool) -> Checkpoint | None:
    """The newest intact checkpoint of the run in `folder`, else the one from which it branches, else None.

    It is the same in every process.

    Args:
        tidy: rename newer, damaged checkpoints and remove what killed saves left; only for the holder of the lock.

    Raises:
        UserError: all checkpoints are damaged, or the newest has another network, data set, precision or options.
    """
    newest = launch.on_main(accelerator, lambda: _newest(folder, tidy))
    if newest is None:
        trunk = setup.config.branch_from
        return None if trunk is None else branch(trunk, setup, precision)
    earlier = Checkpoint.open(newest)
    _require_same(folder, earlier, setup, precision)
    return earlier


def _newest(folder: Path, tidy: bool) -> Path | None:
    newest, faults = checkpoint.newest_whole(folder)
    for damaged, fault in faults.items():
        if newest is None:
            raise UserError(f"no checkpoint of {folder} is intact; the newest: {fault}; use another --exp-name")
        # set aside, not removed: it may hold what the user needs
        aside = damaged.with_name(f"{damaged.name}.damaged")
        renamed = f"; {damaged.name} is now {aside.name}" if tidy else ""
        note(f"{fault}: continuing from {newest.name}, the newest intact one{renamed}")
        if tidy:
            with files.writing(aside):
                damaged.rename(aside if not aside.exists() else damaged.with_name(f"{aside.name}-{time.time_ns()}"))
    if tidy:
        for part in (folder / "checkpoints", folder / "averages"):
            if left := files.remove_leftovers(part, alone=True):
                note(f"removed what a killed save left in {part}: {', '.join(left)}")
    return newest


def prune(folder: Path, limit: int | None = None, every: int | None = None) -> None:
    """Remove checkpoints that need not stay.

    Of those that the clock or a signal asked for, the last two stay. With `limit`, only so many of the latest
    checkpoints stay, and those whose step is a multiple of `every`.
    """
    saved = [path for path in checkpoint.saved(folder) if checkpoint.is_checkpoint(path)]  # the latest first
    passing = [path for path in saved if files.read_json(path / "config.json").get("kept") is False]
    surplus = [] if limit is None else [path for path in saved[limit:] if every is None or int(path.name) % every]
    for path in dict.fromkeys([*passing[2:], *surplus]):
        files.remove(path)


def _require_same(folder: Path, earlier: Checkpoint, setup: Setup, precision: str) -> None:
    """Refuse to continue a run under other options, data or architecture."""
    where, config = f"{folder} cannot be continued", setup.config
    _require_same_base(where, earlier, setup, precision, changeable=config.mixed_precision is not None)
    for key, then, now in changes(config, earlier.config["train"]):
        raise UserError(
            f"{where}: its {key.replace('_', '-')} is {then}, not {now}; use the same options, or another --exp-name"
        )
    saved = earlier.config["align"]
    require(
        saved.keys() == setup.options.keys(),
        f"{where}: its alignments are {list(saved)}, not {list(setup.options)}; use another --exp-name",
    )
    for name, options in setup.options.items():
        for key, then, now in changes(options, saved[name]):
            raise UserError(
                f"{where}: its {name} {key.replace('_', '-')} is {then}, not {now}; use the same options, or another "
                f"--exp-name"
            )


def _require_same_base(where: str, earlier: Checkpoint, setup: Setup, precision: str, changeable: bool = False) -> None:
    """Refuse a checkpoint of another network or data set, or of another precision unless that is `changeable`."""
    spec = dataclasses.replace(setup.spec, position_span=earlier.spec.position_span)  # the span came with the weights
    require(
        earlier.spec == spec,
        f"{where}: its network is {differences(earlier.spec.to_json(), spec.to_json())}; "
        f"use its --model, or another --exp-name",
    )
    require(
        earlier.config["data"]["digest"] == setup.data.digest,
        f"{where}: {setup.config.data_dir} is not the latent set on which it was trained; use another --exp-name",
    )
    before = earlier.config["precision"]
    require(
        before == precision or changeable,
        f"{where}: it was trained in {before}, not {precision}; give {launch.PRECISIONS.get(before)}",
    )
    if before != precision:
        note(f"{earlier.path} was trained in {before}; from step {earlier.step} on this run goes on in {precision}")


def changes(options: Any, saved: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, saved value, value now) of each option that differs and may not differ."""
    # a cosine of the learning rate ends at --max-train-steps, so all steps depend on it
    fixed = set() if getattr(options, "lr_scheduler", "constant") == "constant" else {"max_train_steps"}
    for key, value in json.loads(json.dumps(as_dict(options))).items():
        if key not in FREE_ON_RESUME - fixed and saved[key] != value:
            yield key, saved[key], value


def branch(name: str, setup: Setup, precision: str) -> Checkpoint:
    """The checkpoint `name` of --branch-from, which a run continues under other options of its alignments.

    The branch equals a run that had its options from the start, bit for bit. It is refused if the two would differ
    before that step, or if it needs a head that the checkpoint no longer has.
    """
    trunk, where = Checkpoint.open(name), f"--branch-from {name}"
    require("train" in trunk.config, f"{where}: {trunk.path} holds imported weights, not a run; use --init-ckpt")
    _require_same_base(where, trunk, setup, precision)
    # options of the run: only those that name the alignments may differ, and these are compared below
    for key, then, now in changes(setup.config, trunk.config["train"]):
        if key not in ("align", "preset", "branch_from"):
            raise UserError(
                f"{where}: its {key.replace('_', '-')} is {then}, not {now}; a branch may change only options of its "
                f"alignments"
            )
    saved = trunk.config["align"]
    heads = set(trunk.tensors("heads")) if "heads.safetensors" in trunk.files else set()
    require(
        saved.keys() == setup.options.keys(),
        f"{where}: its alignments are {list(saved) or ['none']}, not {list(setup.options) or ['none']}; to end one "
        f"here, give --align-stop-steps {trunk.step}",
    )
    setup = measured(setup, trunk)
    for alignment, options in setup.options.items():
        for key, then, now in changes(options, saved[alignment]):
            require(
                key in TIMED,
                f"{where}: its {alignment} {key.replace('_', '-')} is {then}, not {now}; a branch may change "
                f"{', '.join(TIMED)}",
            )
        before, stopped = build(type(options), saved[alignment]), trunk.config["resolved"][alignment]["stop"]
        _require_same_measure(where, alignment, before, stopped, setup, trunk.step)
        end = stopped if before.schedule == "plateau" else before.stop(setup.epoch_steps)
        ends = end, setup.stops[alignment]
        _require_same_weights(where, alignment, (before, options), ends, trunk.step, setup.epoch_steps)
        # an alignment that had ended took its head and optimiser state with it
        has_head = any(key.startswith(f"{alignment}.") for key in heads)
        require(
            alignment not in setup.alive(trunk.step) or has_head or stopped is None or trunk.step < stopped,
            f"{where}: {alignment} had ended by step {trunk.step} and its head is gone; branch from an earlier step",
        )
    return trunk


# Options of an alignment that set when and how strongly it acts.
TIMED = ("weight", "schedule", "stop_steps", "stop_epochs", "plateau_steps")


def measured(setup: Setup, earlier: Checkpoint) -> Setup:
    """`setup` with the ends that had been measured by the checkpoint `earlier`, of the same run or of its trunk."""
    stops = {}
    for name, options in setup.options.items():
        before = build(type(options), earlier.config["align"][name])
        stop, latest = earlier.config["resolved"][name]["stop"], setup.stops[name]
        # an end that the options do not give was measured
        if "plateau" == options.schedule == before.schedule and stop != before.stop(setup.epoch_steps):
            stops[name] = stop if latest is None else min(stop, latest)
    return setup.ending(stops)


def _require_same_measure(
    where: str, name: str, before: AlignOptions, stopped: int | None, setup: Setup, step: int
) -> None:
    """Refuse a branch at `step` whose alignment `name` would have averaged or read other residuals by then.

    `stopped` is the end that the trunk had set or measured by that step.
    """
    after, stop = setup.options[name], setup.stops[name]
    if after.schedule != "plateau":
        return
    require(
        before.schedule == "plateau",
        f"{where}: {name} had the schedule {before.schedule}, so the averages that plateau reads are missing; train "
        f"anew with --{name}-schedule plateau",
    )
    require(
        before.ramp == after.ramp,
        f"{where}: its {name} plateau-steps is {before.ramp}, not {after.ramp}, on which its averages depend; keep it",
    )
    require(
        stopped is None or stop == stopped or step < stopped - before.ramp,
        f"{where}: the weight of {name} falls from step {(stopped or 0) - before.ramp} on, and its plateau is no "
        f"longer looked for; branch from an earlier step",
    )


def _require_same_weights(
    where: str,
    name: str,
    options: tuple[AlignOptions, AlignOptions],
    stops: tuple[int | None, int | None],
    steps: int,
    epoch_steps: int,
) -> None:
    """Refuse a branch whose alignment `name` would have had another weight in any of its first `steps` steps.

    `options` and `stops` are the trunk's and the branch's.
    """
    for step in range(steps):
        then, now = (of.weight_at(step, stop, epoch_steps) for of, stop in zip(options, stops, strict=True))
        require(
            then == now,
            f"{where}: the weight of {name} at step {step} was {then:g}, not {now:g}: branch before that step, or keep "
            f"the weights up to it",
        )


def network(setup: Setup, earlier: Checkpoint | None) -> tuple[models.Backbone, list[str]]:
    """The network of the run's checkpoint, of `--init-ckpt`, or a fresh one, and lines for the introduction."""
    config = setup.config
    if earlier is not None:
        return models.build(earlier.spec, weights=earlier.tensors("network")), []
    if config.init_ckpt is None:
        return models.build(setup.spec, seed=config.seed), []
    source = Checkpoint.open(config.init_ckpt)
    difference = source.space.difference(setup.data.space)
    require(
        difference is None,
        f"--init-ckpt {source.path} was trained on other latents than {config.data_dir} ({difference})",
    )
    # rows of the label table are classes by number; other names for them are no error, but worth a line
    started, changes = start_from(source, setup.spec, config.seed, config.init_weights)
    names = source.config.get("data", {}).get("class_names")
    if names and names != setup.data.manifest["class_names"] and len(names) == setup.data.num_classes:
        changes += ["its classes have other names, the label table keeps its rows"]
    lines = [
        f"starts from the {config.init_weights} weights of {source.path} (step {source.step}): "
        f"{', '.join(changes) or 'as they are'}"
    ]
    unverified = source.space.unverified_match(setup.data.space)
    return started, lines + ([f"warning: --init-ckpt {source.path}: {unverified}"] if unverified else [])


def start_from(
    source: Checkpoint, spec: models.ModelSpec, seed: int, weights: str = "ema"
) -> tuple[models.Backbone, list[str]]:
    """A network with the weights of `source` (`ema`, `raw`, `ema-DECAY`), and the changes made to them.

    The label table is fresh if the number of classes differs; at another latent size the positions are stretched.

    Raises:
        UserError: the networks differ in anything else.
    """
    # everything but latent size and classes must agree
    resized = source.spec.sized(spec.input_size)
    spec = dataclasses.replace(spec, position_span=resized.position_span)
    same = dataclasses.replace(resized, num_classes=spec.num_classes)
    require(
        same == spec,
        f"--init-ckpt {source.path} does not fit: its network is {differences(same.to_json(), spec.to_json())}",
    )
    tensors, changes = source.tensors(weights), []
    if source.spec.num_classes != spec.num_classes:
        table = "y_embedder.embedding_table.weight"
        tensors[table] = models.build(spec, seed=seed).state_dict()[table]
        changes += [
            f"all {spec.num_classes + 1} rows of the label table are fresh (it had {source.spec.num_classes} classes)"
        ]
    if source.spec.input_size != spec.input_size:
        changes += [
            f"positions of its {source.spec.side}x{source.spec.side} tokens are stretched over {spec.side}x{spec.side}"
        ]
    return models.build(spec, weights=tensors), changes


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """'key old (not new)' for each key whose value has changed."""
    return ", ".join(f"{key} {then[key]} (not {now[key]})" for key in then if then[key] != now[key])


def teacher_loader(folder: Path, resolved: Mapping[str, Any]) -> Callable[[str], Checkpoint]:
    """Opens a teacher's checkpoint; for a resumed run the one with which it began, even if the teacher trained on."""
    began_with = {choices["guiding_ckpt"]: choices["teacher"] for choices in resolved.values() if "teacher" in choices}

    def load(path: str) -> Checkpoint:
        if path not in began_with:
            return Checkpoint.open(path)
        teacher = Checkpoint.open(began_with[path]["path"])
        require(
            teacher.digest == began_with[path]["digest"],
            f"{folder} cannot be continued: its teacher {teacher.path} has changed since; use another --exp-name",
        )
        return teacher

    return load


def restore(
    earlier: Checkpoint,
    averages: Mapping[str, nn.Module],
    alignments: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | Muon,
    names: Mapping[Tensor, str],
) -> None:
    """Load the averages by name, the heads of the active `alignments`, and the optimiser's state of `names`."""
    for name, average in averages.items():
        average.load_state_dict(earlier.tensors(name))
    needed = {f"{name}.{key}" for name, alignment in alignments.items() for key in alignment.state_dict()}
    if needed:
        heads = earlier.tensors("heads")
        lost = min(needed - heads.keys(), default=None)
        require(lost is None, f"{earlier.path} lacks {lost} among its heads; use another checkpoint")
        for name, alignment in alignments.items():
            if f"{name}.{AVERAGES}" not in needed:
                heads.pop(f"{name}.{AVERAGES}", None)  # of its trunk: a branch may have another schedule
            alignment.load_state_dict(
                {key.removeprefix(f"{name}."): value for key, value in heads.items() if key.startswith(f"{name}.")}
            )
    earlier.require_intact("optimizer.json")
    # state of heads that have ended may still be in the file; it is not needed
    active = ("network.", *(f"{name}." for name in alignments))
    state = {key: value for key, value in earlier.tensors("optimizer").items() if key.startswith(active)}
    optimizers.restore(optimizer, state, names)
