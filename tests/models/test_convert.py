"""Published weights through the public command: every layout of the family, matched to the peers' own numbers."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import generate
import models
from models import convert, layouts
from models.checkpoint import Checkpoint
from runtime import files
from runtime.errors import UserError
from sampling.config import SamplingConfig
from sampling.internal import open_inner
from tests.helpers import DATA, PARITY_SIT, inputs, parity, perturbed, tiny_vae


def save(path: Path, weights: dict, *, wrapped: bool = False) -> Path:
    """Weights as a trainer leaves them: flat, or beside the raw ones, the optimiser and an argument list."""
    if wrapped:
        raw = {
            f"module.{name}".replace("attn.", "_orig_mod.attn."): value + 1
            if name == "final_layer.linear.bias"
            else value
            for name, value in weights.items()
        }
        torch.save(
            {
                "model": raw,
                "ema": weights,
                "opt": {"state": {}, "param_groups": []},
                "args": argparse.Namespace(model="SiT-XL/2", lr=1e-4),
                "steps": 400,
            },
            path,
        )
    elif path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def statistics(tmp_path: Path, channels: int) -> str:
    torch.save(
        {"mean": torch.arange(channels).view(1, -1, 1, 1) / 10, "std": torch.full((1, channels, 1, 1), 2.0)},
        tmp_path / "latents_stats.pt",
    )
    return str(tmp_path / "latents_stats.pt")


def compare(checkpoint: Checkpoint, stored: dict[str, Tensor], reversed_time: bool) -> None:
    """The velocity and every stored block are the peer's, to 2e-5."""
    blocks = {int(name.removeprefix("block")): value for name, value in stored.items() if name.startswith("block")}
    t = 1 - stored["t"] if reversed_time else stored["t"]
    output = checkpoint.network("ema")(stored["x"], t, stored["y"], taps=list(blocks))
    pairs = [(-output.velocity if reversed_time else output.velocity, stored["velocity"])]
    pairs += [(output.features[number], value) for number, value in blocks.items()]
    assert max((a - b).abs().max() for a, b in pairs) < 2e-5


@pytest.mark.parametrize(
    ("name", "suffix", "reversed_time"),
    [
        ("repa_sit", ".pt", False),
        ("sit_original", ".pth", True),
        ("lightningdit", ".safetensors", True),
        ("lightningdit_qknorm", ".pt", True),
    ],
)
def test_parity_with_the_published_code(name, suffix, reversed_time, tmp_path, capsys):
    weights, stored = parity(name)
    source = save(tmp_path / f"{name}{suffix}", weights)
    extra = ["--statistics", statistics(tmp_path, 8)] if name.startswith("lightningdit") else []
    checkpoint = Checkpoint.open(
        convert.main([str(source), "--out", str(tmp_path / "out"), "--num-heads", "4", *extra])
    )
    compare(checkpoint, stored, reversed_time)
    assert checkpoint.spec.qk_norm == name.endswith("qknorm") and checkpoint.spec.num_classes == 10
    assert checkpoint.config["source"]["digest"] == files.digest(source)
    assert checkpoint.config["source"]["layout"] in capsys.readouterr().out
    if extra:
        assert (checkpoint.space.name, checkpoint.space.stride) == ("va-vae", 16)
        assert (checkpoint.space.shift[3], checkpoint.space.scale[3]) == pytest.approx((0.3, 0.5))
    else:
        assert (checkpoint.space.name, checkpoint.space.scale, checkpoint.space.digest) == ("sd-vae", (0.18215,), None)


def test_self_flow_comes_without_a_null_label(tmp_path, capsys):
    """Patches by a linear layer, eight output channels of which four count, and no label dropout."""
    weights, stored = parity("self_flow")
    source = save(tmp_path / "self_flow.pt", weights)
    checkpoint = Checkpoint.open(convert.main([str(source), "--out", str(tmp_path / "out"), "--num-heads", "4"]))
    assert "Self-Flow, noise at t = 0" in (printed := capsys.readouterr().out) and "projector.* (4 tensors)" in printed
    assert "its null label was not trained: no classifier-free guidance" in printed and not checkpoint.has_null
    velocity = checkpoint.network("ema")(stored["x"], stored["uniform.t"], stored["y"]).velocity
    assert (velocity - stored["uniform.velocity"]).abs().max() < 2e-5
    words = ["--ckpt", str(tmp_path / "out"), "--out", str(tmp_path / "samples"), "--num-fid-samples", "2"]
    with pytest.raises(UserError, match="no null class to guide with: use --cfg-scale 1"):
        generate.main([*words, "--cfg-scale", "2"])


