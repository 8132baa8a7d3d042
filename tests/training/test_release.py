"""Measured release in runs: equal to no stop until it begins, exact across a resume, branches, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from alignment import release
from models.checkpoint import Checkpoint
from models.sit import SiT
from runtime import files
from runtime.errors import UserError
from runtime.jsonlines import read
from tests.helpers import ROOT, Words, assert_same_bits, build_run, saved_tensors
from training import loop
from training import release as decisions

RAMP = 50
SMALL = ("--model", "SiT-Two/2", "--batch-size", 8, "--grad-ratio-steps", 0)
CONSTANT = (*SMALL, "--align", "latent", "--align-hidden", 16)
# The fast average is the last residual, and the slow one spans 20 steps.
PLATEAU = (*CONSTANT, "--align-schedule", "plateau", "--align-plateau-steps", RAMP)


@contextmanager
def readings() -> Iterator[Callable[[bool], None]]:
    """Networks of two blocks, readings every ten steps; sets whether each notices a plateau."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SiT.sizes, "SiT-Two/2", (2, 32, 4, 2))
        patch.setattr(decisions, "EVERY", 10)
        yield lambda answer: patch.setattr(decisions, "flat", lambda fast, slow: answer)


@pytest.fixture(scope="module")
def often() -> Iterator[Callable[[bool], None]]:
    with readings() as noticing:
        yield noticing


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, words: Words, often: Callable[[bool], None]) -> Path:
    """A run of 104 steps whose plateau is noticed at step 50, so that it ends at step 100; several checkpoints."""
    often(True)
    folder = tmp_path_factory.mktemp("whole")
    return train.main(words(folder, "run", *PLATEAU, "--checkpointing-steps", 25, "--max-train-steps", 104))


def losses(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if "per_second" not in key} for line in read(run / "log.jsonl")]


def test_a_plateau_that_is_never_reached_is_no_stop(
    tmp_path: Path, words: Words, often: Callable[[bool], None]
) -> None:
    often(False)
    measured = train.main(words(tmp_path, "measured", *PLATEAU, "--max-train-steps", 61))
    constant = train.main(words(tmp_path, "constant", *CONSTANT, "--max-train-steps", 61))
    assert losses(measured) == losses(constant)
    expected, actual = saved_tensors(constant), saved_tensors(measured)
    assert actual.keys() - expected.keys() == {f"heads.safetensors/latent.{release.AVERAGES}"}
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    assert Checkpoint.open(measured).config["resolved"]["latent"]["stop"] is None


def test_from_the_plateau_on_the_weight_falls_and_then_the_alignment_is_gone(
    whole: Path, tmp_path: Path, words: Words, often: Callable[[bool], None], capsys: pytest.CaptureFixture
) -> None:
    lines = read(whole / "log.jsonl")
    assert [line["step"] for line in lines if "loss/latent" in line] == list(range(1, 101))
    for step in (50, 75, 104):
        config = Checkpoint.open(f"{whole}@{step}").config
        assert config["resolved"]["latent"]["stop"] == 100 and config["align"]["latent"]["stop_steps"] is None
    assert Checkpoint.open(f"{whole}@25").config["resolved"]["latent"]["stop"] is None
    assert files.read_json(whole / "run.json")["resolved"]["latent"]["stop"] == 100
    assert "heads.safetensors" not in Checkpoint.open(whole).files
    # without weights or interval the loss is the residual
    averages = Checkpoint.open(f"{whole}@75").tensors("heads")[f"latent.{release.AVERAGES}"]
    fast = slow = lines[0]["loss/latent"]
    for line in lines[:75]:
        fast, slow = line["loss/latent"], slow + 2.5 / RAMP * (line["loss/latent"] - slow)
    np.testing.assert_allclose(averages.numpy(), [fast, slow], rtol=1e-5)
    # the same steps under the same weights, with a stop instead of a measurement
    run = build_run(words(tmp_path, "again", *PLATEAU, "--align-stop-steps", 100, "--max-train-steps", 104))
    often(False)
    loop.train(run)
    expected, actual = saved_tensors(whole), saved_tensors(run.folder)
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    shown = capsys.readouterr().out
    assert "latent ends by measurement: from step 50 on" in shown and "at the latest it ends at step 100" in shown
    assert "step 100: alignment latent has ended" in shown


def test_a_run_that_is_cut_anywhere_continues_exactly(
    whole: Path, tmp_path: Path, words: Words, often: Callable[[bool], None], capsys: pytest.CaptureFixture
) -> None:
    often(True)
    for step in (45, 50, 75, 100, 104):  # before and at the plateau, in the decay, at the end
        capsys.readouterr()
        argv = words(tmp_path, "run", *PLATEAU, "--checkpointing-steps", 25, "--max-train-steps", step)
        run = train.main(argv)
        noticed = "step 50: the residual of latent has stopped falling" in capsys.readouterr().out
        assert noticed == (step == 50)
    assert_same_bits(whole, run)
    assert losses(whole) == losses(run)


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        (25, (*PLATEAU, "--align-stop-steps", 130)),  # a latest end
        (75, (*PLATEAU, "--align-stop-steps", 130)),  # one behind the end that is measured, when the weight falls
        (25, (*CONSTANT, "--align-stop-steps", 60)),  # no measurement
        (25, (*CONSTANT, "--align-stop-steps", 25)),
    ],
)
def test_a_branch_equals_a_run_that_had_its_options(
    step: int, changed: tuple, whole: Path, tmp_path: Path, words: Words, often: Callable[[bool], None]
) -> None:
    often(True)
    branch = train.main(
        words(tmp_path, "branch", *changed, "--branch-from", f"{whole}@{step}", "--max-train-steps", 104)
    )
    start = train.main(words(tmp_path, "start", *changed, "--max-train-steps", 104))
    assert_same_bits(start, branch)
    ends = [Checkpoint.open(run).config["resolved"]["latent"]["stop"] for run in (start, branch)]
    assert ends[0] == ends[1] or (step == 25 and changed[-1] == 25)


