"""Tables of records beside published numbers, each number with a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from recipes.rows import Row
from runtime.text import aligned

SPREAD = 0.013
"""Relative spread of an FID over training seeds (arXiv 2606.20536)."""
METRICS = ("fid", "fd")
"""The first of these that a score has is what a table shows."""


def verdict(published: float | None, ours: Sequence[float]) -> str:
    """What several seeds say of a published number.

    `reproduced` (at least three seeds, and their mean at most the larger of 1.3 % and twice the standard error away),
    `inconclusive` (fewer than three), `differs`, `not run`.
    """
    if not ours:
        return "not run"
    if published is None:
        return ""
    if len(ours) < 3:
        return "inconclusive"
    tolerance = max(SPREAD * published, 2 * statistics.stdev(ours) / math.sqrt(len(ours)))
    return "reproduced" if abs(statistics.mean(ours) - published) <= tolerance else "differs"


def columns(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Protocol key -> what its column is called; one column for each protocol among the scores of `records`."""
    named: dict[str, str] = {}
    for record in records:
        for score in record["scores"]:
            named.setdefault(score["key"], f"{score['preset']} [{score['key']}]")
    return named


def render(rows: Sequence[Row], records: Sequence[dict[str, Any]], scale: str) -> str:
    """The table of `rows` at one scale: a block for each protocol, published numbers at the paper's scale alone."""
    records = [record for record in records if record["scale"] == scale and record["status"] == "finished"]
    by_row = {row.name: [record for record in records if record["row"] == row.name] for row in rows}
    shown = [record for row in rows for record in by_row[row.name]]
    blocks = []
    for key, title in columns(shown).items() or {"": "no record yet"}.items():
        lines = [["row", "published", "ours", "difference", "verdict", "device hours", "with stage 1", "images/s"]]
        lines += [_line(row, by_row[row.name], key, scale) for row in rows]
        blocks.append(f"{title}\n{aligned(lines)}")
    return "\n\n".join(blocks)


def _line(row: Row, records: Sequence[dict[str, Any]], key: str, scale: str) -> list[str]:
    scores = [score for record in records for score in record["scores"] if score["key"] == key]
    last = max((score["epochs"] for score in scores), default=0)
    ours = [next(score["metrics"][name] for name in METRICS if name in score["metrics"]) for score in scores if score["epochs"] == last]
    number = row.published.metrics["fid"] if row.published and scale == "paper" else None
    spread = f" ± {statistics.stdev(ours):.2f}" if len(ours) > 1 else ""
    hours = [record["device_hours"] for record in records if record["scores"]]
    rates = [record["images_per_second"] for record in records if record["scores"]]
    return [row.name.split("/", 1)[1], "" if number is None else f"{number:.2f}",
            f"{statistics.mean(ours):.2f}{spread} ({len(ours)})" if ours else "",
            f"{statistics.mean(ours) - number:+.2f}" if ours and number is not None else "", verdict(number, ours),
            f"{statistics.mean(h['training'] for h in hours):.3g}" if hours and ours else "",
            f"{statistics.mean(h['training'] + h['stage 1'] for h in hours):.3g}" if hours and ours else "",
            f"{statistics.mean(rates):.3g}" if rates and ours else ""]


def figure_points(rows: Sequence[Row], records: Sequence[dict[str, Any]], scale: str) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Protocol key -> row -> epochs -> values over seeds: what a figure draws."""
    points: dict[str, dict[str, dict[float, list[float]]]] = {}
    for row in rows:
        for record in records:
            if record["row"] == row.name and record["scale"] == scale:
                for score in record["scores"]:
                    value = next(score["metrics"][name] for name in METRICS if name in score["metrics"])
                    points.setdefault(score["key"], {}).setdefault(row.name, {}).setdefault(score["epochs"], []).append(value)
    return points
