"""REPA (arXiv 2410.06940): a head on a shallow block predicts the patch tokens of a frozen external encoder.

    L_repa = - mean over tokens cos(h(f_k(x_t, t, y)), tokens(image))

The encoder sees the clean image: DINOv2 ViT-B/14 in the paper, 224 pixels for images of 256, class token dropped. The
cosine is taken over channels, token by token. Weight 0.5, all times, to the end of training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from alignment.base import Alignment, Context, Setting, cosine, given_or
from alignment.external import External, ExternalOptions
from models import ModelSpec
from models.backbone import block_number
from models.heads import mlp
from runtime.streams import Stream

# By the student's depth: 4 of SiT-B's 12 blocks, 8 of the deeper ones, as the authors say in issues 5 and 12 of their
# repository (the default of its script is 8 for every size).
BLOCKS = {12: 4, 24: 8, 28: 8}


@dataclass(frozen=True, kw_only=True)
class RepaOptions(ExternalOptions):
    """Options of REPA; `depth` is 4 of 12 blocks, 8 of 24 and 28, a third of any other depth."""


class Repa(Alignment):
    """Negative cosine between a head on block k and the encoder's patch tokens, one value per sample in [-1, 1]."""

    name = "repa"
    Options = RepaOptions
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {"paper": {"options": {}}}

    @classmethod
    def resolve(cls, options: RepaOptions, student: ModelSpec, batch_size: int = 256) -> RepaOptions:
        chosen = given_or(options.depth, BLOCKS.get(student.depth))
        return replace(options, depth=block_number(student.depth, 1 / 3, chosen, "--repa-depth"))

    def __init__(self, options: RepaOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.external = External(options, setting)
        self.columns = self.external.columns
        self.taps = (options.depth,)
        self.head = mlp(setting.student.hidden_size, options.hidden, self.external.encoder.width,
                        Stream(setting.seed, "init/repa"))

    def forward(self, context: Context) -> Tensor:
        return -cosine(self.head(context.features[self.taps[0]]), self.external(context).tokens)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.external.describe()}

    @property
    def frozen(self) -> list[nn.Module]:
        return [self.external.encoder]