def test_a_training_checkpoint_gives_both_sets_of_weights_and_names_what_it_leaves(tmp_path, capsys):
    weights, stored = parity("repa_sit")
    source = save(tmp_path / "0400000.pt", weights, wrapped=True)
    checkpoint = Checkpoint.open(convert.main([str(source), "--out", str(tmp_path / "out"), "--num-heads", "4"]))
    compare(checkpoint, stored, reversed_time=False)
    bias = [checkpoint.network(which).final_layer.linear.bias for which in ("raw", "ema")]
    torch.testing.assert_close(bias[0], bias[1] + 1)
    assert checkpoint.step == 400
    assert checkpoint.config["source"]["ignored"] == ["opt", "args", "steps", "projectors.* (6 tensors)"]
    assert "ignored: opt, args, steps, projectors.* (6 tensors)" in capsys.readouterr().out


def test_without_an_average_the_weights_that_are_there_count(tmp_path):
    weights, stored = parity("repa_sit")
    for name in ("model", "state_dict"):
        torch.save({name: weights, "epoch": 3}, tmp_path / "0000007.pt")
        checkpoint = Checkpoint.open(
            convert.main([str(tmp_path / "0000007.pt"), "--out", str(tmp_path / name), "--num-heads", "4"])
        )
        compare(checkpoint, stored, reversed_time=False)
        assert checkpoint.step == 7 and "epoch" in checkpoint.config["source"]["ignored"]
        with pytest.raises(UserError, match="has no network.safetensors; its weights are ema: "):
            checkpoint.network("raw")


def test_every_layout_of_the_family_is_the_same_network(tmp_path):
    """Heads and block names differ between the codes; what is left is REPA's network."""
    weights, stored = parity("repa_sit")
    bare = {name: value for name, value in weights.items() if not name.startswith("projectors.")}
    mlp = {f"projectors.{i}.{part}": torch.zeros(1) for i in (0, 2, 4) for part in ("weight", "bias")}
    layouts = {
        "REPA without projectors": bare,
        "REPA": {
            name.replace("blocks.2.", "decoder_blocks.0.").replace("blocks.3.", "decoder_blocks.1."): value
            for name, value in weights.items()
        },
        "SRA": bare | {f"ap_head.linear{i}.{part}": torch.zeros(1) for i in (1, 2) for part in ("weight", "bias")},
        "Self-Transcendence, stage 2": bare | mlp,
        "Self-Transcendence, stage 1": bare | mlp | {"projectors_final.linear.weight": torch.zeros(1)},
    }
    for number, (layout, tensors) in enumerate(layouts.items()):
        source = save(tmp_path / f"{number}.pt", tensors)
        checkpoint = Checkpoint.open(
            convert.main([str(source), "--out", str(tmp_path / str(number)), "--num-heads", "4"])
        )
        assert checkpoint.config["source"]["layout"] == f"{layout}, noise at t = 1"
        compare(checkpoint, stored, reversed_time=False)


def test_qk_norm_tells_the_heads_and_loads(tmp_path):
    """The authors' networks: LayerNorm with affine on queries and keys, from which the head width is read."""
    weights, stored = parity("repa_sit")
    for block in range(4):
        for which in "qk":
            weights[f"blocks.{block}.attn.{which}_norm.weight"] = torch.full((12,), 1.5)
            weights[f"blocks.{block}.attn.{which}_norm.bias"] = torch.full((12,), 0.1)
    checkpoint = Checkpoint.open(convert.main([str(save(tmp_path / "a.pt", weights)), "--out", str(tmp_path / "out")]))
    assert checkpoint.spec.qk_norm and checkpoint.spec.num_heads == 4
    velocity = checkpoint.network()(stored["x"], stored["t"], stored["y"]).velocity
    assert (velocity - stored["velocity"]).abs().max() > 1e-3


