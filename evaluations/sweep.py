"""Which guidance suits a checkpoint: score a grid of scales and upper ends of the guidance interval.

    python -m evaluations.sweep --ckpt exps/stage2 --reference imagenet256.npz \\
        --cfg-scale 1.0:2.5:0.1 --guidance-high 0.6:1.0:0.05 --num-fid-samples 5000

Prints the cost, then samples and scores point by point. A killed sweep continues; a wider range adds points.
Writes `sweep.json` after every point, and a heat map, `sweep.png` and `sweep.svg`, at the end. Every point draws the
same noise and labels, so points differ by guidance alone. Use small-sample distances to compare points only.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import TypedDict

from config import FeatureOptions, require_samples
from evaluations import drawing
from models.peers import SAMPLING
from runtime import errors, files, schema
from runtime.errors import UserError, require
from runtime.locks import locked
from runtime.options import group, option, read
from runtime.text import aligned
from sampling.config import SamplingConfig, SourceOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sampling.source import Source

Point = tuple[float, float]  # guidance scale, upper end of the interval


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Options of `generate.py`, but the scale and the upper end of the interval are ranges."""

    source: SourceOptions = group(SourceOptions)
    cfg_scale: str = option("1.0:2.5:0.1", help="guidance scales, FIRST:LAST:STEP or a single number", heading="sweep")
    guidance_high: str = option("1.0", help="upper ends of the interval, FIRST:LAST:STEP or a single number")
    num_fid_samples: int = option(5000, help="samples per point")
    out: str | None = option(None, help="folder of the result (default: sweep/ beside the checkpoint)")
    sampling: SamplingConfig = group(SamplingConfig, without=("cfg_scale", "guidance_high"))
    reference: str = option(help="reference to score against, small or large", heading="scores")
    scores: FeatureOptions = group(FeatureOptions)

    def __post_init__(self) -> None:
        require_samples(self.num_fid_samples, 4)
        for point in self.points():
            self.at(point)  # each has SamplingConfig's own checks

    def points(self) -> list[Point]:
        """The grid. At scale 1 there is no guidance, so a single point represents all intervals."""
        highs = values("--guidance-high", self.guidance_high)
        return [
            (scale, high)
            for scale in values("--cfg-scale", self.cfg_scale)
            for high in (highs if scale != 1 else highs[-1:])
        ]

    def at(self, point: Point) -> SamplingConfig:
        """The settings of one point."""
        return dataclasses.replace(self.sampling, cfg_scale=point[0], guidance_high=point[1])


def values(flag: str, text: str) -> list[float]:
    """FIRST:LAST:STEP as numbers, LAST included where the steps meet it; or one number.

    Decimal arithmetic: 0.6:1.0:0.05 has nine values, the last of which is 1.0.
    """
    try:
        first, last, step = (Decimal(part) for part in (text.split(":") if ":" in text else (text, text, "1")))
    except (ValueError, InvalidOperation) as error:
        raise UserError(f"{flag} {text} is neither a number nor FIRST:LAST:STEP; give one of them") from error
    require(
        first.is_finite() and last.is_finite() and step.is_finite(),
        f"{flag} {text} holds a number that is not finite; give finite ones",
    )
    require(step > 0 and last >= first, f"{flag} {text}: STEP must be positive and LAST at least FIRST")
    return [float(first + step * index) for index in range(int((last - first) / step) + 1)]


class Scored(TypedDict):
    """One point of `sweep.json`."""

    cfg_scale: float
    guidance_high: float
    metrics: dict[str, float]


class Sweep(TypedDict):
    """`sweep.json`."""

    settings: dict[str, Any]
    points: list[Scored]


class Results:
    """The points that are done, in `sweep.json` with the settings that they depend on."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.points: dict[Point, dict[str, float]] = {}
        if path.is_file():
            earlier = schema.read(Sweep, path, "give another --out", sealed=True)
            for key, value in settings.items():
                if earlier["settings"].get(key) != value:
                    raise UserError(
                        f"{path} is a sweep with another {key} ({earlier['settings'].get(key)}, not "
                        f"{value}); give another --out"
                    )
            self.points = {
                (point["cfg_scale"], point["guidance_high"]): point["metrics"] for point in earlier["points"]
            }

    def write(self) -> None:
        """Write all points, atomically and sealed."""
        points = [
            {"cfg_scale": scale, "guidance_high": high, "metrics": metrics}
            for (scale, high), metrics in sorted(self.points.items())
        ]
        files.write_sealed(self.path, {"settings": self.settings, "points": points})


def rows(points: dict[Point, dict[str, float]], metric: str) -> tuple[list[float], list[float], np.ndarray]:
    """Scales, upper ends, and `metric` as a table [upper end][scale]."""
    scales, highs = sorted({scale for scale, _ in points}), sorted({high for _, high in points})
    # At scale 1 there is one point, with the last of the upper ends.
    grid = [[points[scale, high if scale != 1 else highs[-1]][metric] for scale in scales] for high in highs]
    return scales, highs, np.array(grid)


def table(points: dict[Point, dict[str, float]], metric: str) -> str:
    """The grid as aligned text: scales across, upper ends down."""
    scales, highs, grid = rows(points, metric)
    lines = [["high \\ scale", *(f"{scale:g}" for scale in scales)]]
    lines += [[f"{high:g}", *(f"{value:.3f}" for value in line)] for high, line in zip(highs, grid, strict=True)]
    return aligned(lines, left=(), rule=False)


def heat_map(points: dict[Point, dict[str, float]], metric: str, title: str) -> Figure:
    """The grid as a heat map with its numbers, rows in the table's order. Dark is good; a ring marks the best point."""
    scales, highs, image = rows(points, metric)
    figure = drawing.canvas(2.5 + 0.55 * len(scales), 1.8 + 0.45 * len(highs))
    axes = figure.subplots()
    picture = axes.imshow(image, origin="upper", aspect="auto", cmap="viridis")
    best = np.unravel_index(image.argmin(), image.shape)
    axes.plot(best[1], best[0], "o", markersize=14, markerfacecolor="none", markeredgecolor="white", markeredgewidth=2)
    # dark cells get white numbers
    middle = (image.min() + image.max()) / 2
    for (row, column), value in np.ndenumerate(image):
        axes.text(
            column,
            row,
            f"{value:.3g}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if value <= middle else "black",
        )
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axes.set_yticks(range(len(highs)), [f"{high:g}" for high in highs])
    axes.set(xlabel="guidance scale", ylabel="guide while t is at most", title=title)
    figure.colorbar(picture, label=metric)
    return figure


