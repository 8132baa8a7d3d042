"""Tables of records beside published numbers, each number with a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from recipes import costs
from recipes.record import newest
from recipes.rows import Row
from runtime.text import aligned, spread

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
    records = [record for record in newest(records) if record["scale"] == scale]
    by_row = {row.name: [record for record in records if record["row"] == row.name] for row in rows}
    shown = [record for row in rows for record in by_row[row.name]]
    blocks = []
    for key, title in columns(shown).items() or {"": "no record yet"}.items():
        lines = [["row", "epochs", "published", "ours", "difference", "verdict", "class accuracy", "device hours", "with stage 1",
                  "images/s", "PFLOPs"]]
        lines += [line for row in rows for line in _lines(row, by_row[row.name], key, scale)]
        kept = [place for place, column in enumerate(zip(*lines, strict=True)) if any(column[1:]) or column[0] != "class accuracy"]
        blocks.append(f"{title}\n{aligned([[line[place] for place in kept] for line in lines])}")
    return "\n\n".join(blocks)


def _lines(row: Row, records: Sequence[dict[str, Any]], key: str, scale: str) -> list[list[str]]:
    """One line for each number of epochs at which the row is scored; published is what stands at its end."""
    name = row.name.split("/", 1)[1]
    published = row.published.metrics["fid"] if row.published and scale == "paper" else None
    shown = "" if published is None else f"{published:.2f}"
    scored: dict[float, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for record in records:
        for score in record["scores"]:
            if score["key"] == key:
                scored.setdefault(score["epochs"], []).append((record, score))
    if not scored:
        hours = f" ({costs.paper_hours()[row.name]:,.3g} h)" if scale == "paper" else ""  # computed, of an H100
        return [[name, f"{row.epochs:g}", shown, "", "", verdict(published, []) + hours, *[""] * 5]]
    lines = []
    for epochs, found in sorted(scored.items()):
        number = published if epochs == row.epochs else None
        ours = [quality(score) for _, score in found]
        classes = [score["metrics"]["class_accuracy"] for _, score in found if "class_accuracy" in score["metrics"]]
        hours = [score["device_hours"] for _, score in found]
        lines.append([name, f"{epochs:g}", "" if number is None else shown, f"{spread(ours)} ({len(ours)})",
                      "" if number is None else f"{statistics.mean(ours) - number:+.2f}", verdict(number, ours), spread(classes),
                      f"{statistics.mean(h['training'] for h in hours):.3g}",
                      f"{statistics.mean(h['training'] + h['stage 1'] for h in hours):.3g}",
                      f"{statistics.mean(record['images_per_second'] for record, _ in found):.3g}",
                      f"{statistics.mean(score['flops'] for _, score in found) / 1e15:.3g}"])
    return lines


def quality(score: dict[str, Any]) -> float:
    """The Frechet distance of a score."""
    return next(score["metrics"][name] for name in METRICS if name in score["metrics"])


def epochs_to(rows: Sequence[Row], records: Sequence[dict[str, Any]], scale: str, target: float) -> str:
    """For each row that is scored along the way, the first epochs at which its mean is at most `target`, a table for each protocol."""
    blocks = []
    for key, curves in figure_points(rows, records, scale).items():
        lines = [["row", f"epochs to {target:g}"]]
        for row, points in curves.items():
            reached = [epochs for epochs, values in sorted(points.items()) if statistics.mean(values) <= target]
            lines.append([row.split("/", 1)[1], f"{reached[0]:g}" if reached else f"not by {max(points):g}"])
        blocks.append(f"[{key}]\n{aligned(lines)}")
    return "\n\n".join(blocks)


def figure_points(rows: Sequence[Row], records: Sequence[dict[str, Any]], scale: str) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Protocol key -> row -> epochs -> values over seeds: what a figure draws."""
    points: dict[str, dict[str, dict[float, list[float]]]] = {}
    for row in rows:
        for record in newest(records):
            if record["row"] == row.name and record["scale"] == scale:
                for score in record["scores"]:
                    points.setdefault(score["key"], {}).setdefault(row.name, {}).setdefault(score["epochs"], []).append(quality(score))
    return points
