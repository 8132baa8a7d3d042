"""Every alignment on a tiny network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from alignment import Alignment, BuildContext, find
from models.checkpoint import Checkpoint
from models.pixels import pixels

SPEC = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10)


@pytest.fixture(scope="session")
def build(teacher: Path, encoder: Path) -> Callable[..., Alignment]:
    """build(name, **options): an alignment on the tiny network."""
    own = {
        "guided": {"guiding_ckpt": str(teacher)},
        "repa": {"encoder": str(encoder)},
        "haste": {"encoder": str(encoder)},
    }

    def make(name: str, **options: Any) -> Alignment:
        kind = find(name)
        small = {"hidden": 32} if "hidden" in kind.Options.__dataclass_fields__ else {}
        chosen = kind.resolve(kind.Options(**{**small, **own.get(name, {}), **options}), SPEC)
        alignment = kind(chosen, BuildContext(SPEC, pixels(1), 0, torch.device("cpu"), None, Checkpoint.open))
        if name == "internal":  # its head starts at zero, where nothing passes
            torch._foreach_add_([p.data for p in alignment.parameters()], 0.05)
        return alignment

    return make
