"""LightningDiT: published sizes and names, and the laws of its own layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import models
from models.layers import rotate
from models.lightningdit import RMSNorm, SwiGLU, rotary_tables
from runtime.errors import UserError
from tests.helpers import PARITY_SIT, parity

# Published tables: 32 latent channels at 16x16, 1000 classes.
COUNTS = {"B/1": 130_556_192, "L/2": 458_153_056, "XL/1": 675_256_736, "1p0B/1": 1_029_401_120, "1p6B/1": 1_631_767_120}


def outline(name: str, **kwargs) -> models.Backbone:
    return models.outline(
        models.spec(f"LightningDiT-{name}", in_channels=32, input_size=16, num_classes=1000, **kwargs)
    )


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    assert models.parameter_count(outline(name)) == COUNTS[name]


def test_qk_norm_adds_one_weight_for_each_element_of_a_head():
    assert models.parameter_count(outline("XL/1", qk_norm=True)) == 675_260_768


@pytest.mark.parametrize("name", ["lightningdit", "lightningdit_qknorm"])
def test_state_dict_has_the_published_names_and_the_tables_are_recomputed(name):
    weights, _ = parity(name)
    spec = dataclasses.replace(
        PARITY_SIT,
        architecture="lightningdit",
        depth=3,
        patch_size=1,
        in_channels=8,
        input_size=4,
        qk_norm=name.endswith("qknorm"),
    )
    network = models.build(spec)
    tables = {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    assert set(network.state_dict()) == set(weights) - tables
    for table, key in (
        (network.pos_embed, "pos_embed"),
        (network.rotary_cos, "feat_rope.freqs_cos"),
        (network.rotary_sin, "feat_rope.freqs_sin"),
    ):
        torch.testing.assert_close(table, weights[key], rtol=0, atol=1e-6)


def test_rotation_keeps_lengths_and_makes_products_depend_on_offsets_alone():
    side, head_dim = 5, 8
    cos, sin = rotary_tables(head_dim, side)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, head_dim, generator=generator).unbind()
    turned_q, turned_k = (rotate(v.expand(side * side, head_dim), cos, sin).view(side, side, head_dim) for v in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(side, side))
    products = torch.einsum("abd,efd->abef", turned_q, turned_k)
    for row, column in ((0, 1), (2, 0), (1, 3)):
        along = torch.stack(
            [products[i, j, i + row, j + column] for i in range(side - row) for j in range(side - column)]
        )
        torch.testing.assert_close(along, along[0].expand_as(along), rtol=0, atol=1e-5)
    assert (products[0, 0, 0, 1] - products[0, 0, 1, 0]).abs() > 1e-3  # rows and columns turn different halves


def test_layers_against_their_formulas():
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0)).double()
    norm = RMSNorm(12)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x.float()), expected.float())
    assert norm(1e-4 * x.float()).abs().max() < 0.5  # eps is felt

    mlp = SwiGLU(12).double()
    gate, value = (x @ mlp.w12.weight.T + mlp.w12.bias).split(32, dim=-1)
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * value) @ mlp.w3.weight.T + mlp.w3.bias)
    assert [SwiGLU(width).w3.in_features for width in (768, 1024, 1152)] == [2048, 2730, 3072]


def test_heads_that_cannot_be_rotated_are_refused():
    with pytest.raises(UserError, match="divisible by 4, not 6"):
        models.build(
            models.ModelSpec(
                name="custom",
                architecture="lightningdit",
                depth=1,
                hidden_size=24,
                num_heads=4,
                patch_size=1,
                in_channels=4,
                input_size=4,
                num_classes=10,
            )
        )
