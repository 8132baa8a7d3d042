"""The networks: `build` is the one way to make one (`models.registry`, whose names this package has too).

spec = models.spec("SiT-B/2", in_channels=4, input_size=32, num_classes=1000)
network = models.build(spec, seed=0)
velocity, features = network(x, t, y, taps=[8])
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.registry import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        # Commands in this package read their options before they need torch, and import this file first. A statement
        # `from models import checkpoint` asks here before it imports the file of that name.
        if name.startswith("__") or find_spec(f"{__name__}.{name}") is not None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # kept, so that each name is looked for on disk once
        globals()[name] = value = getattr(importlib.import_module("models.registry"), name)
        return value
