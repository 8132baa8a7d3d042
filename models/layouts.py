"""The layouts of published diffusion transformers: their state dicts in this project's names and conventions.

A converted network has t = 1 as noise and predicts the velocity noise - data. If a file runs the other way, the
reversal is folded into its weights (`reverse_time`), so that no flag has to remember it.
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

# Tensors that every layout of these networks has, and their numbers of dimensions
ESSENTIAL = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "blocks.0.attn.qkv.weight": 2,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
    "final_layer.linear.bias": 1,
    "t_embedder.mlp.0.weight": 2,
}

# Internal Guidance's second final layer, on the tokens of a shallow block. No file states the block; the authors'
# commands and configurations, for SiT and LightningDiT, all have 8.
SECOND = "final_layer_xr."
SECOND_BLOCK = 8

SELF_FLOW = "Self-Flow"
# Training heads that a network does not need, by prefix; the first prefix that occurs names the family.
HEADS = {
    "projectors_final.": "Self-Transcendence, stage 1",
    "projectors.0.weight": "Self-Transcendence, stage 2",
    "projectors.": "REPA",
    "ap_head.": "SRA",
    "projector.": SELF_FLOW,
}


@dataclass(frozen=True)
class Converted:
    """A network in this project's names and conventions."""

    spec: ModelSpec
    layout: str
    weights: dict[str, Tensor]
    ignored: list[str]
    # a second final layer: its description and its tensors
    velocity_head: VelocityHead | None = None
    head: dict[str, Tensor] = field(default_factory=dict)

    @property
    def has_null(self) -> bool:
        """Whether its null label was trained."""
        return not self.layout.startswith(SELF_FLOW)


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
        num_heads, noise_at, internal_block: facts that are neither in the weights nor known of the family
            (`convert.Options`).

    Raises:
        UserError: an unknown layout, an unknown number of heads, or tensors left over or missing.
    """
    weights = patch_convolution(rename_legacy(weights))
    require_known_layout(weights, source)
    spec = read_spec(weights, source, num_heads)
    heads = {name for name in weights if name.startswith(tuple(HEADS))}
    tensors = {name: value.float() for name, value in weights.items() if name not in heads}
    check_tables(tensors, spec, source)
    channels = tensors["final_layer.linear.weight"].shape[0] // spec.patch_size**2
    doubled = channels == 2 * spec.in_channels
    if doubled:
        # The second half of DiT's channels is unused. Rows are (row, column, channel), channel fastest.
        for name in last_layers(tensors):
            tensors[name] = tensors[name][torch.arange(len(tensors[name])) % channels < spec.in_channels]
    layout, direction = recognise(weights, spec, doubled)
    noise_at = direction if noise_at is None else noise_at
    if noise_at == 0:
        reverse_time(tensors)
    second = {name.removeprefix(SECOND): tensors.pop(name) for name in list(tensors) if name.startswith(SECOND)}
    models.check_weights(models.outline(spec), tensors, spec.name)
    counts = Counter(name.split(".")[0] for name in weights if name in heads)
    ignored = [f"{prefix}.* ({count} tensors)" for prefix, count in counts.items()]
    head = second_velocity(second, spec, source, internal_block)
    return Converted(spec, f"{layout}, noise at t = {noise_at}", tensors, ignored, head, second)


def require_known_layout(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError unless `weights` has the tensors that every layout has."""
    for name, dimensions in ESSENTIAL.items():
        require(
            name in weights and weights[name].ndim == dimensions,
            f"{source} is of no known layout (SiT, REPA and its descendants, LightningDiT, VA-VAE): it has no {name} "
            f"with {dimensions} dimensions; its first keys are {', '.join(list(weights)[:3])}",
        )


