"""Internal Guidance: the second velocity in training, its average, and what it does to samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import generate
import models
import train
from evaluations import sweep
from models.checkpoint import Checkpoint
from models.heads import VelocityHead
from models.layers import modulate
from models.pixels import PixelCodec, pixels
from runtime.errors import UserError
from sampling.config import SamplingConfig
from sampling.internal import Inner, open_inner
from sampling.sampler import Sampler
from tests.helpers import Words, inputs, perturbed
from training import command
from training.run import Run

SPEC = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10)
LIGHT = models.spec("LightningDiT-Tiny/1", in_channels=1, input_size=4, num_classes=10)


def inner(low: float = 0.0, high: float = 1.0, spec: models.ModelSpec = SPEC) -> Inner:
    """A head of random weights on block 2."""
    described = VelocityHead(kind="final-layer", block=2, low=low, high=high)
    head, generator = described.build(spec, None), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return Inner("internal", described, head.requires_grad_(False), spec.patch_size, low, high)


def sampler(guide: Inner | None, **settings: object) -> Sampler:
    return Sampler(
        perturbed(SPEC, seed=0).requires_grad_(False),
        PixelCodec(pixels(1)),
        SamplingConfig(mode="ode", num_steps=4, **settings),
        4,
        inner=guide,
    )


def by_hand(x: torch.Tensor, t: float, labels: torch.Tensor, guide: Inner) -> tuple[torch.Tensor, torch.Tensor]:
    """Both velocities, block by block: the network's own and that of the head on block 2."""
    network = perturbed(SPEC, seed=0)
    tokens = network.x_embedder(x.float()) + network.pos_embed
    c = (network.t_embedder(torch.full((len(x),), t)) + network.y_embedder(labels))[:, None]
    for number, block in enumerate(network.blocks, start=1):
        tokens = block(tokens, c)
        if number == 2:
            shift, scale = guide.head.adaLN_modulation(c).chunk(2, dim=-1)
            middle = guide.head.linear(
                modulate(torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6), shift, scale)
            )
    ends = network.final_layer(tokens, c), middle
    return tuple(
        part.reshape(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 1, 8, 8).detach().double() for part in ends
    )


@pytest.mark.parametrize("scale", [0.0, 1.4])
def test_one_euler_step_is_the_formula_with_and_without_cfg(scale: float) -> None:
    """x0 = x1 - v over one step; with CFG, both velocities are guided internally first."""
    guide, y, null = inner(), torch.tensor([1, 2, 3, 4]), torch.full((4,), 10)
    for cfg in (1.0, 3.0):
        drawn = sampler(guide, internal_scale=scale, cfg_scale=cfg)
        drawn.grid = [1.0, 0.0]
        sampled = drawn.latents(range(4), y.numpy())
        with torch.no_grad():
            start = next(drawn._noise(range(4), 1))
            conditional, unconditional = (
                middle + scale * (own - middle)
                for own, middle in (by_hand(start, 1.0, labels, guide) for labels in (y, null))
            )
        torch.testing.assert_close(
            sampled, start - (unconditional + cfg * (conditional - unconditional)), rtol=0, atol=2e-5
        )


def test_scale_one_is_no_guidance_bit_for_bit_and_scale_zero_the_shallow_velocity() -> None:
    plain = sampler(None).latents(range(4))
    assert torch.equal(sampler(inner(), internal_scale=1.0).latents(range(4)), plain)
    assert not torch.equal(sampler(inner(), internal_scale=1.5).latents(range(4)), plain)
    x, t, y = torch.zeros(4, 1, 8, 8).double(), 0.5, torch.arange(4)
    shallow = sampler(inner(), internal_scale=0.0)._velocity(y)(x, t)
    torch.testing.assert_close(shallow, by_hand(x, t, y, inner())[1], rtol=0, atol=1e-5)


def test_it_guides_inside_its_interval_alone() -> None:
    x, y = torch.ones(4, 1, 8, 8).double(), torch.arange(4)
    plain, guided = (
        sampler(guide, internal_scale=2.0 if guide else 1.0)._velocity(y) for guide in (None, inner(0.3, 0.6))
    )
    assert [torch.equal(plain(x, t), guided(x, t)) for t in (0.0, 0.29, 0.3, 0.45, 0.6, 0.61, 1.0)] == [
        True,
        True,
        False,
        False,
        False,
        True,
        True,
    ]


