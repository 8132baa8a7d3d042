"""Torture from outside: kills, flipped bits, two-process starts under load, and bad inputs, as real processes.

    python -m benchmarks.torture --kills 50 --flips 200 --starts 20 --inputs all

A kill is SIGKILL to a training process at a random moment, saves among them; after it the same command runs to its end, whose
checkpoint must be that of an undisturbed run bit for bit. A flip turns one bit of one file of a checkpoint, of a latent set or of
samples; whoever reads the file must refuse it or come to the very same result. A start is an encoding by two processes
while other processes keep the cores busy; it must end with exit code 0. The counts are printed, and written with --out.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import bad_inputs, bad_world
from benchmarks.bad_world import World
from dataset import LatentSet
from models.checkpoint import Checkpoint, versions
from runtime import errors, files, progress
from runtime.errors import UserError, require
from runtime.options import option, read
from sampling import store

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Options:
    kills: int = option(50, help="SIGKILLs of training runs, up to eight of each")
    steps: int = option(120, help="optimiser steps of those runs")
    flips: int = option(200, help="flipped bits, over all kinds of files")
    starts: int = option(20, help="two-process encodings on a busy machine")
    long_steps: int = option(0, help="tiny steps of one long run, whose memory and open files must stay flat")
    inputs: str = option("all", help="bad inputs as processes: how many, evenly over the table, or all")
    seed: int = option(0, help="seed of moments and places")
    out: str | None = option(None, help="result file (JSON)")

    def __post_init__(self) -> None:
        require(min(self.kills, self.flips, self.starts, self.long_steps) >= 0,
                "--kills, --flips, --starts and --long-steps must not be negative")
        require(self.steps > 1, f"--steps {self.steps} must be at least 2")
        require(self.inputs == "all" or self.inputs.isdigit(), f"--inputs {self.inputs}: give a number, or all")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for and print the counts; ends with an error where anything was lost."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = read(Options, words, prog="python -m benchmarks.torture", description=__doc__)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        world = bad_world.build(Path(place) / "world")
        result: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks.torture", *words]), "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} CPU cores, {platform.system()}", "python": platform.python_version(), "versions": versions()}
        for name, part in (("kills", kills), ("flips", flips), ("starts", starts), ("long run", long_run), ("inputs", inputs)):
            began = time.monotonic()
            result[name] = {**part(options, world, Path(place), chance), "seconds": round(time.monotonic() - began)}
            print(f"{name}: " + ", ".join(f"{value} {what}" for what, value in result[name].items() if what != "faults"), flush=True)
            for fault in result[name].get("faults", []):
                print(f"  {fault}")
            if options.out:
                files.write_json(options.out, result)
    if any(isinstance(part, dict) and part.get("faults") for part in result.values()):
        raise UserError("something was lost, accepted or not answered: see above, and repair it")


def command(*words: object, **more: Any) -> subprocess.Popen:
    """Start Python with `words` on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


def kills(options: Options, world: World, place: Path, chance: random.Random) -> dict[str, Any]:
    """SIGKILL at random moments, again and again in one run, until it is through; then a new run."""
    if not options.kills:
        return {"killed": 0, "lost": 0}
    counts, faults = Counter(), []
    steps = options.steps
    argv = [*world.words("train.py"), "--align", "latent", "--align-hidden", 8, "--align-stop-steps", steps // 2,
            "--max-train-steps", steps, "--checkpointing-steps", 10, "--log-steps", 5]
    whole = place / "whole"
    run_to_end(["train.py", *argv, "--output-dir", whole])
    wanted = tensors_of(whole / "x")
    bar = progress.bar(total=options.kills, desc="kills")
    while counts["killed"] < options.kills:
        folder = place / "killed"
        for _ in range(min(8, options.kills - counts["killed"])):
            process = command("train.py", *argv, "--output-dir", folder)
            _wait_for(chance.choice(("set-up", "step", "step", "save", "save")), folder / "x", process, chance)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            counts["killed"] += 1
            counts["of these during a save"] += any((folder / "x" / "checkpoints").glob(".*.tmp"))
            bar.update()
        counts["runs"] += 1
        said = run_to_end(["train.py", *argv, "--output-dir", folder])
        found = tensors_of(folder / "x") if said is None else {}
        if found != wanted:
            faults.append(f"after {counts['killed']} kills: {said or 'other bits'}")
        if left := [path.name for path in (folder / "x").rglob(".*") if path.name.endswith(".tmp")]:
            faults.append(f"left behind: {left}")
        shutil.rmtree(folder)
    return {**counts, "lost": len(faults), "faults": faults}


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
    return {**{file.name: files.digest(file) for file in folder.glob("*.safetensors")}, "log": hashlib.sha256(log.encode()).hexdigest()}


