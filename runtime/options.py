"""A dataclass as a command line.

A command declares its options as a frozen dataclass. Its fields are made with `option` (one flag each:
`max_train_steps` -> `--max-train-steps`) and `group` (another such dataclass, whose flags join in). `read` turns
the command line into that dataclass. Later sources win: defaults, layers between (recipes, presets), command line.

Why not a library: simple-parsing 0.1.9, tyro 1.0.17 and jsonargparse 4.53 were tried (November 2026). None has all that
the commands here need: the given values apart from defaults, so that presets can stand between (only jsonargparse);
options of several alignments side by side, with a short flag where it is unambiguous; one line for a mistake, with the
nearest flag or a hint of our own (tyro suggests, in a box of ten lines); `--interval 0.4 0.7` as a tuple (jsonargparse
wants a list in brackets). So argparse parses, and this file derives its arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import types
import typing
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from runtime import foreign
from runtime.errors import UserError, nearest, require
from runtime.foreign import Hint

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
# Option names and values, as words or a layer of settings gave them.
Given = dict[str, Any]


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: Collection[str] | None = None,
    flag: str | None = None,
    heading: str | None = None,
    within: str = "",
    rare: bool = False,
) -> Any:
    """A dataclass field that is also a command-line flag. Without `default` the flag is required.

    Args:
        flag: the flag's name where it is not that of the field.
        heading: starts a group of `--help`, to which the fields that follow belong too.
        within: bounds of its number (of each, where it has several) in mathematical notation: "[0, 1)", "(0, inf)".
        rare: has no flag. Presets and files of options (`values_of`) set it.
    """
    metadata = {"help": help, "choices": choices, "flag": flag, "heading": heading, "within": within, "rare": rare}
    return dataclasses.field(default=default, metadata=metadata)


def group(schema: type, *, without: Sequence[str] = ()) -> Any:
    """A dataclass field that holds the options of `schema`. Fields in `without` have no flag and keep their defaults.

    Option names are unique over all groups.
    """
    return dataclasses.field(default=MISSING, metadata={"group": schema, "without": frozenset(without)})


def _require_bounds(schema: type[DataclassInstance], values: Given, section: str) -> None:
    """Raise UserError for the first of `values` that lies outside the `within` of its option; None is inside."""
    for field in dataclasses.fields(schema):
        bounds, value = field.metadata.get("within"), values.get(field.name)
        if not bounds or value is None:
            continue
        low, high = map(float, bounds[1:-1].split(","))
        for number in value if isinstance(value, tuple) else (value,):
            above = number >= low if bounds[0] == "[" else number > low
            below = number <= high if bounds[-1] == "]" else number < high
            flags = " or ".join(flags_of(field, section, alone=bool(section)))
            require(above and below, f"{flags} {number} must lie in {bounds}")


class Option(NamedTuple):
    """One flag of a schema, wherever it is declared."""

    field: dataclasses.Field
    hint: Any
    heading: str | None


_hints = functools.cache(typing.get_type_hints)
# What ends the name of an option that takes a file, a folder or a checkpoint
_PATHS = (
    "dir",
    "out",
    "ckpt",
    "config",
    "reference",
    "images",
    "masks",
    "source",
    "samples",
    "folder",
    "file",
    "sample",
)


def options_of(schema: type) -> Iterator[Option]:
    """The options of `schema` and of its groups, in order."""
    hints, heading = _hints(schema), None
    for field in dataclasses.fields(schema):
        if inner := field.metadata.get("group"):
            yield from (opt for opt in options_of(inner) if opt.field.name not in field.metadata["without"])
        elif field.metadata:
            heading = field.metadata["heading"] or heading
            yield Option(field, hints[field.name], heading)


def _ordered(schema: type, common: Sequence[str]) -> Iterator[Option]:
    """The options of `schema`, those called `common` first and under a heading of their own."""
    options = list(options_of(schema))
    for name in common:
        yield next(opt for opt in options if opt.field.name == name)._replace(heading="common options")
    yield from (opt for opt in options if opt.field.name not in common)


def read(
    schema: type[T],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None = None,
    first: str | None = None,
    between: Callable[[Given], Given] | None = None,
    epilog: str | None = None,
    hints: Mapping[str, Hint] | None = None,
) -> T:
    """The options of a command.

    Args:
        argv: the words after the command's name; None: those that this process was started with.
        first: the option that takes a leading word without a flag.
        between: returns settings between the defaults and the command line, from the given values (a preset).
        epilog: text after the options in `--help`, such as the names of presets.
        hints: replies to flags of other programs, by flag or by FLAG=VALUE (for a value that is other here); used
            before the nearest flag is suggested.

    Raises:
        UserError: an unknown flag, a value of the wrong type, a missing required option, or a value that the dataclass
            refuses.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if first is not None and words and not words[0].startswith("-"):
        words = [f"--{first.replace('_', '-')}", *words]
    given = parse({"": schema}, words, prog=prog, description=description, epilog=epilog, hints=hints)[""]
    return build(schema, between(given) if between else {}, given)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(
    schemas: Mapping[str, type],
    argv: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    epilog: str | None = None,
    hints: Mapping[str, Hint] | None = None,
    common: Sequence[str] = (),
) -> dict[str, Given]:
    """The values that `argv` gives, by section and option name, with the types of the sections' dataclasses.

    The section called "" has plain flags (`--seed`). Every other section is an alignment: `--repa-depth` sets `depth`
    of section `repa`, and so does `--align-depth` if no other alignment has that option. See `read`.

    Args:
        common: names of plain options that `--help` shows first, under one heading.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options]",
    )
    owners = Counter(opt.field.name for section, schema in schemas.items() if section for opt in options_of(schema))
    titled: dict[str | None, Any] = {None: parser}
    replies = dict(hints or {})
    for section, schema in schemas.items():
        for opt in _ordered(schema, () if section else common):
            if opt.field.metadata["rare"]:
                file = f'{{"train": {{"{opt.field.name}": ...}}}}'
                replies[f"--{opt.field.name.replace('_', '-')}"] = Hint(
                    f"give it in a file: --config FILE with {file}", None
                )
                continue
            title = f"alignment {section}" if section else opt.heading
            if title not in titled:
                titled[title] = parser.add_argument_group(title)
            name = opt.field.name
            _add(titled[title], opt, flags_of(opt.field, section, alone=owners[name] == 1), dest=f"{section}.{name}")
    # argparse would end the process at an unknown flag without the hint that helps
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = {flag for action in parser._actions for flag in action.option_strings}
        raise UserError(foreign.message(argv, unknown, flags, replies, prog))
    given: dict[str, Given] = {section: {} for section in schemas}
    for key, value in vars(known).items():
        section, name = key.split(".")
        given[section][name] = tuple(value) if isinstance(value, list) else value
    return given


def peek(schema: type, name: str, argv: Sequence[str]) -> Any:
    """The value that `argv` gives to one option of `schema`, else its default. Other words are not read."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    opt = next(opt for opt in options_of(schema) if opt.field.name == name)
    _add(parser, opt, flags_of(opt.field), dest=name)
    parser.set_defaults(**{name: opt.field.default})
    return getattr(parser.parse_known_args(argv)[0], name)


