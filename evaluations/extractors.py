"""Feature extractors by name."""

from __future__ import annotations

import torch

from config import FeatureOptions
from evaluations.features import Extractor, FDr, Pixels, Timm
from evaluations.inception import Inception
from runtime.errors import UserError, nearest


def open_extractor(options: FeatureOptions, device: torch.device | str = "cpu") -> Extractor:
    """The extractor that `options` names (inception, pixels, timm:NAME or fdr:NAME) on `device`.

    Raises UserError for an unknown name, or weights that belong to another extractor.
    """
    name = options.features
    # pixels have no weights
    if options.feature_weights and not name.startswith(("inception", "timm:", "fdr:")):
        raise UserError(f"--feature-weights: --features {name} has no weights; leave it out")
    if name == "pixels":
        return Pixels(device)
    if name == "inception":
        return Inception(options.feature_weights, device)
    if name.startswith("timm:"):
        return Timm(name, options.feature_weights, device)
    if name.startswith("fdr:"):
        return FDr(name, options.feature_weights, device)
    raise UserError(
        f"unknown features {name}{nearest(name, ['inception', 'pixels'])}; use inception, pixels, timm:NAME or fdr:NAME"
    )
