"""What `--dry-run` prints, against counts on real tensors, formulas on paper, and what it must leave alone."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import models
import train
import train_guide
from alignment.interval import expected_share
from loss import Learner
from models.latents import LatentSpace
from preprocessing import shards
from runtime.errors import UserError
from runtime.peaks import PEAKS, SHARE
from tests.helpers import Words, build_run
from training import command, cost
from training.batches import Batches


def estimate(argv: list[str], program: str = "train") -> cost.Cost:
    return cost.estimate(*command.resolve(argv, program, None, ("guided",) if program == "train_guide" else ()))


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four items with the shapes of ImageNet at 256 pixels in the SD-VAE's space, images kept."""
    folder, buffer = tmp_path_factory.mktemp("shapes"), io.BytesIO()
    Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(buffer, "PNG")
    latents = np.zeros((4, 1, 2, 4, 32, 32), np.float16)
    entry = shards.write_shard(folder, 0, latents, np.arange(4), images=[buffer.getvalue()] * 4)
    shards.write_manifest(
        folder,
        space=LatentSpace(name="sd-vae", channels=4, stride=8, shift=(0.0,), scale=(0.18215,)),
        resolution=256,
        latent_size=32,
        views=1,
        parts=2,
        dtype="float16",
        crop="center",
        images=True,
        class_names=[str(n) for n in range(1000)],
        shards=[entry],
        source="shapes",
    )
    return folder


def test_a_route_and_two_times_are_counted_as_they_run(tmp_path: Path, words: Words) -> None:
    argv = words(tmp_path, "x", "--align", "self-flow", "--route", 2, 4, 0.5, "--max-train-steps", 1)
    estimated = estimate(argv)
    run = build_run(argv)
    learner = Learner(run.network, run.alignments, ema=run.ema.network)
    ((batch,),) = Batches(run.config, run.data, run.device, 0, 1).steps(0, 1, run.alignments)
    with FlopCounterMode(display=False, custom_mapping=cost.attention_on_cpu()) as counter:
        sum(value.mean() for value in learner(batch).values()).backward()
    assert sum(part.flops for part in estimated.parts) == pytest.approx(counter.get_total_flops() / 16, rel=1e-6)
    network, route, *_ = estimated.parts
    # half of the tokens leave out half of the blocks, which are nearly all of the network
    assert -0.26 < route.flops / network.flops < -0.22 and estimated.plain == estimate(words(tmp_path, "y")).plain


@pytest.mark.parametrize("more", [("repa", "sra"), ("haste",), ("guided",)])
def test_flops_are_those_of_a_real_step(
    more: tuple, tmp_path: Path, words: Words, encoder: Path, teacher: Path
) -> None:
    program = "train_guide" if more == ("guided",) else "train"
    argv = words(tmp_path, "x", "--max-train-steps", 1)
    argv += ["--guiding-ckpt", str(teacher)] if program == "train_guide" else ["--align", *more]
    argv += [] if program == "train_guide" else [f"--{more[0]}-encoder", str(encoder)]
    estimated = estimate(argv, program)

    run = build_run(argv, program)
    learner = Learner(run.network, run.alignments, ema=run.ema.network)
    ((batch,),) = Batches(run.config, run.data, run.device, 0, 1).steps(0, 1, run.alignments)
    with FlopCounterMode(display=False, custom_mapping=cost.attention_on_cpu()) as counter:
        losses = learner(batch)
        sum(value.mean() for value in losses.values()).backward()
    assert estimated.ratio() * estimated.plain * 16 == pytest.approx(counter.get_total_flops(), rel=0.01)
    trained = sum(p.numel() for p in learner.parameters()) + run.network.pos_embed.numel()
    assert sum(part.parameters for part in estimated.parts if part.trained) == trained


