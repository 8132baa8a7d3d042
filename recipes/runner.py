"""Runs a chain link by link, skipping what is done, and leaves a record of success or failure."""

from __future__ import annotations

import functools
import importlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from recipes import chain, record
from recipes.chain import Link
from recipes.row import Row
from recipes.scale import Scale
from runtime import files, locks, signals
from runtime.errors import TRY_AGAIN, EndedEarly, UserError, require

# Hours to wait for another chain that makes what this one needs, and seconds between two looks.
PATIENCE, LOOK = 24.0, 5.0


def run(
    row: Row,
    scale: Scale,
    seed: int,
    work: Path,
    results: Path,
    processes: int,
    nodes: int = 1,
    *,
    until: str | None = None,
    patience: float = PATIENCE,
) -> Path | None:
    """Run what is left of the chain of `row` and write its record; returns the record's folder.

    Args:
        until: end after the last link whose name begins with this word, without a record.
        patience: hours to wait at most for another chain that makes what this one needs.

    Raises:
        UserError: a link failed; its record, with status `failed`, is written first.
        Taken: another chain still makes what this one needs; there is no record.
        EndedEarly: the process was asked to end; what a link had to save is saved.
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
        work=work,
        processes=processes,
        nodes=nodes,
        results=results,
    )
    with signals.noted(at_once=True) as asked:
        try:
            for link, command in zip(plan.up_to(until), commands, strict=False):
                with _alone(link, work, patience):
                    asked.end()  # a request that came when the link before had nothing left to save
                    if link.done:
                        print(f"done: {link.name}", flush=True)
                        continue
                    print(f"\n$ {command}", flush=True)
                    _start(link, command, processes, nodes)
                    require(link.done, f"{link.name} ended without {link.makes}; run it by hand to see why: {command}")
        except locks.Taken:
            raise
        except UserError as error:
            write(failure=str(error))
            raise
        return None if until else write()


@contextmanager
def _alone(link: Link, work: Path, patience: float) -> Iterator[None]:
    """Keep other chains from what `link` writes inside the block; first wait for one that is there, or for its result.

    The lock lies beside the work, since the link's own command takes that of the folder itself.

    Raises:
        Taken: another chain is still there after `patience` hours.
    """
    place = work / "locks" / "-".join(link.folder.relative_to(work).parts)
    with files.writing(place):
        place.mkdir(parents=True, exist_ok=True)  # it stays, so that no process removes it while another looks
    end, waited = time.monotonic() + 3600 * patience, False
    with ExitStack() as held:
        while not link.done:
            try:
                held.enter_context(locks.locked(place, "wait for it, and give the same command again"))
                break
            except locks.Taken as taken:
                if time.monotonic() > end:
                    raise
                if not waited:
                    print(f"{link.name}: waiting for {taken.holder}, which makes {link.folder}", flush=True)
                waited = True
                time.sleep(LOOK)
        yield


def call(words: Sequence[str]) -> None:
    """Run a command in this process: a file or `-m` and a module, then its options."""
    module, *options = words[1:] if words[0] == "-m" else words
    importlib.import_module(module.removesuffix(".py")).main(options)


def _start(link: Link, command: str, processes: int, nodes: int) -> None:
    """Run one link: one process in this one, several through the launcher, on several nodes as a Slurm task on each.

    Raises:
        EndedEarly: it was asked to end.
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

    with subprocess.Popen(words) as process:
        try:
            process.wait()
        except EndedEarly:
            process.terminate()  # any signal becomes SIGTERM, which launchers pass on to their processes
            raise
    # a launcher ends with 1 whatever code its processes end with; a run that saved and left writes a file
    if process.returncode == TRY_AGAIN or (link.folder / ENDED_EARLY).exists():
        raise EndedEarly(f"{link.name} was asked to end; the same command continues")
    require(process.returncode == 0, f"{link.name} ended with exit code {process.returncode}: {command}")
