"""Torture from outside: kills, flipped bits, two-process starts under load, and bad inputs, as real processes.

    python -m benchmarks.torture --kills 50 --flips 200 --starts 20 --inputs all

A kill is SIGKILL to a training process at a random moment, saves among them; after it the same command runs to its end, whose
checkpoint must be that of an undisturbed run bit for bit. A flip turns one bit of one file of a checkpoint, of a latent set or of
samples; whoever reads the file must refuse it or come to the very same result. A start is an encoding by two processes
while other processes keep the cores busy; it must end with exit code 0. The counts are printed, and written with --out after
each kill, flip, start and input: the same command goes on from there, and one with larger counts adds to them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import bad_inputs, bad_world
from benchmarks.bad_world import World
from benchmarks.flips import flips as bit_flips
from models.checkpoint import Checkpoint, versions
from runtime import errors, files, progress
from runtime.errors import UserError, require
from runtime.options import option, read

ROOT = Path(__file__).parents[1]
Units = Iterator[tuple[int, dict[str, int], list[str]]]
"""What a part yields: how many of its kills, flips, ... are done now, what they came to in counts, and faults in words."""


@dataclass(frozen=True, kw_only=True)
class Options:
    kills: int = option(50, help="SIGKILLs of training runs, up to eight of each")
    steps: int = option(120, help="optimiser steps of those runs")
    flips: int = option(200, help="flipped bits, over all kinds of files")
    starts: int = option(20, help="two-process encodings on a busy machine")
    long_steps: int = option(0, help="tiny steps of one long run, whose memory and open files must stay flat")
    inputs: str = option("all", help="bad inputs as processes: how many, evenly over the table, or all")
    seed: int = option(0, help="seed of moments and places")
    out: str | None = option(None, help="result file (JSON); what it holds is not done again")

    def __post_init__(self) -> None:
        require(
            min(self.kills, self.flips, self.starts, self.long_steps) >= 0,
            "--kills, --flips, --starts and --long-steps must not be negative",
        )
        require(self.steps > 1, f"--steps {self.steps} must be at least 2")
        require(self.inputs == "all" or self.inputs.isdigit(), f"--inputs {self.inputs}: give a number, or all")

    def chance(self, part: str, number: int) -> random.Random:
        """The moments and places of one unit: the same whenever it is done."""
        return random.Random(f"{self.seed} {part} {number}")

    @property
    def rows(self) -> list[bad_inputs.Row]:
        """The bad inputs that are given."""
        table = bad_inputs.rows()
        count = len(table) if self.inputs == "all" else int(self.inputs)
        return table[:: max(1, len(table) // count)][:count] if count else []


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for and not yet in the result file, and print the counts; ends with an error where anything was lost."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = read(Options, words, prog="python -m benchmarks.torture", description=__doc__)
    settings = {name: getattr(options, name) for name in ("seed", "steps", "long_steps", "inputs")}
    earlier = (
        files.read_json(Path(options.out)) if options.out and Path(options.out).is_file() else {"settings": settings}
    )
    require(
        earlier.get("settings") == settings,
        f"--out {options.out} holds results of {earlier.get('settings')}, not {settings}; "
        f"use the same, or another file",
    )
    result: dict[str, Any] = {
        **earlier,
        "command": f"python -m benchmarks.torture {shlex.join(words)}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": versions(),
    }
    parts: dict[str, tuple[Callable[[Options, World, Path, int], Units], int]] = {
        "kills": (kills, options.kills),
        "flips": (flips, options.flips),
        "starts": (starts, options.starts),
        "long run": (long_run, options.long_steps),
        "inputs": (inputs, len(options.rows)),
    }
    with tempfile.TemporaryDirectory() as place:
        world = bad_world.build(Path(place) / "world")
        for name, (part, total) in parts.items():
            state = result.setdefault(name, {"done": 0, "seconds": 0, "counts": {}, "faults": []})
            if state["done"] < total:
                with closing(part(options, world, Path(place), state["done"])) as units:
                    for _ in _kept(state, units, progress.bar(total=total, initial=state["done"], desc=name)):
                        if options.out:
                            files.write_json(options.out, result)
            print(
                f"{name}: {state['done']} done in {state['seconds']:.0f} s, {len(state['faults'])} faults"
                + "".join(f", {value} {what}" for what, value in state["counts"].items()),
                flush=True,
            )
            for fault in state["faults"]:
                print(f"  {fault}")
    if any(result[name]["faults"] for name in parts):
        raise UserError("something was lost, accepted or not answered: see above, and repair it")


def _kept(state: dict[str, Any], units: Units, bar: Any) -> Iterator[None]:
    """Add what the units come to to the state of their part, one after the other."""
    began = time.monotonic()
    with bar:
        for done, counts, faults in units:
            state["done"] += done
            state["seconds"] = round(state["seconds"] + time.monotonic() - began, 1)
            began = time.monotonic()
            state["counts"] = dict(Counter(state["counts"]) + Counter(counts))
            state["faults"] += faults
            bar.update(done)
            yield


def command(*words: object, **more: Any) -> subprocess.Popen:
    """Start Python with `words` on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def kills(options: Options, world: World, place: Path, done: int) -> Units:
    """SIGKILL at random moments, again and again in one run, until it is through; then a new run."""
    steps = options.steps
    argv = [
        *world.words("train.py"),
        "--align",
        "latent",
        "--align-hidden",
        8,
        "--align-stop-steps",
        steps // 2,
        "--max-train-steps",
        steps,
        "--checkpointing-steps",
        10,
        "--log-steps",
        5,
    ]
    whole, folder = place / "whole", place / "killed"
    run_to_end(["train.py", *argv, "--output-dir", whole])
    wanted = tensors_of(whole / "x")
    while done < options.kills:
        counts, faults, several = Counter(runs=1), [], min(8, options.kills - done)
        for number in range(done, done + several):
            chance, process = options.chance("kill", number), command("train.py", *argv, "--output-dir", folder)
            _wait_for(chance.choice(("set-up", "step", "step", "save", "save")), folder / "x", process, chance)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            counts["during a save"] += any((folder / "x" / "checkpoints").glob(".*.tmp"))
        done += several
        said = run_to_end(["train.py", *argv, "--output-dir", folder])
        found = tensors_of(folder / "x") if said is None else {}
        if found == wanted:
            counts["runs with the same bits"] += 1
        else:
            faults.append(f"after {done} kills: {said or 'other bits'}")
        if left := [path.name for path in (folder / "x").rglob(".*") if path.name.endswith(".tmp")]:
            faults.append(f"left behind: {left}")
        shutil.rmtree(folder)
        yield several, counts, faults


