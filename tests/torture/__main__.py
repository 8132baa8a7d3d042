"""Torture from outside: kills, faults, races, flipped bits, starts on a busy machine, a long run, and bad inputs.

    python -m tests.torture --out FILE.json

- A kill is a SIGKILL to a training process at a random moment, also during saves. Then the same command runs to its
  end, and its checkpoint must equal that of an undisturbed run bit for bit.
- Crashes kill a command (encode, import, generate, posthoc, stage 2) at its n-th file operation, and faults let that
  operation fail (EIO, ENOSPC, EACCES); a race starts two processes on one output. Then the same command must end with
  the files of an undisturbed one. Each is a fork of a warm process under a preloaded library (`forks.py`, `faults.c`).
- A flip turns one bit of one file of a checkpoint, a latent set, samples or weights. The reader must refuse the file,
  or come to the same result.
- A start is an encoding by two processes while other processes keep the cores busy. It must exit with code 0.
- An input is a row of the table of bad options and bad files, as a process of its own.

The counts are printed. --out writes them after each unit, and a table beside them: the same command continues there,
and one with larger counts adds to them.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.checkpoint import versions
from runtime import errors, files, launch, progress
from runtime.errors import UserError, require
from runtime.options import read
from runtime.text import aligned
from tests.torture import world as worlds
from tests.torture.parts import PARTS, Options, Units


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
                            Path(options.out).with_suffix(".txt").write_text(_table(result))
            counts = "".join(f", {value} {what}" for what, value in state["counts"].items())
            print(f"{name}: {state['done']} done in {state['seconds']:.0f} s, {len(state['faults'])} faults{counts}")
            for fault in state["faults"]:
                print(f"  {fault}")
    if any(result[name]["faults"] for name in PARTS):
        raise UserError("something was lost, accepted or not answered; see the faults above, and repair it")


def _table(result: dict[str, Any]) -> str:
    """The parts that were tried, as aligned text."""
    lines = [["kind", "tried", "survived"]]
    for name, part in ((name, result[name]) for name in PARTS if result.get(name, {}).get("done")):
        lines.append([name, str(part["done"]), str(part["done"] - len(part["faults"]))])
    return f"{result['date']}, commit {result['commit']}, {result['machine']}\n\n{aligned(lines)}\n"


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
        "commit": launch.commit(),
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
