"""Decoding and cropping in worker processes, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from preprocessing.images import BadImage, ImageSet, cropped, png
from runtime.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Items that were planned together. Bad images are in `bad` alone."""

    indices: list[int]
    images: Tensor  # (n, R, R, C) uint8
    pngs: list[bytes]  # empty unless images are kept
    bad: list[str]  # one message per unusable image

    def pin_memory(self) -> Batch:
        return Batch(self.indices, self.images.pin_memory(), self.pngs, self.bad)


class _Crops(Dataset):
    def __init__(self, source: ImageSet, resolution: int, grey: bool, keep: bool) -> None:
        self.source, self.resolution, self.grey, self.keep = source, resolution, grey, keep

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | None, bytes | None, str]:
        try:
            image = cropped(self.source, index, self.resolution, self.grey)
        except BadImage as error:
            return index, None, None, str(error)
        return index, image, png(image) if self.keep else None, ""


def _collate(items: list[tuple[int, np.ndarray | None, bytes | None, str]]) -> Batch:
    images = [image for _, image, _, _ in items if image is not None]
    return Batch(
        indices=[index for index, image, _, _ in items if image is not None],
        images=torch.from_numpy(np.stack(images) if images else np.empty((0, 0, 0, 0), np.uint8)),
        pngs=[file for _, _, file, _ in items if file is not None],
        bad=[message for _, image, _, message in items if image is None],
    )


def batches(
    source: ImageSet,
    plan: Sequence[list[int]],
    *,
    resolution: int,
    grey: bool = False,
    keep: bool = False,
    workers: int | None = None,
    processes: int = 1,
    pin: bool = False,
) -> Iterator[Batch]:
    """The crops of the items of `plan`, batch by batch, decoded by `workers` processes (None: this process's cores)."""
    if workers is None:
        workers = max(1, len(os.sched_getaffinity(0)) // processes)
    loader = DataLoader(
        _Crops(source, resolution, grey, keep),
        batch_sampler=plan,
        num_workers=min(workers, len(plan)),
        collate_fn=_collate,
        pin_memory=pin,
        prefetch_factor=4 if min(workers, len(plan)) else None,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a decoding process was killed, perhaps because it ran out of memory; the same command continues; if it "
            "happens again, lower --workers"
        ) from error
