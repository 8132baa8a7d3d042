"""Self-Flow (arXiv 2603.06507): tokens at two times; a block follows a deeper block of the EMA network at less noise.

    t_i     = s for a random quarter of the tokens, t for the others;    x_i = (1 - t_i) x0_i + t_i eps_i
    L_self  = mean over tokens of 1 - cos(h(f_k(x, (t, s), y)), sg f_m^EMA(x', t', y))
    t'      = min(t, s) for all tokens

h is Linear(D, 2D), SiLU, Linear(2D, D). The velocity's loss is over all tokens, each at its own time. Preset
`self-flow` (the default) is the paper: weight 0.8, blocks 0.3 and 0.7 of the depth. No training code is public, so
nobody has compared this loss with theirs; the network is compared with their inference code.

Preset `dts-as` is SRA-DTS-AS (arXiv 2607.02508), as its authors' code has it: a token attends to those of its own time
only, in the teacher too; the teacher's times are t' = max(t_g - 0.2 u, 0), u ~ U(0, 1) for each sample and group;
weight 0.5, blocks 3 and 8 of 12; and the cosine runs along the tokens, channel by channel (`--self-flow-distance
cosine` is the usual one over the channels). With `full_share` > 0 some samples keep a single time, and all their tokens
attend to each other. The teacher sees the labels after the student's dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import interpolant
from alignment.base import (
    Alignment,
    AlignOptions,
    BuildContext,
    Context,
    cosine_distance,
    not_none,
    require_distance_per_token,
)
from models import ModelSpec
from models.backbone import block_number
from models.heads import mlp
from models.routing import Segments, split
from runtime.options import option
from runtime.streams import Stream

# Depth, student's and teacher's block of SRA-DTS-AS: SRA's
BLOCKS = ((12, 3, 8), (24, 6, 16), (28, 8, 20))


@dataclass(frozen=True, kw_only=True)
class SelfFlowOptions(AlignOptions):
    """Options of Self-Flow and SRA-DTS-AS."""

    weight: float = option(0.8, within="[0, inf)", help="lambda, the weight of this loss beside the flow-matching loss")
    depth: int | None = option(None, help="student's block k (default: 0.3 of the depth)")
    target_depth: int | None = option(None, help="teacher's block m (default: 0.7 of the depth)")
    share: float = option(0.25, within="[0, 1]", help="share of the tokens at the second time")
    full_share: float = option(0.0, within="[0, 1]", help="share of the samples that keep a single time")
    separate: bool = option(False, help="tokens attend to those of their own time only")
    teacher_time: str = option(
        "min",
        choices=("min", "offset"),
        help="the teacher's time: the smaller of the two for all tokens, or each less a random offset",
    )
    offset: float = option(0.2, within="[0, 1]", help="largest of these offsets")
    distance: str = option("cosine", choices=("cosine", "token-cosine"), help="distance to the teacher")
    # Set by presets, used if a block is not given: (depth, k, m) of networks whose blocks are published
    blocks: tuple[tuple[int, int, int], ...] = ()


class SelfFlow(Alignment[SelfFlowOptions]):
    """1 - cosine between a head on block k and block m of the EMA network, one value per sample in [0, 2]."""

    name = "self-flow"
    Options = SelfFlowOptions
    tokenwise = True
    reads_ema = True
    segmented = True
    columns = ("time",)
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "self-flow": {"options": {}},
        "dts-as": {
            "options": {
                "weight": 0.5,
                "separate": True,
                "teacher_time": "offset",
                "distance": "token-cosine",
                "blocks": BLOCKS,
            }
        },
    }

    @classmethod
    def resolve(cls, options: SelfFlowOptions, student: ModelSpec, batch_size: int = 256) -> SelfFlowOptions:
        published = {depth: (own, followed) for depth, own, followed in options.blocks}
        own, followed = published.get(student.depth, (None, None))
        return replace(
            options,
            depth=block_number(student.depth, 0.3, options.depth, "--self-flow-depth", own),
            target_depth=block_number(student.depth, 0.7, options.target_depth, "--self-flow-target-depth", followed),
        )

    @classmethod
    def check(cls, options: SelfFlowOptions) -> None:
        super().check(options)
        require_distance_per_token(cls.name, options)

    def __init__(self, options: SelfFlowOptions, build_context: BuildContext) -> None:
        super().__init__(options, build_context)
        self.taps = (not_none(options.depth),)
        self.tokens = build_context.student.tokens
        width, stream = build_context.student.hidden_size, Stream(build_context.seed, "init/self-flow")
        self.head = mlp(width, 2 * width, width, stream, layers=2)

    def draw(self, stream: Stream, count: int) -> dict[str, np.ndarray]:
        return {
            "order": stream.uniform(count * self.tokens).reshape(count, self.tokens),
            "full": stream.uniform(count) < self.options.full_share,
            "offset": (stream.uniform(2 * count) * np.float32(self.options.offset)).reshape(count, 2),
        }

    def segments(self, t: Tensor, second: Tensor, draws: dict[str, Tensor]) -> tuple[Segments, Tensor]:
        full = draws["full"].bool() if self.options.full_share else None
        lengths = split(self.tokens, (self.options.share, 1 - self.options.share))
        segments = Segments.shuffled(draws["order"], lengths, self.options.separate, full)
        return segments, torch.stack([second if full is None else torch.where(full, t, second), t], dim=1)

    def forward(self, context: Context) -> Tensor:
        prediction, target = self.head(context.features[self.taps[0]]), self.target(context)
        weigh = self.weigh(context)
        return cosine_distance(prediction, target, self.options.distance, weigh, context.token_weight)

    @torch.no_grad()
    def target(self, context: Context) -> Tensor:
        """(N, T, D) raw output of the EMA network's block m at the teacher's times."""
        block, segments = not_none(self.options.target_depth), not_none(context.segments)
        times = not_none(context.times)
        if self.options.teacher_time == "min":
            earlier = times.amin(dim=1)
            xt, cut = interpolant.corrupt(context.x0, context.eps, earlier), None
        else:
            offset = context.draws["offset"]
            if segments.joined is not None:
                # a sample of a single time has a single teacher's time
                offset = torch.where(segments.joined[:, None], offset[:, 1:], offset)
            earlier = (times - offset).clamp(0, 1)
            grid = segments.on_grid(earlier, context.x0.shape[-1])
            xt, cut = interpolant.corrupt(context.x0, context.eps, grid), segments
        teacher = not_none(context.ema)
        return teacher(xt, earlier, context.y, taps=(block,), exit_early=True, segments=cut).features[block]
