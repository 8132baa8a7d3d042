"""Features of a set of images that arrives in batches, on one process or several: the first half of every score.

Processes exchange features through files in the output folder (`Accelerator.project_dir`): collective operations would
take them through the memory of each device, of which training has little left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from evaluations.features import Extractor
from evaluations.images import Images
from evaluations.metrics import Moments, Statistics
from runtime import files, progress
from runtime.errors import UserError
from runtime.launch import on_main

Array = np.ndarray | Tensor


@dataclass(frozen=True)
class Collected:
    """Features of a whole set, on the CPU and in the set's order. `pool` and `labels` are whole on the main process.

    On the others they are those of its own share.
    """

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
        """The features of all processes, in order. Every process must call it."""
        share, parts = _joined(self._shares), [[moments.cpu() for moments in self._moments]]
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            share, parts = _exchanged(share, parts[0], self.accelerator)
        if not sum(pool.count for pool, _ in parts):
            raise UserError("there are no images to score")
        whole = share.of(share.indices.argsort())
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
    # a process may have no images, and says nothing of their labels then
    shares = [share for share in shares if len(share.indices)]
    if not shares:
        return _Share(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0), None)
    labels = [share.labels for share in shares if share.labels is not None]
    return _Share(
        torch.cat([share.indices for share in shares]),
        torch.cat([share.pool for share in shares]),
        torch.cat(labels) if len(labels) == len(shares) else None,
    )


def _exchanged(
    share: _Share, moments: Sequence[Moments], accelerator: Accelerator
) -> tuple[_Share, list[list[Moments]]]:
    """On the main process the shares of all joined, on the others their own; on each the moments of all.

    Raises:
        UserError: a process cannot write into the output folder.
    """
    ranks, rank = range(accelerator.num_processes), accelerator.process_index
    values = {f"{number}.{key}": value for number, part in enumerate(moments) for key, value in vars(part).items()}
    message = None
    # a folder of this exchange alone: another score may be written beside this one
    with ExitStack() as held:
        folder = on_main(accelerator, lambda: held.enter_context(_shared_folder(accelerator)))
        features, sums = ([folder / f"{kind}.{number}" for number in ranks] for kind in ("features", "sums"))
        # an error is gathered before it is raised: a process that left early would let the others wait for it
        try:
            present = {key: value for key, value in share._asdict().items() if value is not None}
            files.save_tensors(features[rank], present)
            files.save_tensors(sums[rank], {key: torch.as_tensor(value) for key, value in values.items()})
        except UserError as error:
            message = str(error)
        if messages := [other for other in gather_object([message]) if other]:
            raise UserError(messages[0])
        if accelerator.is_main_process:
            stored = map(files.load_tensors, features)
            share = _joined([_Share(each["indices"], each["pool"], each.get("labels")) for each in stored])
        parts = [
            [Moments(int(each[f"{n}.count"]), each[f"{n}.mean"], each[f"{n}.scatter"]) for n in range(len(moments))]
            for each in map(files.load_tensors, sums)
        ]
        accelerator.wait_for_everyone()  # all have read
    return share, parts


@contextmanager
def _shared_folder(accelerator: Accelerator) -> Iterator[Path]:
    """A temporary folder in the output folder, which a later start clears away if this process is killed."""
    assert accelerator.project_dir is not None
    place = Path(accelerator.project_dir, "features")
    with files.writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.scratch(place) as (folder, _):
            yield folder


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
