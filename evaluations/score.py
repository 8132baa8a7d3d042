"""From images to metrics: extract features as the images come, then compare with a reference.

    scorer = Scorer(reference, extractor)
    for images, labels in batches:
        scorer.add(images, labels)
    result = scorer.result()

Under `accelerate launch` each process adds its share; the result is that of one process.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

import progress
from errors import UserError
from evaluations import metrics
from evaluations.features import Extractor, open_extractor
from evaluations.images import ArrayImages, Images
from evaluations.metrics import Moments, Statistics
from training.streams import Stream

if TYPE_CHECKING:
    from accelerate import Accelerator

    from evaluations.reference import Reference


Array = np.ndarray | Tensor
FEW = 10_000
NAMES = {("inception", "fd"): "fid", ("inception", "sfd"): "sfid"}  # the names that only Inception's features deserve


class Collected(NamedTuple):
    """Features of a whole set, on the CPU and in the set's order."""

    count: int
    statistics: Statistics  # of all
    spatial: Statistics | None
    pool: Tensor  # (M, D) float32, of those that were kept
    labels: Tensor | None  # (M,) int64


class Collector:
    """Features of a set of images that arrives in batches, on one process or several.

    keep: which images' features are held, by index; None holds all. Statistics are of all images in any case.
    """

    def __init__(self, extractor: Extractor, accelerator: Accelerator | None = None,
                 keep: np.ndarray | None = None) -> None:
        self.extractor, self.accelerator = extractor, accelerator
        self._keep = None if keep is None else torch.from_numpy(keep)
        self._shares: list[_Share] = []
        self._moments = (Moments(), Moments())  # pool, spatial
        self._next = 0

    def add(self, images: Array, labels: Array | None = None, indices: Array | None = None) -> None:
        """Take in images, uint8 (n, H, W, C), with labels (n,) and their places `indices` (n,) in the whole set.

        Without `indices` the images follow the ones before; with several processes they must be given, each once.
        """
        if indices is None:
            indices = torch.arange(self._next, self._next + len(images))
        self._next += len(images)
        features = self.extractor(torch.as_tensor(images))
        for moments, x in zip(self._moments, features, strict=True):
            if x is not None:
                moments.add(x)
        share = _Share(torch.as_tensor(indices).cpu(), features.pool.cpu(),
                       None if labels is None else torch.as_tensor(labels).long().cpu())
        self._shares.append(share if self._keep is None else share.of(torch.isin(share.indices, self._keep)))

    def collect(self) -> Collected:
        """The features of all processes, in order, on each of them. To be called by every process."""
        shares, parts = self._shares, [tuple(moments.cpu() for moments in self._moments)]
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            shares, parts = gather_object([_joined(shares)] if shares else []), gather_object(parts)
        if not shares:
            raise UserError("there are no images to score")
        whole = _joined(shares)
        whole = whole.of(whole.indices.argsort())
        if (whole.indices.diff() == 0).any():
            raise ValueError("an index was added twice")
        pool, spatial = (functools.reduce(Moments.merged, of_all) for of_all in zip(*parts, strict=True))
        return Collected(pool.count, pool.statistics(), spatial.statistics() if spatial.count else None, whole.pool,
                         whole.labels)


class _Share(NamedTuple):
    indices: Tensor
    pool: Tensor
    labels: Tensor | None

    def of(self, rows: Tensor) -> _Share:
        return _Share(*(None if x is None else x[rows] for x in self))


def _joined(shares: Sequence[_Share]) -> _Share:
    labelled = all(share.labels is not None for share in shares)
    return _Share(torch.cat([share.indices for share in shares]), torch.cat([share.pool for share in shares]),
                  torch.cat([share.labels for share in shares]) if labelled else None)


def collect(images: Images, extractor: Extractor, *, accelerator: Accelerator | None = None, batch_size: int = 64,
            title: str = "features", keep: np.ndarray | None = None) -> Collected:
    """Features of all `images`, each process taking one contiguous share, with a progress bar on the main one."""
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    start, stop = len(images) * rank // processes, len(images) * (rank + 1) // processes
    collector = Collector(extractor, accelerator, keep)
    with progress.bar(total=stop - start, desc=title, unit="image", main=rank == 0, leave=False) as bar:
        for batch in images.batches(start, stop, batch_size):
            indices = np.arange(start, start + len(batch))
            collector.add(batch, None if images.labels is None else images.labels[indices], indices)
            start += len(batch)
            bar.update(len(batch))
    return collector.collect()


