"""Logs with one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a log that hold a step and numbers; [] if the file does not exist.

    Other lines are left out: a kill can cut the last line short.
    """
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        # half a line can still be valid JSON, such as a number
        if (
            isinstance(values, dict)
            and type(values.get("step")) is int
            and {type(value) for value in values.values()} <= {int, float}
        ):
            lines.append(values)
    return lines
