"""Crashes, faults and races of whole commands: the same command then ends as an undisturbed one does."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import train
from runtime import files, locks
from tests.torture import forks
from tests.torture.forks import Ending, Trial
from tests.torture.world import World

Run = Callable[..., list[Ending]]
# What a file system can answer at any moment: a failing disk, a full one, a missing permission.
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES)


class Case(NamedTuple):
    """A command that writes below `out`."""

    name: str
    command: str
    argv: list[str]


def cases(world: World, out: Path) -> dict[str, Case]:
    """Small commands, a few tenths of a second each."""
    folder = str(out / "set")
    encode = [*world.words("encode"), "--vae", "pixels", "--keep-images", "--flip", "--shard-size", "2"]
    importing = [str(world.path("repa")), "--shard-size", "2"]
    generate = [*world.words("generate.py"), "--batch-size", "2"]
    posthoc = [str(world.path("exps/lengths")), "--lengths", "0.06", "0.08"]
    stage2 = [*world.words("train_guide.py"), "--max-train-steps", "3", "--checkpointing-steps", "1"]
    made = [
        Case("encode", "encode", [*encode, "--batch-size", "2", "--out", folder]),
        Case("import", "import_latents", [*importing, "--out", folder]),
        Case("generate", "generate.py", [*generate, "--out", folder]),
        Case("posthoc", "posthoc", [*posthoc, "--out", folder]),
        Case("stage 2", "train_guide.py", [*stage2, "--output-dir", folder]),
    ]
    return {case.name: case for case in made}


class Trials:
    """Disturbed runs of the cases below `out`, each judged against an undisturbed one."""

    def __init__(self, world: World, out: Path, run: Run) -> None:
        self.out, self.run = out.resolve(), run
        self.cases = cases(world, self.out)
        if not (lengths := world.path("exps/lengths")).exists():
            words = [*world.words("train.py"), "--output-dir", str(lengths.parent), "--exp-name", lengths.name]
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                train.main([*words, "--max-train-steps", "4", "--ema-lengths", "0.05", "0.1"])
        self._sound: dict[str, tuple[dict[str, str], int]] = {}

    def sound(self, name: str) -> tuple[dict[str, str], int]:
        """The digests of what an undisturbed run writes, and its file operations."""
        if name not in self._sound:
            (ending,) = self.run(self.trial(name))
            assert ending.code == 0, ending.errors
            self._sound[name] = self.written(), ending.operations
            self.clear()
        return self._sound[name]

    def trial(self, name: str, at: int = 0, code: int = 0) -> Trial:
        self.out.mkdir(parents=True, exist_ok=True)
        return Trial(self.cases[name].command, self.cases[name].argv, str(self.out), at, code)

    def disturbed(self, name: str, chance: random.Random, code: int = 0) -> str | None:
        """Kill the command at some operation, or let that operation fail; returns what was lost."""
        at = chance.randint(1, self.sound(name)[1])
        (ending,) = self.run(self.trial(name, at, code))
        where = f"{name}, {errno.errorcode.get(code, 'killed')} at operation {at}"
        # a process killed in its last operations can have ended before
        right = ending.clean if code else ending.code in (-9, 0)
        return self.judged(where, name, right, ending)

    def raced(self, name: str) -> str | None:
        """Two processes at once on one output."""
        self.sound(name)
        endings = self.run(self.trial(name), self.trial(name))
        right = all(ending.clean for ending in endings) and any(ending.code == 0 for ending in endings)
        return self.judged(f"two of {name}", name, right, *endings)

    def judged(self, where: str, name: str, right: bool, *endings: Ending) -> str | None:
        """What is wrong with `endings`, or with what the same command makes of what they left; None if nothing."""
        sound, _ = self.sound(name)
        (again,) = self.run(self.trial(name))
        written = self.written()
        self.clear()
        if not right:
            return f"{where}: " + " | ".join(f"exit {ending.code}: {ending.errors[-300:]}" for ending in endings)
        if again.code != 0:
            return f"{where}: then exit {again.code}: {again.errors[-300:]}"
        differing = sorted(path for path in sound.keys() | written.keys() if sound.get(path) != written.get(path))
        return f"{where}: then other files: {', '.join(differing[:4])}" if differing else None

    def written(self) -> dict[str, str]:
        """Digest of every file below `out` but locks, and logs, which have rates."""
        paths = [path for path in self.out.rglob("*") if path.is_file() and path.name not in (locks.LOCK, "log.jsonl")]
        return {str(path.relative_to(self.out)): files.digest(path) for path in paths}

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)


Act = Callable[[Trials, str, random.Random, int], str | None]
"""Disturbs a case; the number of the trial is given too. Returns what was lost."""


def kill(trials: Trials, name: str, chance: random.Random, number: int) -> str | None:
    return trials.disturbed(name, chance)


def fail(trials: Trials, name: str, chance: random.Random, number: int) -> str | None:
    return trials.disturbed(name, chance, ERRORS[number // len(trials.cases) % len(ERRORS)])


def race(trials: Trials, name: str, chance: random.Random, number: int) -> str | None:
    return trials.raced(name)


def units(
    act: Act, names: Sequence[str], numbers: range, seed: int, world: World, place: Path
) -> Iterator[tuple[int, Mapping[str, int], list[str]]]:
    """Do `act` to the cases `names` in turn, once for each of `numbers`; yields as the parts of the torture do."""
    with forks.server(forks.build(place)) as run:
        trials = Trials(world, place / "trials", run)
        for number in numbers:
            name = names[number % len(names)]
            fault = act(trials, name, random.Random(f"{seed} {act.__name__} {number}"), number)
            yield 1, {name: 1}, [fault] if fault else []
