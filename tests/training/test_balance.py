"""The gradient-norm ratio of alignment to denoising: its value, its warnings, and no effect on the run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import train
import train_guide
from runtime.jsonlines import read
from tests.helpers import Words, assert_same_bits, build_run
from training import balance, command
from training.batches import Batches


def ratios_of(run: Path, name: str) -> dict[int, float]:
    key = f"grad_norm_ratio/{name}"
    return {int(line["step"]): line[key] for line in read(run / "log.jsonl") if key in line}


def without_measurements(run: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if not key.startswith(("grad_norm_ratio/", "images_per_second"))}
        for line in read(run / "log.jsonl")
    ]


@pytest.mark.parametrize("number", [1, 4])
def test_the_ratio_is_that_of_two_backward_passes_over_what_both_losses_reach(
    tmp_path: Path, words: Words, number: int
) -> None:
    run = build_run(
        words(tmp_path, "run", "--align", "latent", "--align-hidden", 32, "--gradient-accumulation-steps", number)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in run.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    source = Batches(run.config, run.data, run.device, 0, 1)
    (micros,) = source.steps(0, 1, run.alignments)
    measured = balance.ratios(run.learner(), micros, {"latent": 0.3}, run.accelerator)
    assert all(parameter.grad is None for parameter in run.learner().parameters())

    source.micro = run.config.batch_size
    ((batch,),) = source.steps(0, 1, run.alignments)  # the same samples at once
    (block,) = run.alignments["latent"].taps
    network = run.network
    parts = (network.x_embedder, network.t_embedder, network.y_embedder, *network.blocks[:block])
    shared = [parameter for part in parts for parameter in part.parameters()]
    norms = []
    for loss in (lambda losses: 0.3 * losses["latent"], lambda losses: losses["diffusion"].mean()):
        network.zero_grad()
        loss(run.learner()(batch)).backward()
        norms.append(torch.cat([p.grad.flatten() for p in shared]).norm())
    assert 0 < block < len(network.blocks)
    torch.testing.assert_close(measured, {"latent": norms[0] / norms[1]}, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "more",
    [
        ("--gradient-accumulation-steps", 2),
        ("--align-interval", 0.2, 0.8, "--compile", "on"),
        ("--activation-checkpointing", "selective", "--mixed-precision", "bf16"),
    ],
)
def test_a_run_is_the_same_bits_with_and_without(
    tmp_path: Path, words: Words, teacher: Path, monkeypatch: pytest.MonkeyPatch, more: tuple
) -> None:
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **_: compile_(self, backend="aot_eager", fullgraph=True)
    )
    runs = [
        train_guide.main(
            words(
                tmp_path / str(every),
                "run",
                "--guiding-ckpt",
                teacher,
                "--align-hidden",
                32,
                "--align-stop-steps",
                4,
                "--max-train-steps",
                5,
                *more,
                grad_ratio_steps=every,
            )
        )
        for every in (0, 1)
    ]
    assert_same_bits(*runs)
    assert without_measurements(runs[0]) == without_measurements(runs[1])
    # At the first step the last layer is zero, so no gradient of denoising reaches the blocks. After the stop, no
    # ratio is measured.
    assert not ratios_of(runs[0], "guided") and list(ratios_of(runs[1], "guided")) == [2, 3, 4]


def test_it_is_measured_early_and_then_every_so_many_steps() -> None:
    def steps(every: int) -> list[int]:
        argv = ["--data-dir", "d", "--exp-name", "e", "--grad-ratio-steps", str(every)]
        config, _ = command.resolve(argv, "train.py", None)
        return [step for step in range(1, 2500) if config.compares_gradients_at(step)]

    assert steps(1000) == [1, 10, 30, 100, 300, 1000, 2000] and steps(0) == []
    assert steps(800) == [1, 10, 30, 100, 300, 800, 1600, 2400]


def test_it_is_logged_at_its_step_and_leaves_the_means_of_the_others_alone(tmp_path: Path, words: Words) -> None:
    argv = ("--align", "latent", "dispersive", "--align-hidden", 8, "--max-train-steps", 7, "--log-steps", 4)
    run, without = (train.main(words(tmp_path, f"run{every}", *argv, grad_ratio_steps=every)) for every in (3, 0))
    for name in ("latent", "dispersive"):
        assert list(ratios_of(run, name)) == [3, 6]
    assert [line["step"] for line in read(run / "log.jsonl")] == [3, 4, 6, 7]
    assert [line for line in without_measurements(run) if len(line) > 1] == without_measurements(without)
    plain = train.main(words(tmp_path, "plain", "--max-train-steps", 2, grad_ratio_steps=1))
    assert not any("ratio" in key for line in read(plain / "log.jsonl") for key in line)


def test_a_continued_run_measures_at_the_steps_of_an_unbroken_one(tmp_path: Path, words: Words) -> None:
    argv = ("--align", "latent", "--align-hidden", 8)
    whole = train.main(words(tmp_path / "a", "run", *argv, "--max-train-steps", 11))
    for steps in (9, 11):
        broken = train.main(words(tmp_path / "b", "run", *argv, "--max-train-steps", steps))
    assert list(ratios_of(whole, "latent")) == [10] and ratios_of(whole, "latent") == ratios_of(broken, "latent")


def test_too_much_is_warned_of_at_once_and_too_little_after_three_in_a_row() -> None:
    watch = balance.RatioMonitor({"latent": 0.5})

    def warnings(*ratios: float, step: int = 1000) -> list[int]:
        return [len(watch(step, {"latent": ratio})) for ratio in ratios]

    high, low = 2 * balance.HIGH, balance.LOW / 2
    assert warnings(high, high, step=balance.SETTLED - 1) == [0, 0]
    assert warnings(0.5, high, high, 0.5, high, 0.5, 0.5) == [0, 1, 0, 0, 0, 0, 0]
    # it has to come back for as long
    assert warnings(0.5, high, 0.5, 0.5, 0.5) == [0, 1, 0, 0, 0]
    assert warnings(low, low, 0.5, low, low) == [0] * 5
    (line,) = watch(1000, {"latent": low})
    assert "higher --latent-weight" in line and "\n" not in line
    (line,) = watch(1000, {"latent": 25.0})
    assert line.startswith("warning: at step 1000") and "--latent-weight 0.02 would bring it to 1" in line
    assert watch(1000, {}) == []


def test_the_weight_that_a_run_recommends_brings_the_ratio_to_1(
    tmp_path: Path, words: Words, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(balance, "SETTLED", 1)
    # from a trained network: denoising reaches all blocks in the first step
    argv = ("--align", "latent", "--align-hidden", 8, "--init-ckpt", teacher, "--max-train-steps", 1)
    run = train.main(words(tmp_path, "heavy", *argv, "--align-weight", 500))
    assert ratios_of(run, "latent")[1] > balance.HIGH
    (weight,) = re.findall(r"warning: at step 1 .* --latent-weight (\S+) would bring it to 1", capsys.readouterr().out)
    light = train.main(words(tmp_path, "light", *argv, "--latent-weight", weight))
    assert ratios_of(light, "latent")[1] == pytest.approx(1, rel=0.05)
    assert "outweighs" not in capsys.readouterr().out
