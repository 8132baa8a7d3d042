"""Stage 1, VAE-based alignment (paper section 3.2, equation 1): a shallow block regresses the clean latent.

    L_align = mean (MLP(f_n) - z)^2

z is the clean scaled latent in token layout. The paper says "shallow" and gives neither n nor the weight for this
stage; preset `paper` uses n = depth/6, the authors' released block for SiT-B, and 0.5. (SRA 2, arXiv 2601.17830,
reports for the same loss on SiT-B/2, by a third party's note of its ablation: block 2 28.89, block 6 32.44, block 8
36.20, plain 33.02; the paper's own stage 1 is at 29.04.) Preset `upstream` follows the authors' code: the velocity as
target on the latent grid, a head that ends in LayerNorm and a linear layer, QK-norm, and the interval 0.4-0.7 as a
weight. Preset `efficient` is the same without QK-norm, and its interval selects samples. Preset `sra2` is SRA 2:
smooth-L1, weight 1, a head of five layers, and the blocks 2, 8, 8 of SiT-B, L and XL.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

import interpolant
from alignment.base import Alignment, AlignOptions, BuildContext, Context, not_none, smooth_l1, squared_error
from models import ModelSpec, patchify
from models.backbone import block_number
from models.heads import HIDDEN, VelocityHead, hidden_width
from runtime.options import option
from runtime.streams import Stream

# The authors' code in this stage
AUTHORS = {"target": "velocity", "head": "mlp-norm-linear", "interval": (0.4, 0.7)}
# SRA 2's settings; its blocks are a sixth of SiT-B's depth and a third of SiT-L's and XL's
SRA2 = {"distance": "smooth-l1", "weight": 1.0, "layers": 5, "blocks": ((12, 2), (24, 8), (28, 8))}


@dataclass(frozen=True, kw_only=True)
class LatentOptions(AlignOptions):
    """Options of the stage-1 alignment."""

    depth: int | None = option(None, help="guided block n, counted from 1 (default: a sixth of the depth)")
    target: str = option("latent", choices=("latent", "velocity"), help="what the head regresses")
    distance: str = option(
        "mse", choices=("mse", "smooth-l1"), help="distance to the target (smooth-l1: SRA 2's, beta 0.05)"
    )
    head: str = option("mlp", choices=("mlp", "mlp-norm-linear"), help="the paper's MLP, or the authors' longer head")
    layers: int = option(3, within="[2, inf)", help="linear layers of the MLP (SRA 2: 5)")
    hidden: int | None = option(None, within="[1, inf)", help=HIDDEN)
    # Set by presets, used if `depth` is not given: (depth, n) of networks whose block is published, and n as a share of
    # any other depth.
    share: float = 1 / 6
    blocks: tuple[tuple[int, int], ...] = ()


class Latent(Alignment[LatentOptions]):
    """Distance between a head on block n and the clean latent, one value per sample."""

    name = "latent"
    Options = LatentOptions
    tokenwise = True
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "paper": {"options": {}},
        "upstream": {"options": {**AUTHORS, "mask": "upstream"}, "train": {"qk_norm": True}},
        "efficient": {"options": {**AUTHORS, "mask": "select"}},
        "sra2": {"options": SRA2},
    }

    @classmethod
    def resolve(cls, options: LatentOptions, student: ModelSpec, batch_size: int = 256) -> LatentOptions:
        published = dict(options.blocks).get(student.depth)
        depth = block_number(student.depth, options.share, options.depth, "--latent-depth", published)
        return replace(options, depth=depth, hidden=options.hidden or hidden_width(student.hidden_size))

    def __init__(self, options: LatentOptions, build_context: BuildContext) -> None:
        super().__init__(options, build_context)
        self.patch = build_context.student.patch_size
        block, (low, high) = not_none(options.depth), options.trained_times
        self.taps = (block,)
        head = VelocityHead(
            kind=options.head,
            block=block,
            hidden=not_none(options.hidden),
            layers=options.layers,
            low=low,
            high=high,
        )
        self.head = head.build(build_context.student, Stream(build_context.seed, "init/latent"))
        self.velocity_head = head if options.target == "velocity" else None

    def forward(self, context: Context) -> Tensor:
        target = context.x0 if self.options.target == "latent" else interpolant.velocity(context.x0, context.eps)
        distance = squared_error if self.options.distance == "mse" else smooth_l1
        prediction = self.head(context.features[self.taps[0]])
        return distance(prediction, patchify(target, self.patch), weigh=self.weigh(context))
