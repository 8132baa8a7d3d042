"""LayerSync (arXiv 2510.12581): a block follows a deeper block of the same forward pass.

    L_sync = - mean over tokens cos(f_k, sg f_m),    k < m

No head, no second pass. Weight 0.2, all times, to the end of training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from alignment.base import Alignment, AlignOptions, BuildContext, Context, cosine, not_none
from models import ModelSpec
from models.backbone import block_number
from runtime.errors import require
from runtime.options import option

# (k, m) by depth. Those of SiT-L (24) and XL (28) are published. We found no published pair for SiT-B: 4 and 8 are
# ours, by the authors' rules (a real gap, the student not among the earliest blocks, the target not in the last fifth).
BLOCKS = {12: (4, 8), 24: (8, 18), 28: (8, 16)}


@dataclass(frozen=True, kw_only=True)
class LayerSyncOptions(AlignOptions):
    """Options of LayerSync; blocks as published for 24 and 28 blocks, a third and two thirds of any other depth."""

    weight: float = option(0.2, within="[0, inf)", help="lambda, the weight of this loss beside the flow-matching loss")
    depth: int | None = option(None, help="block k that follows")
    target_depth: int | None = option(None, help="block m that is followed")


class LayerSync(Alignment[LayerSyncOptions]):
    """Negative cosine between block k and the detached block m, one value per sample in [-1, 1]."""

    name = "layersync"
    Options = LayerSyncOptions
    tokenwise = True
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "paper": {"options": {}, "train": {"max_grad_norm": 0.0, "mixed_precision": "no", "tf32": True}},
    }

    @classmethod
    def resolve(cls, options: LayerSyncOptions, student: ModelSpec, batch_size: int = 256) -> LayerSyncOptions:
        published = BLOCKS.get(student.depth, (None, None))
        depth = block_number(student.depth, 1 / 3, options.depth, "--layersync-depth", published[0])
        target = block_number(student.depth, 2 / 3, options.target_depth, "--layersync-target-depth", published[1])
        require(depth < target, f"--layersync-depth {depth} must come before --layersync-target-depth {target}")
        return replace(options, depth=depth, target_depth=target)

    def __init__(self, options: LayerSyncOptions, build_context: BuildContext) -> None:
        super().__init__(options, build_context)
        self.taps = (not_none(options.depth), not_none(options.target_depth))

    def forward(self, context: Context) -> Tensor:
        follower, followed = (context.features[tap] for tap in self.taps)
        return -cosine(follower, followed.detach(), weigh=self.weigh(context))
