"""From words to a run: recipes, presets and flags of `train.py` and `train_guide.py`, and what a network is taken over from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import models
from alignment import Alignment, AlignOptions, find
from config import RECIPES, TrainConfig
from models.checkpoint import Checkpoint, latest
from models.peers import PEERS
from runtime import launch
from runtime.errors import UserError, nearest, require
from runtime.options import Given, build, parse, peek
from training import cost, loop
from training.between import Callback
from training.run import Run


def resolve(
    argv: Sequence[str],
    prog: str,
    description: str | None,
    always: tuple[str, ...] = (),
    take_over: Callable[[dict[str, Given]], Given] | None = None,
) -> tuple[TrainConfig, dict[str, AlignOptions]]:
    """The run's options and those of each alignment: defaults < recipe < what is taken over < preset < command line.

    `always` names alignments that the program adds by itself. `take_over` finds what is taken over from a checkpoint that the
    command names (`taken_over`); without it no file is opened.

    Raises:
        UserError: unknown flags, names or presets, contradictory values.
    """
    names = [*always, *(name for name in peek(TrainConfig, "align", argv) if name != "none")]
    kinds = {name: find(name) for name in names}
    given = parse(
        {"": TrainConfig, **{name: kind.Options for name, kind in kinds.items()}},
        argv,
        prog=prog,
        description=description,
        epilog=catalogue(),
        hints=PEERS,
    )
    taken = take_over(given) if take_over else {}
    recipe = RECIPES[given[""].get("recipe", taken.get("recipe", "sit"))]
    preset = given[""].get("preset")
    known = {word for kind in kinds.values() for word in kind.presets}
    if preset is not None and preset not in known:
        raise UserError(
            f"unknown preset {preset}{nearest(preset, known)}; "
            f"{' and '.join(names) or 'plain training'} has {', '.join(sorted(known)) or 'none'}: give one of these, or none"
        )
    chosen = {name: kind.presets.get(preset, {}) for name, kind in kinds.items()}
    train = build(
        TrainConfig, recipe["train"], taken, *(settings.get("train", {}) for settings in chosen.values()), given[""]
    )
    options = {}
    for name, kind in kinds.items():
        common = {key: value for key, value in recipe["align"].items() if key in kind.Options.__dataclass_fields__}
        options[name] = build(kind.Options, common, chosen[name].get("options", {}), given[name])
    return train, options


def taken_over(given: dict[str, Given]) -> Given:
    """Model, QK-norm and recipe of the network that a run starts from, or of its teacher, where the command does not say them.

    A run that is continued has them in its own checkpoint. The main process says what was taken, and from where.
    """
    plain = given[""]
    place = plain.get("branch_from") or plain.get("init_ckpt") or given.get("guided", {}).get("guiding_ckpt")
    if place is None or "exp_name" not in plain or not {"model", "qk_norm", "recipe"} - plain.keys():
        return {}
    resumed = latest(Path(plain.get("output_dir", TrainConfig.output_dir)) / plain["exp_name"])
    source = Checkpoint.open(resumed or place)
    trained = source.config.get("train") or {}
    family = trained.get("recipe", "lightningdit" if source.spec.architecture == "lightningdit" else "sit")
    known = {"model": source.spec.name, "qk_norm": source.spec.qk_norm, "recipe": family}
    taken = {key: value for key, value in known.items() if key not in plain}
    require(
        taken.get("model", "") != "custom",
        f"{place} is of no registered size: say --model, one of {', '.join(models.names())}",
    )
    if resumed is None and os.environ.get("RANK", "0") == "0":
        print(
            f"taken over from {source.path}: "
            + ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in taken.items())
        )
    return taken


def catalogue() -> str:
    """The names that `--help` ends with: models, and alignments with their presets."""
    width = max(map(len, Alignment.registry))
    lines = [
        f"  {name:{width}}  {kind.summary()} (presets: {', '.join(kind.presets) or 'none'})"
        for name, kind in sorted(Alignment.registry.items())
    ]
    by_family = [f"  {', '.join(sizes)}" for sizes in models.SIZES.values()]
    return "\n".join(["models:", *by_family, "", "alignments (options of one: --align NAME --help):", *lines])


def main(
    argv: Sequence[str],
    prog: str,
    description: str | None,
    watch: Callable[..., Sequence[Callback]],
    always: tuple[str, ...] = (),
) -> Path:
    """Resolve the options and train, or say what that would cost; returns the run's folder.

    `watch(config, folder, spec, data, accelerator)` opens what is to be done between steps (previews and scores), before
    the first one, so that what is missing is missed then.
    """
    config, options = resolve(argv, prog, description, always, taken_over)
    if peek(TrainConfig, "tf32", argv):
        launch.require_tf32()
    if config.dry_run:
        cost.main(config, options)
        return Path(config.output_dir) / config.exp_name
    with ExitStack() as held:
        run = Run(config, options, held)
        return loop.train(run, watch(config, run.folder, run.spec, run.data, run.accelerator))