def command(config: SweepConfig, point: Point) -> str:
    """The command that draws the full set of samples at `point`."""
    words = ["python", "generate.py", "--ckpt", config.source.ckpt]
    for options in (config.source, config.at(point)):
        for field in dataclasses.fields(options):
            if field.name not in ("ckpt", "batch_size") and (value := getattr(options, field.name)) != field.default:
                words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def sweep(config: SweepConfig) -> Path:
    """Sample and score every point; returns the result's folder."""
    from evaluations.reference import open_pair
    from evaluations.score import Scorer, add_drawn
    from runtime.launch import on_main
    from sampling.source import Source

    points = config.points()
    source = Source.open(config.source, config.at(points[-1]))  # the last point has guidance, which asks for most
    accelerator, count = source.accelerator, config.num_fid_samples
    out = Path(config.out) if config.out else source.folder / "sweep" / source.checkpoint.path.name
    accelerator.project_configuration.set_directories(str(out))
    reference, extractor = open_pair(config.reference, config.scores, accelerator, config.source.batch_size)
    settings = source.settings(config.at(points[0]), count) | {
        "reference": reference.digest,
        "features": extractor.name,
        "features_weights": extractor.weights,
        **({"mind": True} if config.scores.mind else {}),
    }
    for swept in ("cfg_scale", "guidance_high", "evaluations"):
        del settings[swept]
    with ExitStack() as held:
        on_main(accelerator, lambda: held.enter_context(locked(out, "wait for it, or choose another --out")))
        results = Results(out / "sweep.json", settings)
        accelerator.wait_for_everyone()  # all have read before one writes
        todo = [point for point in points if point not in results.points]
        accelerator.print(cost(config, source, todo, len(points)), flush=True)
        for number, point in enumerate(todo, 1):
            scorer = Scorer(reference, extractor, accelerator=accelerator, mind=config.scores.mind)
            add_drawn(
                scorer,
                source.sampler(config.at(point), count),
                count,
                config.source.batch_size,
                f"{number}/{len(todo)}: scale {point[0]:g}, high {point[1]:g},",
            )
            results.points[point] = scorer.result()["metrics"]
            if accelerator.is_main_process:
                results.write()
        if accelerator.is_main_process:
            conclude(config, results, out)
        accelerator.wait_for_everyone()
    return out


def cost(config: SweepConfig, source: Source, todo: Sequence[Point], total: int) -> str:
    """The cost of the points to do, as a sentence."""
    each = [config.at(point).evaluations for point in todo]
    network = "an adaptive number of" if None in each else f"{sum(filter(None, each)) * config.num_fid_samples:,}"
    images = len(todo) * config.num_fid_samples
    return (
        f"{len(todo)} of {total} points to do, {config.num_fid_samples} samples each: {images:,} images, {network} "
        f"network evaluations, as many images as {images / 50_000:.2g} full samplings"
    )


def conclude(config: SweepConfig, results: Results, out: Path) -> None:
    """Print the table and the best point's command, and write the heat map."""
    points = {point: results.points[point] for point in config.points()}
    metric = next(iter(next(iter(points.values()))))
    title = f"{metric} of {config.num_fid_samples} samples"
    best = min(points, key=lambda point: points[point][metric])
    drawing.save(heat_map(points, metric, title), out / "sweep")
    print(
        f"{title} (not to be compared with other counts):\n{table(points, metric)}\n"
        f"written to {out}/sweep.json, sweep.png and sweep.svg"
    )
    print(
        f"best: {metric} {points[best][metric]:.3f} at scale {best[0]:g}, high {best[1]:g}. The full set of "
        f"samples:\n{command(config, best)}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; returns the result's folder."""
    return sweep(read(SweepConfig, argv, prog="python -m evaluations.sweep", description=__doc__, hints=SAMPLING))


if __name__ == "__main__":
    errors.run(main)
