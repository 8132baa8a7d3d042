"""Signs of life of the processes of a launch, so that the one that stands still can be named."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

EVERY = 5.0  # seconds between two signs
SILENT = 15.0  # seconds without one after which a process stands still


class Presence:
    """A small file for each process in `folder`, written anew every few seconds by a thread, with the step reached.

    A process that is stopped or gone falls silent; one that hangs in its own work falls behind.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank, self.step = folder, rank, 0
        self._ended = threading.Event()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sign()
        threading.Thread(target=self._run, daemon=True, name="presence").start()

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            with suppress(OSError):  # a sign that could not be given is one that is missed
                self._sign()

    def _sign(self) -> None:
        temporary = self.folder / f".{self.rank}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "step": self.step}))
        os.replace(temporary, self.folder / f"{self.rank}.json")

    def missing(self) -> str:
        """The other processes that fell silent, else those that are behind, in words."""
        seen = []
        for file in self.folder.glob("*.json"):
            with suppress(OSError, ValueError):
                if int(file.stem) != self.rank:
                    seen.append((int(file.stem), time.time() - file.stat().st_mtime, json.loads(file.read_text())))
        silent = [entry for entry in seen if entry[1] > SILENT]
        if silent:
            return "; ".join(
                f"process {rank} ({about['process']} on {about['host']}) gave its last sign of life {age:.0f} seconds ago, at "
                f"step {about['step']}"
                for rank, age, about in sorted(silent)
            )
        behind = [entry for entry in seen if entry[2]["step"] < self.step]
        return (
            "; ".join(
                f"process {rank} ({about['process']} on {about['host']}) is alive, but stands at step {about['step']}"
                for rank, _, about in sorted(behind)
            )
            or "all the others were alive just now; see their own messages"
        )

    def end(self) -> None:
        """Give no more signs."""
        self._ended.set()
        (self.folder / f"{self.rank}.json").unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()  # by the last


def clear(folder: Path) -> None:
    """Drop the signs of an earlier launch, before a new one gives its own."""
    shutil.rmtree(folder, ignore_errors=True)
