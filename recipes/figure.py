"""Figures 4 and 8 of the paper, drawn from records."""

from __future__ import annotations

import statistics
from pathlib import Path

from recipes import record, rows, table
from runtime import files
from runtime.errors import require

TITLES = {"figure4": "FID of 10,000 samples along training", "figure8": "with and without an early stop"}
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1)), "v"))
"""Line and marker of each curve: legible without colour."""


def draw(name: str, scale: str, results: Path) -> list[Path]:
    """Draw `figure4` or `figure8`, one picture for each protocol, as PNG and SVG; returns the files.

    Raises:
        UserError: no such figure, or no record of its rows at this scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = rows.of_table(name)
    require(name in TITLES, f"{name} is a table: python -m recipes table {name.removeprefix('table')}")
    by_protocol = table.figure_points(chosen, record.load(results), scale)
    require(bool(by_protocol), f"no row of {name} has a record at scale {scale}: python -m recipes run {chosen[0].name} --scale {scale}")
    written = []
    for key, curves in by_protocol.items():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for (row, points), (line, marker) in zip(curves.items(), STYLES * len(curves)):
            epochs = sorted(points)
            means = [statistics.mean(points[epoch]) for epoch in epochs]
            spread = [statistics.stdev(points[epoch]) if len(points[epoch]) > 1 else 0.0 for epoch in epochs]
            axes.errorbar(epochs, means, spread, linestyle=line, marker=marker, capsize=3, label=row.split("/")[-1])
        axes.set(xlabel="epochs", ylabel="Fréchet distance", title=f"{TITLES[name]} ({scale}, protocol {key})")
        axes.grid(alpha=0.3)
        axes.legend()
        for kind in ("png", "svg"):
            path = results / "figures" / f"{name}-{scale}-{key}.{kind}"
            with files.replacing(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=150)
            written.append(path)
    return written
