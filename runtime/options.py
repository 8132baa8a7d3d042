"""A dataclass as a command line.

A command declares its options as a frozen dataclass whose fields are made with `option` (one flag each:
`max_train_steps` -> `--max-train-steps`) and `group` (another such dataclass, whose flags join in). `read` is the one
call that turns words into that dataclass: defaults < layers between (recipes, presets) < command line.

Why not a library. simple-parsing 0.1.9, tyro 1.0.17 and jsonargparse 4.53 were tried (November 2026). What
the commands here need and none of them has together: the values that were given, apart from defaults, so that presets
can stand between (jsonargparse alone tells them apart); options of any number of alignments side by side, a flag being
shortened where it is unambiguous (none); a mistake answered in one line with the nearest flag or with a hint of our own
(tyro suggests, in a box of ten lines); `--interval 0.4 0.7` as a tuple (jsonargparse wants a list in brackets). So argparse
does the parsing and this file only derives its arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, NamedTuple, NoReturn, TypeVar

from runtime.errors import UserError, nearest

T = TypeVar("T")
Given = dict[str, Any]
"""Option names and values, as words or a layer of settings gave them."""


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: Sequence[str] | None = None,
    flag: str | None = None,
    heading: str | None = None,
    later: bool = False,
) -> Any:
    """A dataclass field that is also a command-line flag. Without `default` the flag is required.

    `heading` starts a group of `--help`, to which the fields that follow belong too. `later` is for an option that is younger
    than records on disk: at its default it is left out of them (`as_dict`), so that the record of an older command stays the same.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "flag": flag, "heading": heading, "later": later}
    )


def group(schema: type, *, without: Sequence[str] = ()) -> Any:
    """A dataclass field that holds the options of `schema`; the flags of the fields in `without` are left out.

    Those keep their defaults, and the command declares what it has in their place. Option names are unique over all groups.
    """
    return dataclasses.field(default=MISSING, metadata={"group": schema, "without": frozenset(without)})


class Option(NamedTuple):
    """One flag of a schema, wherever it is declared."""

    field: dataclasses.Field
    hint: Any
    heading: str | None


def options_of(schema: type) -> Iterator[Option]:
    """The options of `schema`, those of its groups among them, in order."""
    hints, heading = typing.get_type_hints(schema), None
    for field in dataclasses.fields(schema):
        if inner := field.metadata.get("group"):
            yield from (opt for opt in options_of(inner) if opt.field.name not in field.metadata["without"])
        elif field.metadata:
            heading = field.metadata["heading"] or heading
            yield Option(field, hints[field.name], heading)


def read(
    schema: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    first: str | None = None,
    between: Callable[[Given], Given] | None = None,
    epilog: str | None = None,
    hints: Mapping[str, str] | None = None,
) -> T:
    """The options of a command.

    Args:
        first: the option that a leading word without a flag stands for.
        between: settings between the defaults and the command line, chosen by what was given (a preset).
        epilog: text after the options in `--help`: what only the caller knows, such as the names of presets.
        hints: what to say to a flag of other programs, by flag; looked up before the nearest flag is suggested.

    Raises:
        UserError: an unknown flag, a value of the wrong type, a required option that is missing, and whatever the
            dataclass refuses by itself.
    """
    words = list(argv)
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
    hints: Mapping[str, str] | None = None,
) -> dict[str, Given]:
    """The values that `argv` gives, by section and option name, typed as the sections' dataclasses say.

    The section called "" has plain flags (`--seed`). Every other section is an alignment: `depth` of section `repa` is
    set by `--repa-depth`, and by `--align-depth` too where it is the only alignment that has it. See `read`.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    owners = Counter(opt.field.name for section, schema in schemas.items() if section for opt in options_of(schema))
    titled: dict[str | None, Any] = {None: parser}
    for section, schema in schemas.items():
        for opt in options_of(schema):
            title = f"alignment {section}" if section else opt.heading
            if title not in titled:
                titled[title] = parser.add_argument_group(title)
            name = opt.field.name
            _add(titled[title], opt, flags_of(opt.field, section, alone=owners[name] == 1), dest=f"{section}.{name}")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_unknown(unknown[0].split("=")[0], parser, hints or {}))
    given: dict[str, Given] = {section: {} for section in schemas}
    for key, value in vars(known).items():
        section, name = key.split(".")
        given[section][name] = tuple(value) if isinstance(value, list) else value
    return given


def _unknown(word: str, parser: argparse.ArgumentParser, hints: Mapping[str, str]) -> str:
    """What to say to a word that is not a flag of the parser."""
    if word in hints:
        return f"{word} is not an option here: {hints[word]}"
    flags = [flag for action in parser._actions for flag in action.option_strings]
    return f"unknown option {word}{nearest(word, flags)}; see --help"


def peek(schema: type, name: str, argv: Sequence[str]) -> Any:
    """The value that `argv` gives to one option of `schema`, other words unread; its default where it gives none."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    opt = next(opt for opt in options_of(schema) if opt.field.name == name)
    _add(parser, opt, flags_of(opt.field), dest=name)
    parser.set_defaults(**{name: opt.field.default})
    return getattr(parser.parse_known_args(argv)[0], name)


