"""Every method through the programs that train it: options, schedules, combinations, and stage 2 with any teacher."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import models
import train
import train_guide
from loss import Batch
from models.checkpoint import Checkpoint
from runtime.errors import UserError
from runtime.jsonlines import read
from tests.helpers import Words
from training import command
from training.run import Run

SHORT = ("--max-train-steps", 4)


def same(run: Path, other: Path) -> bool:
    first, second = Checkpoint.open(run).tensors("network"), Checkpoint.open(other).tensors("network")
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, words: Words) -> Path:
    """M_ori: a plain network."""
    return train.main(words(tmp_path_factory.mktemp("plain"), "plain", *SHORT))


@pytest.fixture(scope="module")
def repa(tmp_path_factory: pytest.TempPathFactory, words: Words, encoder: Path) -> Path:
    """M_repa: a network aligned with an encoder and with itself."""
    return train.main(
        words(
            tmp_path_factory.mktemp("repa"),
            "both",
            "--align",
            "repa",
            "layersync",
            "--repa-encoder",
            encoder,
            "--repa-hidden",
            32,
            "--layersync-weight",
            0.3,
            *SHORT,
        )
    )


def test_two_alignments_train_together(repa: Path, plain: Path) -> None:
    lines = read(repa / "log.jsonl")
    assert all({"loss/diffusion", "loss/repa", "loss/layersync"} <= set(line) for line in lines)
    assert lines[0]["loss/diffusion"] == read(plain / "log.jsonl")[0]["loss/diffusion"]
    assert not same(repa, plain)
    checkpoint = Checkpoint.open(repa)
    heads = checkpoint.tensors("heads")
    assert set(heads) == {f"repa.head.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    assert checkpoint.config["align"]["layersync"]["weight"] == 0.3
    assert set(checkpoint.tensors("network")) == set(Checkpoint.open(plain).tensors("network"))


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("origin", ["plain", "teacher", "repa"])
def test_stage_2_takes_any_teacher(
    origin: str, weights: str, tmp_path: Path, words: Words, request: pytest.FixtureRequest
) -> None:
    """M_ori, M_align and M_repa, raw or averaged: the same program, the teacher's identity in the checkpoint."""
    source = request.getfixturevalue(origin)
    more = ("--guiding-ckpt", source, "--guiding-weights", weights, "--align-hidden", 32, "--align-stop-steps", 0)
    run = train_guide.main(words(tmp_path, "x", *more, "--max-train-steps", 2))
    resolved = Checkpoint.open(run).config["resolved"]["guided"]
    teacher = Checkpoint.open(source)
    assert resolved["teacher"]["digest"] == teacher.digest and resolved["teacher"]["weights"] == weights
    own = Run(*command.resolve(words(tmp_path, "x", *more, "--max-train-steps", 3), "train_guide", None, ("guided",)))
    used = own.alignments["guided"].teacher.network.state_dict()
    stored = teacher.tensors("ema" if weights == "ema" else "network")
    assert all(torch.equal(value, stored[name]) for name, value in used.items())


def test_a_backbone_of_ones_own_trains_both_stages_and_must_be_given_its_scale(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "plain", models.Backbone)  # replaced below, removed after the test

    class Plain(models.Backbone):
        architecture = "plain"
        sizes: ClassVar = {"Plain-Tiny/2": (2, 16, 2, 2)}
        norm = staticmethod(torch.nn.LayerNorm)
        head_norm = staticmethod(torch.nn.LayerNorm)

        @staticmethod
        def mlp(width: int) -> torch.nn.Module:
            return torch.nn.Linear(width, width)

    assert models.ARCHITECTURES["plain"] is Plain and "Plain-Tiny/2" in models.names()
    latent = ("--model", "Plain-Tiny/2", "--align", "latent", "--align-hidden", 8)
    stage1 = train.main(words(tmp_path, "stage1", *latent, "--max-train-steps", 2))
    more = ("--guiding-ckpt", stage1, "--align-hidden", 8, "--max-train-steps", 2)
    with pytest.raises(UserError, match="no guide scale is published for Plain-Tiny/2 .*: give --guide-scale") as error:
        train_guide.main(words(tmp_path, "stage2", *more))
    assert "\n" not in str(error.value)
    checkpoint = Checkpoint.open(train_guide.main(words(tmp_path, "stage2", *more, "--guide-scale", 5)))
    assert checkpoint.spec.architecture == "plain" and checkpoint.config["resolved"]["guided"]["guide_scale"] == 5


def test_omega_is_a_fact_of_the_backbone() -> None:
    """Section 4.1 of the paper."""
    scales = {name: kind.guide_scale for name, kind in models.ARCHITECTURES.items()}
    assert scales == {"sit": 30, "lightningdit": 10} and models.Backbone.guide_scale is None