def test_branches_that_would_have_measured_otherwise_are_refused(
    whole: Path, tmp_path: Path, words: Words, often: Callable[[bool], None]
) -> None:
    constant = train.main(words(tmp_path, "constant", *CONSTANT, "--max-train-steps", 2))
    often(False)
    latest = train.main(words(tmp_path, "latest", *PLATEAU, "--align-stop-steps", 100, "--max-train-steps", 51))
    for trunk, more, message in (
        (constant, PLATEAU, "had the schedule constant, so the averages that plateau reads are missing"),
        (f"{whole}@25", (*PLATEAU[:-1], 60), "plateau-steps is 50, not 60"),
        (f"{whole}@75", CONSTANT, "the weight of latent at step 51 was 0.49.*, not 0.5"),
        (
            latest,
            (*PLATEAU, "--align-stop-steps", 120),
            "falls from step 50 on, and its plateau is no",
        ),
        (latest, (*PLATEAU, "--align-token-weights", "residual"), "token-weights is .*, not residual"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            train.main(words(tmp_path, "branch", *more, "--branch-from", trunk, "--max-train-steps", 104))
        assert "\n" not in str(caught.value) and not (tmp_path / "branch").exists()


def test_weights_move_the_run_and_continue_exactly(tmp_path: Path, words: Words, often: Callable[[bool], None]) -> None:
    more = ("--align-token-weights", "residual"), ("--align-time-weights", "smooth")
    runs = []
    for name, options in {"plain": (), "tokens": more[0], "times": more[1], "both": (*more[0], *more[1])}.items():
        argv = words(tmp_path, name, *CONSTANT, *options)
        train.main([*argv, "--max-train-steps", "2"])
        runs.append(train.main([*argv, "--max-train-steps", "4"]))
        assert_same_bits(runs[-1], train.main([*argv, "--max-train-steps", "4", "--output-dir", str(tmp_path / "w")]))
    weights = [Checkpoint.open(run).tensors("network")["blocks.0.attn.qkv.weight"] for run in runs]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_the_cost_counts_to_the_latest_end(
    tmp_path: Path, words: Words, often: Callable[[bool], None], capsys: pytest.CaptureFixture
) -> None:
    def shown(*more: object) -> str:
        train.main(words(tmp_path, "x", *PLATEAU, *more, "--max-train-steps", 400, "--dry-run"))
        return capsys.readouterr().out

    line = "latent ends by measurement, which nobody knows before"
    without, with_latest = shown(), shown("--align-stop-steps", 200)
    assert line in without and line in with_latest
    assert "from step 200 on" in with_latest and "from step" not in without


def two_processes(argv: list[str]) -> None:
    """Runs inside each of two processes."""
    with readings() as noticing:
        noticing(True)
        run = build_run(argv)
        assert run.accelerator.num_processes == 2
        loop.train(run)


def test_two_processes_measure_as_one(tmp_path: Path, words: Words, often: Callable[[bool], None]) -> None:
    """On an interval, in which the processes have different numbers of samples; with both kinds of weights."""
    more = ["--align-interval", 0.3, 0.6, "--align-token-weights", "residual", "--align-time-weights", "smooth"]
    more += ["--checkpointing-steps", 10, "--max-train-steps", 104]
    (tmp_path / "job.json").write_text(json.dumps(words(tmp_path, "two", *PLATEAU, *more)))
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__)), str(tmp_path / "job.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 50: the residual of latent has stopped falling") == 1
    often(True)
    one_process = train.main(words(tmp_path, "single", *PLATEAU, *more))
    for step, tolerance in ((10, 1e-5), (50, 1e-4)):
        averages = [
            Checkpoint.open(f"{run}@{step}").tensors("heads")[f"latent.{release.AVERAGES}"]
            for run in (one_process, tmp_path / "two")
        ]
        torch.testing.assert_close(*averages, rtol=tolerance, atol=0)
    assert Checkpoint.open(tmp_path / "two").config["resolved"]["latent"]["stop"] == 100
    both = [[line.get("loss/latent") for line in read(run / "log.jsonl")] for run in (one_process, tmp_path / "two")]
    assert [value is None for value in both[0]] == [value is None for value in both[1]]
    np.testing.assert_allclose(both[0][:20], both[1][:20], rtol=1e-4)


if __name__ == "__main__":
    two_processes(json.loads(Path(sys.argv[1]).read_text()))
