"""Figures as PNG and SVG, legible in black and white: lines differ by dashes and markers, not by colour alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import files

# imported where a figure is drawn: matplotlib would slow the start of every command that may draw one
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Line, marker and colour (Okabe and Ito's) of each curve, in order.
STYLES: tuple[dict[str, Any], ...] = tuple(
    {"linestyle": line, "marker": marker, "color": colour}
    for line, marker, colour in (
        ("-", "o", "#000000"),
        ("--", "s", "#0072b2"),
        (":", "^", "#d55e00"),
        ("-.", "D", "#009e73"),
        ((0, (5, 1)), "v", "#cc79a7"),
        ((0, (1, 1)), "x", "#56b4e9"),
        ((0, (3, 1, 1, 1)), "+", "#e69f00"),
        ((0, (8, 3)), "*", "#666666"),
    )
)


def style(number: int) -> dict[str, Any]:
    """The style of curve `number`, from 0; styles repeat after the last."""
    return STYLES[number % len(STYLES)]


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `figure` as stem.png and stem.svg, atomically; returns both. The same figure gives the same bytes."""
    import matplotlib

    written = []
    with matplotlib.rc_context({"svg.hashsalt": stem.name}):
        for kind, about in (("png", {}), ("svg", {"Date": None})):  # without the date, which would change the bytes
            path = stem.with_name(f"{stem.name}.{kind}")
            with files.replacing(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata=about)
            written.append(path)
    return written


def _bar(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; 0 for one seed."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def curves(axes: Axes, points: Mapping[str, Mapping[float, Sequence[float]]]) -> None:
    """Draw curve name -> x -> values over seeds: the mean, and of several the standard deviation as a bar."""
    for number, (name, values) in enumerate(points.items()):
        at = sorted(values)
        means, bars = zip(*(_bar(values[x]) for x in at), strict=True)
        axes.errorbar(at, means, bars, capsize=3, label=name, **style(number))
    axes.grid(alpha=0.3)
    axes.legend()


def frontier(axes: Axes, points: Mapping[str, tuple[float, Sequence[float]]]) -> None:
    """Draw points name -> (cost, values over seeds), lower is better in both: means with standard deviations.

    Steps join the points that no other beats in both. The names stand right of the axes in the order of the means.
    """
    bars = {name: _bar(values) for name, (_, values) in points.items()}
    means = {name: (cost, bars[name][0]) for name, (cost, _) in points.items()}
    best = [
        (cost, mean)
        for cost, mean in means.values()
        if not any(x <= cost and y <= mean and (x, y) != (cost, mean) for x, y in means.values())
    ]
    axes.step(*zip(*sorted(best), strict=True), where="post", color="#999999", linestyle="--", zorder=0)
    names = sorted(means, key=lambda name: means[name][1])
    for name in names:
        filled = "black" if means[name] in best else "white"
        axes.errorbar(*means[name], bars[name][1], capsize=2, color="black", marker="o", markerfacecolor=filled)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    # each name at the height of its point, moved up, then down, until all stand apart
    apart = np.arange(len(names)) * min(0.05, 1 / len(names))
    heights = np.maximum.accumulate([(means[name][1] - low) / (high - low) for name in names] - apart)
    heights = np.minimum(heights, 1 - apart[-1]) + apart
    for name, height in zip(names, heights, strict=True):
        axes.annotate(
            f"{name}: {means[name][1]:.1f}",
            means[name],
            (1.04, height),
            textcoords=axes.transAxes,
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5, "relpos": (0, 0.5)},
        )
    axes.grid(alpha=0.3)


def tiles(
    rows: Sequence[Sequence[np.ndarray | None]], names: Sequence[str], titles: Sequence[str] = (), size: float = 1.0
) -> Figure:
    """Rows of images (H, W), (H, W, 1) or (H, W, 3), uint8 or in [0, 1], in squares of `size` inches; None: a gap.

    `names` stand left of the rows, `titles` above the columns.
    """
    columns = max(map(len, rows))
    # beside the squares, 0.09 inches for each character of the longest name, and a line for the titles
    figure = canvas(
        size * columns + 0.09 * max(map(len, names), default=0), size * len(rows) + (0.3 if titles else 0.1)
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        for column, axes in enumerate(grid[number]):
            axes.set(xticks=[], yticks=[], frame_on=False)
            image = row[column] if column < len(row) else None
            if image is not None:
                image = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
                # fixed limits: matplotlib would stretch each grey image to its own range
                axes.imshow(
                    image, cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1, interpolation="nearest"
                )
        grid[number, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for axes, title in zip(grid[0], titles):
        axes.set_title(title, fontsize=8)
    return figure
