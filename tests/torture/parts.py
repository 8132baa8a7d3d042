"""The parts of the torture: processes killed at random moments, flipped bits, starts on a busy machine, bad inputs.

Each part is a generator of `Units`. It starts after the units that an earlier call has done.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import train
from models.checkpoint import Checkpoint
from runtime import files
from runtime.errors import require
from runtime.options import option
from tests.torture import bad_files, crashes, flips
from tests.torture.rows import Row, answer
from tests.torture.world import World, start


@dataclass(frozen=True, kw_only=True)
class Options:
    kills: int = option(50, within="[0, inf)", help="SIGKILLs of training runs, up to eight of each")
    steps: int = option(120, within="[2, inf)", help="optimiser steps of those runs")
    crashes: int = option(
        60,
        within="[0, inf)",
        help="SIGKILLs at the n-th file operation of encode and import, of generate, of posthoc and stage 2",
    )
    faults: int = option(200, within="[0, inf)", help="failing operations: a failing or full disk, a permission")
    races: int = option(100, within="[0, inf)", help="two processes at once on one output")
    flips: int = option(500, within="[0, inf)", help="flipped bits, over all kinds of files")
    starts: int = option(20, within="[0, inf)", help="two-process encodings on a busy machine")
    long_steps: int = option(
        0, within="[0, inf)", help="tiny steps of one run; its memory and open files must stay flat"
    )
    inputs: str = option("all", help="bad inputs as processes: how many, evenly over the table, or all")
    seed: int = option(0, help="seed of moments and places")
    out: str | None = option(None, help="result file (JSON); a unit that it holds is not done again")

    def __post_init__(self) -> None:
        require(self.inputs == "all" or self.inputs.isdigit(), f"--inputs {self.inputs}: give a number, or all")

    @property
    def rows(self) -> list[Row]:
        """The bad inputs to run."""
        rows = bad_files.table()
        count = len(rows) if self.inputs == "all" else int(self.inputs)
        return rows[:: max(1, len(rows) // count)][:count] if count else []


Units = Iterator[tuple[int, Mapping[str, int], list[str]]]
"""Yields how many units (kills, starts, steps) are newly done, counts of what came of them, and faults in words."""
KILLS_PER_RUN = 8
ALIGNED = ["--align", "latent", "--align-hidden", 8]


def run_to_end(words: Sequence[object]) -> str | None:
    """Run a command; returns None if it succeeds, else the end of its standard error."""
    process = start(*words)
    _, errors = process.communicate()
    return None if process.returncode == 0 else errors[-500:]


def kills(options: Options, world: World, place: Path, done: int) -> Units:
    """SIGKILL at random moments of one run, again and again. Then it must end with the bits of an undisturbed run."""
    argv = [*world.words("train.py"), *ALIGNED, "--align-stop-steps", options.steps // 2]
    argv += ["--max-train-steps", options.steps, "--checkpointing-steps", 10, "--log-steps", 5]
    undisturbed, folder = place / "undisturbed", place / "killed"
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        # in this process, on one thread like the others: the number of threads changes the last bits
        torch.set_num_threads(1)
        train.main([*map(str, argv), "--output-dir", str(undisturbed)])
    expected = tensors_of(undisturbed / "x")
    while done < options.kills:
        several = min(KILLS_PER_RUN, options.kills - done)
        counts, faults = Counter(runs=1), []
        for number in range(done, done + several):
            chance = random.Random(f"{options.seed} kill {number}")
            process = start("train.py", *argv, "--output-dir", folder)
            _wait_for(chance.choice(("set-up", "step", "step", "save", "save")), folder / "x", process, chance)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            counts["during a save"] += any((folder / "x" / "checkpoints").glob(".*.tmp"))
        done += several
        failure = run_to_end(["train.py", *argv, "--output-dir", folder])
        if failure is None and tensors_of(folder / "x") == expected:
            counts["runs with the same bits"] += 1
        else:
            faults.append(f"after {done} kills: {failure or 'other bits'}")
        if leftovers := [path.name for path in (folder / "x").rglob(".*.tmp")]:
            faults.append(f"left behind: {leftovers}")
        shutil.rmtree(folder)
        yield several, counts, faults


def _wait_for(moment: str, run: Path, process: subprocess.Popen[str], chance: random.Random) -> None:
    """Wait for a moment of a run, while it lives: somewhere in its set-up, among its steps, or inside a save."""

    def wait(seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        end = time.monotonic() + seconds
        while not until() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.0005)

    wait(60, (run / ".lock").exists)
    if moment == "set-up":
        wait(chance.uniform(0.0, 2.0))
        return
    log = run / "log.jsonl"
    begun = log.stat().st_mtime_ns if log.exists() else 0
    wait(60, lambda: log.exists() and log.stat().st_mtime_ns != begun and log.stat().st_size > 0)
    if moment == "step":
        wait(chance.uniform(0.0, 0.5))
    else:
        wait(20, lambda: any((run / "checkpoints").glob(".*.tmp")))
        # a save takes some milliseconds, and must not end before the kill
        time.sleep(chance.uniform(0.0, 0.01))


def tensors_of(run: Path) -> dict[str, str]:
    """SHA-256 of every tensor file of a run's last checkpoint, and of its log without rates."""
    folder = Checkpoint.open(run).path
    log = re.sub(r', "images_per_second": [^,}]*', "", (run / "log.jsonl").read_text())
    tensors = {file.name: files.digest(file) for file in folder.glob("*.safetensors")}
    return {**tensors, "log": hashlib.sha256(log.encode()).hexdigest()}


