"""Runs a chain link by link, skipping what is there, and leaves a record whether it went well or not."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

from recipes import chain, record
from recipes.chain import Link
from recipes.rows import Row
from recipes.scale import Scale
from runtime.errors import UserError

REQUEUE = 75
"""What a run exits with that was asked to stop and has saved: to be started again."""


def run(row: Row, scale: Scale, seed: int, work: Path, results: Path, processes: int, nodes: int = 1) -> Path:
    """Run what is left of the chain of `row` and write its record; returns the record's folder.

    Raises:
        UserError: a link failed; its record, with status `failed`, is written first.
        SystemExit: a link was asked to stop and has saved (exit code 75).
    """
    plan = chain.build(row, scale, seed, work)
    commands = [link.command(processes, nodes) for link in plan.links]
    try:
        for link, command in zip(plan.links, commands, strict=True):
            if link.done:
                print(f"done: {link.name}", flush=True)
                continue
            print(f"\n$ {command}", flush=True)
            _start(link, command, processes * nodes)
            if not link.done:
                raise UserError(f"{link.name} ended without {link.makes}; run it by hand to see why: {command}")
    except UserError as error:
        record.write(plan, size=scale, seed=seed, commands=commands, processes=processes * nodes, results=results,
                     failure=str(error))
        raise
    return record.write(plan, size=scale, seed=seed, commands=commands, processes=processes * nodes, results=results)


def _start(link: Link, command: str, processes: int) -> None:
    """One link: here where one process does, else through the launcher."""
    if processes == 1:
        words = list(link.words)
        module = words.pop(0) if words[0] != "-m" else (words.pop(0), words.pop(0))[1]
        importlib.import_module(module.removesuffix(".py")).main(words)
        return
    words = shlex.split(command)
    launcher = ["-m", "accelerate.commands.launch", *words[2:]] if words[0] == "accelerate" else words[1:]
    code = subprocess.run([sys.executable, *launcher], check=False).returncode
    if code == REQUEUE:
        raise SystemExit(REQUEUE)
    if code:
        raise UserError(f"{link.name} ended with exit code {code}: {command}")
