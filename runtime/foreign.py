"""Flags that a command does not have: what it answers to a pasted command of another program.

Each foreign flag gets a reply. Where all of them are understood, the whole command is translated.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from runtime.errors import nearest


class Hint(NamedTuple):
    """The reply to a flag that is no option here, and its translation."""

    reply: str
    # To write in its place; VALUE is what was given to the flag. None: only the reply helps.
    words: tuple[str, ...] | None = ()


def message(
    argv: Sequence[str], unknown: Sequence[str], flags: Collection[str], hints: Mapping[str, Hint], prog: str
) -> str:
    """The message for all words of `argv` that are no flags here: a reply to each, and the command that is meant."""
    foreign = [word.split("=")[0] for word in unknown if word.startswith("--")]
    replies, translated, understood = [], [], True
    for flag, values in _by_flag(argv):
        hint = _hint(flag, values, flags, hints)
        if hint is not None:
            name = flag if flag in foreign else f"{flag} {shlex.join(values)}"
            replies.append(f"{name} is not an option here: {hint.reply}")
            understood = understood and hint.words is not None
            for word in hint.words or ():
                translated += values if word == "VALUE" else [word]
        elif flag in foreign:
            replies.append(f"unknown option {flag}{_near(flag, flags)}")
            understood = False
        else:
            translated += [flag, *values] if flag else values
    if not foreign:
        return f"unknown option {unknown[0]}; see --help"
    text = " | ".join(dict.fromkeys(replies))
    if not understood:
        return f"{text}; see --help"
    program = f"python {prog}" if prog.endswith(".py") else prog
    return f"{text} | translated: {shlex.join([*program.split(), *translated])}"


def _by_flag(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag of `argv` with its values; words before the first flag belong to ""."""
    flag, values = "", list[str]()
    for word in argv:
        if word.startswith("--"):
            if flag or values:
                yield flag, values
            flag, given, value = word.partition("=")
            values = [value] if given else []
        else:
            values.append(word)
    yield flag, values


def _hint(flag: str, values: Sequence[str], flags: Collection[str], hints: Mapping[str, Hint]) -> Hint | None:
    """The reply to a flag, None if it is one here or nothing is known of it. Underscores count as dashes."""
    dashed = flag.replace("_", "-")
    by_value = hints.get(f"{dashed}={values[0]}" if len(values) == 1 else "")
    if flag in flags:
        return by_value
    if dashed in flags:
        return by_value or Hint(f"write {dashed}", (dashed, "VALUE"))
    return hints.get(dashed) or hints.get(dashed.replace("--no-", "--", 1))


def _near(flag: str, flags: Collection[str]) -> str:
    """' (did you mean X?)' for a flag at most two edits away, or ''."""
    return nearest(flag, [known for known in flags if edits(flag, known) <= 2])


def edits(a: str, b: str) -> int:
    """How many letters must be put in, left out or replaced to turn `a` into `b`."""
    before = list(range(len(b) + 1))
    for row, letter in enumerate(a, start=1):
        line = [row]
        for column, other in enumerate(b, start=1):
            line.append(min(before[column] + 1, line[-1] + 1, before[column - 1] + (letter != other)))
        before = line
    return before[-1]
