"""Post-hoc EMA: averages follow their profile, and averages synthesised from them come near theirs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

import generate
import train
from config import TrainConfig
from models.checkpoint import Checkpoint, saved
from runtime.errors import UserError
from runtime.options import build
from tests.helpers import Words, build_run
from training import loop, posthoc
from training.ema import EMA, Power, exponent

LENGTHS = (0.05, 0.1)


def profile(s: float, t: float, length: float) -> float:
    """The profile's definition: a power of time up to t, of integral 1."""
    gamma = exponent(length)
    return (gamma + 1) * s**gamma / t ** (gamma + 1) if s <= t else 0.0


def shares(steps: int, length: float) -> np.ndarray:
    """The share of each step's weights in the average: the profile's integral over that step."""
    ends = (np.arange(steps + 1) / steps) ** (exponent(length) + 1)
    return np.diff(ends)


@pytest.mark.parametrize("length, gamma", [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)])
def test_a_length_is_the_standard_deviation_of_its_profile(length: float, gamma: float) -> None:
    mean = quad(lambda s: s * profile(s, 1.0, length), 0, 1)[0]
    variance = quad(lambda s: (s - mean) ** 2 * profile(s, 1.0, length), 0, 1)[0]
    assert math.sqrt(variance) == pytest.approx(length, rel=1e-6)
    assert exponent(length) == pytest.approx(gamma, abs=0.01)  # the first two are published


@pytest.mark.parametrize("length", [0.02, *LENGTHS, 0.28])
def test_an_average_is_the_weighted_sum_of_all_weights(length: float) -> None:
    network, steps = nn.Linear(3, 2).double(), 60
    average, passed = EMA(network, Power(length)), []
    for step in range(1, steps + 1):
        with torch.no_grad():
            network.weight.copy_(torch.from_numpy(np.random.default_rng(step).normal(size=(2, 3))))
        passed.append(network.weight.detach().clone())
        average.update(step)
    wanted = torch.einsum("s,sij->ij", torch.from_numpy(shares(steps, length)), torch.stack(passed))
    torch.testing.assert_close(average.network.weight.data, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "first, second", [((40, 0.05), (40, 0.1)), ((40, 0.05), (90, 0.2)), ((90, 0.05), (40, 0.2)), ((7, 0.1), (7, 0.1))]
)
def test_inner_products_are_the_integrals(first: tuple[int, float], second: tuple[int, float]) -> None:
    product = posthoc.inner_products(
        *(np.array(value) for at, of in (first, second) for value in (float(at), exponent(of)))
    )
    integral = quad(lambda s: profile(s, *first) * profile(s, *second), 0, min(first[0], second[0]))[0]
    assert float(product) == pytest.approx(integral, rel=1e-8)


def test_a_stored_average_is_found_again_and_the_distance_of_another_is_measured() -> None:
    stored = [(step, length) for step in range(50, 401, 50) for length in LENGTHS]
    coefficients, distance = posthoc.coefficients(stored, 400, 0.1)
    np.testing.assert_allclose(coefficients, [0.0] * 15 + [1.0], atol=1e-8)
    assert distance < 1e-6
    for length in (0.03, 0.15):
        coefficients, distance = posthoc.coefficients(stored, 400, length)
        times = np.linspace(0, 400, 200_001)[1:]
        wanted = np.array([profile(1, 1, length)]) * (times / 400) ** exponent(length) / 400
        made = sum(
            share * np.where(times <= at, profile(1, 1, of) * (times / at) ** exponent(of) / at, 0)
            for share, (at, of) in zip(coefficients, stored, strict=True)
        )
        measured = math.sqrt(np.square(made - wanted).sum() / np.square(wanted).sum())
        assert distance == pytest.approx(measured, rel=5e-3) and coefficients.sum() == pytest.approx(1)
    more = [(step, length) for step in range(10, 401, 10) for length in LENGTHS]
    assert posthoc.coefficients(more, 400, 0.15)[1] < posthoc.coefficients(stored, 400, 0.15)[1] / 5


def config(**options: object) -> TrainConfig:
    return build(TrainConfig, {"data_dir": "d", "exp_name": "e"}, options)


KEY = "blocks.1.mlp.fc2.weight"