def test_every_option_of_the_guidance_moves_the_run(plain: Path, tmp_path: Path, words: Words) -> None:
    def weights(name: str, *more: object) -> torch.Tensor:
        run = train_guide.main(
            words(tmp_path, name, "--guiding-ckpt", plain, "--align-hidden", 32, "--max-train-steps", 2, *more)
        )
        return Checkpoint.open(run).tensors("network")["blocks.0.attn.qkv.weight"]

    base = weights("base")
    changes = {
        "omega": ("--guide-scale", 3),
        "guiding": ("--guiding-depth", 3),
        "guided": ("--guided-depth", 2),
        "lambda": ("--align-weight", 0.1),
        "stop": ("--align-stop-steps", 1),
        "interval": ("--align-interval", 0.4, 0.7),
        "upstream": ("--align-interval", 0.4, 0.7, "--align-mask", "upstream"),
        "dropped": ("--guiding-labels", "dropped", "--cfg-prob", 0.5),
        "linear": ("--align-schedule", "linear", "--align-stop-steps", 3),
    }
    results = {name: weights(name, *more) for name, more in changes.items()}
    names = list(results)
    assert all(not torch.equal(base, value) for value in results.values())
    assert all(not torch.equal(results[a], results[b]) for i, a in enumerate(names) for b in names[:i])


def test_the_loop_weighs_each_step_by_the_schedule(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.loop

    seen, update = [], training.loop.update

    def watched(learner: torch.nn.Module, micros: list[Batch], weights: dict[str, float], *rest: object) -> None:
        seen.append(weights)
        few = {name: getattr(micros[0], name)[:4] for name in ("x0", "eps", "t", "y", "labels")}
        update(learner, [Batch(**few, draws={"sra": {"offset": torch.zeros(4)}})], weights, *rest)

    monkeypatch.setattr("training.loop.update", watched)
    train.main(
        words(
            tmp_path,
            "x",
            "--align",
            "layersync",
            "sra",
            "--layersync-schedule",
            "linear",
            "--layersync-stop-steps",
            2,
            "--sra-tail-epoch",
            0,
            "--sra-tail-length",
            1,
            "--batch-size",
            599,
            "--max-train-steps",
            5,
        )
    )
    assert [lambdas.get("layersync") for lambdas in seen] == [0.2, 0.1, None, None, None]  # gone after its stop
    assert [lambdas["sra"] for lambdas in seen] == pytest.approx([0.2, 0.2, 0.2, 0.02, 0.02])  # 3 steps an epoch


def test_a_falling_schedule_needs_its_stop_before_anything_runs(tmp_path: Path, words: Words) -> None:
    with pytest.raises(UserError, match="falls to 0 at the stop"):
        train.main(words(tmp_path, "x", "--align", "layersync", "--align-schedule", "cosine", *SHORT))
    assert not (tmp_path / "x").exists()


def test_sra_continues_exactly(tmp_path: Path, words: Words) -> None:
    """The average is teacher and result at once; its resume must hold both, and draws depend on the step alone."""
    more = ("--align", "sra", "--checkpointing-steps", 2)
    whole = train.main(words(tmp_path / "a", "x", *more, "--max-train-steps", 4))
    train.main(words(tmp_path / "b", "x", *more, "--max-train-steps", 2))
    parts = train.main(words(tmp_path / "b", "x", *more, "--max-train-steps", 4))
    assert same(whole, parts)
    first, second = (Checkpoint.open(run).tensors("ema") for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "more",
    [
        ("dispersive", "--preset", "pytorch"),
        ("sra", "--align-distance", "token-cosine"),
        ("haste", "--align-stop-steps", 2, "--align-attention-depths", 2, 3, "--align-encoder-depths", 1, 4),
    ],
)
def test_options_reach_their_alignment(more: tuple, tmp_path: Path, words: Words, encoder: Path) -> None:
    external = ("--align-encoder", encoder, "--align-hidden", 32) if more[0] == "haste" else ()
    run = train.main(words(tmp_path, "x", "--align", *more, *external, *SHORT))
    resolved, lines = Checkpoint.open(run).config["resolved"][more[0]], read(run / "log.jsonl")
    assert all(np.isfinite(value) for line in lines for value in line.values())
    if more[0] == "dispersive":
        assert resolved["taps"] == [6] and resolved["temperature"] == 1.0
        assert Checkpoint.open(run).config["train"]["max_grad_norm"] == 0.0
    elif more[0] == "sra":
        assert 0 <= lines[0]["loss/sra"] <= 2
    else:
        assert resolved["attention_pairs"] == [[2, 1], [3, 4]] and resolved["stop"] == 2
        assert ["loss/haste" in line for line in lines] == [True, True, False, False]