def second_velocity(
    tensors: Mapping[str, Tensor], spec: ModelSpec, source: str, block: int | None
) -> VelocityHead | None:
    """The velocity head in Internal Guidance's second final layer, whose target is the network's own at all t.

    Raises:
        UserError: a block beyond the depth, one for a file without such a layer, or tensors left over or missing.
    """
    if not tensors:
        require(block is None, f"{source} has no second final layer ({SECOND}*): leave out --internal-block")
        return None
    head = VelocityHead(kind="final-layer", block=SECOND_BLOCK if block is None else block)
    require(
        1 <= head.block <= spec.depth,
        f"{source}: block {head.block} of its second final layer is not among blocks 1 to {spec.depth}: give its block "
        f"with --internal-block",
    )
    # built for its names and shapes; its random weights are not used
    models.check_weights(
        head.build(spec, Stream(0, "shapes")), tensors, f"the second final layer ({SECOND}*) of {spec.name}"
    )
    return head


def rename_legacy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """REPA's first layout counts the blocks after the aligned block from 0 again, as `decoder_blocks`."""
    before = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return {
        re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) + before}", name): value
        for name, value in weights.items()
    }


def patch_convolution(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Self-Flow embeds patches, (channel, row, column) of 2 x 2, by a linear layer: as the convolution that it is."""
    name = "x_embedder.proj.weight"
    linear = weights.get(name)
    if linear is None or linear.ndim != 2 or linear.shape[1] % 4:
        return dict(weights)
    return {**weights, name: linear.unflatten(1, (-1, 2, 2))}


def read_spec(weights: Mapping[str, Tensor], source: str, num_heads: int | None = None) -> ModelSpec:
    """The description in the shapes; the number of heads from `num_heads`, QK-norms, or the published sizes."""
    # shapes give everything but the number of heads, which splits the width without a trace unless QK-norm is there
    hidden, in_channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = 1 + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name)))
    architecture = "lightningdit" if "blocks.0.mlp.w12.weight" in weights else "sit"
    sizes = models.ARCHITECTURES[architecture].sizes
    head_norm = weights.get("blocks.0.attn.q_norm.weight")
    published = {size[:2]: size[2] for size in sizes.values()}.get((depth, hidden))
    heads = num_heads or (published if head_norm is None else hidden // len(head_norm))
    if heads is None:
        raise UserError(
            f"{source}: {depth} blocks of width {hidden} are not a published size, and the weights do not show the "
            "number of heads: add --num-heads"
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
    families = [family for prefix, family in HEADS.items() if any(name.startswith(prefix) for name in weights)]
    family = next(iter(families), "REPA without projectors")
    if doubled:
        return SELF_FLOW if family == SELF_FLOW else "SiT, Dispersive Loss or LayerSync (doubled head)", 0
    return "Internal Guidance" if internal else family, 1


def check_tables(tensors: dict[str, Tensor], spec: ModelSpec, source: str) -> None:
    """Remove the fixed tables from `tensors`: they are recomputed, and must equal the stored ones."""
    network = models.outline(spec)
    tables = {"pos_embed": network.pos_embed}
    if rotation := network.rotation():
        tables |= {"feat_rope.freqs_cos": rotation[0], "feat_rope.freqs_sin": rotation[1]}
    for name, table in tables.items():
        stored = tensors.pop(name, None)
        if stored is None or stored.shape != table.shape or not torch.allclose(stored, table, rtol=0, atol=5e-3):
            raise UserError(
                f"{source}: its {name} is not the fixed table of the published networks, so its positions would be "
                "misread; check --num-heads, or train such a network here"
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
    """The names of the weights and biases that output a velocity: the last layer's, and a second last layer's."""
    return [name for name in weights if name.startswith(("final_layer.linear.", f"{SECOND}linear."))]


def describe(network: Converted) -> str:
    """One line on a converted network."""
    s = network.spec
    norm = ", QK-norm" if s.qk_norm else ""
    # its authors trained without label dropout, so nothing is known of the last row
    untrained = "" if network.has_null else "; its null label was not trained: no classifier-free guidance"
    second = (
        f", second velocity from block {network.velocity_head.block} (--internal-scale)"
        if network.velocity_head
        else ""
    )
    return (
        f"{s.name} from {network.layout}: {s.depth} blocks, width {s.hidden_size}, {s.num_heads} heads{norm}, patch "
        f"{s.patch_size}, latents {s.in_channels}x{s.input_size}x{s.input_size}, {s.num_classes} classes"
        f"{second}{untrained}"
    )