def options(*more: object) -> list[object]:
    return [
        "--ema-lengths",
        *LENGTHS,
        "--max-train-steps",
        24,
        "--checkpointing-steps",
        12,
        *more,
    ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, words: Words) -> np.ndarray:
    """(24, ...) one weight of the run after each of its steps."""
    run = build_run(words(tmp_path_factory.mktemp("watched"), "run", *options(), ema_snapshot_steps=2))
    return np.stack([run.network.state_dict()[KEY].double().numpy().copy() for _ in loop.steps(run, 24)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, words: Words) -> Path:
    """The same run as a command, ended once in its middle."""
    folder = tmp_path_factory.mktemp("posthoc")
    train.main(words(folder, "run", *options("--max-train-steps", 12), ema_snapshot_steps=2))
    return train.main(words(folder, "run", *options(), ema_snapshot_steps=2))


def test_another_length_is_near_its_closed_form(
    run: Path, weights: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = posthoc.main([str(run), "--lengths", "0.08", "0.15", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert [path.name for path in made] == ["0000024-0.08", "0000024-0.15"] and "off by" in output
    for path, length in zip(made, (0.08, 0.15), strict=True):
        checkpoint = Checkpoint.open(path)
        wanted, last, others = (np.tensordot(shares(24, of), weights, 1) for of in (length, 0.01, 0.28))
        error = np.abs(checkpoint.tensors("ema")[KEY].numpy() - wanted).max()
        assert error < 0.03 * np.abs(last - others).max()
        assert checkpoint.config["posthoc"]["length"] == length and checkpoint.config["posthoc"]["snapshots"] == 12
        assert (
            checkpoint.weights == ["ema"] and checkpoint.step == 24 and checkpoint.epochs == Checkpoint.open(run).epochs
        )
    drawn = generate.main(
        ["--ckpt", str(made[0]), "--num-fid-samples", "4", "--num-steps", "2", "--out", str(tmp_path / "drawn")]
    )
    assert (drawn / "samples.npz").is_file()
    drawn = generate.main(
        [
            "--ckpt",
            str(run),
            "--weights",
            "ema-length-0.05",
            "--num-fid-samples",
            "4",
            "--num-steps",
            "2",
            "--out",
            str(tmp_path / "stored"),
        ]
    )
    assert json.loads((drawn / "samples.json").read_text())["weights"] == "ema-length-0.05"


def test_what_is_kept_is_what_the_checkpoint_has_and_survives_a_restart(run: Path, weights: np.ndarray) -> None:
    snapshots = posthoc.snapshots(run)
    assert [snapshot.step for snapshot in snapshots] == list(range(2, 25, 2)) and set(snapshots[0].files) == {
        f"ema-length-{of}.safetensors" for of in LENGTHS
    }
    for of in LENGTHS:
        wanted = torch.from_numpy(np.tensordot(shares(24, of), weights, 1))
        for snapshot in (snapshots[-1], Checkpoint.open(run)):  # of both parts of the run
            torch.testing.assert_close(snapshot.tensors(f"ema-length-{of}")[KEY].double(), wanted, rtol=1e-4, atol=1e-6)


def test_averages_of_a_head_are_made_too_and_a_branch_uses_its_trunk(
    tmp_path: Path, words: Words, capsys: pytest.CaptureFixture
) -> None:
    more = ["--align", "internal", "--ema-lengths", *LENGTHS, "--checkpointing-steps", 4]
    trunk = train.main(words(tmp_path, "trunk", *more, "--max-train-steps", 4, ema_snapshot_steps=1))
    branch = train.main(
        words(
            tmp_path,
            "branch",
            *more,
            "--max-train-steps",
            6,
            "--branch-from",
            f"{trunk}@4",
            "--align-schedule",
            "constant",
            ema_snapshot_steps=1,
        )
    )
    assert [snapshot.step for snapshot in posthoc.snapshots(branch)] == [1, 2, 3, 4, 5, 6]
    (made,) = posthoc.main(["--run", str(branch), "--lengths", "0.1"])
    assert made == branch / "posthoc" / "0000006-0.1"
    synthesised, newest = Checkpoint.open(made), Checkpoint.open(branch)
    for name in ("ema", "internal-head-ema"):
        stored = newest.tensors(f"{name}-length-0.1")
        assert all(torch.allclose(value, stored[key], atol=1e-6) for key, value in synthesised.tensors(name).items())
    generate.main(
        [
            "--ckpt",
            str(made),
            "--internal-scale",
            "1.4",
            "--num-fid-samples",
            "4",
            "--num-steps",
            "2",
            "--out",
            str(tmp_path / "drawn"),
        ]
    )
    capsys.readouterr()
    posthoc.main([str(branch), "--lengths", "0.02", "--step", "2"])
    assert "smaller ema_snapshot_steps" in capsys.readouterr().out


def test_mistakes_are_answered(run: Path, tmp_path: Path) -> None:
    for wrong in ((0.3,), (0.0,), (0.1, 0.1), (float("nan"),)):
        with pytest.raises(UserError, match="--ema-lengths .* from 0.005 to 0.28"):
            config(ema_lengths=wrong)
    with pytest.raises(UserError, match="ema_snapshot_steps needs"):
        config(ema_snapshot_steps=2)
    with pytest.raises(UserError, match="has no averages .* --ema-lengths"):
        posthoc.main([str(tmp_path), "--lengths", "0.1"])
    with pytest.raises(UserError, match="--step 3: .* has no averages of that step"):
        posthoc.main([str(run), "--lengths", "0.1", "--step", "3"])
    assert not (run / "posthoc").exists() and len(saved(run)) == 2


def test_a_snapshot_is_kept_a_32nd_of_the_run_apart_and_at_the_end() -> None:
    averaging = config(ema_lengths=LENGTHS, max_train_steps=100)
    assert [step for step in range(1, 101) if averaging.keeps_averages_at(step)] == [*range(3, 100, 3), 100]
    assert not config(max_train_steps=100).keeps_averages_at(100)
