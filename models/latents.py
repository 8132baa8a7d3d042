"""Latent spaces: what a network sees, and how it is normalised.

A latent set stores raw latents; a network sees x = (raw - shift) * scale, channel by channel. What turns images into
latents and back is a `Codec`: a VAE (`models/vae.py`), or the identity (`models/pixels.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from runtime import schema
from runtime.errors import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Larger numbers of channels or pixels of stride mean that a description is damaged.
LIMIT = 65_536


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """A latent space; latent sets and checkpoints store it as JSON.

    `shift` and `scale` have one value, or one for each channel: x = (raw - shift) * scale.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    name: str  # "pixels", "sd-vae", "va-vae", or the last part of the VAE's name
    channels: int
    stride: int  # pixels along one side of a latent element
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    vae: str | None = None  # hub id or folder
    digest: str | None = None  # SHA-256 of the encoder's weights: decoders tuned on one encoder share its space

    def __post_init__(self) -> None:
        require(
            1 <= self.channels <= LIMIT and 1 <= self.stride <= LIMIT,
            f"latent space {self.name}: {self.channels} channels of stride {self.stride}; "
            f"both must lie between 1 and {LIMIT}",
        )
        for name in ("shift", "scale"):
            values = getattr(self, name)
            require(
                len(values) in (1, self.channels) and all(map(math.isfinite, values)),
                f"latent space {self.name}: {name} needs 1 or {self.channels} finite numbers, not {values}",
            )
        require(all(self.scale), f"latent space {self.name}: a scale of 0 makes a channel constant")

    def normalise(self, raw: Tensor) -> Tensor:
        """(N, C, H, W) raw latents -> what the network sees."""
        return (raw - _channelwise(self.shift, raw.dtype, raw.device)) * _channelwise(self.scale, raw.dtype, raw.device)

    def denormalise(self, x: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return x / _channelwise(self.scale, x.dtype, x.device) + _channelwise(self.shift, x.dtype, x.device)

    def difference(self, other: LatentSpace) -> str | None:
        """Why a network of this space cannot read latents of `other`, in a few words; None if it can."""
        for name in ("channels", "stride"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} {getattr(self, name)} against {getattr(other, name)}"
        for name in ("shift", "scale"):
            # one value stands for all channels, so (a,) and (a, a, a, a) are the same space
            here, there = (
                (values * self.channels if len(values) == 1 else values)
                for values in (getattr(self, name), getattr(other, name))
            )
            if not all(map(functools.partial(math.isclose, rel_tol=1e-5), here, there)):
                return f"{name} {getattr(self, name)[0]:g}... against {getattr(other, name)[0]:g}..."
        # a space from statistics alone has no digest; `unverified_match` warns if the names differ too
        if None not in (self.digest, other.digest) and self.digest != other.digest:
            return f"the encoder of {self.vae} against that of {other.vae}"
        return None

    def unverified_match(self, other: LatentSpace) -> str | None:
        """A warning if the names differ and no digest shows that one encoder made both; None if they match."""
        if None not in (self.digest, other.digest) or self.name == other.name:
            return None
        return f"latents of {self.name} against {other.name}, and no digest shows whether one encoder made both"

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "shift": list(self.shift), "scale": list(self.scale)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LatentSpace:
        """Raises UserError if a field is missing, unknown or of another type."""
        return schema.checked(cls, dict(value), "the latent space's description")


@functools.lru_cache(maxsize=16)
def _channelwise(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(C, 1, 1) constants, made once: the host would wait for a copy to the device in every step."""
    import torch

    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


class Codec(Protocol):
    """Images (N, C, R, R) in [-1, 1] to latents and back."""

    space: LatentSpace
    image_channels: int  # C: 1 for grey images, 3 for RGB

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (N, C, H, W) of the raw latents, float32."""

    def decode(self, x: Tensor) -> Tensor:
        """Images in [-1, 1], not clamped, float32, of normalised latents (N, C, H, W)."""
