"""The space of pixels, for training on small images directly, without a VAE; and the range of pixel values.

A stored image is uint8 (N, H, W, C); a network and a VAE see (N, C, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.latents import LatentSpace

if TYPE_CHECKING:
    from torch import Tensor

# The name of the space, which every option for a VAE accepts
PIXELS = "pixels"


def pixels(channels: int, shift: Sequence[float] = (0.0,), scale: Sequence[float] = (1.0,)) -> LatentSpace:
    """The space of images themselves, in [-1, 1] before shift and scale."""
    return LatentSpace(name=PIXELS, channels=channels, stride=1, shift=tuple(shift), scale=tuple(scale))


def is_pixels(space: LatentSpace) -> bool:
    """Whether latents of `space` are the images themselves."""
    return space.name == PIXELS


class PixelCodec:
    """The identity: an image is its own latent, with standard deviation 0."""

    def __init__(self, space: LatentSpace) -> None:
        self.space = space
        self.image_channels = space.channels

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.float(), images.new_zeros(images.shape).float()

    def decode(self, x: Tensor) -> Tensor:
        return self.space.denormalise(x.float())


def to_signed(images: Tensor) -> Tensor:
    """uint8 images (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor, rule: str = "round") -> Tensor:
    """Images (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), clamped.

    `round` is SiT's and LightningDiT's floor(127.5 x + 128); `truncate` is REPA's floor(127.5 x + 127.5), half a level
    darker.
    """
    offset = {"round": 128.0, "truncate": 127.5}[rule]
    return (127.5 * images.float() + offset).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
