"""What samples are compared with: statistics of the real images, and features of some of them.

A reference file is one of
- ADM's: `arr_0` (the images for precision and recall) and perhaps `mu`, `sigma`, `mu_s`, `sigma_s` (Inception
  statistics of the whole training set), which then stand for the images' own; `labels` (N,) for class accuracy;
- statistics alone (`mu`, `sigma`): Frechet distance only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import files
from errors import UserError
from evaluations import metrics
from evaluations.features import Extractor
from evaluations.images import Images, NpzArchive, NpzImages
from evaluations.metrics import Statistics
from evaluations.score import collect

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images, as features. `pool` and `labels` belong to the images behind precision and recall."""

    name: str
    digest: str
    features: str  # the extractor's name
    weights: str | None  # and its weights' SHA-256, where known
    shape: tuple[int, ...] | None  # H, W, C of the images, where known
    statistics: Statistics
    spatial: Statistics | None
    origin: str  # of the statistics
    pool: Tensor | None  # (M, D)
    labels: Tensor | None  # (M,)

    @classmethod
    def open(cls, path: Path | str, extractor: Extractor, *, accelerator: Accelerator | None = None,
             batch_size: int = 64) -> Reference:
        """Read a reference file, extracting features where it holds images. To be called by every process.

        Raises UserError for a file that is damaged, or holds neither images nor statistics.
        """
        archive = NpzArchive(path)
        stored = "mu" in archive.names and extractor.name != "pixels"
        if "arr_0" in archive.names:
            return cls.of_images(NpzImages(path), extractor, accelerator=accelerator, batch_size=batch_size,
                                 stored=archive if stored else None)
        if not stored:
            raise UserError(f"{path} holds neither arr_0 (images) nor mu and sigma for {extractor.name} features")
        first, second = _stored(archive)
        return cls(name=Path(path).name, digest=files.digest(path), features=extractor.name, weights=None, shape=None,
                   statistics=first, spatial=second, origin="stored", pool=None, labels=None)

    @classmethod
    def of_images(cls, images: Images, extractor: Extractor, *, accelerator: Accelerator | None = None,
                  batch_size: int = 64, stored: NpzArchive | None = None) -> Reference:
        """Features of real images; their statistics too, unless `stored` brings some."""
        real = collect(images, extractor, accelerator=accelerator, batch_size=batch_size, title="reference")
        first, second = _stored(stored) if stored else (metrics.statistics(real.pool), real.spatial)
        return cls(name=images.name, digest=images.digest(), features=extractor.name, weights=extractor.weights,
                   shape=images.shape, statistics=first, spatial=second, pool=real.pool, labels=real.labels,
                   origin="stored" if stored else f"computed from {len(images)} images")

    def require(self, extractor: Extractor) -> None:
        """UserError unless the features are those of `extractor`."""
        if self.features != extractor.name:
            raise UserError(f"{self.name} holds {self.features} features, not {extractor.name}; "
                            f"give --features {self.features}")
        if self.weights and extractor.weights and self.weights != extractor.weights:
            raise UserError(f"{self.name} was made with other {self.features} weights ({self.weights[:8]}, not "
                            f"{extractor.weights[:8]}); build it again with these")

    def require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """UserError unless images of (H, W, C) `shape` are of the reference's size."""
        if self.shape is not None and shape != self.shape:
            raise UserError(f"{name}: images are {_size(shape)}, those of {self.name} are {_size(self.shape)}")

    def describe(self) -> dict[str, Any]:
        """Its part of metrics.json."""
        return {"name": self.name, "sha256": self.digest, "statistics": self.origin,
                "num_images": 0 if self.pool is None else len(self.pool)}


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _stored(archive: NpzArchive) -> tuple[Statistics, Statistics | None]:
    """`mu`, `sigma` and, where there, `mu_s`, `sigma_s`, as float64 whatever their type."""
    pairs = []
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        present = {mean, covariance} & archive.names
        if len(present) == 1:
            raise UserError(f"{archive.path} holds {present.pop()} but not its partner of {mean} and {covariance}")
        if not present:
            continue
        pair = Statistics(*(torch.from_numpy(archive.read(name).astype(np.float64)) for name in (mean, covariance)))
        if pair.mean.ndim != 1 or pair.covariance.shape != (len(pair.mean), len(pair.mean)):
            raise UserError(f"{archive.path}: {mean} {tuple(pair.mean.shape)} and {covariance} "
                            f"{tuple(pair.covariance.shape)} are no mean (D,) and covariance (D, D)")
        if not (pair.mean.isfinite().all() and pair.covariance.isfinite().all()):
            raise UserError(f"{archive.path}: {mean} or {covariance} holds NaN or infinite values; get the file again")
        pairs.append(pair)
    if "mu" not in archive.names:
        raise UserError(f"{archive.path} holds mu_s and sigma_s without mu and sigma")
    return pairs[0], pairs[1] if len(pairs) > 1 else None
