"""The command `python -m tests.torture` in short: a real process killed, results that a later call continues."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from runtime import files
from runtime.errors import UserError
from tests.torture import __main__ as torture
from tests.torture import crashes, forks
from tests.torture import world as worlds
from tests.torture.parts import PARTS, Options, Units
from tests.torture.world import World

NOTHING = [
    word for flag in ("kills", "crashes", "faults", "races", "flips", "starts", "inputs") for word in (f"--{flag}", 0)
]


def run(out: Path, *words: object) -> dict:
    torture.main([str(word) for word in (*NOTHING, "--out", out, *words)])
    return files.read_json(out)


def test_a_killed_run_loses_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").symlink_to(data)
    monkeypatch.setattr(worlds, "build", lambda _: World(tmp_path))
    kills = run(tmp_path / "torture.json", "--kills", 1, "--steps", 16)["kills"]
    assert kills["done"] == kills["counts"]["runs with the same bits"] == 1 and not kills["faults"]


def test_commands_killed_at_any_operation_finish_as_if_undisturbed(tmp_path: Path) -> None:
    """Also with failing operations, and two at once; the command above tries many more."""
    world = worlds.build(tmp_path / "world")
    with forks.server(forks.build(tmp_path)) as fork:
        trials = crashes.Trials(world, tmp_path / "trials", fork)
        for act, count, names in (
            (crashes.kill, 12, ("encode", "import", "generate", "posthoc")),
            (crashes.fail, 24, ("encode", "import", "generate", "posthoc")),
            (crashes.race, 4, ("encode", "import", "generate", "posthoc")),
        ):
            for number in range(count):
                name = names[number % len(names)]
                assert act(trials, name, random.Random(f"suite {number}"), number) is None


def test_without_a_compiler_operations_of_python_are_killed_and_fail(tmp_path: Path) -> None:
    """The digits, at their first write, their last, and never."""
    out = tmp_path / "out"
    with forks.server(None) as trials:

        def ending(at: int, code: int = 0) -> forks.Ending:
            return trials(forks.Trial("digits", ["--out", str(out)], str(out), at, code))[0]

        assert ending(3).code == -9 and not (out / "manifest.json").exists()
        failed = ending(3, errno.ENOSPC)
        assert failed.code == 2 and "No space left" in failed.errors
        assert ending(0).code == 0 and (out / "manifest.json").exists()


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands for the starts; returns the numbers of those that were done."""
    done_units: list[int] = []

    def stand_in(options: Options, world: World, place: Path, done: int) -> Units:
        for number in range(done, options.starts):
            done_units.append(number)
            yield 1, {"clean ends": number % 2}, []

    monkeypatch.setattr(worlds, "build", World)
    monkeypatch.setitem(PARTS, "starts", (stand_in, PARTS["starts"][1]))
    return done_units


def test_a_torture_continues_where_it_was_cut_off(units: list[int], tmp_path: Path) -> None:
    """The same units as in one go, each once; other settings are refused."""
    for count, expected in ((3, 3), (9, 9), (9, 9)):
        assert run(tmp_path / "parts", "--starts", count)["starts"]["done"] == expected
    assert units == list(range(9))
    whole = run(tmp_path / "whole", "--starts", 9)["starts"]
    assert files.read_json(tmp_path / "parts")["starts"]["counts"] == whole["counts"]
    with pytest.raises(UserError, match=r"holds results of .*'seed': 0.* use the same, or another file"):
        run(tmp_path / "parts", "--starts", 9, "--seed", 1)


def test_the_bad_inputs_are_spread_over_the_table() -> None:
    chosen = Options(inputs="40").rows
    assert len(chosen) == 40 and len({row.command for row in chosen}) > 10
