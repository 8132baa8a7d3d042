"""A bad input as a row of a table, and the judgement of a command's answer to it.

The answer to every row is exit code 2 and one line that names the culprit and a remedy, and the command writes nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from runtime import errors
from tests.torture.world import COMMANDS, World, start

REMEDY = re.compile(
    r"\b(use|give|choose|add|must|run|write|encode|restore|see|make|needs?|between|lie|drop|free|correct|remove|repair|"
    r"copy|get|build|did you mean|there are|at least|at most|count from|positive|pass|fetch|name|save|leave|wait|"
    r"unpack|known|convert|expected|install|raise|lower|takes|go together|accept|check|knows?|nothing to set|"
    r"belong)\b"
)
PROGRESS = re.compile(r"\d+%\||/s\]")
"""Marks a line as a progress bar."""
BEGUN = ("log.jsonl", "run.json", "job.json", ".stopped")
"""Files that a command leaves when it stops after it has begun its work. The same command then continues from there."""

Damage = Callable[[World, Path], tuple[list[str], list[str]]]
"""Makes damaged files below a folder; returns more arguments, and more names that the answer must contain."""


@dataclass(frozen=True)
class Row:
    """One bad input: a command, arguments after those under which it works, and names that the answer must contain."""

    command: str
    name: str
    words: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    damage: Damage | None = None


@dataclass(frozen=True)
class Answer:
    """What a command did with a row."""

    code: object
    """The exit code, None for a success; the text of an exception that is not SystemExit."""
    lines: list[str]
    """Lines of standard error without progress bars."""
    written: list[str]
    """Files that it left behind."""

    def fault(self, named: tuple[str, ...]) -> str | None:
        """What is wrong with the answer; None for a good one."""
        text = " | ".join(self.lines)
        if self.code != 2 or len(self.lines) != 1:
            return f"exit {self.code}, {len(self.lines)} lines: {text[-300:]}"
        if missing := [name for name in named if name not in text]:
            return f"does not name {missing}: {text}"
        if not REMEDY.search(text):
            return f"no remedy: {text}"
        return f"wrote {self.written}" if self.written else None


def answer(row: Row, world: World, scratch: Path, as_process: bool = False) -> tuple[Answer, tuple[str, ...]]:
    """Run a row, in this process unless `as_process`; returns its answer and the names that it must contain."""
    words, named = row.damage(world, scratch) if row.damage else ([], [])
    argv = [*world.words(row.command), *row.words, *words]
    before = listing(world.root)
    code, output = (_in_process if as_process else _in_thread)(row.command, argv)
    written = [name for name in listing(world.root) - before if Path(name.split(" (")[0]).name not in BEGUN]
    if world.out.exists():
        shutil.rmtree(world.out)
    lines = [line for line in re.split(r"[\r\n]+", output) if line.strip() and not PROGRESS.search(line)]
    return Answer(code, lines, sorted(written)), (*row.named, *named)


def _in_process(command: str, argv: list[str]) -> tuple[object, str]:
    process = start(*COMMANDS[command].process.split(), *argv)
    _, output = process.communicate()
    return process.returncode, output


def _in_thread(command: str, argv: list[str]) -> tuple[object, str]:
    """Run a command through the one place that catches user errors; a thread, so that it has no state of this one."""
    output = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output), ThreadPoolExecutor(1) as runner:
        # whatever exception ends the command is part of its answer
        end = runner.submit(errors.run, lambda: COMMANDS[command].main(argv)).exception()
    code = end.code if isinstance(end, SystemExit) else end and f"{type(end).__name__}: {end}"
    return code, output.getvalue()


def listing(root: Path) -> set[str]:
    """Every file below `root` with its size."""
    # os.walk, because pathlib takes four times as long, and every row lists the world twice
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    return {f"{os.path.relpath(path, root)} ({os.path.getsize(path)} bytes)" for path in paths if os.path.isfile(path)}


def faults(table: list[Row], world: World, scratch: Path, as_process: bool = False) -> dict[str, str]:
    """The rows whose answer is not as it should be, each with the reason."""
    reasons = {}
    for number, row in enumerate(table):
        place = scratch / str(number)
        place.mkdir(parents=True)
        given, named = answer(row, world, place, as_process)
        if reason := given.fault(named):
            reasons[f"{row.command}: {row.name}"] = reason
        shutil.rmtree(place)
    return reasons
