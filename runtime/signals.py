"""Signals by which a scheduler or a user asks a program to end, noted so that it can end well."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
TWICE = 2.0  # seconds: a launcher passes on what its processes have already got, which is no second signal


class Asked:
    """Whether this process was asked to end: `by` is the reason in a few words, None while nobody asked."""

    def __init__(self) -> None:
        self.by: str | None = None
        self._since = 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler: the first signal is noted, a second one ends the process at once."""
        if self.by is None:
            self.by, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > TWICE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def noted() -> Iterator[Asked]:
    """Note the signals of `ASKING` inside the block; a process that ignores one (nohup) goes on ignoring it."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {}
    for name in ASKING:
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, asked.note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
