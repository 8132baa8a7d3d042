"""The layers that the backbones share. N batch, T tokens, D width, C channels, p patch size.

Attributes carry the names of the published checkpoints, so that their state dicts load without renaming. Tables
(positions, frequencies) are made with NumPy: a network is first laid out on the meta device, where a torch factory
would leave a table without values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Numbers of tokens that stand one group after the other; empty: all tokens are one group.
Lengths = tuple[int, ...]

# Cosines and sines that turn queries and keys, (T, head_dim) or (N, 1, T, head_dim) each.
Rotation = tuple[Tensor, Tensor]

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut images (N, C, H, W) into tokens (N, T, p*p*C): row-major patches, each as (row, column, channel)."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify` for square images: (N, T, p*p*C) -> (N, C, H, W)."""
    n, count, width = tokens.shape
    side, c = math.isqrt(count), width // patch**2
    x = tokens.reshape(n, side, side, patch, patch, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, c, side * patch, side * patch)


def grid_positions(side: int, span: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Row and column (side*side,) of each token.

    With `span`, positions 0 .. span of another grid are stretched over this one.
    """
    row, column = np.divmod(np.arange(side * side), side)
    return (row, column) if span is None else (row * (span / side), column * (span / side))


def sincos_positions(width: int, side: int, span: int | None = None) -> Tensor:
    """(1, side*side, width) fixed positions: quarters sin(column), cos(column), sin(row), cos(row); `width` in fours.

    Frequencies 10000^(-i / (width/4)), as in MAE and DiT. `span`: see `grid_positions`.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = grid_positions(side, span)
    angles = [np.outer(axis, frequencies) for axis in (column, row)]
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table.astype(np.float32))[None]


def by_segment(function: Callable[..., Tensor], x: Tensor, rows: Sequence[Tensor], lengths: Lengths) -> Tensor:
    """`function(x, *rows)` of tokens (N, T, D) and of rows (N, S, D), one for each of S segments of these `lengths`.

    Without `lengths` the rows are broadcast: a single one over all tokens, or one for each token.
    """
    if len(lengths) < 2:
        return function(x, *rows)
    parts = zip(x.split(lengths, 1), *(row.split(1, 1) for row in rows), strict=True)
    return torch.cat([function(*part) for part in parts], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, lengths: Lengths = ()) -> Tensor:
    """Adaptive layer norm: x (N, T, D) times 1 + scale plus shift, both (N, S, D); see `by_segment`."""
    return by_segment(lambda part, offset, factor: part * (1 + factor) + offset, x, (shift, scale), lengths)


def gate(x: Tensor, row: Tensor, lengths: Lengths = ()) -> Tensor:
    """x (N, T, D) times `row` (N, S, D); see `by_segment`."""
    return by_segment(torch.mul, x, (row,), lengths)


def cast_block_linears(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Store the weights of the blocks' linear layers in `dtype`, which saves autocast's cast at every call."""
    if dtype is not None:
        for module in network.get_submodule("blocks").modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)


class PatchEmbedder(nn.Module):
    """Images (N, C, H, W) -> tokens (N, T, D)."""

    def __init__(self, patch: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        # A matrix product instead of the convolution gives the same sum, in the precision of all other products.
        # Patches have the layout of the weight, (channel, row, column), so that its gradient needs no copy.
        n, c, h, w = x.shape
        patches = x.reshape(n, c, h // self.patch, self.patch, w // self.patch, self.patch).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(n, -1, c * self.patch**2), self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    """Times (N,) in [0, 1], unscaled, -> (N, D): cosines then sines of 128 frequencies, then an MLP.

    It runs in float32 even under autocast: in bf16, neighbouring times would have the same sinusoids.
    """

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        table = np.exp(-math.log(10000) * np.arange(frequencies, dtype=np.float32) / frequencies)
        self.register_buffer("frequencies", torch.from_numpy(table.astype(np.float32)), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            angles = t.float()[:, None] * self.frequencies
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Labels (N,) in 0 .. num_classes -> (N, D); the last row, `num_classes`, is the null label."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        # nn.Embedding(...) would draw random values, which nothing uses and which take a second of imports on meta
        self.embedding_table = nn.Embedding.from_pretrained(torch.empty(num_classes + 1, width), freeze=False)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None, mask: Tensor | None = None) -> Tensor:
    """(N, heads, T, head_dim) each -> the same shape and dtype as v. `mask` (N, 1, T, T): which keys a query sees.

    `kernel` is a name in KERNELS; None leaves the choice to PyTorch, and so does a mask. On a CPU it runs in float32,
    whatever the precision of the products around it: the backward pass of PyTorch's bf16 kernel takes six to thirteen
    times as long at 16 tokens, and is slower at 256 too (`benchmarks/results`).
    """
    if v.device.type == "cpu" and v.dtype != torch.float32:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(v.dtype)
    if kernel is None or mask is not None:
        return F.scaled_dot_product_attention(q, k, v, mask)
    with sdpa_kernel(KERNELS[kernel]):
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, T, D), with optional normalisation and rotation of queries and keys.

    `query_norm` and `key_norm` act on each head's (..., head_dim) vector, before the rotation.
    """

    def __init__(self, width: int, heads: int, query_norm: nn.Module, key_norm: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        # the kernel chosen for inputs of a dtype (`models.attention.choose`); PyTorch chooses for any other: a kernel
        # of half precision refuses float32
        self.kernels: dict[torch.dtype, str] = {}
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = query_norm
        self.k_norm = key_norm
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, rotation: Rotation | None, lengths: Lengths = (), mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (N, T, D), and queries and keys (N, heads, T, head_dim) as they enter the dot product.

        With `lengths`, tokens attend within groups of so many, one dense call each.
        """
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        # norm and rotation leave float32 under autocast; the kernels want one dtype
        q, k = q.to(v.dtype), k.to(v.dtype)
        kernel = self.kernels.get(v.dtype)
        if len(lengths) < 2:
            mixed = attention(q, k, v, kernel, mask)
        else:
            groups = zip(*(part.split(lengths, 2) for part in (q, k, v)), strict=True)
            mixed = torch.cat([attention(query, key, value, kernel) for query, key, value in groups], dim=2)
        return self.proj(mixed.transpose(1, 2).flatten(2)), q, k


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of neighbours in x (..., T, head_dim) into (a cos - b sin, b cos + a sin).

    The tables `cos` and `sin` are (T, head_dim), or (N, 1, T, head_dim) where samples have orders of their own.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


class Mlp(nn.Module):
    """(..., D) -> (..., D) through `hidden` units with the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
