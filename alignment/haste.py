"""HASTE (arXiv 2505.16792): REPA's features and the encoder's attention maps, both dropped early.

    L_haste = L_repa + mean over block pairs, heads and queries of - sum over keys P_T log P_S

    P_T = softmax(q k^T / sqrt(d)) of the encoder's patch tokens, class token left out before the softmax
    P_S = the same of the student's first heads, as many as the encoder has (12 of SiT-XL's 16)

Published, for SiT: weight 0.5 on each term, features at block 8, student blocks 5-8 against DINOv2-B's 9-12, until step
100,000 (SiT-B) or 250,000 (SiT-L, SiT-XL) of 256 images. The stop is stored as images, so that it comes after as many
images at another batch size.

Token weights by residual and the measured release look at the features alone: the attention term is not zero where the
maps agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignment.base import Alignment, BuildContext, Context, cosine, not_none
from alignment.external import External, ExternalOptions
from models import QK, ModelSpec
from models.backbone import block_number
from models.heads import hidden_width, mlp
from runtime.errors import require
from runtime.options import option
from runtime.streams import Stream

# By the student's depth: the block of the features, and the images after which the loss stops
BLOCKS = {12: 8, 24: 8, 28: 8}
IMAGES = {12: 25_600_000, 24: 64_000_000, 28: 64_000_000}


@dataclass(frozen=True, kw_only=True)
class HasteOptions(ExternalOptions):
    """Options of HASTE; `depth` is 8 of 12, 24 and 28 blocks, two thirds of any other depth."""

    attention: float = option(
        1.0, within="[0, inf)", help="weight of the attention term beside the feature term; 0: without attention maps"
    )
    attention_depths: tuple[int, ...] | None = option(
        None, help="student's blocks (default: four that end at the depth)"
    )
    encoder_depths: tuple[int, ...] | None = option(None, help="encoder's blocks (default: its last, as many)")


class Haste(Alignment[HasteOptions]):
    """Negative cosine to the patch tokens plus cross-entropy of the attention maps, one value per sample."""

    name = "haste"
    Options = HasteOptions
    tokenwise = True
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {"paper": {"options": {}}}

    @classmethod
    def resolve(cls, options: HasteOptions, student: ModelSpec, batch_size: int = 256) -> HasteOptions:
        depth = block_number(student.depth, 2 / 3, options.depth, "--haste-depth", BLOCKS.get(student.depth))
        require(
            options.attention > 0 or not (options.attention_depths or options.encoder_depths),
            "--haste-attention 0 compares no blocks: leave out --haste-attention-depths and --haste-encoder-depths",
        )
        student_blocks: tuple[int, ...] = ()
        if options.attention > 0:
            student_blocks = options.attention_depths or tuple(range(max(1, depth - 3), depth + 1))
        encoder_blocks = options.encoder_depths or tuple(range(-len(student_blocks), 0))
        require(
            len(student_blocks) == len(encoder_blocks),
            f"--haste-attention-depths names {len(student_blocks)} blocks and --haste-encoder-depths "
            f"{len(encoder_blocks)}, which are compared in pairs: name as many of each",
        )
        # only for its error: it refuses a block that the student does not have
        for number in student_blocks:
            block_number(student.depth, 1, number, "--haste-attention-depths")
        # other depths stop as SiT-B if they have fewer than 12 blocks, else as SiT-XL
        stop = max(1, round(IMAGES.get(student.depth, IMAGES[12] if student.depth < 12 else IMAGES[28]) / batch_size))
        return replace(
            options,
            depth=depth,
            hidden=options.hidden or hidden_width(student.hidden_size),
            attention_depths=student_blocks,
            encoder_depths=encoder_blocks,
            stop_steps=options.stop_steps if options.ends else stop,
        )

    def __init__(self, options: HasteOptions, build_context: BuildContext) -> None:
        super().__init__(options, build_context)
        self.student = build_context.student
        self.external = External(options, build_context, not_none(options.encoder_depths))
        self.columns = self.external.columns
        self.pairs = tuple(zip(not_none(options.attention_depths), self.external.attention, strict=True))
        self.taps = (not_none(options.depth), *(QK(block) for block, _ in self.pairs))
        self.heads = min(self.student.num_heads, self.external.encoder.heads)
        stream = Stream(build_context.seed, "init/haste")
        self.head = mlp(self.student.hidden_size, not_none(options.hidden), self.external.encoder.width, stream)

    def forward(self, context: Context) -> Tensor:
        target = self.external(context)
        features = -cosine(self.head(context.features[self.taps[0]]), target.tokens, weigh=self.weigh(context))
        if not self.pairs:
            return features
        maps = [(context.features[QK(block)], target.attention[encoder_block]) for block, encoder_block in self.pairs]
        attention = sum(
            attention_loss(student[:, :, : self.heads], teacher[:, :, : self.heads]) for student, teacher in maps
        ) / len(maps)
        return features + self.options.attention * attention

    def describe(self) -> dict[str, Any]:
        return {
            "taps": [self.taps[0]],
            "attention_pairs": [list(pair) for pair in self.pairs],
            "attention_heads": self.heads,
            **self.external.describe(),
        }

    def notes(self) -> list[str]:
        if self.student.architecture == "sit" and self.student.depth in BLOCKS:
            return []
        return [
            f"note: HASTE is published for SiT-B, L and XL; its blocks and its stop for {self.student.name} are our "
            f"choice, by depth"
        ]

    @property
    def frozen(self) -> list[nn.Module]:
        return [self.external.encoder]

    @property
    def compiled(self) -> list[nn.Module]:
        return []  # the encoder is read through hooks, which compiled blocks would not call


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of attention maps from queries and keys (N, 2, heads, T, head_dim): (N,) float32."""
    goal, guess = logits(teacher).softmax(-1), logits(student).log_softmax(-1)
    return -(goal * guess).sum(-1).flatten(1).mean(1)


def logits(qk: Tensor) -> Tensor:
    """Scaled dot products (N, heads, T, T) of queries and keys, in float32.

    The scale goes onto q before the product, as in the authors' code and in fused attention.
    """
    q, k = qk.unbind(1)
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
