"""Dispersive Loss (arXiv 2506.09027): the features of a batch repel each other; no target, no head.

    L_disp = log mean over i, j of exp(- d_ij / tau),    d_ij = |z_i - z_j|^2 / (T D),    z = f_k flattened

The mean runs over the whole B x B matrix with its diagonal of zeros, so -log B <= L_disp <= 0. B is what one process
holds in one micro-batch, as in the authors' code: 16 in the paper's runs, 32 in their PyTorch code. Another number of
processes or accumulation steps changes the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignment.base import Alignment, AlignOptions, BuildContext, Context, not_none
from models import ModelSpec
from models.backbone import block_number
from runtime.arithmetic import exact_arithmetic
from runtime.errors import require
from runtime.options import option

# The authors' training does not clip gradients and computes in float32 with TF32 products.
TRAIN = {"max_grad_norm": 0.0, "mixed_precision": "no", "tf32": True}


@dataclass(frozen=True, kw_only=True)
class DispersiveOptions(AlignOptions):
    """Options of Dispersive Loss; the defaults are the paper's."""

    depth: int | None = option(None, help="block (default: a quarter of the depth)")
    temperature: float = option(0.5, help="tau")
    # Set by presets: the block as a share of the depth, used if `depth` is not given; and the samples of a micro-batch
    # in the published runs, for a warning.
    share: float = 1 / 4
    published_batch: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"--dispersive-temperature {self.temperature} must be positive")


class Dispersive(Alignment[DispersiveOptions]):
    """Log of the mean similarity between the samples of a batch, a scalar."""

    name = "dispersive"
    Options = DispersiveOptions
    coupled = True
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "paper": {
            "options": {"weight": 0.5, "temperature": 0.5, "share": 1 / 4, "published_batch": 16},
            "train": TRAIN,
        },
        # the authors' PyTorch code: the last block, weight 0.25, tau 1; SiT-B/2 32.64
        "pytorch": {
            "options": {"weight": 0.25, "temperature": 1.0, "share": 1.0, "published_batch": 32},
            "train": TRAIN,
        },
    }

    @classmethod
    def resolve(cls, options: DispersiveOptions, student: ModelSpec, batch_size: int = 256) -> DispersiveOptions:
        return replace(options, depth=block_number(student.depth, options.share, options.depth, "--dispersive-depth"))

    def __init__(self, options: DispersiveOptions, build_context: BuildContext) -> None:
        super().__init__(options, build_context)
        self.taps = (not_none(options.depth),)
        self.micro_batch = build_context.micro_batch

    def notes(self) -> list[str]:
        published = self.options.published_batch
        if self.micro_batch in (0, published):
            return []
        parts = self.micro_batch / published
        remedy = (
            f": raise --gradient-accumulation-steps {parts:g} times, or launch as many more processes"
            if parts > 1 and parts.is_integer()
            else ""
        )
        return [
            f"warning: Dispersive Loss couples the {self.micro_batch} samples that a process sees at once; "
            f"the published runs have {published}{remedy}"
        ]

    def forward(self, context: Context) -> Tensor:
        z = context.features[self.taps[0]].float().flatten(1)
        count = len(z)
        distances = SquaredDistances.apply(z) / z.shape[1]
        return (distances / -self.options.temperature).flatten().logsumexp(0) - math.log(count**2)


class SquaredDistances(torch.autograd.Function):
    """(B, D) rows -> (B, B) squared distances between them, with memory for at most two more copies of the rows.

    d_ij = |z_i|^2 + |z_j|^2 - 2 z_i z_j, whose terms would cancel far from the origin. So the mean of the rows is
    subtracted first, which leaves numbers of the size of the distances, and the products are exact float32 in both
    directions. (`torch.pdist` holds the differences of all pairs in its backward pass: 51 GB for 256 images of
    SiT-B/2.)
    """

    @staticmethod
    @exact_arithmetic()
    def forward(ctx: Any, z: Tensor) -> Tensor:
        centred = z - z.mean(0)
        ctx.save_for_backward(centred)
        norms = centred.square().sum(1)
        distances = (norms[:, None] + norms - 2 * (centred @ centred.T)).clamp_(min=0)
        return distances.fill_diagonal_(0)

    @staticmethod
    @exact_arithmetic()
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (centred,) = ctx.saved_tensors
        both = (grad + grad.T).fill_diagonal_(0)
        # sum over j of 2 (g_ij + g_ji)(z_i - z_j)
        return 2 * torch.addmm(both.sum(1, keepdim=True) * centred, both, centred, alpha=-1)