def test_the_published_size_by_formulas_on_paper(imagenet_like: Path, tmp_path: Path) -> None:
    """SiT-B/2 at 256 pixels: 3 x 23.00 GMAC a step; REPA's head and DINOv2-B at 224 pixels on the fly, 1.417 in all."""
    estimated = estimate(
        [
            "--data-dir",
            str(imagenet_like),
            "--exp-name",
            "x",
            "--output-dir",
            str(tmp_path),
            "--batch-size",
            "4",
            "--align",
            "repa",
            "--mixed-precision",
            "bf16",
        ]
    )
    width, tokens, depth = 768, 256, 12
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    assert estimated.plain == pytest.approx(
        2 * 3 * depth * block, rel=0.015
    )  # embedders and the final layer are the rest
    head = tokens * (768 * 2048 + 2048**2 + 2048 * 768)
    shares = {part.name: part.flops for part in estimated.parts}
    assert shares["repa: head and loss"] == pytest.approx(2 * 3 * head, rel=0.01)
    assert shares["repa: encoder"] == pytest.approx(2 * 23.16e9, rel=0.01)
    assert estimated.ratio() == pytest.approx(1.417, rel=0.01)
    parameters = {part.name: part.parameters for part in estimated.parts}
    assert parameters["network"] == models.parameter_count(
        models.outline(models.spec("SiT-B/2", in_channels=4, input_size=32, num_classes=1000))
    )
    assert parameters["repa: encoder"] == pytest.approx(85.7e6, rel=0.002)


def test_the_teachers_share_follows_its_depth_and_the_interval(tmp_path: Path, words: Words, teacher: Path) -> None:
    """Two passes to two thirds of the depth: 4/9 of a plain step whatever the size, 0.3 of that on 0.4 <= t <= 0.7."""
    base = words(tmp_path, "x", "--guiding-ckpt", teacher, "--max-train-steps", 100)
    share = {
        name: next(p.flops for p in estimated.parts if p.name == "guided: teacher") / estimated.plain
        for name, estimated in {
            "all": estimate(base, "train_guide"),
            "some": estimate([*base, "--align-interval", "0.4", "0.7"], "train_guide"),
            "less": estimate(
                [*base, "--guiding-labels", "skip", "--cfg-prob", "0.2", "--guide-scale", "1"], "train_guide"
            ),
        }.items()
    }
    assert share["all"] == pytest.approx(4 / 9, rel=0.02)
    assert share["some"] == pytest.approx(0.3 * share["all"])
    assert share["less"] == pytest.approx(0.8 * 0.5 * share["all"])  # labelled samples, and the conditional pass alone
    normal = 1 / (1 + np.exp(-np.random.default_rng(0).standard_normal(200_000)))
    for low, high in ((0.4, 0.7), (0.5, 1.0), (0.0, 0.2)):
        assert expected_share((low, high), "select", "uniform") == pytest.approx(high - low)
        measured = ((normal >= low) & (normal <= high)).mean()
        assert expected_share((low, high), "select", "logit-normal") == pytest.approx(measured, abs=0.005)
        assert expected_share((low, high), "upstream", "uniform") == 1.0


def test_an_alignment_that_ends_costs_its_share_of_the_run(tmp_path: Path, words: Words) -> None:
    estimated = estimate(words(tmp_path, "x", "--align", "latent", "--align-stop-steps", 25, "--max-train-steps", 100))
    extra = estimated.ratio() - 1
    assert extra > 0.01 and estimated.ratio(24) == estimated.ratio() and estimated.ratio(25) == 1
    assert estimated.mean_ratio() == pytest.approx(1 + extra / 4)
    slow, fast = estimated.hours(200.0)
    assert slow == pytest.approx(100 * 16 / 200 / 3600) and fast == pytest.approx(slow * (1 + extra / 4) / (1 + extra))
    assert estimated.epoch_steps == 1797 // 16
    hours = estimated.computed_hours(PEAKS["H100"])
    assert hours * 3600 * SHARE * 990e12 == pytest.approx(estimated.flops(100))
    (line,) = [line for line in cost.report(estimated).splitlines() if line.startswith("computed, not measured")]
    a800, h100, h200 = map(float, re.findall(r"[AH]\d00 ([\d.e-]+)", line))
    assert "at 40% of its bf16 peak" in line and h100 == h200 and a800 / h100 == pytest.approx(990 / 312, rel=0.01)
    assert "computed" not in cost.report(estimated, 200.0)


