"""What GPUs can do, as their vendor states it, and what a training run is assumed to get of it."""

from __future__ import annotations

# Dense bf16 operations a second.
PEAKS = {"A100": 312e12, "A800": 312e12, "H100": 990e12, "H200": 990e12, "H800": 990e12}
# The share of its peak that a GPU is assumed to sustain.
SHARE = 0.4