@pytest.mark.parametrize("stage", [1, 2])
def test_the_authors_release_as_their_trainer_saves_it(stage, tmp_path):
    """`model` and `ema` with QK-norm, the heads of stage 1 or the head of stage 2, optimiser and arguments."""
    spec = models.spec("SiT-Tiny/2", in_channels=4, input_size=8, num_classes=10, qk_norm=True)
    networks = {"model": perturbed(spec, seed=1), "ema": perturbed(spec, seed=2)}
    heads = {f"projectors.{layer}.{kind}": torch.zeros(1) for layer in (0, 2, 4) for kind in ("weight", "bias")}
    if stage == 1:
        heads |= {
            "projectors_final.linear.weight": torch.zeros(16, 128),
            "projectors_final.linear.bias": torch.zeros(16),
        }
    archive = {
        name: {**network.state_dict(), "pos_embed": network.pos_embed, **heads} for name, network in networks.items()
    }
    torch.save(
        {**archive, "opt": {"state": {}}, "args": argparse.Namespace(qk_norm=True), "steps": 2_000_000},
        tmp_path / "2000000.pt",
    )
    checkpoint = Checkpoint.open(convert.main([str(tmp_path / "2000000.pt"), "--out", str(tmp_path / "out")]))
    assert checkpoint.step == 2_000_000 and checkpoint.spec.qk_norm and checkpoint.spec.num_heads == 4
    assert f"Self-Transcendence, stage {stage}" in checkpoint.config["source"]["layout"]
    x, t, y = inputs(spec)
    for weights, name in (("raw", "model"), ("ema", "ema")):
        assert torch.equal(checkpoint.network(weights)(x, t, y).velocity, networks[name](x, t, y).velocity)


def test_the_direction_of_time_can_be_said(tmp_path):
    """A four-channel SiT has REPA's keys: --noise-at folds the reversal where the keys leave it open."""
    weights, stored = parity("repa_sit")
    source = save(tmp_path / "a.pt", weights)
    checkpoint = Checkpoint.open(
        convert.main([str(source), "--out", str(tmp_path / "out"), "--num-heads", "4", "--noise-at", "0"])
    )
    compare(checkpoint, stored, reversed_time=True)


def test_reversing_time_changes_the_direction_and_nothing_else():
    spec = models.spec("SiT-Tiny/2", in_channels=4, input_size=8, num_classes=10)
    network = perturbed(spec)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    layouts.reverse_time(weights)
    x, t, y = inputs(spec)
    expected = network(x, t, y, taps=range(1, 7))
    output = models.build(spec, weights=weights)(x, 1 - t, y, taps=range(1, 7))
    torch.testing.assert_close(output.velocity, -expected.velocity, rtol=1e-5, atol=2e-5)
    for number, feature in expected.features.items():
        torch.testing.assert_close(output.features[number], feature, rtol=1e-5, atol=2e-5)
    layouts.reverse_time(weights)
    torch.testing.assert_close(weights["t_embedder.mlp.0.weight"], network.state_dict()["t_embedder.mlp.0.weight"])


def second_layer(weights: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Internal Guidance's second final layer for a network: the names and shapes of its own, other values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name.replace("final_layer.", "final_layer_xr."): 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in weights.items()
        if name.startswith("final_layer.")
    }


