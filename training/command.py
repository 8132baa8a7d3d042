"""From the command line to a run: recipes, presets, files of options and flags of `train.py` and `train_guide.py`.

A run that starts from a checkpoint takes over model, QK-norm and recipe from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

import models
from alignment import Alignment, AlignOptions, find
from config import COMMON, RECIPES, TrainConfig
from models.checkpoint import Checkpoint, latest
from models.peers import PEERS
from runtime import files, launch
from runtime.errors import UserError, nearest, require
from runtime.foreign import Hint
from runtime.options import Given, build, flags_of, options_of, parse, peek, values_of
from training import cost, loop
from training.between import Callback
from training.log import Meter
from training.run import Run

# Steps before --measure looks at the clock: compilation and first allocations.
WARM_UP = 3


def resolve(
    argv: Sequence[str],
    prog: str,
    description: str | None,
    always: tuple[str, ...] = (),
    take_over: Callable[[dict[str, Given]], Given] | None = None,
) -> tuple[TrainConfig, dict[str, AlignOptions]]:
    """The run's options and those of each alignment.

    Later sources win: defaults, recipe, checkpoint that the run starts from, preset, --config, flags.

    Args:
        always: alignments that the program adds by itself.
        take_over: finds the options to take over from a checkpoint (`taken_over`). Without it no checkpoint is opened.

    Raises:
        UserError: unknown flags, names or presets, contradictory values.
    """
    file = peek(TrainConfig, "config", argv) or ""
    settings = read_settings(file) if file else {"train": {}, "align": {}}
    train_settings = values_of(TrainConfig, settings["train"], file)
    words = ["--align", *train_settings.get("align", ["none"]), *argv] if file else argv
    names = [*always, *(name for name in peek(TrainConfig, "align", words) if name != "none")]
    kinds = {name: find(name) for name in names}
    unused = min(settings["align"].keys() - kinds.keys(), default=None)
    require(unused is None, f"{file} has options of {unused}, which this command does not train; remove them there")
    flags = parse(
        {"": TrainConfig, **{name: kind.Options for name, kind in kinds.items()}},
        argv,
        prog=prog,
        description=description,
        epilog=catalogue(),
        hints=_of_alignments() | PEERS,
        common=COMMON,
    )
    given = {"": {**train_settings, **flags[""]}}
    for name, kind in kinds.items():
        given[name] = {**values_of(kind.Options, settings["align"].get(name, {}), file), **flags[name]}
    taken = take_over(given) if take_over else {}
    recipe = RECIPES[str(given[""].get("recipe", taken.get("recipe", "sit")))]
    chosen = _preset(given[""].get("preset"), kinds)
    presets = (preset.get("train", {}) for preset in chosen.values())
    train = build(TrainConfig, recipe, taken, *presets, given[""])
    options = {}
    for name, kind in kinds.items():
        options[name] = build(kind.Options, chosen[name].get("options", {}), given[name], section=name)
    return train, options


def _of_alignments() -> dict[str, Hint]:
    """Replies to options of alignments that the command does not train."""
    owners: dict[str, list[str]] = {}
    for name, kind in sorted(Alignment.registry.items()):
        for opt in options_of(kind.Options):
            for flag in flags_of(opt.field, name, alone=True):
                owners.setdefault(flag, []).append(name)
    return {
        flag: Hint(
            "it belongs to train_guide.py"
            if names == ["guided"]
            else f"it belongs to an alignment: add --align {' or '.join(name for name in names if name != 'guided')}",
            None,
        )
        for flag, names in owners.items()
    }


def read_settings(file: str) -> dict[str, Given]:
    """Options in a JSON file: {"train": {...}, "align": {NAME: {...}}}, the form of a run's run.json.

    Raises:
        UserError: the file is missing, or has another form.
    """
    values = files.read_json(Path(file))
    settings = {key: values.get(key, {}) for key in ("train", "align")} if isinstance(values, dict) else {}
    right = bool(settings) and values.keys() <= {"train", "align", "resolved", "machine"}
    right = right and all(isinstance(part, dict) for part in [*settings.values(), *settings["align"].values()])
    require(right, f'{file} is not of the form {{"train": {{...}}, "align": {{NAME: {{...}}}}}}; correct it')
    return settings


def _preset(preset: str | None, kinds: Mapping[str, type[Alignment]]) -> dict[str, dict[str, Given]]:
    """The settings that `preset` has for each alignment."""
    known = {word for kind in kinds.values() for word in kind.presets}
    if preset is not None and preset not in known:
        method = " and ".join(kinds) or "plain training"
        presets = f"has the presets {', '.join(sorted(known))}" if known else "has no presets: leave out --preset"
        raise UserError(f"unknown preset {preset}{nearest(preset, known)}; {method} {presets}")
    return {name: kind.presets.get(preset, {}) if preset else {} for name, kind in kinds.items()}


def taken_over(given: dict[str, Given]) -> Given:
    """Model, QK-norm and recipe of the network that a run starts from, or of its teacher, unless `given` has them.

    A run that is continued has them in its own checkpoint. The main process prints what was taken and from where.
    """
    plain = given[""]
    place = plain.get("branch_from") or plain.get("init_ckpt") or given.get("guided", {}).get("guiding_ckpt")
    if place is None or "exp_name" not in plain or not {"model", "qk_norm", "recipe"} - plain.keys():
        return {}
    # after the first checkpoint the run itself is the source: the other one may have changed since
    resumed = latest(Path(plain.get("output_dir", TrainConfig.output_dir)) / plain["exp_name"])
    source = Checkpoint.open(resumed or place)
    trained = source.config.get("train") or {}
    family = trained.get("recipe", "lightningdit" if source.spec.architecture == "lightningdit" else "sit")
    known = {"model": source.spec.name, "qk_norm": source.spec.qk_norm, "recipe": family}
    taken = {key: value for key, value in known.items() if key not in plain}
    require(
        taken.get("model", "") != "custom",
        f"the network of {place} has no registered size: give --model, one of {', '.join(models.names())}",
    )
    if resumed is None and os.environ.get("RANK", "0") == "0":
        print(
            f"taken over from {source.path}: "
            + ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in taken.items())
        )
    return taken


def catalogue() -> str:
    """Names at the end of `--help`: models, and alignments with their presets."""
    width = max(map(len, Alignment.registry))
    lines = [
        f"  {name:{width}}  {kind.summary()} (presets: {', '.join(kind.presets) or 'none'})"
        for name, kind in sorted(Alignment.registry.items())
    ]
    by_family = [f"  {', '.join(kind.sizes)}" for kind in models.ARCHITECTURES.values()]
    return "\n".join(["models:", *by_family, "", "alignments (options of one: --align NAME --help):", *lines])


def measured(config: TrainConfig, options: dict[str, AlignOptions], steps: int) -> float:
    """Images per second of `steps` steps of the run that would train, in all processes; nothing is written."""
    run = Run(config, options)
    stepping = loop.steps(run, run.step + WARM_UP + steps, Meter(run.accelerator))

    def clock_after(count: int) -> float:
        for _ in range(count):
            next(stepping)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return time.perf_counter()

    began = clock_after(WARM_UP)
    rate = steps * config.batch_size / (clock_after(steps) - began)
    run.accelerator.print(
        f"measured: {rate:.4g} images per second over {steps} steps of {run.accelerator.num_processes} process(es) on "
        f"{run.device.type}, after {WARM_UP} to warm up"
    )
    return rate


def main(
    argv: Sequence[str],
    prog: str,
    description: str | None,
    watch: Callable[..., Sequence[Callback]],
    always: tuple[str, ...] = (),
) -> Path:
    """Resolve the options and train, or print what that would cost; returns the run's folder.

    `watch(config, folder, spec, data, accelerator)` opens previews and scores before the first step, so that a missing
    file fails before training starts.
    """
    config, options = resolve(argv, prog, description, always, taken_over)
    if peek(TrainConfig, "tf32", argv):
        launch.require_tf32()
    if config.dry_run:
        cost.main(config, options, measured(config, options, config.measure) if config.measure else None)
        return Path(config.output_dir) / config.exp_name
    with ExitStack() as held:
        run = Run(config, options, held)
        return loop.train(run, watch(config, run.folder, run.spec, run.data, run.accelerator))
