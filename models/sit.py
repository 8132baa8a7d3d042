"""SiT (arXiv 2401.08740): the plain diffusion transformer, with optional normalisation of queries and keys.

Sizes and names are those of the published checkpoints; REPA, SRA, Dispersive Loss, LayerSync and Self-Transcendence
train this network.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from models.backbone import Backbone
from models.layers import Mlp


class SiT(Backbone):
    """LayerNorm without affine, tanh-GELU MLP of ratio 4, absolute positions only."""

    architecture = "sit"
    guide_scale = 30.0
    sizes: ClassVar[dict[str, tuple[int, int, int, int]]] = {
        f"SiT-{size}/{patch}": (*shape, patch)
        for size, shape in {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}.items()
        for patch in (2, 4, 8)
    } | {"SiT-Nano/2": (6, 64, 2, 2), **{f"SiT-Tiny/{patch}": (6, 128, 4, patch) for patch in (2, 4)}}

    @staticmethod
    def norm(width: int) -> nn.Module:
        return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    @staticmethod
    def head_norm(head_dim: int) -> nn.Module:
        return nn.LayerNorm(head_dim, eps=1e-5)

    @staticmethod
    def mlp(width: int) -> nn.Module:
        return Mlp(width, 4 * width)
