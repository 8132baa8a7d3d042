"""The age of files by the history of git: whether one was last changed before others were added."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


def _git(place: Path, *words: str) -> str | None:
    """What git prints in the folder `place`; None if it fails."""
    try:
        result = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=place)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def known(place: Path) -> bool:
    """Whether the whole history of the folder `place` is there: not in an archive, and not in a shallow clone."""
    return (
        place.is_dir()
        and _git(place, "rev-parse", "--is-shallow-repository") == "false"
        and bool(_git(place, "log", "-1", "--format=%H", "--", "."))
    )


def not_older(file: Path, others: Sequence[Path]) -> list[Path]:
    """Those of `others` that were committed before the last change of `file` was, or together with it.

    A change that is not committed is younger than all that is. Call it where the history is known.
    """
    place = file.parent
    changed = _git(place, "status", "--porcelain", "--", file.name)
    last = None if changed else _git(place, "log", "-1", "--format=%H", "--", file.name)
    younger = []
    for other in others:
        added = (_git(other, "log", "--reverse", "--format=%H", "--", ".") or "").split()
        if not added:
            # not committed yet
            before = last is not None
        else:
            older = last is not None and _git(place, "merge-base", "--is-ancestor", last, added[0]) is not None
            before = older and last != added[0]
        younger += [] if before else [other]
    return younger
