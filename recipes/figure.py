"""Figures from records: the paper's Figures 4 and 8 as curves; for every other table, distance against cost."""

from __future__ import annotations

from pathlib import Path

from evaluations import drawing
from recipes import costs, record, rows, scale, table
from recipes.photographs import SETTINGS
from runtime.errors import require

CURVES = {"figure4": "FID of 10,000 samples along training", "figure8": "with and without an early stop"}
DISTANCE = "Fréchet distance"


def draw(name: str, size: str, results: Path) -> list[Path]:
    """Draw the rows of a table at a scale, one picture for each protocol, as PNG and SVG; returns the files.

    `figure4` and `figure8` are curves over epochs. For another table a point is a row after some epochs: its distance
    against the FLOPs of its training, teacher and encoder included. Trials are left out.

    Raises:
        UserError: no such table, or no record of its rows at this scale.
    """
    chosen = {row.name: row for row in rows.of_table(name) if not row.tunes}
    by_protocol = table.figure_points([*chosen.values()], record.load(results), size)
    require(
        bool(by_protocol),
        f"no row of {name} has a record at scale {size}: python -m recipes run {next(iter(chosen))} --scale {size}",
    )
    titles = {key: setting.title for key, setting in SETTINGS.items()}
    written = []
    for protocol, of_rows in by_protocol.items():
        if name in CURVES:
            figure = drawing.canvas(6.4, 4.2)
            axes = figure.subplots()
            drawing.curves(axes, {chosen[row].key: at for row, at in of_rows.items()})
            axes.set(xlabel="epochs", ylabel=DISTANCE, title=f"{CURVES[name]} ({size}, protocol {protocol})")
        else:
            points = {
                f"{titles.get(chosen[row].key, chosen[row].key)}, {epochs:g} epochs": (
                    costs.whole(chosen[row], scale.find(size), epochs) / 1e12,
                    values,
                )
                for row, at in of_rows.items()
                for epochs, values in at.items()
            }
            figure = drawing.canvas(8.0, max(4.2, 0.22 * len(points)))
            axes = figure.subplots()
            drawing.frontier(axes, points)
            axes.set(xlabel="TFLOP of training, teacher and encoder included", ylabel=DISTANCE)
        written += drawing.save(figure, results / "figures" / f"{name}-{size}-{protocol}")
    return written
