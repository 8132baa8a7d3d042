"""Heads: small networks from a block's tokens to what an alignment compares, initialised from a stream of their own."""

from __future__ import annotations

import math

import torch
from torch import nn

from runtime.streams import Stream


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
    inner = [module for before, after in zip(widths, widths[1:]) for module in (linear(before, after, stream), nn.SiLU())]
    return nn.Sequential(*inner, linear(hidden, out, stream))
