"""Progress bars, the same everywhere: rate and time left, few lines in log files, on the main process alone."""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakSet

from tqdm import tqdm

_OPEN: WeakSet[tqdm] = WeakSet()


def bar(*args: Any, main: bool = True, **kwargs: Any) -> tqdm:
    """A tqdm bar. If stderr is not a terminal, it prints a line every 30 seconds instead of ten a second."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    made = tqdm(
        *args, disable=not main, dynamic_ncols=True, mininterval=interval, maxinterval=max(10.0, interval), **kwargs
    )
    _OPEN.add(made)
    return made


def end() -> None:
    """Close every bar that is still open, so that the next message has a line of its own."""
    for opened in list(_OPEN):
        opened.close()