def _wait_for(moment: str, run: Path, process: subprocess.Popen, chance: random.Random) -> None:
    """Wait for a moment of a run: somewhere in its set-up, among its steps, or while it saves; no longer than it lives."""

    def until(seen: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not seen() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.0005)

    until((run / ".lock").exists, 60)
    if moment == "set-up":
        until(lambda: False, chance.uniform(0.0, 2.0))
        return
    log = run / "log.jsonl"
    begun = log.stat().st_mtime_ns if log.exists() else 0
    until(lambda: log.exists() and log.stat().st_mtime_ns != begun and log.stat().st_size > 0, 60)
    if moment == "step":
        until(lambda: False, chance.uniform(0.0, 0.5))
    else:
        until(lambda: any((run / "checkpoints").glob(".*.tmp")), 20)
        time.sleep(chance.uniform(0.0, 0.01))


def run_to_end(words: Sequence[object]) -> str | None:
    """Run a command; None where it ends well, else the end of what it said."""
    process = command(*words)
    _, said = process.communicate()
    return None if process.returncode == 0 else said[-500:]


def tensors_of(run: Path) -> dict[str, str]:
    """SHA-256 of every tensor file of a run's last checkpoint, and of its log without rates."""
    folder = Checkpoint.open(run).path
    log = re.sub(r', "images_per_second": [^,}]*', "", (run / "log.jsonl").read_text())
    return {
        **{file.name: files.digest(file) for file in folder.glob("*.safetensors")},
        "log": hashlib.sha256(log.encode()).hexdigest(),
    }


