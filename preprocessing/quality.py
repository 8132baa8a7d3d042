"""Whether an autoencoder suits its images: the PSNR of a few reconstructions and the spread of their latents.

Files can be whole and yet useless: an autoencoder with broken weights encodes everything. SD-VAE reconstructs
photographs at about 26 dB, and its scaled latents have a standard deviation of about 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from models.latents import Codec
from models.pixels import is_pixels, to_uint8
from preprocessing.images import ImageSet, cropped
from runtime.errors import UserError

if TYPE_CHECKING:
    from dataset import LatentSet

PSNR = 18.0  # dB; a lower one means that the reconstruction shows another picture
SCALE = (0.5, 2.0)  # usual standard deviations of scaled latents
SAMPLE = 8  # items to check after encoding


def spread(count: int, chosen: int) -> np.ndarray:
    """At most `chosen` places, evenly spread over 0 .. count - 1."""
    return np.unique(np.linspace(0, count - 1, min(count, chosen)).astype(int))


def decoded(latents: LatentSet, chosen: np.ndarray, codec: Codec) -> np.ndarray:
    """The images (n, R, R, channels) uint8 that `codec` decodes from the items `chosen`."""
    import torch

    raw = torch.from_numpy(latents.read(chosen)[0][:, 0])
    return to_uint8(torch.cat([codec.decode(latents.space.normalise(latent[None])) for latent in raw])).cpu().numpy()


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """(n,) peak signal-to-noise ratio in dB of uint8 images against their originals."""
    error = ((images.astype(np.float64) - originals) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))


def originals_in(source: ImageSet, latents: LatentSet, chosen: np.ndarray, grey: bool) -> np.ndarray:
    """The images (n, R, R, channels) uint8 in `source` from which the items `chosen` were encoded.

    Raises UserError if the source does not hold one of them.
    """
    places: dict[str | None, int] = {name: index for index, name in enumerate(source.names)}
    images = []
    for index in chosen:
        place = places.get(latents.source_name(index))
        if place is None:
            raise UserError(f"{source.description} does not hold {latents.name(index)}; give the source of the set")
        images.append(cropped(source, place, latents.manifest["resolution"], grey))
    return np.stack(images)


def of_reconstruction(mean: float | None) -> list[str]:
    """A warning if reconstructions of `mean` dB do not show the images; None: there was nothing to compare."""
    if mean is None or mean >= PSNR:
        return []
    return [
        f"reconstructions of {mean:.1f} dB do not show the images (SD-VAE: about 26 dB): the autoencoder's weights are "
        f"broken, or not made for such images; look at the picture of preprocessing.verify"
    ]


def of_scale(std: float) -> list[str]:
    """A warning if the standard deviation `std` of the scaled latents is far from what the recipes expect."""
    if SCALE[0] <= std <= SCALE[1]:
        return []
    return [
        f"scaled latents have a standard deviation of {std:.2f}, and the recipes expect about 1: give the VAE's "
        f"statistics (--statistics of preprocessing.encode), or check its weights"
    ]


def report(latents: LatentSet, source: ImageSet, codec: Codec) -> list[str]:
    """Lines to print after `source` was encoded: figures of a few items, and warnings."""
    import torch

    chosen = spread(len(latents), SAMPLE)
    raw = torch.from_numpy(latents.read(chosen)[0][:, 0])
    std = float(latents.space.normalise(raw).std())
    if is_pixels(latents.space):
        return [f"pixels of {len(chosen)} items: standard deviation {std:.2f}"]
    originals = originals_in(source, latents, chosen, codec.image_channels == 1)
    mean = float(psnr(decoded(latents, chosen, codec), originals).mean())
    figures = (
        f"{len(chosen)} items decoded again: PSNR {mean:.2f} dB; their scaled latents have a standard deviation of "
        f"{std:.2f}"
    )
    return [figures, *(f"warning: {warning}" for warning in of_reconstruction(mean) + of_scale(std))]
