"""Progress bars, the same everywhere: rate and time left, quiet in log files, on the main process alone."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(*args: Any, main: bool = True, **kwargs: Any) -> tqdm:
    """A tqdm bar. Where standard error is no terminal it prints a line every 30 seconds instead of ten a second."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(*args, disable=not main, dynamic_ncols=True, mininterval=interval, maxinterval=max(10.0, interval), **kwargs)
