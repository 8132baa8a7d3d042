"""The layouts of published diffusion transformers: their state dicts in this project's names and conventions.

Networks come out with t = 1 as noise and the velocity as noise - data. Where a file runs the other way, the reversal is folded into its
weights (`reverse_time`), so that no flag has to remember it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import models
from models import ModelSpec
from models.heads import VelocityHead
from models.layers import TimeEmbedder
from runtime.errors import UserError, require
from runtime.streams import Stream

# What every layout of these networks has, with its number of dimensions.
ESSENTIAL = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "blocks.0.attn.qkv.weight": 2,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
    "final_layer.linear.bias": 1,
    "t_embedder.mlp.0.weight": 2,
}

SECOND = "final_layer_xr."
"""Internal Guidance's second final layer, on the tokens of a shallow block."""
SECOND_BLOCK = 8
"""That block. No file says it; the authors' commands and configurations, for SiT and LightningDiT, all have 8."""

# Training heads that a network does not need, by prefix; the first key that is present names the family.
HEADS = {
    "projectors_final.": "Self-Transcendence, stage 1",
    "projectors.0.weight": "Self-Transcendence, stage 2",
    "projectors.": "REPA",
    "ap_head.": "SRA",
}


@dataclass(frozen=True)
class Converted:
    """A network in this project's names and conventions."""

    spec: ModelSpec
    layout: str
    weights: dict[str, Tensor]
    ignored: list[str]
    velocity_head: VelocityHead | None = None
    """What a second final layer is here, and its tensors."""
    head: dict[str, Tensor] = field(default_factory=dict)


def convert_network(
    weights: Mapping[str, Tensor],
    source: str,
    *,
    num_heads: int | None = None,
    noise_at: int | None = None,
    internal_block: int | None = None,
) -> Converted:
    """Recognise a transformer's state dict and bring it into this project's form, strictly.

    Args:
        source: the file's name, for messages.
        num_heads, noise_at, internal_block: what is not in the weights, where the family does not tell it (`convert.Options`).

    Raises:
        UserError: an unknown layout, a number of heads that cannot be told, or tensors left over or missing.
    """
    weights = rename_legacy(weights)
    for name, dimensions in ESSENTIAL.items():
        if name not in weights or weights[name].ndim != dimensions:
            raise UserError(
                f"{source} is of no known layout (SiT, REPA and what derives from it, LightningDiT, VA-VAE): {name} "
                f"with {dimensions} dimensions is not in it; its first keys are {', '.join(list(weights)[:3])}"
            )
    spec = read_spec(weights, source, num_heads)
    kept, left_out = {}, Counter()
    for name, value in weights.items():
        if prefix := next((prefix for prefix in HEADS if name.startswith(prefix)), None):
            left_out[prefix.split(".")[0]] += 1
        else:
            kept[name] = value.float()
    check_tables(kept, spec, source)
    channels = kept["final_layer.linear.weight"].shape[0] // spec.patch_size**2
    doubled = channels == 2 * spec.in_channels
    if doubled:  # DiT's unused second half: rows are (row, column, channel), channel fastest
        for name in last_layers(kept):
            kept[name] = kept[name][torch.arange(len(kept[name])) % channels < spec.in_channels]
    layout, direction = recognise(weights, spec, doubled)
    noise_at = direction if noise_at is None else noise_at
    if noise_at == 0:
        reverse_time(kept)
    second = {name.removeprefix(SECOND): kept.pop(name) for name in list(kept) if name.startswith(SECOND)}
    models.check_weights(models.outline(spec), kept)
    ignored = [f"{prefix}.* ({count} tensors)" for prefix, count in left_out.items()]
    head = second_velocity(second, spec, source, internal_block)
    return Converted(spec, f"{layout}, noise at t = {noise_at}", kept, ignored, head, second)


def second_velocity(
    tensors: Mapping[str, Tensor], spec: ModelSpec, source: str, block: int | None
) -> VelocityHead | None:
    """The head that Internal Guidance's second final layer is: its target, the velocity at all t, is the network's own.

    Raises:
        UserError: a block beyond the depth, one for a file without such a layer, or tensors left over or missing.
    """
    if not tensors:
        require(block is None, f"{source} has no second final layer ({SECOND}*): leave out --internal-block")
        return None
    head = VelocityHead(kind="final-layer", block=SECOND_BLOCK if block is None else block)
    require(
        1 <= head.block <= spec.depth,
        f"{source}: block {head.block} of its second final layer is not among blocks 1 to {spec.depth}: "
        f"say which it is with --internal-block",
    )
    wanted = {name: tuple(value.shape) for name, value in head.build(spec, Stream(0, "shapes")).state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = next((name for name in wanted | found if wanted.get(name) != found.get(name)), None)
    require(
        wrong is None,
        f"{source}: {SECOND}{wrong} is {found.get(wrong, 'missing')} where {wanted.get(wrong, 'nothing')} is needed; "
        f"it is of no known layout",
    )
    return head


def rename_legacy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """REPA's first layout counts the blocks after the aligned one anew, as `decoder_blocks`."""
    before = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return {
        re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) + before}", name): value
        for name, value in weights.items()
    }


