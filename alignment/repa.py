"""REPA (arXiv 2410.06940): a head on a shallow block predicts the patch tokens of a frozen external encoder.

    L_repa = - mean over tokens cos(h(f_k(x_t, t, y)), tokens(image))

The encoder sees the clean image: DINOv2 ViT-B/14 in the paper, 224 pixels for images of 256, class token dropped. The
cosine is taken over channels, token by token. Weight 0.5, all times, to the end of training.

Presets `irepa` and `irepa-jit` are iREPA (arXiv 2512.10794): h is a convolution over the grid of tokens with PyTorch's
initialisation, and the encoder's tokens are standardised over space, channel by channel: (z - a mean) / (std + 1e-6).
`irepa` is what its authors' command for SiT runs: weight 1, a = 0.6, and a 1x1 convolution, the default of its script,
where the paper has 3x3. `irepa-jit` is their program for JiT: weight 0.5, a = 0.8, 3x3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from alignment.base import Alignment, BuildContext, Context, cosine, not_none
from alignment.external import External, ExternalOptions
from models import ModelSpec
from models.backbone import block_number
from models.heads import Convolution, hidden_width, mlp
from runtime.options import option
from runtime.streams import Stream

# By the student's depth: 4 of SiT-B's 12 blocks, 8 of the deeper ones, as the authors say in issues 5 and 12 of their
# repository (the default of its script is 8 for every size).
BLOCKS = {12: 4, 24: 8, 28: 8}


@dataclass(frozen=True, kw_only=True)
class RepaOptions(ExternalOptions):
    """Options of REPA; `depth` is 4 of 12 blocks, 8 of 24 and 28, a third of any other depth."""

    projector: str = option(
        "mlp", choices=("mlp", "conv1x1", "conv3x3"), help="head: the MLP on each token, or a convolution (iREPA)"
    )
    spatial_norm: float | None = option(
        None, help="standardise the encoder's tokens over space after subtracting this share of their mean"
    )


class Repa(Alignment[RepaOptions]):
    """Negative cosine between a head on block k and the encoder's patch tokens, one value per sample in [-1, 1]."""

    name = "repa"
    Options = RepaOptions
    tokenwise = True
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "paper": {"options": {}},
        "irepa": {"options": {"weight": 1.0, "projector": "conv1x1", "spatial_norm": 0.6}},
        "irepa-jit": {"options": {"projector": "conv3x3", "spatial_norm": 0.8}},
    }
    spatial_norm: float | None = None

    @classmethod
    def resolve(cls, options: RepaOptions, student: ModelSpec, batch_size: int = 256) -> RepaOptions:
        published = BLOCKS.get(student.depth)
        depth = block_number(student.depth, 1 / 3, options.depth, "--repa-depth", published)
        return replace(options, depth=depth, hidden=options.hidden or hidden_width(student.hidden_size))

    def __init__(self, options: RepaOptions, build_context: BuildContext) -> None:
        super().__init__(options, build_context)
        self.external = External(options, build_context)
        self.columns = self.external.columns
        self.taps = (not_none(options.depth),)
        self.spatial_norm = options.spatial_norm
        width, out = build_context.student.hidden_size, self.external.encoder.width
        stream = Stream(build_context.seed, "init/repa")
        self.head = (
            mlp(width, not_none(options.hidden), out, stream)
            if options.projector == "mlp"
            else Convolution(width, out, 1 if options.projector == "conv1x1" else 3, stream)
        )

    def forward(self, context: Context) -> Tensor:
        tokens = self.external(context).tokens
        if self.spatial_norm is not None:
            tokens = standardised(tokens, self.spatial_norm)
        return -cosine(self.head(context.features[self.taps[0]]), tokens, weigh=self.weigh(context))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.external.describe()}

    @property
    def frozen(self) -> list[nn.Module]:
        return [self.external.encoder]


def standardised(tokens: Tensor, share: float) -> Tensor:
    """(z - share mean) / (std + 1e-6) of tokens (N, T, D), mean and std over space by channel, in float32."""
    tokens = tokens.float()
    return (tokens - share * tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + 1e-6)
