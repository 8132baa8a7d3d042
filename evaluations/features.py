"""Feature extractors: uint8 images to the vectors that the metrics compare. Each owns its preprocessing."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from errors import UserError, nearest
from evaluations.metrics import exact_arithmetic

MAX_PIXELS = 4096  # the covariance of D features takes 8 D^2 bytes


class Features(NamedTuple):
    """pool (n, D) for the Frechet distance, precision and recall; spatial (n, S) for sFID, where there is one."""

    pool: Tensor
    spatial: Tensor | None = None


class Extractor(Protocol):
    """A frozen network, or none. `head` (K, D) turns pool features into the Inception Score's logits, if it exists."""

    name: str
    weights: str | None  # SHA-256 of the weights file
    head: Tensor | None
    device: torch.device

    def __call__(self, images: Tensor) -> Features:
        """uint8 images (n, H, W, C), on any device, to float32 features on `device`. UserError where it cannot."""
        ...


class Pixels:
    """The image itself, flattened, uint8 / 127.5 - 1: for images so small that pixels are features (the digits)."""

    name = "pixels"
    weights = head = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, images: Tensor) -> Features:
        count = images[0].numel()
        if count > MAX_PIXELS:
            raise UserError(f"pixels are features for images of at most {MAX_PIXELS} values, these have {count}; "
                            "use --features inception")
        with exact_arithmetic():
            return Features(images.to(self.device).flatten(1).float() / 127.5 - 1)


def open_extractor(name: str, *, device: torch.device | str = "cpu") -> Extractor:
    """The extractor `name` on `device`.

    Raises UserError for an unknown name.
    """
    if name == "pixels":
        return Pixels(device)
    raise UserError(f"unknown features {name}{nearest(name, ['pixels'])}; use pixels")
