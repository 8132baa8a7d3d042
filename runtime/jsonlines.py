"""Logs with one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from runtime import files


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


def cut(path: Path, step: int) -> None:
    """Drop the lines after `step`, whose steps run again, so that every step has one line; makes a missing log."""
    lines = [line for line in read(path) if line["step"] <= step]
    with files.replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def append(path: Path, step: int, values: Mapping[str, float]) -> None:
    """Add a line; numbers have six digits."""
    line = {"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}}
    with files.writing(path), open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")
