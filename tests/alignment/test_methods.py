"""Every method through the programs that train it: options, schedules, combinations, and stage 2 with any teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import train
import train_guide
from loss import Batch
from models.checkpoint import Checkpoint
from runtime.errors import UserError
from tests.helpers import Words
from training import command
from training.log import read
from training.run import Run

SHORT = ("--max-train-steps", 4)


def same(one: Path, two: Path) -> bool:
    first, second = (Checkpoint.open(run).tensors("network") for run in (one, two))
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
    found = Checkpoint.open(repa)
    heads = found.tensors("heads")
    assert set(heads) == {f"repa.head.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    assert found.config["align"]["layersync"]["weight"] == 0.3
    assert set(found.tensors("network")) == set(Checkpoint.open(plain).tensors("network"))


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
    found = {name: weights(name, *more) for name, more in changes.items()}
    names = list(found)
    assert all(not torch.equal(base, value) for value in found.values())
    assert all(not torch.equal(found[a], found[b]) for i, a in enumerate(names) for b in names[:i])


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
    assert [one.get("layersync") for one in seen] == [0.2, 0.1, None, None, None]  # gone after its stop
    assert [one["sra"] for one in seen] == pytest.approx([0.2, 0.2, 0.2, 0.02, 0.02])  # 3 steps an epoch


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
    found, lines = Checkpoint.open(run).config["resolved"][more[0]], read(run / "log.jsonl")
    assert all(np.isfinite(value) for line in lines for value in line.values())
    if more[0] == "dispersive":
        assert found["taps"] == [6] and found["temperature"] == 1.0
        assert Checkpoint.open(run).config["train"]["max_grad_norm"] == 0.0
    elif more[0] == "sra":
        assert 0 <= lines[0]["loss/sra"] <= 2
    else:
        assert found["attention_pairs"] == [[2, 1], [3, 4]] and found["stop"] == 2
        assert ["loss/haste" in line for line in lines] == [True, True, False, False]
