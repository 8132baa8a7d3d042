"""Stage 1, VAE-based alignment (paper section 3.2, equation 1): a shallow block regresses the clean latent.

    L_align = mean (MLP(f_n) - z)^2

z is the clean scaled latent in token layout. The paper gives neither n nor the weight for this stage; preset `paper`
takes n = depth/2 and 0.5. Preset `upstream` follows the authors' code: n = depth/6, the velocity as target on the
latent grid, a head that ends in LayerNorm and a linear layer, QK-norm, and the interval 0.4-0.7 as a weight; `efficient` is the
same without QK-norm, the interval selecting samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

import interpolant
from alignment.base import Alignment, AlignOptions, Context, Published, Setting, block_number, squared_error
from models import ModelSpec, patchify
from models.heads import linear, mlp
from runtime.options import option
from runtime.streams import Stream

AUTHORS = {"target": "velocity", "head": "mlp-norm-linear", "interval": (0.4, 0.7), "share": 1 / 6}
"""What the authors' code does in this stage (SiT-B: block 2 of 12)."""


@dataclass(frozen=True, kw_only=True)
class LatentOptions(AlignOptions):
    """Options of the stage-1 alignment."""

    depth: int | None = option(None, help="guided block n, counted from 1 (default: half the depth)")
    target: str = option("latent", choices=("latent", "velocity"), help="what the head regresses")
    head: str = option("mlp", choices=("mlp", "mlp-norm-linear"), help="the paper's MLP, or the authors' longer head")
    hidden: int = option(2048, help="width of the head's hidden layers")
    share: float = 1 / 2
    """n as a share of the depth, where `depth` does not say it; set by presets."""


class Latent(Alignment):
    """Mean squared error between a head on block n and the clean latent, one value per sample."""

    name = "latent"
    Options = LatentOptions
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "paper": {"options": {}},
        "upstream": {"options": {**AUTHORS, "mask": "upstream"}, "train": {"qk_norm": True}},
        "efficient": {"options": {**AUTHORS, "mask": "select"}},
    }
    published: ClassVar[dict[str, Published]] = {
        "SiT-B/2": Published(29.04, 80, "sampler not stated", flips=False),
        "SiT-L/2": Published(14.61, 80, "sampler not stated", flips=False),
        "SiT-XL/2": Published(12.25, 80, "sampler not stated", flips=False),
    }

    @classmethod
    def resolve(cls, options: LatentOptions, student: ModelSpec) -> LatentOptions:
        return replace(options, depth=block_number(student.depth, options.share, options.depth, "--latent-depth"))

    def __init__(self, options: LatentOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        student = setting.student
        self.patch = student.patch_size
        self.taps = (options.depth,)
        width, out = student.hidden_size, student.patch_size**2 * student.in_channels
        stream = Stream(setting.seed, "init/latent")
        if options.head == "mlp":
            self.head = mlp(width, options.hidden, out, stream)
        else:
            self.head = nn.Sequential(mlp(width, options.hidden, width, stream),
                                      nn.LayerNorm(width, elementwise_affine=False), linear(width, out, stream))

    def forward(self, context: Context) -> Tensor:
        target = context.x0 if self.options.target == "latent" else interpolant.velocity(context.x0, context.eps)
        return squared_error(self.head(context.features[self.taps[0]]), patchify(target, self.patch))
