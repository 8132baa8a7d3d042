"""Copies from host memory to a device that do not make the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`."""
    # From pageable memory, the copy would wait for all queued work of the device; from pinned memory it does not.
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
