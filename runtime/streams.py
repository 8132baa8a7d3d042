"""Randomness as a function of (seed, name, index): no generator state is ever saved, because none exists.

`Stream(seed, "noise", step)` is the same sequence of numbers in any process, on any number of GPUs and after any
resume. Host draws come from NumPy's Philox generator under a 128-bit key; draws on a CUDA device come from that
device's generator under a 64-bit seed taken from the same key (reproducible on one kind of device, not across kinds).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Stream:
    """One random stream, named by a seed, a purpose and an index (an optimiser step, an epoch or a sample index)."""

    def __init__(self, seed: int, name: str, index: int = 0) -> None:
        key = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=16).digest()
        self._key = int.from_bytes(key, "little")
        self.host = np.random.Generator(np.random.Philox(key=self._key))
        self._device: torch.Generator | None = None

    def uniform(self, count: int) -> np.ndarray:
        """(count,) float32, uniform on [0, 1)."""
        return self.host.random(count, dtype=np.float32)

    def permutation(self, count: int) -> np.ndarray:
        """(count,) int64, a random order of 0 .. count-1."""
        return self.host.permutation(count)

    def integers(self, high: int, count: int) -> np.ndarray:
        """(count,) int64, uniform on 0 .. high-1."""
        return self.host.integers(high, size=count)

    def fill_normal(self, out: np.ndarray) -> None:
        """Fill `out` (float32) with the standard normal numbers that `normal` draws on the host; releases the GIL."""
        self.host.standard_normal(out=out, dtype=np.float32)

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Standard normal float32 tensor of `shape`, drawn on `device`."""
        import torch

        device = torch.device(device)
        if device.type == "cpu":  # the CPU's torch generator keeps only 32 bits of its seed
            return torch.from_numpy(self.host.standard_normal(tuple(shape), dtype=np.float32))
        if self._device is None:
            self._device = torch.Generator(device).manual_seed(self._key & (2**63 - 1))
        return torch.randn(tuple(shape), generator=self._device, device=device)