class Scorer:
    """Metrics of images that arrive in batches, against a reference: nothing is written, no image is kept.

    precision_mode: "adm_fp16" or "fp32" (metrics.precision_recall); None takes ADM's for the features ADM uses, and
    the exact one for all others. shuffle: a seed to shuffle by before the Inception Score is cut into chunks.
    """

    def __init__(self, reference: Reference, extractor: Extractor, *, accelerator: Accelerator | None = None,
                 precision_mode: str | None = None, shuffle: int | None = None) -> None:
        reference.require(extractor)
        self.reference, self.extractor, self.accelerator = reference, extractor, accelerator
        self.precision_mode = precision_mode or ("adm_fp16" if extractor.name == "inception" else "fp32")
        self.shuffle = shuffle
        self._collector = Collector(extractor, accelerator)

    def add(self, images: Array, labels: Array | None = None, indices: Array | None = None) -> None:
        """Take in images, uint8 (n, H, W, C); see Collector.add. UserError where their size is not the reference's."""
        self.reference.require_shape("the samples", tuple(images.shape[1:]))
        self._collector.add(images, labels, indices)

    def result(self) -> dict[str, Any]:
        """What metrics.json holds, the same on every process. To be called by every process."""
        return self.compare(self._collector.collect())

    def compare(self, samples: Collected) -> dict[str, Any]:
        """The metrics of collected features; computed by the main process, returned on all."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return self._compare(samples)
        from accelerate.utils import broadcast_object_list

        answer: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                answer = [self._compare(samples)]
            except UserError as error:  # to be raised everywhere: a process left waiting would hang
                answer = [error]
        (answer,) = broadcast_object_list(answer)
        if isinstance(answer, UserError):
            raise answer
        return answer

    def _compare(self, samples: Collected) -> dict[str, Any]:
        reference, device = self.reference, self.extractor.device
        values = {"fd": metrics.frechet(samples.statistics, reference.statistics)}
        if samples.spatial is not None and reference.spatial is not None:
            values["sfd"] = metrics.frechet(samples.spatial, reference.spatial)
        if self.extractor.head is not None:
            values["is"] = metrics.inception_score(self._logits(samples.pool))
        if reference.pool is not None:
            x, r = samples.pool.to(device), reference.pool.to(device)
            values["precision"], values["recall"] = metrics.precision_recall(x, r, mode=self.precision_mode)
            if samples.labels is not None and reference.labels is not None:
                values["class_accuracy"] = metrics.class_accuracy(x, samples.labels, r, reference.labels)
        return {
            "metrics": {NAMES.get((self.extractor.name, name), name): value for name, value in values.items()},
            "num_samples": samples.count,
            "warnings": self._warnings(samples),
            "reference": reference.describe(),
            "features": {"name": self.extractor.name, "weights_sha256": self.extractor.weights},
            "precision_recall": {"mode": self.precision_mode, "k": metrics.NEIGHBOURS},
            "processes": 1 if self.accelerator is None else self.accelerator.num_processes,
            "device": device.type,
            "order": "as given" if self.shuffle is None else f"shuffled by seed {self.shuffle}",
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        }

    def _warnings(self, samples: Collected) -> list[str]:
        found = [self.extractor.note] if self.extractor.note else []
        if samples.count < FEW:
            found.append(f"{samples.count} samples: the Frechet distance is biased upwards at so few, "
                         f"compare it only with others of {samples.count} samples")
        elif samples.count != 50_000 and self.extractor.name == "inception":
            found.append(f"{samples.count} samples: published FIDs are of 50000")
        if self.extractor.head is not None and self.shuffle is None and samples.labels is not None \
                and (samples.labels.diff() >= 0).all() and samples.labels[0] != samples.labels[-1]:
            found.append("the samples are sorted by class, which lowers the Inception Score: give --shuffle SEED")
        return found

    def _logits(self, pool: Tensor) -> Tensor:
        order = torch.arange(len(pool))
        if self.shuffle is not None:
            order = torch.from_numpy(Stream(self.shuffle, "inception score").permutation(len(pool)))
        with metrics.exact_arithmetic():
            return torch.cat([part @ self.extractor.head.T.cpu() for part in pool[order].split(metrics.CHUNK)])


class Drawable(Protocol):
    """What `add_drawn` needs of a sampler: images uint8 (n, H, W, C) and labels (n,) of the samples at `indices`."""

    def images(self, indices: Sequence[int]) -> np.ndarray: ...

    def labels(self, indices: Sequence[int]) -> np.ndarray: ...


def add_drawn(scorer: Scorer, sampler: Drawable, count: int, batch_size: int, title: str = "sampling") -> None:
    """Draw samples 0 .. count - 1 and add them, each process its share. Nothing is kept but features."""
    accelerator = scorer.accelerator
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    start, stop = count * rank // processes, count * (rank + 1) // processes
    with progress.bar(total=stop - start, desc=f"{title} {count}", unit="image", main=rank == 0, leave=False) as bar:
        for first in range(start, stop, batch_size):
            indices = range(first, min(first + batch_size, stop))
            scorer.add(sampler.images(indices), sampler.labels(indices), np.array(indices))
            bar.update(len(indices))


def score(samples: np.ndarray, labels: np.ndarray | None, reference: Reference | Path | str, *,
          features: str = "pixels", device: torch.device | str = "cpu", batch_size: int = 256) -> dict[str, Any]:
    """Metrics of uint8 samples (N, H, W, C) in memory, against a reference or the path of one.

    Returns what metrics.json holds; its "metrics" entry maps names to numbers. Raises UserError as the command does.
    """
    from evaluations.reference import Reference

    extractor = open_extractor(features, device=device)
    if not isinstance(reference, Reference):
        reference = Reference.open(reference, extractor, batch_size=batch_size)
    images = ArrayImages(samples, labels, "the samples")
    scorer = Scorer(reference, extractor)
    for start, batch in zip(range(0, len(images), batch_size), images.batches(0, len(images), batch_size), strict=True):
        scorer.add(batch, None if images.labels is None else images.labels[start : start + len(batch)])
    return scorer.result()
