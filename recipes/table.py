"""Tables of records beside published numbers, each number with a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from recipes import costs
from recipes.record import METRICS, newest
from recipes.rows import Row
from runtime.text import aligned, spread

SPREAD = 0.013
"""Relative spread of an FID over training seeds (arXiv 2606.20536)."""


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


def by_epochs(
    records: Sequence[dict[str, Any]], row: str, key: str | None = None
) -> dict[float, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Epochs, in their order -> every score of `row` there, behind its record; of one protocol where its `key` is given."""
    found: dict[float, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for record in records:
        for score in record["scores"] if record["row"] == row else ():
            if key in (None, score["key"]):
                found.setdefault(score["epochs"], []).append((record, score))
    return dict(sorted(found.items()))


def columns(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Protocol key -> what its column is called; one column for each protocol among the scores of `records`."""
    named: dict[str, str] = {}
    for record in records:
        for score in record["scores"]:
            named.setdefault(score["key"], f"{score['preset']} [{score['key']}]")
    return named


def render(rows: Sequence[Row], records: Sequence[dict[str, Any]], scale: str) -> str:
    """The table of `rows` at one scale: a block for each protocol, published numbers at the paper's scale alone."""
    shown = _of(rows, records, scale)
    blocks = []
    for key, title in columns(shown).items() or {"": "no record yet"}.items():
        lines = [
            [
                "row",
                "epochs",
                "published",
                "ours",
                "difference",
                "verdict",
                "class accuracy",
                "device hours",
                "with stage 1",
                "images/s",
                "PFLOPs",
            ]
        ]
        lines += [line for row in rows for line in _lines(row, shown, key, scale)]
        kept = [
            place
            for place, column in enumerate(zip(*lines, strict=True))
            if any(column[1:]) or column[0] != "class accuracy"
        ]
        blocks.append(f"{title}\n{aligned([[line[place] for place in kept] for line in lines])}")
    return "\n\n".join(blocks)


def _of(rows: Sequence[Row], records: Sequence[dict[str, Any]], scale: str) -> list[dict[str, Any]]:
    """The newest records of `rows` at one scale, row by row."""
    records = [record for record in newest(records) if record["scale"] == scale]
    return [record for row in rows for record in records if record["row"] == row.name]


def _lines(row: Row, records: Sequence[dict[str, Any]], key: str, scale: str) -> list[list[str]]:
    """One line for each number of epochs at which the row is scored; published is what stands at its end."""
    name = row.name.split("/", 1)[1]
    published = row.published.metrics["fid"] if row.published and scale == "paper" else None
    shown = "" if published is None else f"{published:.2f}"
    scored = by_epochs(records, row.name, key)
    if not scored:
        hours = f" ({costs.paper_hours()[row.name]:,.3g} h)" if scale == "paper" else ""  # computed, of an H100
        return [[name, f"{row.epochs:g}", shown, "", "", verdict(published, []) + hours, *[""] * 5]]
    lines = []
    for epochs, found in scored.items():
        number = published if epochs == row.epochs else None
        ours = [quality(score) for _, score in found]
        classes = [score["metrics"]["class_accuracy"] for _, score in found if "class_accuracy" in score["metrics"]]
        hours = [score["device_hours"] for _, score in found]
        lines.append(
            [
                name,
                f"{epochs:g}",
                "" if number is None else shown,
                f"{spread(ours)} ({len(ours)})",
                "" if number is None else f"{statistics.mean(ours) - number:+.2f}",
                verdict(number, ours),
                spread(classes),
                f"{statistics.mean(h['training'] for h in hours):.3g}",
                f"{statistics.mean(h['training'] + h['stage 1'] for h in hours):.3g}",
                f"{statistics.mean(record['images_per_second'] for record, _ in found):.3g}",
                f"{statistics.mean(score['flops'] for _, score in found) / 1e15:.3g}",
            ]
        )
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
            reached = [epochs for epochs, values in points.items() if statistics.mean(values) <= target]
            lines.append([row.split("/", 1)[1], f"{reached[0]:g}" if reached else f"not by {max(points):g}"])
        blocks.append(f"[{key}]\n{aligned(lines)}")
    return "\n\n".join(blocks)


def figure_points(
    rows: Sequence[Row], records: Sequence[dict[str, Any]], scale: str
) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Protocol key -> row -> epochs -> values over seeds: what a figure draws."""
    shown = _of(rows, records, scale)
    scored = {key: {row.name: by_epochs(shown, row.name, key) for row in rows} for key in columns(shown)}
    return {
        key: {
            row: {epochs: [quality(score) for _, score in found] for epochs, found in at.items()}
            for row, at in of.items()
            if at
        }
        for key, of in scored.items()
    }
