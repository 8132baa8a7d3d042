"""Internal Guidance (arXiv 2512.24176): a shallow block predicts the velocity, and sampling guides away from it.

    L_mid = mean (H(f_k, c) - v)^2,    v = eps - x0

H is a second final layer: tokens normalised, modulated by the blocks' condition c, and projected to patches. Weight
0.5, all times, to the end of training; block 8 of SiT-XL's 28, and that share of any other depth. An average of H is
kept beside the network's; `generate.py --internal-scale` guides with it (`sampling/internal.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

import interpolant
from alignment.base import Alignment, AlignOptions, BuildContext, Context, not_none, squared_error
from models import ModelSpec
from models.backbone import block_number
from models.heads import VelocityHead
from runtime.options import option
from runtime.streams import Stream


@dataclass(frozen=True, kw_only=True)
class InternalOptions(AlignOptions):
    """Options of Internal Guidance's training."""

    depth: int | None = option(None, help="block k of the second velocity (default: 8/28 of the depth)")


class Internal(Alignment[InternalOptions]):
    """Squared error of the velocity predicted from block k, one value per sample."""

    name = "internal"
    Options = InternalOptions
    tokenwise = True
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {"paper": {"options": {}}}
    velocity_head: VelocityHead

    @classmethod
    def resolve(cls, options: InternalOptions, student: ModelSpec, batch_size: int = 256) -> InternalOptions:
        return replace(options, depth=block_number(student.depth, 8 / 28, options.depth, "--internal-depth"))

    def __init__(self, options: InternalOptions, build_context: BuildContext) -> None:
        super().__init__(options, build_context)
        low, high = options.trained_times
        self.patch = build_context.student.patch_size
        self.velocity_head = VelocityHead(kind="final-layer", block=not_none(options.depth), low=low, high=high)
        self.taps = self.velocity_head.taps
        self.head = self.velocity_head.build(build_context.student, Stream(build_context.seed, "init/internal"))

    def forward(self, context: Context) -> Tensor:
        predicted = self.velocity_head.velocity(self.head, context.features, self.patch)
        return squared_error(predicted, interpolant.velocity(context.x0, context.eps), self.weigh(context), self.patch)
