"""LightningDiT (arXiv 2501.01423): only what it changes in the plain transformer.

RMSNorm with weights, a SwiGLU MLP, and 2-D rotary positions on queries and keys, on top of the absolute ones.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone, ModelSpec
from models.layers import Rotation, grid_positions
from runtime.errors import require


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32, times a learned weight."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """(..., D) -> (..., D): SiLU(gate) * value through floor(8D/3) units, not rounded to any multiple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LightningDiT(Backbone):
    """RMSNorm everywhere, SwiGLU, rotation of queries and keys."""

    architecture = "lightningdit"
    guide_scale = 10.0
    # L/1 is ours, for latents of stride 16
    sizes: ClassVar[dict[str, tuple[int, int, int, int]]] = {
        "LightningDiT-B/1": (12, 768, 12, 1),
        "LightningDiT-L/2": (24, 1024, 16, 2),
        "LightningDiT-L/1": (24, 1024, 16, 1),
        "LightningDiT-XL/1": (28, 1152, 16, 1),
        "LightningDiT-1p0B/1": (24, 1536, 24, 1),
        "LightningDiT-1p6B/1": (28, 1792, 28, 1),
        "LightningDiT-Tiny/1": (6, 128, 4, 1),
    }
    PARTS: ClassVar[dict[str, int]] = {**Backbone.PARTS, "mlp.w12.weight": 2}
    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, spec: ModelSpec, depth: int | None = None) -> None:
        super().__init__(spec, depth)
        cos, sin = rotary_tables(spec.hidden_size // spec.num_heads, spec.side, spec.position_span)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)

    @staticmethod
    def norm(width: int) -> nn.Module:
        return RMSNorm(width)

    @staticmethod
    def head_norm(head_dim: int) -> nn.Module:
        return RMSNorm(head_dim)

    @staticmethod
    def mlp(width: int) -> nn.Module:
        return SwiGLU(width)

    def rotation(self) -> Rotation:
        return self.rotary_cos, self.rotary_sin


def rotary_tables(head_dim: int, side: int, span: int | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines (side*side, head_dim) of axial 2-D rotation.

    The first half of a head turns with the row, the second with the column, each adjacent pair at its own frequency
    10000^(-2i / (head_dim/2)). `span`: see `layers.grid_positions`.

    Raises:
        UserError: `head_dim` is not a multiple of 4.
    """
    require(
        head_dim % 4 == 0,
        f"rotary positions need a head dimension divisible by 4, not {head_dim}: change the number of heads",
    )
    frequencies = 10000.0 ** (-np.arange(head_dim // 4) / (head_dim / 4))
    angles = [np.repeat(np.outer(axis, frequencies), 2, axis=1) for axis in grid_positions(side, span)]
    table = np.concatenate(angles, axis=1)
    return torch.from_numpy(np.cos(table).astype(np.float32)), torch.from_numpy(np.sin(table).astype(np.float32))