def test_a_forward_pass_gives_the_condition_and_the_velocity_away() -> None:
    network = perturbed(SPEC, seed=0)
    x, t, y = inputs(SPEC)
    output = network(x, t, y, taps=(2, models.CONDITION, models.VELOCITY))
    assert torch.equal(output.features[models.VELOCITY], output.velocity)
    torch.testing.assert_close(
        output.features[models.CONDITION], (network.t_embedder(t) + network.y_embedder(y))[:, None], rtol=0, atol=0
    )
    assert list(network(x, t, y, taps=(models.CONDITION,), exit_early=True).features) == [models.CONDITION]


def test_the_head_is_a_second_final_layer_that_starts_at_zero_and_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    for spec in (SPEC, LIGHT):
        network = models.build(spec)
        head = VelocityHead(kind="final-layer", block=1).build(spec, None)
        fresh = network.final_layer.state_dict()
        weights = head.state_dict()
        assert weights.keys() == fresh.keys() and all(
            torch.equal(value, fresh[name]) for name, value in weights.items()
        )
        assert all(parameter.requires_grad for parameter in head.parameters())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, words: Words) -> Path:
    """Four steps of Internal Guidance with a checkpoint after each."""
    return train.main(
        words(tmp_path_factory.mktemp("internal"), "whole", *OPTIONS, "--max-train-steps", 4, ema_extra_decays=[0.5])
    )


OPTIONS = ("--align", "internal", "--align-interval", 0.2, 0.9, "--checkpointing-steps", 1)


def test_the_loss_reaches_head_condition_and_shallow_blocks_alone(tmp_path: Path, words: Words) -> None:
    own = Run(*command.resolve(words(tmp_path, "x", "--align", "internal", "--align-depth", 2), "train", None))
    own.network, alignment = perturbed(own.spec, seed=0), own.alignments["internal"]
    with torch.no_grad():
        for parameter in alignment.parameters():
            parameter += 0.1
    own.setup.learner(own.network, own.alignments, None, own.ema.network)(next(iter(own.batches(1)))[0])[
        "internal"
    ].backward()
    reached = {
        name
        for name, parameter in own.network.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert {name.split(".")[1] for name in reached if name.startswith("blocks.")} == {"0", "1"}
    assert {name.split(".")[0] for name in reached} == {"blocks", "x_embedder", "t_embedder", "y_embedder"}
    assert all(parameter.grad is not None for parameter in alignment.head.parameters())


def test_the_average_of_the_head_follows_its_definition(run: Path) -> None:
    """After n steps, from w0 and weights w1 .. wn: sum over s of (1 - d_s) w_s times the product of later decays."""
    steps = [Checkpoint.open(f"{run}@{step}") for step in range(1, 5)]
    trained = [
        {key.removeprefix("internal.head."): value for key, value in checkpoint.tensors("heads").items()}
        for checkpoint in steps
    ]
    assert any(value.any() for value in trained[-1].values())
    for of, decay in (("ema", 0.9999), ("ema-0.5", 0.5)):
        expected = {
            name: torch.zeros_like(value).double() for name, value in trained[0].items()
        }  # w0: the head starts at zero
        for step, weights in enumerate(trained, start=1):
            d = min(decay, (1 + step) / (10 + step))
            expected = {name: d * value + (1 - d) * weights[name].double() for name, value in expected.items()}
        average = steps[-1].tensors(f"internal-head-{of}")
        assert average.keys() == expected.keys()
        for name, value in average.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-9)


def test_it_continues_exactly(run: Path, tmp_path: Path, words: Words) -> None:
    for steps in (2, 4):
        parts = train.main(words(tmp_path, "whole", *OPTIONS, "--max-train-steps", steps, ema_extra_decays=[0.5]))
    first, second = Checkpoint.open(run), Checkpoint.open(parts)
    for name in ("raw", "ema", "ema-0.5", "heads", "optimizer", "internal-head-ema", "internal-head-ema-0.5"):
        whole, resumed = first.tensors(name), second.tensors(name)
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole), name


