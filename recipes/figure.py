"""Figures 4 and 8 of the paper, drawn from records."""

from __future__ import annotations

from pathlib import Path

from evaluations import drawing
from recipes import record, rows, table
from runtime.errors import require

TITLES = {"figure4": "FID of 10,000 samples along training", "figure8": "with and without an early stop"}


def draw(name: str, scale: str, results: Path) -> list[Path]:
    """Draw `figure4` or `figure8`, one picture for each protocol, as PNG and SVG; returns the files.

    Raises:
        UserError: no such figure, or no record of its rows at this scale.
    """
    chosen = rows.of_table(name)
    require(name in TITLES, f"{name} is a table: use python -m recipes table {name.removeprefix('table')}")
    by_protocol = table.figure_points(chosen, record.load(results), scale)
    require(
        bool(by_protocol),
        f"no row of {name} has a record at scale {scale}: python -m recipes run {chosen[0].name} --scale {scale}",
    )
    written = []
    for key, curves in by_protocol.items():
        figure = drawing.canvas(6.4, 4.2)
        axes = figure.subplots()
        drawing.curves(axes, {row.split("/")[-1]: points for row, points in curves.items()})
        axes.set(xlabel="epochs", ylabel="Fréchet distance", title=f"{TITLES[name]} ({scale}, protocol {key})")
        written += drawing.save(figure, results / "figures" / f"{name}-{scale}-{key}")
    return written