def test_a_cached_encoder_costs_one_pass_and_nothing_in_a_step(tmp_path: Path, words: Words, encoder: Path) -> None:
    argv = words(tmp_path, "x", "--align", "repa", "--repa-encoder", encoder)
    every_step, cached = estimate(argv), estimate([*argv, "--align-cache"])
    (running,) = [part for part in every_step.parts if part.name == "repa: encoder"]
    (precomputed,) = [part for part in cached.parts if part.name == "repa: encoder"]
    assert running.flops > 0 and precomputed.flops == 0 and cached.ratio() < every_step.ratio()
    assert every_step.once == 0 and cached.once == 1797 * running.flops
    assert "before the first step" in cost.report(cached) and "before the first step" not in cost.report(every_step)


def test_plain_training_has_its_published_number_too() -> None:
    assert "33.00" in cost.reported("SiT-B/2", [])[0]


def test_what_activation_checkpointing_computes_twice(imagenet_like: Path, tmp_path: Path) -> None:
    """Blocks computed twice cost a third of a step; with their products kept they cost no product."""
    argv = [
        "--data-dir",
        str(imagenet_like),
        "--exp-name",
        "x",
        "--output-dir",
        str(tmp_path),
        "--batch-size",
        "4",
        "--mixed-precision",
        "bf16",
        "--model",
        "SiT-Tiny/2",
        "--activation-checkpointing",
    ]
    none, some, full = (estimate([*argv, mode]) for mode in ("none", "selective", "full"))
    width, tokens, depth = 128, 256, 6
    forward = 2 * depth * (12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2)
    assert none.recomputed == some.recomputed == 0 and full.recomputed == forward
    assert none.plain == some.plain == full.plain
    assert "computed twice" in cost.report(full) and "computed twice" not in cost.report(some)


def test_a_dry_run_prints_and_touches_nothing(
    tmp_path: Path, words: Words, teacher: Path, capsys: pytest.CaptureFixture
) -> None:
    train_guide.main(
        words(
            tmp_path,
            "x",
            "--guiding-ckpt",
            teacher,
            "--align-stop-steps",
            10,
            "--max-train-steps",
            100,
            "--dry-run",
            "--measure",
            2,
        )
    )
    text = capsys.readouterr().out
    for word in (
        "network",
        "guided: head and loss",
        "guided: teacher",
        "total",
        "from step 10 on",
        "mean over the run",
        "112 per epoch",
        "images per second over 2 steps of 1 process(es) on cpu",
        "time at ",
    ):
        assert word in text, word
    protocol = "ImageNet 256, no guidance"
    assert cost.reported("SiT-B/2", ["layersync", "repa"]) == [
        f"published with layersync: FID 30.00 after 80 epochs (ODE, Heun; trained with flips; {protocol})",
        f"published with repa: FID 24.40 after 80 epochs (SDE, 250 steps; trained without flips; {protocol})",
    ]
    assert cost.reported("SiT-Tiny/2", ["repa"]) == []
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="belongs to --dry-run"):
        train.main(words(tmp_path, "x", "--measure", 5))


def test_a_small_network_is_counted_on_real_tensors_with_the_counts_of_fake_ones(
    tmp_path: Path, words: Words, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = words(tmp_path, "x", "--guiding-ckpt", teacher, "--activation-checkpointing", "full")
    real = estimate(argv, "train_guide")
    with monkeypatch.context() as patch:
        patch.setattr(cost, "SMALL", 0)
        assert estimate(argv, "train_guide") == real
    monkeypatch.setattr("torch._subclasses.fake_tensor.FakeTensorMode", None)  # would fail
    assert estimate(argv, "train_guide") == real
