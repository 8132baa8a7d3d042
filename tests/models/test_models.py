"""The networks: published sizes, names and numbers; taps; initialisation."""

from __future__ import annotations

import pytest
import torch

import models
from models.layers import patchify, unpatchify
from runtime.errors import UserError
from tests.helpers import PARITY_SIT, inputs, parity, perturbed

both = pytest.mark.parametrize("name", ["SiT-Tiny/2", "LightningDiT-Tiny/1"])

# Published tables: 4 latent channels at 32x32, 1000 classes, patch 2, 4, 8.
COUNTS = {
    "S": (32_957_200, 32_920_384, 33_049_600),
    "B": (130_500_112, 130_426_432, 130_684_672),
    "L": (458_086_416, 457_988_160, 458_332_416),
    "XL": (675_111_184, 675_000_640, 675_387_904),
}


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_are_the_published_ones(size):
    specs = [models.spec(f"SiT-{size}/{p}", in_channels=4, input_size=32, num_classes=1000) for p in (2, 4, 8)]
    assert tuple(models.parameter_count(models.outline(spec)) for spec in specs) == COUNTS[size]


def test_state_dict_has_the_published_names_and_the_position_table_is_recomputed():
    weights, _ = parity("repa_sit")
    published = {name for name in weights if not name.startswith("projectors.")}
    network = models.build(PARITY_SIT)
    assert set(network.state_dict()) == published - {"pos_embed"}
    torch.testing.assert_close(network.pos_embed, weights["pos_embed"], rtol=0, atol=1e-7)


def test_repa_sit_velocity_and_every_block():
    weights, stored = parity("repa_sit")
    names = set(models.outline(PARITY_SIT).state_dict())
    network = models.build(PARITY_SIT, weights={name: value for name, value in weights.items() if name in names})
    velocity, features = network(stored["x"], stored["t"], stored["y"], taps=[1, 2, 3, 4])
    torch.testing.assert_close(velocity, stored["velocity"], rtol=0, atol=2e-5)
    for number, feature in features.items():
        torch.testing.assert_close(feature, stored[f"block{number}"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
@both
def test_taps_are_the_raw_outputs_of_the_blocks_and_an_early_exit_changes_nothing(name, qk_norm):
    spec = models.spec(name, in_channels=3, input_size=8, num_classes=10, qk_norm=qk_norm)
    network = perturbed(spec)
    hooked, called = {}, []
    for number, block in enumerate(network.blocks, start=1):
        block.register_forward_hook(lambda _, __, output, number=number: hooked.update({number: output}))
    velocity, features = network(*inputs(spec), taps={2, 5})
    assert set(features) == {2, 5} and velocity.shape == (3, 3, 8, 8)
    assert all(torch.equal(features[number], hooked[number]) for number in features)

    network.blocks[3].register_forward_hook(lambda *_: called.append(4))
    early = network(*inputs(spec), taps=[1, 3], exit_early=True)
    assert early.velocity is None and not called
    full = network(*inputs(spec), taps=[1, 3])
    assert all(torch.equal(early.features[number], full.features[number]) for number in (1, 3))
    assert torch.equal(full.velocity, velocity)


@both
def test_a_truncated_network_equals_the_full_one_up_to_its_depth(name):
    spec = models.spec(name, in_channels=4, input_size=8, num_classes=10)
    full = perturbed(spec)
    names = models.outline(spec, depth=4).state_dict()
    assert len(names) < len(full.state_dict())
    cut = models.build(spec, depth=4, weights={name: full.state_dict()[name] for name in names})
    assert len(cut.blocks) == 4 and cut.final_layer is None
    expected = full(*inputs(spec), taps=[4]).features[4]
    assert torch.equal(cut(*inputs(spec), taps=[4], exit_early=True).features[4], expected)
    with pytest.raises(UserError, match="has blocks 1 to 4"):
        cut(*inputs(spec), taps=[5], exit_early=True)
    with pytest.raises(ValueError, match="exit_early"):
        cut(*inputs(spec))


@pytest.mark.parametrize("num_classes", [1, 10, 1001])
@pytest.mark.parametrize("in_channels", [1, 3, 4])
@both
def test_output_is_zero_at_initialisation_and_the_null_label_follows_the_classes(name, num_classes, in_channels):
    spec = models.spec(name, in_channels=in_channels, input_size=8, num_classes=num_classes)
    network = models.build(spec)
    x, t, _ = inputs(spec)
    velocity = network(x, t, torch.tensor([0, num_classes - 1, num_classes])).velocity
    assert velocity.shape == x.shape and not velocity.any()
    with pytest.raises(IndexError):
        network(x, t, torch.full((3,), num_classes + 1))


def test_the_null_label_is_a_class_of_its_own():
    spec = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10)
    network = perturbed(spec)
    x, t, y = inputs(spec)
    assert not torch.allclose(network(x, t, y).velocity, network(x, t, torch.full_like(y, 10)).velocity)


def test_initialisation_follows_the_published_distributions():
    spec = models.spec("SiT-B/2", in_channels=4, input_size=32, num_classes=1000)
    weights = models.build(spec, depth=1).state_dict()
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert weights[name].std() == pytest.approx(0.02, rel=0.01) and abs(weights[name].mean()) < 2e-4
    for name, fan in {
        "x_embedder.proj.weight": 768 + 16,
        "blocks.0.attn.qkv.weight": 4 * 768,
        "blocks.0.attn.proj.weight": 2 * 768,
        "blocks.0.mlp.fc1.weight": 5 * 768,
    }.items():
        bound = (6 / fan) ** 0.5
        assert weights[name].abs().max() <= bound * (1 + 1e-6)
        assert weights[name].std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not any(value.any() for name, value in weights.items() if name.endswith("bias") or "adaLN" in name)


@both
def test_initialisation_is_a_function_of_seed_and_name_alone(name):
    spec = models.spec(name, in_channels=4, input_size=8, num_classes=10, qk_norm=True)
    first = models.build(spec, seed=3).state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = models.build(spec, seed=3).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    cut = models.build(spec, seed=3, depth=2).state_dict()
    assert all(torch.equal(first[name], cut[name]) for name in cut)
    other = models.build(spec, seed=4).state_dict()
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], first["blocks.1.attn.qkv.weight"])


