"""A distance of images by features of torchvision's MobileNetV2, for training autoencoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.torchvision import MOBILENET, load_strictly, timm_weights

STAGES = (0, 1, 2)  # strides 2, 4 and 8
SIDE = 64  # pixels; smaller images are scaled up to it, larger ones stay


class Perceptual(nn.Module):
    """Squared distance of unit-length features, the mean over positions, the sum over stages of MobileNetV2.

    weights: torchvision's file, or timm's `mobilenetv2_100`. Raises UserError for any other.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path | str) -> None:
        super().__init__()
        import timm

        model: Any = timm.create_model(MOBILENET, num_classes=0)
        load_strictly(model, timm_weights(weights, MOBILENET), weights, MOBILENET)
        self.model: Any = model.eval().requires_grad_(False)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(model.pretrained_cfg[key])[:, None, None], persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (N, 1 or 3, R, R) in [-1, 1] to features (N, D, H, W) of unit length over D, for each stage."""
        if images.shape[-1] < SIDE:
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear")
        x = ((images + 1) / 2 - self.mean) / self.std
        maps = self.model.forward_intermediates(x, indices=list(STAGES), intermediates_only=True, stop_early=True)
        return [F.normalize(features, dim=1, eps=1e-3) for features in maps]

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """The mean over images, a scalar; only `images` get a gradient."""
        with torch.no_grad():
            goals = self.features(originals)
        distances = [
            (features - goal).square().sum(1).mean()
            for features, goal in zip(self.features(images), goals, strict=True)
        ]
        return torch.stack(distances).sum()