def test_samples_record_how_they_were_guided(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def draw(name: str, *more: object) -> tuple[np.ndarray, dict]:
        folder = generate.main(
            [
                "--ckpt",
                str(run),
                "--out",
                str(tmp_path / name),
                "--num-fid-samples",
                "4",
                "--num-steps",
                "4",
                "--weights",
                "raw",
                *map(str, more),
            ]
        )
        with np.load(folder / "samples.npz") as archive:
            return archive["arr_0"], json.loads((folder / "samples.json").read_text())

    plain, record = draw("plain")
    assert record["internal_scale"] == 1 and "internal" not in record
    guided, record = draw("guided", "--internal-scale", 30)
    assert (
        record["internal"] == {"head": "internal", "block": 2, "low": 0.2, "high": 0.9}
        and record["internal_scale"] == 30
    )
    assert record["evaluations"] == 4 and not np.array_equal(plain, guided)
    assert "internal guidance 30 by block 2 (internal) for t in 0.2 to 0.9" in capsys.readouterr().out
    assert np.array_equal(
        plain, draw("outside", "--internal-scale", 30, "--internal-low", 0.5, "--internal-high", 0.6)[0]
    )
    for wrong in (("--internal-low", 0.5), ("--internal-scale", -1), ("--internal-scale", 2, "--internal-low", 0.95)):
        with pytest.raises(UserError, match="internal"):
            draw("wrong", *wrong)


def test_a_sweep_guides_internally_too(run: Path, tmp_path: Path, data: Path) -> None:
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=np.arange(8 * 64, dtype=np.uint8).reshape(8, 8, 8, 1))
    folder = sweep.main(
        [
            "--ckpt",
            str(run),
            "--reference",
            str(reference),
            "--features",
            "pixels",
            "--cfg-scale",
            "1",
            "--num-fid-samples",
            "4",
            "--num-steps",
            "3",
            "--internal-scale",
            "2",
            "--out",
            str(tmp_path / "sweep"),
        ]
    )
    assert json.loads((folder / "sweep.json").read_text())["settings"]["internal"]["block"] == 2


def test_a_stage_1_with_velocity_target_serves_and_one_without_is_refused(
    teacher: Path, tmp_path: Path, words: Words
) -> None:
    settings = SamplingConfig(internal_scale=1.4)
    with pytest.raises(UserError, match="no velocity head.*--align internal") as refused:
        generate.main(["--ckpt", str(teacher), "--internal-scale", "1.4"])
    assert "\n" not in str(refused.value)
    more = ("--align", "latent", "--preset", "efficient", "--align-hidden", 16)
    stage1 = Checkpoint.open(train.main(words(tmp_path, "x", *more, "--max-train-steps", 1)))
    opened = open_inner(stage1, settings)
    assert (opened.name, opened.spec.block, opened.low, opened.high) == ("latent", 1, 0.4, 0.7)
    x, t, y = inputs(stage1.spec)
    network = stage1.network()
    raw = {key.removeprefix("latent.head."): value for key, value in stage1.tensors("heads").items()}
    average = stage1.tensors("latent-head-ema")
    assert raw.keys() == average.keys() and not torch.equal(raw["2.weight"], average["2.weight"])
    velocity = opened(network(x, t, y, taps=opened.spec.taps).features)
    tokens = network(x, t, y, taps=[1]).features[1]
    for layer in (0, 2, 4):
        tokens = torch.nn.functional.linear(tokens, average[f"0.{layer}.weight"], average[f"0.{layer}.bias"])
        tokens = torch.nn.functional.silu(tokens) if layer < 4 else tokens
    tokens = torch.nn.functional.linear(
        torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6), average["2.weight"], average["2.bias"]
    )
    torch.testing.assert_close(velocity, models.unpatchify(tokens, 2), rtol=0, atol=1e-5)
    trained = open_inner(stage1, SamplingConfig(internal_scale=1.4, weights="raw"))
    assert torch.equal(trained.head[2].weight, raw["2.weight"])


def test_a_head_that_has_ended_guides_no_more(tmp_path: Path, words: Words) -> None:
    run = train.main(words(tmp_path, "x", "--align", "internal", "--align-stop-steps", 1, "--max-train-steps", 2))
    assert not [name for name in Checkpoint.open(run).files if "head" in name]
    with pytest.raises(UserError, match="no velocity head"):
        open_inner(Checkpoint.open(run), SamplingConfig(internal_scale=2.0))