def flips(options: Options, world: World, place: Path, chance: random.Random) -> dict[str, Any]:
    """One bit at a time, over all files that are read again."""
    readers: list[tuple[str, str, Callable[[Path], Any]]] = []
    for name in ("config.json", "network.safetensors", "ema.safetensors", "heads.safetensors", "optimizer.safetensors", "optimizer.json"):
        readers.append(("exps/stage1/checkpoints/0000001", name, _checkpoint))
    for name in ("manifest.json", "shard-00000.safetensors"):
        readers.append(("data", name, _latents))
    readers += [("samples", name, _samples) for name in ("samples.npz", "samples.json")]
    readers.append(("weights.pt", "", _weights))
    wanted = {(artefact, name): reader(world.path(artefact)) for artefact, name, reader in readers}
    counts, faults = Counter(), []
    for number in progress.bar(range(options.flips), desc="flips"):
        artefact, name, reader = readers[number % len(readers)]
        folder = bad_world.copied(world, artefact, place / f"flip{number}")
        file = folder / name if name else folder
        content = bytearray(file.read_bytes())
        where, bit = chance.randrange(len(content)), chance.randrange(8)
        content[where] ^= 1 << bit
        file.write_bytes(content)
        try:
            same = _same(reader(folder), wanted[artefact, name])
        except UserError:
            counts["refused"] += 1
        else:
            counts["accepted with the same meaning" if same else "accepted with another meaning"] += 1
            if not same:
                faults.append(f"{artefact}/{name}: bit {bit} of byte {where}")
        shutil.rmtree(place / f"flip{number}")
    return {"flipped": options.flips, "accepted with another meaning": 0, **counts, "faults": faults}


def _checkpoint(folder: Path) -> Any:
    checkpoint = Checkpoint.open(folder)
    checkpoint.require_whole()
    config = {key: value for key, value in checkpoint.config.items() if key != files.SEAL}
    tensors = [checkpoint.tensors(name) for name in ("network", "ema", "heads", "optimizer")]
    return config, files.read_json(folder / "optimizer.json"), tensors


def _latents(folder: Path) -> Any:
    latents = LatentSet(folder)
    latents.check_digests()
    latents.require_intact(wait=None)
    return {key: value for key, value in latents.manifest.items() if key != files.SEAL}, latents.read(np.arange(len(latents)))


def _samples(folder: Path) -> Any:
    settings = {key: value for key, value in store.read_record(folder / "samples.json").items() if key != "samples"}
    require(store.finished(folder, settings), "the samples are not finished")
    with np.load(folder / "samples.npz") as archive:
        return settings, archive["arr_0"], archive["labels"]


def _weights(file: Path) -> Any:
    from models.archives import read_archive

    return read_archive(file)


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of plain values, arrays and tensors are equal."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(np.array_equal(np.asarray(one), np.asarray(other)))


def starts(options: Options, world: World, place: Path, chance: random.Random) -> dict[str, Any]:
    """Two-process encodings, while as many busy processes as there are cores take their share."""
    faults = []
    busy = [command("-c", "while True: pass") for _ in range(os.cpu_count() or 1)] if options.starts else []
    try:
        for number in progress.bar(range(options.starts), desc="starts"):
            process = command("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0, "-m",
                              "preprocessing.encode", *world.words("encode"), "--batch-size", 1, "--shard-size", 1,
                              "--out", place / f"start{number}")
            said = process.communicate()
            if process.returncode:
                faults.append(f"start {number}: exit {process.returncode}: {' '.join(said)[-400:]}")
    finally:
        for process in busy:
            process.kill()
            process.communicate()
    return {"started": options.starts, "failed": len(faults), "faults": faults}


def long_run(options: Options, world: World, place: Path, chance: random.Random) -> dict[str, Any]:
    """Memory, open files and threads of a run of tiny steps, a fifth of the way through and at the end."""
    if not options.long_steps:
        return {"steps": 0}
    argv = [*world.words("train.py"), "--align", "latent", "--align-hidden", 8, "--batch-size", 2, "--max-train-steps", options.long_steps,
            "--checkpointing-steps", options.long_steps // 4, "--log-steps", 50, "--sampling-steps", options.long_steps // 20]
    process = command("train.py", *argv, "--output-dir", place / "long")
    watched, seen = psutil.Process(process.pid), []
    while process.poll() is None:
        with suppress(psutil.Error, OSError):
            seen.append((watched.memory_info().rss / 2**20, watched.num_fds(), watched.num_threads()))
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
    said = process.communicate()[1]
    early, late = (np.median(seen[part], axis=0) for part in (slice(len(seen) // 5, len(seen) // 5 + 9), slice(-12, -3)))
    faults = [] if process.returncode == 0 else [said[-300:]]
    if late[0] > early[0] + 20 or (late[1:] > early[1:] + 1).any():
        faults.append("memory, open files or threads grow")
    words = [f"{early[k]:.0f} to {late[k]:.0f}" for k in range(3)]
    return {"steps": options.long_steps, "MiB": words[0], "open files": words[1], "threads": words[2], "faults": faults}


def inputs(options: Options, world: World, place: Path, chance: random.Random) -> dict[str, Any]:
    """The rows of `benchmarks.bad_inputs`, each as a process of its own."""
    table = bad_inputs.rows()
    count = len(table) if options.inputs == "all" else int(options.inputs)
    faults = []
    for row in progress.bar(table[::max(1, len(table) // count)][:count] if count else [], desc="inputs"):
        scratch = place / "row"
        scratch.mkdir()
        found, said = answer_of_process(row, world, scratch)
        if fault := found.fault(said):
            faults.append(f"{row.command}: {row.name}: {fault}")
        shutil.rmtree(scratch)
    return {"given": count, "answered in one line with culprit and remedy": count - len(faults), "faults": faults}


def answer_of_process(row: bad_inputs.Row, world: World, scratch: Path) -> tuple[bad_inputs.Answer, tuple[str, ...]]:
    """Run a row as a process."""
    more, names = row.damage(world, scratch) if row.damage else ([], [])
    before = bad_inputs.listing(world.root)
    process = command(*world.process(row.command), *world.words(row.command), *row.words, *more)
    _, said = process.communicate()
    return bad_inputs.judged(process.returncode, said, before, world), (*row.said, *names)


if __name__ == "__main__":
    errors.run(main)