def second_velocity(weights: dict[str, Tensor], t: Tensor, y: Tensor, tokens: Tensor, patch: int) -> Tensor:
    """The second velocity in the layout's own direction of time, from the peer's tokens of the block.

    adaLN, projection, and patches put in place.
    """
    angles = t[:, None] * torch.exp(-np.log(10000) * torch.arange(128) / 128)
    c = torch.cat([angles.cos(), angles.sin()], dim=1)
    for layer in ("t_embedder.mlp.0", "t_embedder.mlp.2"):
        c = F.linear(c if layer.endswith("0") else F.silu(c), weights[f"{layer}.weight"], weights[f"{layer}.bias"])
    c = c + weights["y_embedder.embedding_table.weight"][y]
    scale = weights.get("final_layer_xr.norm_final.weight")
    centred = tokens - tokens.mean(-1, keepdim=True) if scale is None else tokens  # LayerNorm, or RMSNorm with a weight
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 if scale is None else scale)
    shift, gain = F.linear(
        F.silu(c),
        weights["final_layer_xr.adaLN_modulation.1.weight"],
        weights["final_layer_xr.adaLN_modulation.1.bias"],
    )[:, None].chunk(2, dim=-1)
    patches = F.linear(
        normed * (1 + gain) + shift, weights["final_layer_xr.linear.weight"], weights["final_layer_xr.linear.bias"]
    )
    side, channels = int(tokens.shape[1] ** 0.5), patches.shape[-1] // patch**2
    out = torch.zeros(len(tokens), channels, side * patch, side * patch)
    for number in range(tokens.shape[1]):
        row, column = divmod(number, side)
        out[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = (
            patches[:, number].reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)
        )
    return out


@pytest.mark.parametrize(
    ("name", "patch", "reversed_time"),
    [("repa_sit", 2, False), ("lightningdit", 1, True), ("lightningdit_qknorm", 1, True)],
)
def test_internal_guidance_brings_its_second_velocity(name, patch, reversed_time, tmp_path, capsys):
    """Both velocities are the peer's: noise at t = 1 for SiT, at 0 for LightningDiT, as in its authors' two folders."""
    weights, stored = parity(name)
    weights = {key: value for key, value in weights.items() if not key.startswith("projectors.")} | second_layer(
        weights
    )
    extra = ["--statistics", statistics(tmp_path, 8)] if reversed_time else []
    argv = [str(save(tmp_path / "ig.pt", {"ema": weights})), "--num-heads", "4", *extra]
    checkpoint = Checkpoint.open(convert.main([*argv, "--out", str(tmp_path / "out"), "--internal-block", "2"]))
    assert "Internal Guidance" in checkpoint.config["source"]["layout"] and checkpoint.config["source"]["ignored"] == []
    assert "second velocity from block 2 (--internal-scale)" in capsys.readouterr().out
    compare(checkpoint, stored, reversed_time)
    inner = open_inner(checkpoint, SamplingConfig(internal_scale=1.4))
    assert (inner.name, inner.spec.kind, inner.spec.block, inner.low, inner.high) == (
        "internal",
        "final-layer",
        2,
        0.0,
        1.0,
    )
    t = 1 - stored["t"] if reversed_time else stored["t"]
    velocity = inner(checkpoint.network()(stored["x"], t, stored["y"], taps=inner.spec.taps).features)
    expected = second_velocity(weights, stored["t"], stored["y"], stored["block2"], patch)
    torch.testing.assert_close(velocity, -expected if reversed_time else expected, rtol=0, atol=2e-5)
    assert expected.abs().mean() > 0.05

    again = tmp_path / "again"  # where the file says otherwise, both velocities turn
    turned = Checkpoint.open(
        convert.main([*argv, "--out", str(again), "--internal-block", "2", "--noise-at", str(int(reversed_time))])
    )
    inner = open_inner(turned, SamplingConfig(internal_scale=1.4))
    opposite = inner(turned.network()(stored["x"], 1 - t, stored["y"], taps=inner.spec.taps).features)
    torch.testing.assert_close(opposite, -velocity, rtol=0, atol=2e-5)