def flags_of(field: dataclasses.Field, section: str = "", alone: bool = False) -> list[str]:
    """The flags that set `field`."""
    word = field.name.replace("_", "-")
    if field.metadata.get("flag"):
        return [f"--{field.metadata['flag']}"]
    if not section:
        return [f"--{word}"]
    return [f"--{section}-{word}"] + ([f"--align-{word}"] if alone else [])


class _Store(argparse.Action):
    """Stores a value; two flags of one option that disagree are refused, while a flag given twice means its last value."""

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
        text += " (required)"  # by `build`: an unknown flag is the better thing to complain about first
    elif field.default not in (None, ""):
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text += f" (default {shown})"
    arguments: dict[str, Any] = {"dest": dest, "help": text.replace("%", "%%")}
    if kind is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **arguments)
    else:
        choices = field.metadata["choices"]
        metavar = None if choices else kind.__name__.upper()
        parser.add_argument(
            *flags,
            action=_Store,
            type=_TYPES.get(kind, kind),
            nargs=count,
            choices=choices,
            metavar=metavar,
            **arguments,
        )


def finite(word: str) -> float:
    """A finite number, with which single precision can still count; the type of every float option."""
    value = float(word)
    if not abs(value) <= 1e30:  # NaN is not
        raise ValueError(word)
    return value


def whole(word: str) -> int:
    """A whole number of at most 64 bits; the type of every int option."""
    value = int(word)
    if not -(2**63) <= value < 2**63:
        raise ValueError(word)
    return value


def printable(word: str) -> str:
    """Characters that a file, a log and a terminal can show; the type of every str option."""
    if not word.strip():
        raise argparse.ArgumentTypeError(
            "it is empty (a variable that is not set?): give a value, or leave the option out"
        )
    odd = next((letter for letter in word if unicodedata.category(letter) in ("Cc", "Cs")), None)
    if odd is not None:
        raise argparse.ArgumentTypeError(
            f"{word[:40]} holds {odd!r}, a control character or a byte that is no UTF-8: choose another value"
        )
    return word


finite.__name__, whole.__name__, printable.__name__ = "float", "int", "str"  # what argparse calls them
_TYPES = {float: finite, int: whole, str: printable}


def kind_of(hint: Any) -> tuple[type, int | str | None]:
    """The scalar type of an annotation, and how many values its flag takes (None: one; '+': a tuple of any length)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return parts[0], "+" if parts[-1] is Ellipsis else len(parts)
    return hint, None


def build(schema: type[T], *layers: Given) -> T:
    """The dataclass `schema` with the values of `layers`, later layers winning; lists become tuples.

    Raises:
        UserError: a name that is not an option, a required option that is missing.
    """
    values: Given = {}
    for layer in layers:
        values.update(layer)
    known = {opt.field.name: opt.field for opt in options_of(schema)}
    known |= {
        field.name: field for field in dataclasses.fields(schema) if not field.metadata
    }  # set by presets, without a flag
    for name in values:
        if name not in known:
            raise UserError(f"{schema.__name__} has no option {name}{nearest(name, known)}")
    missing = [
        flags_of(field)[0]
        for name, field in known.items()
        if name not in values and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; see --help")
    return _filled(schema, {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _filled(schema: type[T], values: Given) -> T:
    """`schema` with those of `values` that are its own or of its groups."""
    arguments = {}
    for field in dataclasses.fields(schema):
        if inner := field.metadata.get("group"):
            arguments[field.name] = _filled(
                inner, {k: v for k, v in values.items() if k not in field.metadata["without"]}
            )
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return schema(**arguments)


def as_dict(config: Any, whole: bool = False) -> Given:
    """A config as plain JSON values by option name, its groups laid flat; `whole`: with `later` options at their defaults too."""
    values: Given = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "group" in field.metadata:
            values |= {k: v for k, v in as_dict(value, whole).items() if k not in field.metadata["without"]}
        elif whole or not field.metadata.get("later") or value != field.default:
            values[field.name] = list(value) if isinstance(value, tuple) else value
    return values