def flags_of(field: dataclasses.Field, section: str = "", alone: bool = False) -> list[str]:
    """The flags that set `field`."""
    word = field.name.replace("_", "-")
    if field.metadata.get("rare"):
        return [field.name]
    if field.metadata.get("flag"):
        return [f"--{field.metadata['flag']}"]
    if not section:
        return [f"--{word}"]
    return [f"--{section}-{word}"] + ([f"--align-{word}"] if alone else [])


class _Store(argparse.Action):
    """Stores a value. The last of two values of one flag wins; two flags of one option must agree."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(self, "flag", None) if hasattr(namespace, self.dest) else None
        if earlier not in (None, option_string) and getattr(namespace, self.dest) != values:
            parser.error(f"{earlier} and {option_string} are one option with two values: give one of them")
        self.flag = option_string
        setattr(namespace, self.dest, values)


def _add(parser: Any, opt: Option, flags: list[str], dest: str) -> None:
    field = opt.field
    kind, count = kind_of(opt.hint)
    text = field.metadata["help"]
    if field.default is MISSING:
        text += " (required)"  # `build` checks it: a message about an unknown flag comes first
    elif field.default is not False and field.default not in (None, "", ()):
        text += f" (default {_written(field.default)})"
    if field.metadata["within"]:
        text += f"; {_in_words(field.metadata['within'])}"
    arguments: dict[str, Any] = {"dest": dest, "help": text.replace("%", "%%")}
    if kind is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **arguments)
    else:
        choices = field.metadata["choices"]
        path = field.name.split("_")[-1] in _PATHS or field.metadata["help"].startswith(("file", "folder"))
        metavar = None if choices else {int: "N", float: "X"}.get(kind, "PATH" if path else "NAME")
        parser.add_argument(
            *flags,
            action=_Store,
            type=_TYPES.get(kind, kind),
            nargs=count,
            choices=choices,
            metavar=metavar,
            **arguments,
        )


def _written(value: Any) -> str:
    """A default as a person would write it."""
    if isinstance(value, tuple):
        return " ".join(map(_written, value))
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def _in_words(bounds: str) -> str:
    """Bounds in mathematical notation as words: "(0, inf)" is "above 0"."""
    low, high = (part.strip() for part in bounds[1:-1].split(","))
    least = "" if low == "-inf" else f"{'at least' if bounds[0] == '[' else 'above'} {low}"
    most = "" if high == "inf" else f"{'at most' if bounds[-1] == ']' else 'below'} {high}"
    if least.startswith("at least") and most.startswith("at most"):
        return f"{low} to {high}"
    return " and ".join(part for part in (least, most) if part)


def finite(word: str) -> float:
    """A finite number within the range of single precision; the type of every float option."""
    value = float(word)
    if not abs(value) <= 1e30:  # false for NaN too
        raise ValueError(word)
    return value


def whole(word: str) -> int:
    """A whole number that fits 64 bits; the type of every int option."""
    value = int(word)
    if not -(2**63) <= value < 2**63:
        raise ValueError(word)
    return value


def printable(word: str) -> str:
    """Characters that a file, a log and a terminal can show; the type of every str option."""
    if not word.strip():
        raise argparse.ArgumentTypeError("it is empty (is a variable unset?): give a value, or leave the option out")
    odd = next((letter for letter in word if unicodedata.category(letter) in ("Cc", "Cs")), None)
    if odd is not None:
        raise argparse.ArgumentTypeError(
            f"{word[:40]} contains {odd!r}, a control character or a byte outside UTF-8: choose another value"
        )
    return word


finite.__name__, whole.__name__, printable.__name__ = "float", "int", "str"  # what argparse calls them
_TYPES = {float: finite, int: whole, str: printable}


def kind_of(hint: Any) -> tuple[type, int | str | None]:
    """The scalar type of an annotation, and the number of its flag's values (None: one; '+': a tuple of any length)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return parts[0], "+" if parts[-1] is Ellipsis else len(parts)
    return hint, None