def test_converted_internal_guidance_samples_at_once(tmp_path, capsys):
    spec = models.spec("SiT-Tiny/2", in_channels=3, input_size=8, num_classes=3)
    networks = {"model": perturbed(spec, seed=1), "ema": perturbed(spec, seed=2)}
    sets = {name: {**network.state_dict(), "pos_embed": network.pos_embed} for name, network in networks.items()}
    sets = {name: weights | second_layer(weights, seed) for seed, (name, weights) in enumerate(sets.items())}
    torch.save(
        {**sets, "opt": {"state": {}}, "args": argparse.Namespace(encoder_depth=8), "steps": 4_000_000},
        tmp_path / "4000000.pt",
    )
    source = [str(tmp_path / "4000000.pt"), "--vae", "pixels", "--out"]
    with pytest.raises(
        UserError, match="block 8 of its second final layer is not among blocks 1 to 6: .*--internal-block"
    ):
        convert.main([*source, str(tmp_path / "out")])
    out = convert.main([*source, str(tmp_path / "out"), "--internal-block", "2"])
    for weights, name in (("raw", "model"), ("ema", "ema")):
        head = open_inner(Checkpoint.open(out), SamplingConfig(internal_scale=2.0, weights=weights)).head
        assert torch.equal(head.linear.weight, sets[name]["final_layer_xr.linear.weight"])

    def draw(name: str, *more: str) -> np.ndarray:
        words = [
            "--ckpt",
            str(out),
            "--num-fid-samples",
            "4",
            "--mode",
            "ode",
            "--num-steps",
            "3",
            "--out",
            str(tmp_path / name),
            *more,
        ]
        with np.load(generate.main(words) / "samples.npz") as archive:
            return archive["arr_0"]

    plain = draw("plain")
    assert not np.array_equal(plain, draw("guided", "--internal-scale", "5"))
    assert "internal guidance 5 by block 2 (internal) for t in 0 to 1" in capsys.readouterr().out


def test_the_second_velocity_is_of_block_8_unless_said_and_must_fit(tmp_path):
    spec = dataclasses.replace(PARITY_SIT, depth=9, hidden_size=16, num_heads=2, input_size=4, num_classes=3)
    network = models.build(spec)
    weights = network.state_dict() | {"pos_embed": network.pos_embed}
    second = second_layer(weights)

    def converted(tensors: dict[str, Tensor], *more: str) -> dict:
        torch.save(tensors, tmp_path / "a.pt")
        argv = [str(tmp_path / "a.pt"), "--num-heads", "2", "--out", str(tmp_path / "out"), *more]
        return Checkpoint.open(convert.main(argv)).config["velocity_heads"]["internal"]

    assert converted(weights | second)["block"] == 8
    assert converted(weights | second, "--internal-block", "4")["block"] == 4
    bias, second_of = (
        "final_layer_xr.linear.bias",
        r"second final layer \(final_layer_xr.\*\) of custom: linear.bias is",
    )
    for tensors, more, message in (
        (
            weights,
            ("--internal-block", "4"),
            r"no second final layer \(final_layer_xr.\*\): leave out --internal-block",
        ),
        (weights | second, ("--internal-block", "10"), "block 10 of its second final layer is not among blocks 1 to 9"),
        (weights | second | {bias: torch.zeros(8)}, (), rf"{second_of} \(8,\) where \(16,\) is needed"),
        (weights | {name: value for name, value in second.items() if name != bias}, (), f"{second_of} missing where"),
        (
            weights | second | {"final_layer_xr.extra": torch.zeros(1)},
            (),
            r"final_layer_xr.*: extra is \(1,\) where nothing is",
        ),
    ):
        with pytest.raises(UserError, match=message):
            converted(tensors, *more)


def test_published_sizes_need_no_heads_and_keep_their_names(tmp_path):
    spec = models.spec("SiT-S/2", in_channels=4, input_size=8, num_classes=3)
    network = models.build(spec)
    weights = network.state_dict() | {"pos_embed": network.pos_embed}
    checkpoint = Checkpoint.open(
        convert.main([str(save(tmp_path / "a.safetensors", weights)), "--out", str(tmp_path / "out")])
    )
    assert checkpoint.spec == spec