def flips(options: Options, world: World, place: Path, done: int) -> Units:
    """One bit at a time (`benchmarks.flips`)."""
    for came_to, fault in bit_flips(
        world, place, ((number, options.chance("flip", number)) for number in range(done, options.flips))
    ):
        yield 1, {came_to: 1}, [fault] if fault else []


def starts(options: Options, world: World, place: Path, done: int) -> Units:
    """Two-process encodings, while as many busy processes as there are cores take their share."""
    busy = [command("-c", "while True: pass") for _ in range(os.cpu_count() or 1)]
    try:
        for number in range(done, options.starts):
            process = command(
                "-m",
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_processes",
                2,
                "--main_process_port",
                0,
                "-m",
                "preprocessing.encode",
                *world.words("encode"),
                "--batch-size",
                1,
                "--shard-size",
                1,
                "--out",
                place / f"start{number}",
            )
            said, code = process.communicate(), process.returncode
            yield (
                1,
                {"clean ends": int(code == 0)},
                [f"start {number}: exit {code}: {' '.join(said)[-400:]}"] if code else [],
            )
    finally:
        for process in busy:
            process.kill()
            process.communicate()


def long_run(options: Options, world: World, place: Path, done: int) -> Units:
    """Memory, open files and threads of a run of tiny steps, a fifth of the way through and at the end; one unit, done whole."""
    argv = [
        *world.words("train.py"),
        "--align",
        "latent",
        "--align-hidden",
        8,
        "--batch-size",
        2,
        "--max-train-steps",
        options.long_steps,
        "--checkpointing-steps",
        options.long_steps // 4,
        "--log-steps",
        50,
        "--sampling-steps",
        options.long_steps // 20,
    ]
    process = command("train.py", *argv, "--output-dir", place / "long")
    watched, seen = psutil.Process(process.pid), []
    while process.poll() is None:
        with suppress(psutil.Error, OSError):
            seen.append((watched.memory_info().rss / 2**20, watched.num_fds(), watched.num_threads()))
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
    said = process.communicate()[1]
    early, late = (
        np.median(seen[part], axis=0) for part in (slice(len(seen) // 5, len(seen) // 5 + 9), slice(-12, -3))
    )
    faults = [] if process.returncode == 0 else [said[-300:]]
    if late[0] > early[0] + 20 or (late[1:] > early[1:] + 1).any():
        faults.append("memory, open files or threads grow")
    kinds = ("MiB", "open files", "threads")
    yield (
        options.long_steps - done,
        {
            f"{what} {when}": round(values[k])
            for k, what in enumerate(kinds)
            for when, values in (("early", early), ("late", late))
        },
        faults,
    )


def inputs(options: Options, world: World, place: Path, done: int) -> Units:
    """The rows of `benchmarks.bad_inputs`, each as a process of its own."""
    for row in options.rows[done:]:
        scratch = place / "row"
        scratch.mkdir()
        found, said = answer_of_process(row, world, scratch)
        fault = found.fault(said)
        shutil.rmtree(scratch)
        yield (
            1,
            {"answered in one line with culprit and remedy": int(not fault)},
            [f"{row.command}: {row.name}: {fault}"] if fault else [],
        )


def answer_of_process(row: bad_inputs.Row, world: World, scratch: Path) -> tuple[bad_inputs.Answer, tuple[str, ...]]:
    """Run a row as a process."""
    more, names = row.damage(world, scratch) if row.damage else ([], [])
    before = bad_inputs.listing(world.root)
    process = command(*world.process(row.command), *world.words(row.command), *row.words, *more)
    _, said = process.communicate()
    return bad_inputs.judged(process.returncode, said, before, world), (*row.said, *names)


if __name__ == "__main__":
    errors.run(main)
