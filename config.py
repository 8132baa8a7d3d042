"""Options: typed dataclasses, and the command line derived from them.

Every command declares its options as one frozen dataclass whose fields are made with `option`. `parse` turns the fields
into flags (`max_train_steps` -> `--max-train-steps`), refuses unknown flags with the nearest known one, and returns
the words that were given, so that recipes and presets can stand between the defaults and the command line:
defaults < recipe < preset < command line.

This file knows nothing of tensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn, TypeVar

from errors import UserError, nearest

T = TypeVar("T")


def option(default: Any = MISSING, *, help: str, choices: Sequence[str] | None = None, flag: str | None = None) -> Any:
    """A dataclass field that is also a command-line flag. Without `default` the flag is required."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "flag": flag})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(schema: type, argv: Sequence[str], *, prog: str, description: str | None = None) -> dict[str, Any]:
    """The options that `argv` gives, by field name, typed as the dataclass `schema` says.

    Raises:
        UserError: an unknown flag (with the nearest known one), a value of the wrong type, a required flag missing.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if field.metadata:
            _add(parser, field, hints[field.name])
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], flags)}; see --help")
    return vars(given)


def flag_of(field: dataclasses.Field) -> str:
    """The flag that sets `field`."""
    return "--" + (field.metadata.get("flag") or field.name.replace("_", "-"))


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    kind, count = _kind(hint)
    text = field.metadata["help"]
    required = field.default is MISSING
    if not required and field.default not in (None, ""):
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text += f" (default {shown})"
    arguments: dict[str, Any] = {"dest": field.name, "help": text.replace("%", "%%"), "required": required}
    if kind is bool:
        parser.add_argument(flag_of(field), action=argparse.BooleanOptionalAction, **arguments)
    else:
        metavar = None if field.metadata["choices"] else kind.__name__.upper()
        parser.add_argument(flag_of(field), type=kind, nargs=count, choices=field.metadata["choices"], metavar=metavar,
                            **arguments)


def _kind(hint: Any) -> tuple[type, int | str | None]:
    """The scalar type of an annotation, and how many values its flag takes (None: one; '+': a tuple of any length)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return parts[0], "+" if parts[-1] is Ellipsis else len(parts)
    return hint, None


def build(schema: type[T], *layers: dict[str, Any]) -> T:
    """The dataclass `schema` with the values of `layers`, later layers winning; lists become tuples."""
    values: dict[str, Any] = {}
    for layer in layers:
        values.update(layer)
    names = {field.name for field in dataclasses.fields(schema)}
    for name in values:
        if name not in names:
            raise UserError(f"{schema.__name__} has no option {name}{nearest(name, names)}")
    missing = [flag_of(f) for f in dataclasses.fields(schema)
               if f.name not in values and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; see --help")
    return schema(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()}


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)