def build(schema: type[T], *layers: Given, section: str = "") -> T:
    """The dataclass `schema` with the values of `layers`. Later layers win; lists become tuples.

    Raises:
        UserError: a name that is not an option, a required option that is missing.
    """
    values: Given = {}
    for layer in layers:
        values.update(layer)
    known = {opt.field.name: opt.field for opt in options_of(schema)}
    # presets alone set fields without metadata
    known |= {field.name: field for field in dataclasses.fields(schema) if not field.metadata}
    for name in values:
        if name not in known:
            raise UserError(f"{schema.__name__} has no option {name}{nearest(name, known)}")
    missing = [
        flags_of(field)[0]
        for name, field in known.items()
        if name not in values and field.default is MISSING and field.default_factory is MISSING
    ]
    require(not missing, f"missing {', '.join(missing)}; see --help")
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return _filled(schema, tuples, section)


def _filled(schema: type[T], values: Given, section: str = "") -> T:
    """`schema` with those of `values` that belong to it or to its groups."""
    arguments = {}
    for field in dataclasses.fields(schema):
        if inner := field.metadata.get("group"):
            arguments[field.name] = _filled(
                inner, {k: v for k, v in values.items() if k not in field.metadata["without"]}
            )
        elif field.name in values:
            arguments[field.name] = values[field.name]
    _require_bounds(schema, arguments, section)
    return schema(**arguments)


def values_of(schema: type, values: Given, where: str) -> Given:
    """`values` that a file gives to options of `schema`, checked as words of the command line are. Nulls are left out.

    Raises:
        UserError: a name that is not an option, a value of the wrong type; `where` names the file.
    """
    known = {opt.field.name: opt for opt in options_of(schema)}
    presets_alone = {field.name for field in dataclasses.fields(schema) if not field.metadata}
    for name in values.keys() - known.keys() - presets_alone:
        raise UserError(f"{where} has no option {name}{nearest(name, known)}; remove it, or correct the name")
    return {
        name: _typed(known[name], value, where) if name in known else value
        for name, value in values.items()
        if value is not None
    }


def _typed(opt: Option, value: Any, where: str) -> Any:
    kind, count = kind_of(opt.hint)
    items = value if isinstance(value, list) else [value]
    right_form = isinstance(value, list) == (count is not None) and count in (None, "+", len(items))
    choices = opt.field.metadata["choices"]
    try:
        # JSON has types of its own: a number is not a word, nor the reverse, and true is not 1
        if not right_form or any(isinstance(item, (bool, str)) != (kind in (bool, str)) for item in items):
            raise ValueError
        typed = [item if kind is bool else _TYPES.get(kind, kind)(str(item)) for item in items]
        if any(not isinstance(item, kind) or (choices and item not in choices) for item in typed):
            raise ValueError
    except (ValueError, argparse.ArgumentTypeError) as error:
        hint = f"one of {', '.join(choices)}" if choices else f"a value of type {kind.__name__}"
        raise UserError(f"{where}: {opt.field.name} is {value!r}; give {hint}") from error
    return tuple(typed) if count else typed[0]


def as_dict(config: Any) -> Given:
    """A config as plain JSON values by option name, its groups laid flat."""
    values: Given = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "group" in field.metadata:
            values |= {k: v for k, v in as_dict(value).items() if k not in field.metadata["without"]}
        else:
            values[field.name] = list(value) if isinstance(value, tuple) else value
    return values