def bit_flips(options: Options, world: World, place: Path, done: int) -> Units:
    """All flips that are left, as one unit."""
    left = options.flips - done
    yield left, *flips.run(world, place, left, first=options.seed + done)


def starts(options: Options, world: World, place: Path, done: int) -> Units:
    """Encodings by two processes, while as many busy processes as there are cores compete with them."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0]
    argv = [*launcher, "-m", "preprocessing.encode", *world.words("encode"), "--batch-size", 1, "--shard-size", 1]
    busy = [start("-c", "while True: pass") for _ in range(os.cpu_count() or 1)]
    try:
        for number in range(done, options.starts):
            failure = run_to_end([*argv, "--out", place / f"start{number}"])
            yield 1, {"clean ends": int(failure is None)}, [f"start {number}: {failure}"] if failure else []
    finally:
        for process in busy:
            process.kill()
            process.communicate()


def long_run(options: Options, world: World, place: Path, done: int) -> Units:
    """Memory, open files and threads of one run of tiny steps, early and late. One unit: it cannot be continued."""
    steps = options.long_steps
    argv = ["train.py", *world.words("train.py"), *ALIGNED, "--batch-size", 2, "--log-steps", 50]
    argv += ["--max-train-steps", steps, "--checkpointing-steps", steps // 4, "--sampling-steps", steps // 20]
    process = start(*argv, "--output-dir", place / "long")
    watched = psutil.Process(process.pid)
    uses: list[tuple[float, ...]] = []
    while process.poll() is None:
        # the process may end between two looks at it
        with suppress(psutil.Error, OSError):
            uses.append((watched.memory_info().rss / 2**20, watched.num_fds(), watched.num_threads()))
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
    faults = [] if process.returncode == 0 else [process.communicate()[1][-300:]]
    # medians of nine seconds, after a fifth of the run and shortly before its end
    fifth = len(uses) // 5
    early, late = np.median(uses[fifth : fifth + 9], axis=0), np.median(uses[-12:-3], axis=0)
    if late[0] > early[0] + 20 or (late[1:] > early[1:] + 1).any():
        faults.append("memory, open files or threads grow")
    counts: dict[str, Any] = {}
    for number, kind in enumerate(("MiB", "open files", "threads")):
        counts |= {f"{kind} early": round(early[number]), f"{kind} late": round(late[number])}
    yield steps - done, counts, faults


def inputs(options: Options, world: World, place: Path, done: int) -> Units:
    """Rows of the table, each as a process of its own."""
    for row in options.rows[done:]:
        scratch = place / "row"
        scratch.mkdir()
        given, named = answer(row, world, scratch, as_process=True)
        shutil.rmtree(scratch)
        fault = given.fault(named)
        counts = {"answered in one line with culprit and remedy": int(not fault)}
        yield 1, counts, [f"{row.command}: {row.name}: {fault}"] if fault else []


Part = tuple[Callable[[Options, World, Path, int], Units], Callable[[Options], int]]


def _of_cases(act: crashes.Act, names: Sequence[str], count: Callable[[Options], int]) -> Part:
    """The part that does `act` to some of the cases of `crashes`."""

    def part(options: Options, world: World, place: Path, done: int) -> Units:
        return crashes.units(act, names, range(done, count(options)), options.seed, world, place)

    return part, count


CASES = ("encode", "import", "generate", "posthoc", "stage 2")
PARTS: dict[str, Part] = {
    "kills of encode and import": _of_cases(crashes.kill, CASES[:2], lambda options: options.crashes),
    "kills of generate": _of_cases(crashes.kill, CASES[2:3], lambda options: options.crashes),
    "kills of posthoc and stage 2": _of_cases(crashes.kill, CASES[3:], lambda options: options.crashes),
    "faults": _of_cases(crashes.fail, CASES, lambda options: options.faults),
    "races": _of_cases(crashes.race, CASES, lambda options: options.races),
    "kills": (kills, lambda options: options.kills),
    "flips": (bit_flips, lambda options: options.flips),
    "starts": (starts, lambda options: options.starts),
    "long run": (long_run, lambda options: options.long_steps),
    "inputs": (inputs, lambda options: len(options.rows)),
}
"""Each part, and how many units of it the options ask for."""
