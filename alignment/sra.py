"""SRA (arXiv 2505.02831): a block follows a deeper block of the EMA network, which sees a little less noise.

    t'    = max(t - 0.2 u, 0),  u ~ U(0, 1) per sample; x_t' from the same latent and the same noise
    L_sra = mean over tokens and channels of smooth-L1(j(f_k(x_t, t, y)), sg f_m^EMA(x_t', t', y); beta 0.05)

j is Linear(D, 2D), SiLU, Linear(2D, D). The teacher sees the labels after the student's dropout. The weight is 0.2 up
to epoch 149, then 0.2 x 10^(-(epoch - 149) / 1000), epochs from 0. The authors' later code uses 1 - cosine with the
constant weight 0.5, where the cosine runs along the tokens, channel by channel: `token-cosine` here. `cosine` is the
usual cosine over the channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import interpolant
from alignment.base import (
    SCHEDULES,
    Alignment,
    AlignOptions,
    BuildContext,
    Context,
    cosine_distance,
    not_none,
    require_distance_per_token,
    smooth_l1,
)
from models import ModelSpec
from models.backbone import block_number
from models.heads import mlp
from runtime.options import option
from runtime.streams import Stream

BLOCKS = {12: (3, 8), 24: (6, 16), 28: (8, 20)}  # student's and teacher's block, by depth


@dataclass(frozen=True, kw_only=True)
class SraOptions(AlignOptions):
    """Options of SRA; blocks as published for 12, 24 and 28 blocks, a quarter and two thirds of any other depth."""

    weight: float = option(0.2, within="[0, inf)", help="lambda, the weight of this loss beside the flow-matching loss")
    schedule: str = option(
        "tail",
        choices=("tail", *SCHEDULES),
        help="lambda: constant then an exponential tail, constant, or falling to 0 at the stop, which plateau measures",
    )
    tail_epoch: int = option(149, within="[0, inf)", help="epoch, from 0, at which the tail begins (512 pixels: 99)")
    tail_length: float = option(
        1000.0, within="(0, inf)", help="epochs in which the tail falls to a tenth (512 pixels: 800)"
    )
    distance: str = option("smooth-l1", choices=("smooth-l1", "cosine", "token-cosine"), help="distance to the teacher")
    offset: float = option(0.2, within="[0, 1]", help="largest step of the teacher's time towards the data")
    depth: int | None = option(None, help="student's block k")
    target_depth: int | None = option(None, help="teacher's block m")

    def weight_at(self, step: int, stop: int | None, epoch_steps: int) -> float:
        weight = super().weight_at(step, stop, epoch_steps)
        if self.schedule != "tail":
            return weight
        return weight * 10 ** (-max(0, step // epoch_steps - self.tail_epoch) / self.tail_length)


class Sra(Alignment[SraOptions]):
    """Distance between a head on block k and block m of the EMA network at an earlier time, one value per sample."""

    name = "sra"
    Options = SraOptions
    whole_time = True
    tokenwise = True
    reads_ema = True
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "paper": {"options": {}},
        "paper-512": {"options": {"tail_epoch": 99, "tail_length": 800.0}},
        "token-cosine": {"options": {"distance": "token-cosine", "weight": 0.5, "schedule": "constant"}},
    }

    @classmethod
    def resolve(cls, options: SraOptions, student: ModelSpec, batch_size: int = 256) -> SraOptions:
        own, followed = BLOCKS.get(student.depth, (None, None))
        return replace(
            options,
            depth=block_number(student.depth, 1 / 4, options.depth, "--sra-depth", own),
            target_depth=block_number(student.depth, 2 / 3, options.target_depth, "--sra-target-depth", followed),
        )

    @classmethod
    def check(cls, options: SraOptions) -> None:
        super().check(options)
        require_distance_per_token(cls.name, options)

    def __init__(self, options: SraOptions, build_context: BuildContext) -> None:
        super().__init__(options, build_context)
        self.taps = (not_none(options.depth),)
        width, stream = build_context.student.hidden_size, Stream(build_context.seed, "init/sra")
        self.head = mlp(width, 2 * width, width, stream, layers=2)

    def draw(self, stream: Stream, count: int) -> dict[str, np.ndarray]:
        return {"offset": stream.uniform(count) * np.float32(self.options.offset)}

    def forward(self, context: Context) -> Tensor:
        prediction, target = self.head(context.features[self.taps[0]]), self.target(context)
        weigh = self.weigh(context)
        if self.options.distance == "smooth-l1":
            return smooth_l1(prediction, target, weigh=weigh)
        return cosine_distance(prediction, target, self.options.distance, weigh, context.token_weight)

    @torch.no_grad()
    def target(self, context: Context) -> Tensor:
        """(N, T, D) raw output of the EMA network's block m at time t'."""
        earlier = (context.t - context.draws["offset"]).clamp(0, 1)
        xt, block = interpolant.corrupt(context.x0, context.eps, earlier), not_none(self.options.target_depth)
        return not_none(context.ema)(xt, earlier, context.y, taps=(block,), exit_early=True).features[block]