def read_spec(weights: Mapping[str, Tensor], source: str, num_heads: int | None = None) -> ModelSpec:
    """All that the shapes tell; the number of heads from `num_heads`, QK-norms, or the published sizes."""
    hidden, in_channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = 1 + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name)))
    architecture = "lightningdit" if "blocks.0.mlp.w12.weight" in weights else "sit"
    sizes = models.SIZES[architecture]
    head_norm = weights.get("blocks.0.attn.q_norm.weight")
    published = {size[:2]: size[2] for size in sizes.values()}.get((depth, hidden))
    heads = num_heads or (published if head_norm is None else hidden // len(head_norm))
    if heads is None:
        raise UserError(
            f"{source}: {depth} blocks of width {hidden} are not a published size, and the number of heads is "
            "not in the weights: add --num-heads"
        )
    return ModelSpec(
        name=next((name for name, size in sizes.items() if size == (depth, hidden, heads, patch)), "custom"),
        architecture=architecture,
        depth=depth,
        hidden_size=hidden,
        num_heads=heads,
        patch_size=patch,
        in_channels=in_channels,
        input_size=math.isqrt(weights["pos_embed"].shape[1]) * patch,
        num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1,
        qk_norm=head_norm is not None,
    )


def recognise(weights: Mapping[str, Tensor], spec: ModelSpec, doubled: bool) -> tuple[str, int]:
    """The family that a state dict comes from, and the time at which it sees noise."""
    internal = any(name.startswith(SECOND) for name in weights)
    if spec.architecture == "lightningdit":
        return "LightningDiT with Internal Guidance" if internal else "LightningDiT", 0
    if doubled:
        return "SiT, Dispersive Loss or LayerSync (doubled head)", 0
    if internal:
        return "Internal Guidance", 1
    for prefix, family in HEADS.items():
        if any(name.startswith(prefix) for name in weights):
            return family, 1
    return "REPA without projectors", 1


def check_tables(kept: dict[str, Tensor], spec: ModelSpec, source: str) -> None:
    """Take the fixed tables out of `kept`: they are recomputed, and must be the ones that were stored."""
    network = models.outline(spec)
    tables = {"pos_embed": network.pos_embed}
    if spec.architecture == "lightningdit":
        tables |= {"feat_rope.freqs_cos": network.rotary_cos, "feat_rope.freqs_sin": network.rotary_sin}
    for name, table in tables.items():
        stored = kept.pop(name, None)
        if stored is None or stored.shape != table.shape or not torch.allclose(stored, table, rtol=0, atol=5e-3):
            raise UserError(
                f"{source}: its {name} is not the fixed table of the published networks, so that its positions "
                "would be misread; check --num-heads, or train such a network here"
            )


def reverse_time(weights: dict[str, Tensor]) -> None:
    """Turn f(x, t) into -f(x, 1 - t), in place and exactly.

    cos(w(1-t)) = cos w cos wt + sin w sin wt and sin(w(1-t)) = sin w cos wt - cos w sin wt: a rotation of each pair of
    columns of the first time layer, whose condition a second final layer reads too. The sign goes into the last layers.
    """
    w = TimeEmbedder(1).frequencies.double()
    cosines, sines = weights["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)
    turned = torch.cat([cosines * w.cos() + sines * w.sin(), cosines * w.sin() - sines * w.cos()], dim=1)
    weights["t_embedder.mlp.0.weight"] = turned.float()
    for name in last_layers(weights):
        weights[name] = -weights[name]


def last_layers(weights: Mapping[str, Tensor]) -> list[str]:
    """The weights and biases from which a velocity comes: of the last layer, and of a second one where there is one."""
    return [name for name in weights if name.startswith(("final_layer.linear.", f"{SECOND}linear."))]


def describe(network: Converted) -> str:
    """One line on a converted network."""
    s = network.spec
    norm = ", QK-norm" if s.qk_norm else ""
    second = (
        f", second velocity from block {network.velocity_head.block} (--internal-scale)"
        if network.velocity_head
        else ""
    )
    return (
        f"{s.name} from {network.layout}: {s.depth} blocks, width {s.hidden_size}, {s.num_heads} heads{norm}, patch "
        f"{s.patch_size}, latents {s.in_channels}x{s.input_size}x{s.input_size}, {s.num_classes} classes{second}"
    )
