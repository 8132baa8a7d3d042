"""Consecutive slices of a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T", Sequence[int], np.ndarray)


def slices(items: T, size: int) -> Iterator[T]:
    """Consecutive slices of at most `size` items; those of a range are ranges."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
