"""The processes of a run agree between steps to end or to save, without waiting for each other or for the device."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

# Steps between two votes. All processes grant a request at the same step, at most two votes after it was made.
EVERY = 4


class Vote:
    """Any process may make a request; all processes grant it at the same step.

    A single process grants its requests at once. Several sum them over the processes at every fourth step and read the
    sum at the next vote. By then it has long arrived, so that reading it does not hold the device up.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sum: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def __call__(self, step: int, **requests: bool) -> set[str]:
        """The names of the requests that are granted at `step`."""
        if self._accelerator.num_processes == 1:
            return {name for name, requested in requests.items() if requested}
        if step % EVERY:
            return set()
        granted = self._read(list(requests))
        self._send([float(requested) for requested in requests.values()])
        return granted

    def _send(self, requests: list[float]) -> None:
        cuda = self._accelerator.device.type == "cuda"
        requested = torch.tensor(requests, pin_memory=cuda).to(self._accelerator.device, non_blocking=True)
        total = self._accelerator.reduce(requested, "sum")
        if cuda:
            host = torch.empty(len(requests), pin_memory=True)
            host.copy_(total, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
            total = host
        self._sum = total

    def _read(self, names: list[str]) -> set[str]:
        if self._sum is None:
            return set()
        if self._ready is not None:
            self._ready.synchronize()
        return {name for name, requested in zip(names, self._sum.tolist(), strict=True) if requested}
