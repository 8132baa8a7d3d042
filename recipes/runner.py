"""Runs a chain link by link, skipping what is there, and leaves a record whether it went well or not."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from recipes import chain, record
from recipes.chain import Link
from recipes.rows import Row
from recipes.scale import Scale
from runtime import files, signals
from runtime.errors import UserError
from training.between import ENDED_EARLY

REQUEUE = 75
"""What a run exits with that was asked to stop and has saved: to be started again."""


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
    try:
        for link, command in zip(plan.links, commands, strict=True):
            if link.done:
                print(f"done: {link.name}", flush=True)
                continue
            print(f"\n$ {command}", flush=True)
            _start(link, command, processes, nodes)
            if not link.done:
                raise UserError(f"{link.name} ended without {link.makes}; run it by hand to see why: {command}")
    except UserError as error:
        record.write(
            plan,
            size=scale,
            seed=seed,
            commands=commands,
            processes=processes * nodes,
            results=results,
            failure=str(error),
        )
        raise
    return record.write(plan, size=scale, seed=seed, commands=commands, processes=processes * nodes, results=results)


def _start(link: Link, command: str, processes: int, nodes: int) -> None:
    """One link: here where one process does, else through the launcher, on several nodes one of Slurm's tasks on each.

    Raises:
        SystemExit: it was asked to end (code 75): a signal to this process is passed on as SIGTERM, which launchers pass on in turn.
        UserError: it failed.
    """
    if processes * nodes == 1:
        words = list(link.words)
        module = words.pop(0) if words[0] != "-m" else (words.pop(0), words.pop(0))[1]
        importlib.import_module(module.removesuffix(".py")).main(words)
        return
    words = shlex.split(command)
    if nodes > 1 and link.many:
        words = ["srun", "bash", "-c", f"exec {command}"]  # each node's shell fills in its own $SLURM_NODEID
    else:
        words = [
            sys.executable,
            *(["-m", "accelerate.commands.launch", *words[2:]] if words[0] == "accelerate" else words[1:]),
        ]
    with signals.noted() as asked, subprocess.Popen(words) as process:
        told = False
        while process.poll() is None:
            if asked.by and not told:
                process.terminate()
                told = True
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
    code = process.returncode
    # a launcher ends with 1 whatever its processes say; a run that saved and left says so by a file
    if asked.by or code == REQUEUE or (link.makes.parents[2] / ENDED_EARLY).exists():
        raise SystemExit(REQUEUE)
    if code:
        raise UserError(f"{link.name} ended with exit code {code}: {command}")
