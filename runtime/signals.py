"""Signals by which a scheduler or a user asks a program to end.

They are noted, so that it can save its work first. Blocks that note them may stand inside each other: a request that
the inner one did not grant is handed to the outer one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from runtime.errors import EndedEarly

ASKING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
# Seconds. A launcher forwards a signal that its processes have already received: that is not a second request.
TWICE = 2.0


class Asked:
    """Whether this process was asked to end: `by` names the reason, or is None.

    Args:
        at_once: end by raising EndedEarly where the program stands.
    """

    def __init__(self, at_once: bool) -> None:
        self.by: str | None = None
        self._at_once = at_once
        # The work is saved and the process is ending: a further signal must not change its exit code.
        self.answered = False
        self._since = 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: it notes the first signal; a second one ends the process at once."""
        if self.by is None:
            self.by, self._since = signal.Signals(number).name, time.monotonic()
            if self._at_once:
                self.end()
        elif not self.answered and time.monotonic() - self._since > TWICE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def end(self) -> None:
        """Raise EndedEarly if the process was asked to end."""
        if self.by is not None:
            raise EndedEarly(f"asked to end by {self.by}; the same command continues")


@contextmanager
def noted(at_once: bool = False) -> Iterator[Asked]:
    """Note the signals of `ASKING` inside the block; signals that the process ignores (nohup) stay ignored.

    Once they are answered, they are ignored for the rest of the process.
    """
    asked = Asked(at_once)
    # Python lets the main thread alone set handlers
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: dict[int, Any] = {}
    for name in ASKING:
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, asked.note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if asked.answered else handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, Asked) and asked.by is not None:
                outer.by = asked.by
