"""Runs a chain link by link, skipping what is done, and leaves a record of success or failure."""

from __future__ import annotations

import functools
import importlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from recipes import chain, record
from recipes.chain import Link
from recipes.rows import Row
from recipes.scale import Scale
from runtime import files, signals
from runtime.errors import TRY_AGAIN, UserError, require


def run(row: Row, scale: Scale, seed: int, work: Path, results: Path, processes: int, nodes: int = 1) -> Path:
    """Run what is left of the chain of `row` and write its record; returns the record's folder.

    Raises:
        UserError: a link failed; its record, with status `failed`, is written first.
        SystemExit: a link was asked to stop and has saved (exit code 75).
    """
    for folder in (work, results):  # what would fail at the end fails now
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    plan = chain.build(row, scale, seed, work)
    commands = [link.command(processes, nodes) for link in plan.links]
    write = functools.partial(
        record.write,
        plan,
        size=scale,
        seed=seed,
        commands=commands,
        processes=processes * nodes,
        results=results,
    )
    try:
        for link, command in zip(plan.links, commands, strict=True):
            if link.done:
                print(f"done: {link.name}", flush=True)
                continue
            print(f"\n$ {command}", flush=True)
            _start(link, command, processes, nodes)
            require(link.done, f"{link.name} ended without {link.makes}; run it by hand to see why: {command}")
    except UserError as error:
        write(failure=str(error))
        raise
    return write()


def call(words: Sequence[str]) -> None:
    """Run a command in this process: a file or `-m` and a module, then its options."""
    module, *options = words[1:] if words[0] == "-m" else words
    importlib.import_module(module.removesuffix(".py")).main(options)


def _start(link: Link, command: str, processes: int, nodes: int) -> None:
    """Run one link: one process in this one, several through the launcher, on several nodes as a Slurm task on each.

    Raises:
        SystemExit: it was asked to end (code 75).
        UserError: it failed.
    """
    if processes * nodes == 1:
        call(link.words)
        return
    words = shlex.split(command)
    if nodes > 1 and link.many:
        words = ["srun", "bash", "-c", f"exec {command}"]  # each node's shell fills in its own $SLURM_NODEID
    elif words[0] == "accelerate":
        words = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    else:
        words = [sys.executable, *words[1:]]
    from training.between import ENDED_EARLY

    with signals.noted() as asked, subprocess.Popen(words) as process:
        while process.poll() is None and not asked.by:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        if asked.by:
            process.terminate()  # any signal becomes SIGTERM, which launchers pass on to their processes
    # a launcher ends with 1 whatever code its processes end with; a run that saved and left writes a file
    if asked.by or process.returncode == TRY_AGAIN or (link.makes.parents[2] / ENDED_EARLY).exists():
        raise SystemExit(TRY_AGAIN)
    require(process.returncode == 0, f"{link.name} ended with exit code {process.returncode}: {command}")
