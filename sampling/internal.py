"""Internal Guidance (arXiv 2512.24176) while sampling: the velocity is guided away from that of a shallow block.

    v <- v_mid + w (v - v_mid)    while low <= t <= high

v_mid is a head's prediction from a block of the same forward pass: no second network, no second evaluation. Under
classifier-free guidance it acts on the conditional and on the unconditional velocity, before they are combined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import models
from models import Tap
from models.checkpoint import Checkpoint
from models.heads import VelocityHead
from runtime.errors import require
from runtime.streams import Stream
from sampling.config import SamplingConfig


@dataclass(frozen=True)
class Inner:
    """The velocity of a shallow block: a head, what it reads, and the times low to high at which it guides."""

    # The alignment that trained it.
    name: str
    spec: VelocityHead
    head: nn.Module
    patch: int
    low: float
    high: float

    def __call__(self, features: Mapping[Tap, Tensor]) -> Tensor:
        """(N, C, H, W) velocity from the tapped `features`."""
        return self.spec.velocity(self.head, features, self.patch)

    def __str__(self) -> str:
        return f"block {self.spec.block} ({self.name}) for t in {self.low:g} to {self.high:g}"

    def describe(self) -> dict[str, Any]:
        """What samples depend on, as JSON values."""
        return {"head": self.name, "block": self.spec.block, "low": self.low, "high": self.high}


def open_inner(checkpoint: Checkpoint, sampling: SamplingConfig, device: torch.device | str = "cpu") -> Inner:
    """The velocity head of `checkpoint` with the weights that `sampling` names; the first, if there are several.

    It guides at the times that `sampling` gives, else at those that it was trained on.

    Raises:
        UserError: the checkpoint has no velocity head, its weights are missing or damaged, or low is above high.
    """
    heads: dict[str, Any] = checkpoint.config.get("velocity_heads", {})
    require(
        bool(heads),
        f"{checkpoint.path} has no velocity head to guide internally with (--internal-scale): use one trained with "
        f"--align internal, or with --align latent --latent-target velocity",
    )
    name = next(iter(heads))
    spec = VelocityHead.from_json(heads[name], f"the velocity head of {checkpoint.path}")
    low = spec.low if sampling.internal_low is None else sampling.internal_low
    high = spec.high if sampling.internal_high is None else sampling.internal_high
    require(
        0 <= low <= high <= 1, f"--internal-low {low:g} and --internal-high {high:g} must satisfy 0 <= low <= high <= 1"
    )
    # the seed does not matter: the checkpoint's weights replace it
    head = spec.build(checkpoint.spec, Stream(0, "replaced by the checkpoint's"))
    head.load_state_dict(_weights(checkpoint, name, sampling.weights))
    return Inner(name, spec, head.to(device).eval().requires_grad_(False), checkpoint.spec.patch_size, low, high)


def _weights(checkpoint: Checkpoint, name: str, weights: str) -> dict[str, Tensor]:
    """The tensors of the head of the alignment `name`: those trained for "raw", else the average called `weights`."""
    file, prefix = ("heads", f"{name}.head.") if weights == "raw" else (f"{name}-head-{weights}", "")
    stored = checkpoint.tensors(file) if f"{file}.safetensors" in checkpoint.files else {}
    tensors = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    require(
        bool(tensors),
        f"{checkpoint.path} has no {weights} weights of the velocity head of {name} (--internal-scale): training ended "
        f"the head, or it stayed where the checkpoint was trained; use an earlier checkpoint, or the run's own",
    )
    models.require_finite(tensors, f"{checkpoint.path} ({weights} weights of the velocity head)")
    return tensors
