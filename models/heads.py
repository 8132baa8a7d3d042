"""Heads: small networks from a block's tokens to what an alignment compares, initialised from a stream of their own.

A `VelocityHead` describes a head that predicts the velocity. A checkpoint stores it, and sampling rebuilds the head
from it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import CONDITION, ModelSpec, Tap, architecture, unpatchify
from models.backbone import FinalLayer
from runtime import schema
from runtime.errors import require
from runtime.streams import Stream

KINDS = ("mlp", "mlp-norm-linear", "final-layer")
# Help of the option that gives an MLP's hidden width, which follows from `hidden_width` by default
HIDDEN = "width of the head's hidden layers (default: 2048; 4 x the network's width if that is below 384)"


@dataclass(frozen=True, kw_only=True)
class VelocityHead:
    """A head on a block that predicts patches (N, T, p*p*C), as JSON in a checkpoint. Kinds:

    mlp              the paper's MLP on each token
    mlp-norm-linear  the authors' longer one
    final-layer      a second final layer of the network, modulated by its condition
    """

    kind: str
    block: int  # the block that it reads, from 1
    hidden: int = 0  # width of an MLP's hidden layers
    layers: int = 0  # linear layers of an MLP
    # the times that it was trained on
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: object) -> VelocityHead:
        """Raises UserError if the description is damaged."""
        head = schema.checked(cls, dict(value), where, "use another checkpoint")
        require(
            head.kind in KINDS,
            f"{where} names a head of kind {head.kind}; known are {', '.join(KINDS)}: use another checkpoint",
        )
        return head

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What it reads of a forward pass, in the order of its arguments."""
        return (self.block, CONDITION) if self.kind == "final-layer" else (self.block,)

    def build(self, model: ModelSpec, stream: Stream) -> nn.Module:
        """The head on the tokens of `model`: MLPs with weights from `stream`, or a final layer that starts at zero."""
        width, out = model.hidden_size, model.patch_size**2 * model.in_channels
        if self.kind == "final-layer":
            with torch.device("meta"):
                head = FinalLayer(width, out, architecture(model).norm(width))
            # zeros but for the norm's weights, as the network's own last layer begins
            start = {
                name: torch.full(value.shape, float(name == "norm_final.weight"))
                for name, value in head.state_dict().items()
            }
            head.load_state_dict(start, assign=True)
            return head
        if self.kind == "mlp":
            return mlp(width, self.hidden, out, stream, self.layers)
        return nn.Sequential(
            mlp(width, self.hidden, width, stream, self.layers),
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6),
            linear(width, out, stream),
        )

    def velocity(self, head: nn.Module, features: Mapping[Tap, Tensor], patch: int) -> Tensor:
        """(N, C, H, W) what `head` predicts from the tapped `features`."""
        return unpatchify(head(*(features[tap] for tap in self.taps)), patch)


def hidden_width(width: int) -> int:
    """The hidden width of an MLP on a network of `width`: the paper's 2048, less where no size is published.

    The narrowest published network is SiT-S, 384 wide. A head of 2048 on a network of 128 has 2.4 times its parameters.
    """
    return 2048 if width >= 384 else 4 * width


def linear(width: int, out: int, stream: Stream) -> nn.Linear:
    """Linear layer with Xavier-uniform weights from `stream` and zero biases."""
    module = nn.utils.skip_init(nn.Linear, width, out)
    bound = math.sqrt(6 / (width + out))
    values = (stream.uniform(width * out) * 2 - 1) * bound
    module.weight.data.copy_(torch.from_numpy(values).view(out, width))
    module.bias.data.zero_()
    return module


def mlp(width: int, hidden: int, out: int, stream: Stream, layers: int = 3) -> nn.Sequential:
    """An MLP that acts on each token; the paper's head has three layers: Linear, SiLU, Linear, SiLU, Linear."""
    widths = [width] + [hidden] * (layers - 1)
    inner = [
        module for before, after in itertools.pairwise(widths) for module in (linear(before, after, stream), nn.SiLU())
    ]
    return nn.Sequential(*inner, linear(hidden, out, stream))


class Convolution(nn.Module):
    """A convolution over the square grid of tokens with zero padding: (N, T, width) -> (N, T, out).

    Weights and biases are PyTorch's: uniform within 1 / sqrt(fan-in).
    """

    def __init__(self, width: int, out: int, side: int, stream: Stream) -> None:
        super().__init__()
        self.conv = nn.utils.skip_init(nn.Conv2d, width, out, kernel_size=side, padding=side // 2)
        bound = 1 / math.sqrt(width * side**2)
        for parameter in self.conv.parameters():
            values = (stream.uniform(parameter.numel()) * 2 - 1) * bound
            parameter.data.copy_(torch.from_numpy(values).view(parameter.shape))

    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        return self.conv(tokens.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
