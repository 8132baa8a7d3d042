"""Features of a set of images that arrives in batches, on one process or several: the first half of every score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from evaluations.features import Extractor
from evaluations.images import Images
from evaluations.metrics import Moments, Statistics
from runtime import progress
from runtime.errors import UserError

Array = np.ndarray | Tensor


@dataclass(frozen=True)
class Collected:
    """Features of a whole set, on the CPU and in the set's order."""

    count: int
    statistics: Statistics  # of all
    spatial: Statistics | None
    pool: Tensor  # (M, D) float32, of the images to keep
    labels: Tensor | None  # (M,) int64


class Collector:
    """Features of a set of images that arrives in batches, on one process or several.

    keep: indices of the images whose features are kept; None keeps all. Statistics are of all images in any case.
    """

    def __init__(
        self, extractor: Extractor, accelerator: Accelerator | None = None, keep: np.ndarray | None = None
    ) -> None:
        self.extractor, self.accelerator = extractor, accelerator
        self._keep = None if keep is None else torch.from_numpy(keep)
        self._shares: list[_Share] = []
        self._moments = (Moments(), Moments())  # pool, spatial

    def add(self, images: Array, labels: Array | None, indices: Array) -> None:
        """Add images, uint8 (n, H, W, C), with labels (n,) and their `indices` (n,) in the whole set.

        Several processes must add each index once.
        """
        features = self.extractor(torch.as_tensor(images))
        for moments, x in zip(self._moments, features, strict=True):
            if x is not None:
                moments.add(x)
        share = _Share(
            torch.as_tensor(indices).cpu(),
            features.pool.cpu(),
            None if labels is None else torch.as_tensor(labels).long().cpu(),
        )
        self._shares.append(share if self._keep is None else share.of(torch.isin(share.indices, self._keep)))

    def collect(self) -> Collected:
        """The features of all processes, in order, on each process. Every process must call it."""
        shares, parts = self._shares, [tuple(moments.cpu() for moments in self._moments)]
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            # a process without images sends no share, because `_joined` needs at least one
            shares, parts = gather_object([_joined(shares)] if shares else []), gather_object(parts)
        if not shares:
            raise UserError("there are no images to score")
        whole = _joined(shares)
        whole = whole.of(whole.indices.argsort())
        if (whole.indices.diff() == 0).any():
            raise ValueError("an index was added twice")
        # merged in the order of the ranks on each process, so that all get the same statistics
        (pool, spatial), *others = parts
        for other_pool, other_spatial in others:
            pool.merge(other_pool)
            spatial.merge(other_spatial)
        return Collected(
            pool.count, pool.statistics(), spatial.statistics() if spatial.count else None, whole.pool, whole.labels
        )


class _Share(NamedTuple):
    indices: Tensor
    pool: Tensor
    labels: Tensor | None

    def of(self, rows: Tensor) -> _Share:
        return _Share(self.indices[rows], self.pool[rows], None if self.labels is None else self.labels[rows])


def _joined(shares: Sequence[_Share]) -> _Share:
    labels = [share.labels for share in shares if share.labels is not None]
    return _Share(
        torch.cat([share.indices for share in shares]),
        torch.cat([share.pool for share in shares]),
        torch.cat(labels) if len(labels) == len(shares) else None,
    )


def collect(
    images: Images,
    extractor: Extractor,
    *,
    accelerator: Accelerator | None = None,
    batch_size: int = 64,
    title: str = "features",
    keep: np.ndarray | None = None,
) -> Collected:
    """Features of all `images`, each process taking one contiguous share, with a progress bar on the main one."""
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    # consecutive shares, so that the features of all processes join in the order of the images
    start, stop = len(images) * rank // processes, len(images) * (rank + 1) // processes
    collector = Collector(extractor, accelerator, keep)
    with progress.bar(total=stop - start, desc=title, unit="image", main=rank == 0, leave=False) as bar:
        for batch in images.batches(range(start, stop), batch_size):
            indices = np.arange(start, start + len(batch))
            collector.add(batch, None if images.labels is None else images.labels[indices], indices)
            start += len(batch)
            bar.update(len(batch))
    return collector.collect()
