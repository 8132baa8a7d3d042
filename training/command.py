"""From words to a run: recipes, presets and flags of `train.py` and `train_guide.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import models
from alignment import Alignment, AlignOptions, find
from config import PEERS, RECIPES, TrainConfig
from runtime import launch
from runtime.errors import UserError, nearest
from runtime.options import build, parse, peek
from training import cost, loop
from training.between import Callback
from training.run import Run


def resolve(argv: Sequence[str], prog: str, description: str | None,
            always: tuple[str, ...] = ()) -> tuple[TrainConfig, dict[str, AlignOptions]]:
    """The run's options and those of each alignment: defaults < recipe < preset < command line.

    `always` names alignments that the program adds by itself.

    Raises:
        UserError: unknown flags, names or presets, contradictory values.
    """
    names = [*always, *(name for name in peek(TrainConfig, "align", argv) if name != "none")]
    kinds = {name: find(name) for name in names}
    given = parse({"": TrainConfig, **{name: kind.Options for name, kind in kinds.items()}}, argv, prog=prog,
                  description=description, epilog=catalogue(), hints=PEERS)
    recipe = RECIPES[given[""].get("recipe", "sit")]
    preset = given[""].get("preset")
    known = {word for kind in kinds.values() for word in kind.presets}
    if preset is not None and preset not in known:
        raise UserError(f"unknown preset {preset}{nearest(preset, known)}; "
                        f"{' and '.join(names) or 'plain training'} has {', '.join(sorted(known)) or 'none'}: give one of these, or none")
    chosen = {name: kind.presets.get(preset, {}) for name, kind in kinds.items()}
    train = build(TrainConfig, recipe["train"], *(settings.get("train", {}) for settings in chosen.values()), given[""])
    options = {}
    for name, kind in kinds.items():
        common = {key: value for key, value in recipe["align"].items() if key in kind.Options.__dataclass_fields__}
        options[name] = build(kind.Options, common, chosen[name].get("options", {}), given[name])
    return train, options


def catalogue() -> str:
    """The names that `--help` ends with: models, and alignments with their presets."""
    width = max(map(len, Alignment.registry))
    lines = [f"  {name:{width}}  {kind.summary()} (presets: {', '.join(kind.presets) or 'none'})"
             for name, kind in sorted(Alignment.registry.items())]
    by_family = [f"  {', '.join(sizes)}" for sizes in models.SIZES.values()]
    return "\n".join(["models:", *by_family, "", "alignments (options of one: --align NAME --help):", *lines])


def main(argv: Sequence[str], prog: str, description: str | None, watch: Callable[..., Sequence[Callback]],
         always: tuple[str, ...] = ()) -> Path:
    """Resolve the options and train, or say what that would cost; returns the run's folder.

    `watch(config, folder, spec, space, accelerator)` opens what is to be done between steps (previews and scores), before
    the first one, so that what is missing is missed then.
    """
    config, options = resolve(argv, prog, description, always)
    if peek(TrainConfig, "tf32", argv):
        launch.require_tf32()
    if config.dry_run:
        cost.main(config, options)
        return Path(config.output_dir) / config.exp_name
    with ExitStack() as held:
        run = Run(config, options, held)
        return loop.train(run, watch(config, run.folder, run.spec, run.data.space, run.accelerator))
