"""From words to a run: recipes, presets and flags of `train.py` and `train_guide.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignment import AlignOptions, find
from config import RECIPES, TrainConfig, build, parse_sections, peek
from errors import UserError, nearest


def resolve(argv: Sequence[str], prog: str, description: str | None,
            always: tuple[str, ...] = ()) -> tuple[TrainConfig, dict[str, AlignOptions]]:
    """The run's options and those of each alignment: defaults < recipe < preset < command line.

    `always` names alignments that the program adds by itself.

    Raises:
        UserError: unknown flags, names or presets, contradictory values.
    """
    names = [*always, *(name for name in peek(TrainConfig, "align", argv) if name != "none")]
    schemas = {name: find(name) for name in names}
    given = parse_sections({"": TrainConfig, **{name: one.Options for name, one in schemas.items()}}, argv, prog=prog,
                           description=description)
    recipe = RECIPES[given[""].get("recipe", "sit")]
    preset = given[""].get("preset")
    known = {word for one in schemas.values() for word in one.presets}
    if preset is not None and preset not in known:
        raise UserError(f"unknown preset {preset}{nearest(preset, known)}; "
                        f"{' and '.join(names) or 'plain training'} has {', '.join(sorted(known)) or 'none'}")
    chosen = {name: one.presets.get(preset, {}) for name, one in schemas.items()}
    train = build(TrainConfig, recipe["train"], *(one.get("train", {}) for one in chosen.values()), given[""])
    options = {}
    for name, one in schemas.items():
        common = {key: value for key, value in recipe["align"].items() if key in one.Options.__dataclass_fields__}
        options[name] = build(one.Options, common, chosen[name].get("options", {}), given[name])
    return train, options


def main(argv: Sequence[str], prog: str, description: str | None, always: tuple[str, ...] = ()) -> Path:
    """Resolve the options and train, or say what that would cost; returns the run's folder."""
    config, options = resolve(argv, prog, description, always)
    if config.dry_run:
        from training import cost

        cost.main(config, options)
        return Path(config.output_dir) / config.exp_name
    from training.loop import Trainer

    return Trainer(config, options).run()
