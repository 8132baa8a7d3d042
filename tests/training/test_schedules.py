"""Learning rates, several averages, and which checkpoints stay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import generate
import train
import train_guide
from config import TrainConfig
from models.checkpoint import Checkpoint
from runtime.errors import UserError
from runtime.jsonlines import read
from runtime.options import build
from tests.helpers import Words, build_run
from training import command, saving
from training.ema import EMA


def config(**options: object) -> TrainConfig:
    return build(TrainConfig, {"data_dir": "d", "exp_name": "e", "learning_rate": 2.0}, options)


def test_the_rate_is_a_function_of_the_step() -> None:
    assert {config(max_train_steps=9).learning_rate_at(step) for step in range(9)} == {2.0}
    warm = config(max_train_steps=9, lr_warmup_steps=4)
    assert [warm.learning_rate_at(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cosine = config(max_train_steps=12, lr_warmup_steps=4, lr_scheduler="cosine")
    assert [cosine.learning_rate_at(step) for step in (0, 3, 4, 8)] == pytest.approx([0.5, 2.0, 2.0, 1.0])
    falling = [cosine.learning_rate_at(step) for step in range(4, 12)]
    assert falling == sorted(falling, reverse=True) and 0 < falling[-1] < 0.1
    for wrong in ({"lr_warmup_steps": -1}, {"lr_warmup_steps": 9, "lr_scheduler": "cosine", "max_train_steps": 9}):
        with pytest.raises(UserError, match="--lr-warmup-steps"):
            config(**wrong)


def test_the_optimiser_follows_the_rate_across_a_resume(tmp_path: Path, words: Words) -> None:
    more = [
        "--lr-warmup-steps",
        2,
        "--lr-scheduler",
        "cosine",
        "--align",
        "latent",
        "--align-hidden",
        16,
        "--max-train-steps",
        5,
    ]
    whole = train.main(words(tmp_path / "a", "run", *more))
    rates = [line["learning_rate"] for line in read(whole / "log.jsonl")]
    chosen, _ = command.resolve(words(tmp_path, "x", *more), "train.py", None)
    assert rates == pytest.approx([chosen.learning_rate_at(step) for step in range(5)], rel=1e-5) and rates[0] == 5e-4
    # cut off after step 3, then continued
    run = build_run(words(tmp_path / "b", "run", *more, "--checkpointing-steps", 3))
    from training import loop

    for step in loop.steps(run, 3):
        assert {group["lr"] for group in run.optimizer.param_groups} == {chosen.learning_rate_at(step - 1)}
    saving.save(run)
    again = train.main(words(tmp_path / "b", "run", *more))
    expected, actual = (Checkpoint.open(folder).tensors("network") for folder in (whole, again))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    with pytest.raises(UserError, match="max-train-steps is 5, not 6"):  # the cosine ends there
        train.main([*words(tmp_path / "a", "run", *more), "--max-train-steps", "6"])


def test_several_averages_are_saved_continued_sampled_and_taught_with(tmp_path: Path, words: Words) -> None:
    argv = words(tmp_path, "run", "--ema-decay", 0.9, "--no-ema-warmup", ema_extra_decays=[0.5, 0.25])
    train.main([*argv, "--max-train-steps", "2"])
    run = train.main([*argv, "--max-train-steps", "4"])
    whole = train.main([*argv, "--max-train-steps", "4", "--output-dir", str(tmp_path / "whole")])
    continued, other = Checkpoint.open(run), Checkpoint.open(whole)
    assert sorted(continued.weights) == ["ema", "ema-0.25", "ema-0.5", "raw"]
    weights = {name: continued.tensors(name) for name in continued.weights}
    assert all(torch.equal(weights[name][key], value) for name in weights for key, value in other.tensors(name).items())
    key = "blocks.0.attn.qkv.weight"
    apart = [float((weights[name][key] - weights["raw"][key]).norm()) for name in ("ema", "ema-0.5", "ema-0.25", "raw")]
    assert apart == sorted(apart, reverse=True) and apart[2] > 0  # the shorter the memory, the nearer to the weights
    sample = ["--num-fid-samples", "4", "--num-steps", "2", "--ckpt", str(run), "--out"]
    drawn = {
        which: np.load(generate.main([*sample, str(tmp_path / which), "--weights", which]) / "samples.npz")["arr_0"]
        for which in ("ema", "ema-0.5")
    }
    assert not np.array_equal(drawn["ema"], drawn["ema-0.5"])
    taught = train_guide.main(
        words(
            tmp_path,
            "two",
            "--guiding-ckpt",
            run,
            "--guiding-weights",
            "ema-0.5",
            "--align-hidden",
            16,
            "--max-train-steps",
            1,
        )
    )
    assert json.loads((taught / "run.json").read_text())["resolved"]["guided"]["teacher"]["weights"] == "ema-0.5"
    started = build_run(words(tmp_path, "three", "--init-ckpt", run, init_weights="ema-0.25"))
    assert torch.equal(started.network.state_dict()[key], weights["ema-0.25"][key])
    for wrong, message in (
        ("ema-0.7", "has no ema-0.7.safetensors; its weights are .*ema-0.5"),
        ("best", "neither raw nor ema"),
    ):
        with pytest.raises(UserError, match=message):
            generate.main([*sample, str(tmp_path / "x"), "--weights", wrong])


def test_further_averages_follow_the_definition_and_are_counted(tmp_path: Path, words: Words) -> None:
    argv = words(tmp_path, "run", ema_extra_decays=[0.5])
    run = build_run(argv)
    known = {name: (average.decay.decay, average.decay.warmup) for name, average in run.averages.items()}
    assert known == {"ema": (0.9999, True), "ema-0.5": (0.5, True)}
    assert all(isinstance(average, EMA) for average in run.averages.values()) and run.averages["ema"] is run.ema
    for wrong in ([1.0], [0.9999], [0.5, 0.5]):
        with pytest.raises(UserError, match="ema_extra_decays"):
            config(ema_extra_decays=tuple(wrong))


@pytest.mark.parametrize(
    "settings, left",
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"checkpoints_total_limit": 2}, [4, 5]),
        ({"checkpoints_total_limit": 1, "keep_every": 2}, [2, 4, 5]),
    ],
)
def test_the_latest_checkpoints_stay_and_those_of_every_so_many_steps(
    tmp_path: Path, words: Words, settings: dict[str, int], left: list[int]
) -> None:
    run = train.main(words(tmp_path, "run", "--checkpointing-steps", 1, "--max-train-steps", 5, **settings))
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == left
    assert Checkpoint.open(run).network("raw") is not None


def test_limits_are_checked() -> None:
    for wrong in ({"checkpoints_total_limit": 0}, {"keep_every": 2}, {"keep_every": 0, "checkpoints_total_limit": 1}):
        with pytest.raises(UserError, match="--checkpoints-total-limit|keep_every"):
            config(**wrong)