def test_the_vae_of_the_latents_can_be_named(tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.5,
    )
    vae.save_pretrained(tmp_path / "vae")
    source = str(save(tmp_path / "a.pt", parity("repa_sit")[0]))
    arguments = ["--out", str(tmp_path / "out"), "--num-heads", "4", "--vae"]
    space = Checkpoint.open(convert.main([source, *arguments, str(tmp_path / "vae")])).space
    assert (space.stride, space.scale, space.vae) == (2, (0.5,), str(tmp_path / "vae")) and space.digest
    assert Checkpoint.open(convert.main([source, *arguments, "pixels"])).space.name == "pixels"


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    weights, _ = parity("repa_sit")
    lightning, _ = parity("lightningdit")

    class Mischief:
        def __reduce__(self):
            return print, ("run",)

    rope = {name: value for name, value in lightning.items() if not name.startswith("feat_rope")}
    shifted = lightning | {"blocks.0.adaLN_modulation.1.weight": torch.zeros(192, 48)}
    heads, stats = ["--num-heads", "4"], ["--statistics", statistics(tmp_path, 8)]
    cases = [
        (weights, [], "add --num-heads"),
        (weights | {"extra.weight": torch.zeros(1)}, heads, r"extra.weight is \(1,\) where nothing is needed"),
        ({k: v for k, v in weights.items() if k != "blocks.2.mlp.fc1.bias"}, heads, "blocks.2.mlp.fc1.bias is missing"),
        ({"a.weight": torch.zeros(1)}, heads, "no known layout"),
        (weights | {"pos_embed": weights["pos_embed"] + 0.1}, heads, "pos_embed is not the fixed table"),
        (weights, [*heads, *stats], "works on 4 channels, .* has 8"),
        (lightning, heads, "--statistics latents_stats.pt"),
        (rope, [*heads, *stats], "feat_rope.freqs_cos is not the fixed table"),
        (shifted, [*heads, *stats], r"adaLN_modulation.1.weight is \(192, 48\) where \(288, 48\)"),
        ({"ema": weights, "hook": Mischief()}, heads, "asks to run print"),
        ({"epoch": 3}, heads, "holds no weights"),
        ([1, 2], heads, "not weights by name"),
        (weights, [*heads, "--num-head", "4"], "did you mean --num-heads"),
    ]
    for number, (value, arguments, message) in enumerate(cases):
        torch.save(value, tmp_path / f"{number}.pt")
        with pytest.raises(UserError, match=message):
            convert.main([str(tmp_path / f"{number}.pt"), "--out", str(tmp_path / "out"), *arguments])
    (tmp_path / "cut.pt").write_bytes((tmp_path / "0.pt").read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("no weights")
    for name, message in (
        ("cut.pt", "damaged"),
        ("text.pt", "damaged"),
        ("absent.pt", "cannot read"),
        ("absent.safetensors", "cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            convert.main([str(tmp_path / name), "--out", str(tmp_path / "out"), *heads])
    assert not (tmp_path / "out").exists()


def test_nothing_but_a_checkpoint_is_replaced(tmp_path):
    source = tmp_path / "repa.safetensors"
    source.write_bytes((DATA / "repa_sit.safetensors").read_bytes())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for out in (source, tmp_path / "mine", tmp_path):
        with pytest.raises(UserError, match="choose another place"):
            convert.main([str(source), "--out", str(out), "--num-heads", "4", "--vae", "pixels"])
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine" and source.stat().st_size > 1000


def test_what_another_command_wrote_is_replaced_only_on_request(tmp_path, guided):
    import shutil

    from models.checkpoint import Checkpoint

    source = save(tmp_path / "a.pt", parity("repa_sit")[0])
    run = tmp_path / "run" / "checkpoints" / "0000004"
    shutil.copytree(Checkpoint.open(guided).path, run)
    vae = Path(tiny_vae(tmp_path / "vae"))
    argv = [str(source), "--num-heads", "4", "--vae", "pixels", "--out"]
    for out in (run, vae):
        before = {file.name: file.read_bytes() for file in out.iterdir()}
        with pytest.raises(UserError, match="not what this command wrote there: .* --overwrite"):
            convert.main([*argv, str(out)])
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
        (out / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="not what this command wrote"):
            convert.main([*argv, str(out), "--overwrite"])
        (out / "notes.txt").unlink()
        convert.main([*argv, str(out), "--overwrite"])
        convert.main([*argv, str(out)])  # now it is this command's


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tensors = parity("repa_sit")[0]
    name = next(iter(tensors))
    save(tmp_path / "nan.safetensors", {**tensors, name: torch.full_like(tensors[name], float("nan"))})
    with pytest.raises(UserError, match=f"nan.safetensors holds numbers that are not finite, first in {name}"):
        convert.main(
            [str(tmp_path / "nan.safetensors"), "--num-heads", "4", "--vae", "pixels", "--out", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()
