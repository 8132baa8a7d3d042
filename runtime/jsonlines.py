"""Logs of one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a log, [] where there is none; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            lines.append(values)
    return lines
