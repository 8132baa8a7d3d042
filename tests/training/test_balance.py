"""The gradient-norm ratio of alignment to denoising: its value, its warnings, and no effect on the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
import train_guide
from tests.helpers import Words, assert_same_bits, build_run
from training import balance
from training.batches import Batches
from training.log import read


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


def test_the_measurement_does_not_wait_for_the_device(tmp_path: Path, words: Words, teacher: Path) -> None:
    from tests.training.test_speed import Counter

    argv = words(tmp_path, "run", "--guiding-ckpt", teacher, "--align-hidden", 32, "--align-interval", 0.2, 0.8)
    run = build_run(argv, "train_guide")
    (micros,) = Batches(run.config, run.data, run.device, 0, 1).steps(0, 1, run.alignments)
    with Counter() as counter:
        measured = balance.ratios(run.learner(), micros, {"guided": 0.5}, run.accelerator)
    assert counter.calls["mm"] and isinstance(measured["guided"], torch.Tensor)
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "item"} & counter.calls.keys()


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


def test_it_is_measured_every_so_many_steps_and_logged_at_the_next_report(tmp_path: Path, words: Words) -> None:
    argv = ("--align", "latent", "dispersive", "--align-hidden", 8, "--max-train-steps", 7, "--log-steps", 4)
    run = train.main(words(tmp_path, "run", *argv, grad_ratio_steps=3))
    for name in ("latent", "dispersive"):
        assert list(ratios_of(run, name)) == [4, 7]
    assert not ratios_of(train.main(words(tmp_path, "default", *argv)), "latent")
    plain = train.main(words(tmp_path, "plain", "--max-train-steps", 2, grad_ratio_steps=1))
    assert not any("ratio" in key for line in read(plain / "log.jsonl") for key in line)


def test_a_ratio_that_stays_outside_the_band_is_warned_of_once() -> None:
    watch = balance.RatioMonitor()

    def warnings(ratio: float) -> list[str]:
        return watch({"grad_norm": 9.0, "grad_norm_ratio/latent": ratio})

    high, low = 2 * balance.HIGH, balance.LOW / 2
    assert [len(warnings(ratio)) for ratio in (high, high, 0.5, high, high)] == [0] * 5
    (line,) = warnings(high)
    assert line.startswith("warning: the gradient-norm ratio of latent to denoising") and "lower --align-weight" in line
    assert [len(warnings(ratio)) for ratio in (high, high, 0.5, low, low)] == [0] * 5
    (line,) = warnings(low)
    assert "higher --align-weight" in line and "\n" not in line
    assert watch({"loss/diffusion": 1.0}) == []


def test_a_run_prints_the_warning(tmp_path: Path, words: Words, capsys: pytest.CaptureFixture) -> None:
    train.main(
        words(
            tmp_path,
            "run",
            "--align",
            "latent",
            "--align-hidden",
            8,
            "--align-weight",
            1e-6,
            "--max-train-steps",
            5,
            grad_ratio_steps=1,
        )
    )
    assert capsys.readouterr().out.count("warning: the gradient-norm ratio of latent") == 1