def test_given_weights_are_copied_and_must_fit():
    network = models.build(PARITY_SIT)
    weights = dict(network.state_dict())
    copy = models.build(PARITY_SIT, weights=weights)
    with torch.no_grad():
        copy.x_embedder.proj.bias += 1
    assert not network.x_embedder.proj.bias.any()
    for broken, message in (
        (dict(weights, extra=torch.zeros(1)), r"extra is \(1,\) where nothing is needed"),
        ({k: v for k, v in weights.items() if k != "blocks.1.attn.qkv.bias"}, "qkv.bias is missing"),
        (dict(weights, **{"x_embedder.proj.bias": torch.zeros(3)}), r"is \(3,\) where \(48,\)"),
    ):
        with pytest.raises(UserError, match=message):
            models.build(PARITY_SIT, weights=broken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "SiT-B2"}, "did you mean SiT-B/2"),
        ({"name": "SiT-B/4", "input_size": 10}, "input_size 10 is not a multiple of patch_size 4"),
        ({"name": "SiT-B/2", "num_classes": 0}, "num_classes 0 must lie between 1 and"),
    ],
)
def test_specs_that_make_no_network_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        models.spec(**{"in_channels": 4, "input_size": 32, "num_classes": 10} | arguments)


def test_specs_survive_json_and_damage_is_named():
    assert models.ModelSpec.from_json(PARITY_SIT.to_json()) == PARITY_SIT
    value = PARITY_SIT.to_json()
    del value["depth"]
    with pytest.raises(UserError, match="depth"):
        models.ModelSpec.from_json(value)
    with pytest.raises(UserError, match="has blocks 1 to 4"):
        models.build(PARITY_SIT, depth=5)


@pytest.mark.parametrize("qk_norm", [False, True])
@both
def test_every_parameter_is_used(name, qk_norm):
    """DDP waits for a gradient of each one."""
    spec = models.spec(name, in_channels=4, input_size=8, num_classes=10, qk_norm=qk_norm)
    network = perturbed(spec)
    network(*inputs(spec)).velocity.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_patches_are_row_major_with_channels_last():
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 4, 12)
    assert torch.equal(tokens[1, 1].reshape(2, 2, 3), x[1, :, 0:2, 2:4].permute(1, 2, 0))
    assert torch.equal(unpatchify(tokens, 2), x)


@pytest.mark.parametrize("qk_norm", [False, True])
@both
def test_under_autocast_the_residual_stream_and_the_time_embedding_stay_float32(name, qk_norm):
    spec = models.spec(name, in_channels=4, input_size=8, num_classes=10, qk_norm=qk_norm)
    network = perturbed(spec)
    x, t, y = inputs(spec)
    exact = network(x, t, y, taps=[4])
    embedding = network.t_embedder(t)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x, t, y, taps=[4])
        assert torch.equal(network.t_embedder(t), embedding)
    assert output.features[4].dtype == torch.float32 and output.velocity.dtype == torch.bfloat16
    error = (output.features[4] - exact.features[4]).abs().max()
    assert 0 < error < 0.05 * exact.features[4].abs().max()


@both
def test_blocks_compile_in_place_into_whole_graphs_and_keep_their_names(name):
    spec = models.spec(name, in_channels=4, input_size=8, num_classes=10)
    network = perturbed(spec)
    names, expected = list(network.state_dict()), network(*inputs(spec), taps=[2])
    for block in network.blocks:
        block.compile(backend="eager", fullgraph=True)
    output = network(*inputs(spec), taps=[2])
    assert list(network.state_dict()) == names
    torch.testing.assert_close(output.velocity, expected.velocity, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.features[2], expected.features[2], rtol=0, atol=1e-6)
