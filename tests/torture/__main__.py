"""Torture from outside: kills, flipped bits, two-process starts on a busy machine, a long run, and bad inputs.

    python -m tests.torture --kills 50 --flips 200 --starts 20 --inputs all

- A kill is a SIGKILL to a training process at a random moment, also during saves. Then the same command runs to its
  end, and its checkpoint must equal that of an undisturbed run bit for bit.
- A flip turns one bit of one file of a checkpoint, a latent set, samples or weights. The reader must refuse the file,
  or come to the same result.
- A start is an encoding by two processes while other processes keep the cores busy. It must exit with code 0.
- An input is a row of the table of bad options and bad files, as a process of its own.

The counts are printed. --out writes them after each unit: the same command continues there, and one with larger counts
adds to them.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.checkpoint import versions
from runtime import errors, files, progress
from runtime.errors import UserError, require
from runtime.options import option, read, require_bounds
from tests.torture import flips, processes, table
from tests.torture import world as worlds
from tests.torture.processes import Units
from tests.torture.rows import Row, answer
from tests.torture.world import World


@dataclass(frozen=True, kw_only=True)
class Options:
    kills: int = option(50, within="[0, inf)", help="SIGKILLs of training runs, up to eight of each")
    steps: int = option(120, within="[2, inf)", help="optimiser steps of those runs")
    flips: int = option(200, within="[0, inf)", help="flipped bits, over all kinds of files")
    starts: int = option(20, within="[0, inf)", help="two-process encodings on a busy machine")
    long_steps: int = option(
        0, within="[0, inf)", help="tiny steps of one run; its memory and open files must stay flat"
    )
    inputs: str = option("all", help="bad inputs as processes: how many, evenly over the table, or all")
    seed: int = option(0, help="seed of moments and places")
    out: str | None = option(None, help="result file (JSON); a unit that it holds is not done again")

    def __post_init__(self) -> None:
        require_bounds(self)
        require(self.inputs == "all" or self.inputs.isdigit(), f"--inputs {self.inputs}: give a number, or all")

    @property
    def rows(self) -> list[Row]:
        """The bad inputs to run."""
        rows = table.rows()
        count = len(rows) if self.inputs == "all" else int(self.inputs)
        return rows[:: max(1, len(rows) // count)][:count] if count else []


def _kills(options: Options, world: World, place: Path, done: int) -> Units:
    return processes.kills(world, place, done, options.kills, options.steps, options.seed)


def _flips(options: Options, world: World, place: Path, done: int) -> Units:
    """All flips that are left, as one unit."""
    outcomes, faults = flips.run(world, place, options.flips - done, first=options.seed + done)
    yield options.flips - done, outcomes, faults


def _starts(options: Options, world: World, place: Path, done: int) -> Units:
    return processes.starts(world, place, done, options.starts)


def _long_run(options: Options, world: World, place: Path, done: int) -> Units:
    return processes.long_run(world, place, done, options.long_steps)


def _inputs(options: Options, world: World, place: Path, done: int) -> Units:
    for row in options.rows[done:]:
        scratch = place / "row"
        scratch.mkdir()
        given, named = answer(row, world, scratch, as_process=True)
        shutil.rmtree(scratch)
        fault = given.fault(named)
        faults = [f"{row.command}: {row.name}: {fault}"] if fault else []
        yield 1, {"answered in one line with culprit and remedy": int(not fault)}, faults


PARTS: dict[str, tuple[Callable[[Options, World, Path, int], Units], Callable[[Options], int]]] = {
    "kills": (_kills, lambda options: options.kills),
    "flips": (_flips, lambda options: options.flips),
    "starts": (_starts, lambda options: options.starts),
    "long run": (_long_run, lambda options: options.long_steps),
    "inputs": (_inputs, lambda options: len(options.rows)),
}
"""Each part, and how many units of it the options ask for."""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is asked for and not yet in the result file, and print the counts.

    Raises:
        UserError: a unit had a fault, or the result file belongs to other settings.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = read(Options, words, prog="python -m tests.torture", description=__doc__)
    result = _result(options, words)
    with tempfile.TemporaryDirectory() as folder:
        world = worlds.build(Path(folder) / "world")
        for name, (part, count) in PARTS.items():
            state = result.setdefault(name, {"done": 0, "seconds": 0, "counts": {}, "faults": []})
            total = count(options)
            if state["done"] < total:
                bar = progress.bar(total=total, initial=state["done"], desc=name)
                with bar, closing(part(options, world, Path(folder), state["done"])) as units:
                    for done in _added(state, units):
                        bar.update(done)
                        if options.out:
                            files.write_json(options.out, result)
            counts = "".join(f", {value} {what}" for what, value in state["counts"].items())
            print(f"{name}: {state['done']} done in {state['seconds']:.0f} s, {len(state['faults'])} faults{counts}")
            for fault in state["faults"]:
                print(f"  {fault}")
    if any(result[name]["faults"] for name in PARTS):
        raise UserError("something was lost, accepted or not answered; see the faults above, and repair it")


def _result(options: Options, words: Sequence[str]) -> dict[str, Any]:
    """The content of the result file, with a new head."""
    settings = {name: asdict(options)[name] for name in ("seed", "steps", "long_steps", "inputs")}
    exists = options.out is not None and Path(options.out).is_file()
    earlier = files.read_json(Path(options.out)) if exists else {"settings": settings}
    require(
        earlier.get("settings") == settings,
        f"--out {options.out} holds results of {earlier.get('settings')}, not {settings}; "
        "use the same, or another file",
    )
    return {
        **earlier,
        "command": f"python -m tests.torture {shlex.join(words)}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def _added(state: dict[str, Any], units: Units) -> Iterator[int]:
    """Add each unit to the state of its part; yields how many were done."""
    began = time.monotonic()
    for done, counts, faults in units:
        state["done"] += done
        state["seconds"] = round(state["seconds"] + time.monotonic() - began, 1)
        began = time.monotonic()
        state["counts"] = dict(Counter(state["counts"]) + Counter(counts))
        state["faults"] += faults
        yield done


if __name__ == "__main__":
    errors.run(main)
