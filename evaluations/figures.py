"""Figures of what networks learn, as PNG and SVG that are legible in black and white.

    python -m evaluations.figures pca --ckpt exps/plain@100000 exps/stage2@100000 --data-dir data/imagenet256   Figs. 1, 9, 10
    python -m evaluations.figures tsne --ckpt exps/stage1 --data-dir data/imagenet256 --classes 207 88 974      Fig. 2
    python -m evaluations.figures steps --runs plain=exps/plain guided=exps/stage2                             Figs. 4, 8
    python -m evaluations.figures seeds --ckpt exps/plain@5000 exps/plain@9000 exps/stage2@5000 exps/stage2@9000 Fig. 5
    python -m evaluations.figures time --runs plain=exps/plain guided=exps/stage2                              section 4.5

pca: a row of pictures for each checkpoint, time, block and feature, the first three principal components of its tokens as red,
green and blue. One basis a row, fitted to the tokens of all its images: colours can be compared along a row, not between rows.
steps: scores from the logs of runs, or from files (--scores NAME=metrics.json); runs of one NAME are seeds. A vertical line
stands where an alignment ended. seeds: runs down, steps across, the same noise everywhere. Figs. 6 and 7 are
`generate.py --classes`; Figs. 4 and 8 from records are `python -m recipes figure`. See each kind's --help.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import interpolant
from evaluations import drawing, histories, representation
from evaluations.taps import Items, Probed, chunks
from runtime import errors, files, progress
from runtime.errors import UserError, nearest, require
from runtime.options import group, option, read
from sampling.classes import labels_of, names_of
from sampling.config import SamplingConfig, SourceOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GLYPHS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""Of classes in t-SNE: told apart without colour."""


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """What pca and tsne look at."""

    ckpt: tuple[str, ...] = option(
        help="checkpoints: folders, runs (their latest), RUN@STEP", heading="what to look at"
    )
    data_dir: str = option(help="latent set with the images")
    weights: str = option("ema", help="weights: ema, raw or ema-DECAY")
    blocks: tuple[int, ...] | None = option(None, help="blocks, from 1 (default: all)")
    t: tuple[float, ...] = option((0.5,), help="times, 1 is noise")
    features: tuple[str, ...] = option(("c", "g"), help="which features: u, c, g")
    omega: tuple[float, ...] = option((30.0,), help="guidance scales of f_g")
    classes: tuple[str, ...] = option((), help="images of these classes only, by name or number")
    seed: int = option(0, help="of the images drawn and their noise")
    batch_size: int = option(64, help="images per pass through the network")

    def __post_init__(self) -> None:
        require(all(0 <= t <= 1 for t in self.t), f"--t {' '.join(map(str, self.t))} must lie between 0 and 1")
        wrong = sorted(set(self.features) - {"u", "c", "g"})
        require(not wrong, f"--features has no {wrong[0] if wrong else ''}; there are u, c and g")
        require(
            all(omega >= 0 for omega in self.omega), f"--omega {' '.join(map(str, self.omega))} must not be negative"
        )
        require(self.batch_size > 0, "--batch-size must be positive")


def _require_items(count: int, most: int) -> None:
    require(0 < count <= most, f"--items {count} must be positive and at most {most:,}: a figure shows no more")


def _require_stem(out: str) -> None:
    require(Path(out).name not in ("", ".."), f"--out {out} is a folder: name the files, without .png and .svg")


@dataclass(frozen=True, kw_only=True)
class PcaOptions:
    """Options of `pca`."""

    look: LookOptions = group(LookOptions)
    items: int = option(8, help="images, the columns")
    out: str = option("pca", help="the files' name, without .png and .svg", heading="output")

    def __post_init__(self) -> None:
        _require_items(self.items, 100)
        _require_stem(self.out)


@dataclass(frozen=True, kw_only=True)
class TsneOptions:
    """Options of `tsne`."""

    look: LookOptions = group(LookOptions)
    items: int = option(500, help="images, one point each")
    out: str = option("tsne", help="the files' name, without .png and .svg", heading="output")

    def __post_init__(self) -> None:
        _require_items(self.items, 50_000)
        _require_stem(self.out)


@dataclass(frozen=True, kw_only=True)
class StepsOptions:
    """Options of `steps`."""

    runs: tuple[str, ...] = option(
        (), help="runs with scores in their logs, NAME=RUN; several of one NAME are seeds", heading="curves"
    )
    scores: tuple[str, ...] = option((), help="or score files, NAME=metrics.json; all of one NAME are one curve")
    metric: str | None = option(
        None, help="what to show, such as fid@5000 (default: the first FID or Frechet distance)"
    )
    out: str = option("steps", help="the files' name, without .png and .svg", heading="output")

    def __post_init__(self) -> None:
        require(bool(self.runs) != bool(self.scores), "give --runs or --scores, one of them")
        _require_stem(self.out)


@dataclass(frozen=True, kw_only=True)
class SeedsOptions:
    """Options of `seeds`."""

    ckpt: tuple[str, ...] = option(help="checkpoints RUN@STEP: a row a run, a column a step", heading="what to draw")
    classes: tuple[str, ...] = option(("0",), help="classes by name or number, each with rows of its own")
    sampling: SamplingConfig = group(SamplingConfig, without=("labels",))
    out: str = option("seeds", help="the files' name, without .png and .svg", heading="output")

    def __post_init__(self) -> None:
        _require_stem(self.out)


@dataclass(frozen=True, kw_only=True)
class TimeOptions:
    """Options of `time`."""

    runs: tuple[str, ...] = option(help="runs, NAME=RUN or NAME=RUN@STEP", heading="table")
    out: str | None = option(None, help="write it as JSON too")


def views(look: LookOptions, items: Items, pooled: bool = False) -> Iterator[tuple[str, str, Tensor]]:
    """Each checkpoint, time, block and feature: where it is from, what it is called, and its tokens (N, T, D), or (N, D) `pooled`."""
    asked = [(kind, omega) for kind in look.features for omega in (look.omega if kind == "g" else (None,))]
    both = any(kind != "c" for kind, _ in asked)
    for name in progress.bar(look.ckpt, desc="reading features", unit="checkpoint"):
        probed = Probed.open(name, items, look.weights, look.blocks)
        if both:
            probed.require_null()
        for t in look.t:
            found: dict[int, list[tuple[Tensor, ...]]] = {block: [] for block in probed.blocks}
            for chunk in chunks(np.arange(len(items)), look.batch_size):
                for block, pair in probed.pairs(items, chunk, t, both).items():
                    found[block].append(tuple((one.mean(1) if pooled else one).cpu() for one in pair))
            for block, pairs in found.items():
                u, c = (torch.cat(parts) for parts in zip(*pairs))
                for kind, omega in asked:
                    feature = {"u": u, "c": c}[kind] if omega is None else interpolant.guide(u, c, omega)
                    yield (
                        f"{probed.name}, t {t:g}, block {block}",
                        f"f_{kind}" + ("" if omega is None else f" {omega:g}"),
                        feature,
                    )


def chosen_items(look: LookOptions, count: int) -> tuple[Items, list[str]]:
    """The images to look at, and the names of all classes of the set."""
    from models.checkpoint import Checkpoint

    names = names_of(Checkpoint.open(look.ckpt[0]))
    items = Items(look.data_dir, count, look.seed, classes=labels_of(look.classes, names))
    require(len(items) > 0, "there is no image of --classes in the data set")
    return items, names


def colours(tokens: Tensor) -> np.ndarray:
    """(N, side, side, 3) in [0, 1] of tokens (N, T, D): their principal components, each stretched between its 1st and 99th percentile."""
    parts = representation.principal(tokens.flatten(0, 1))
    low, high = torch.quantile(parts, torch.tensor([0.01, 0.99], dtype=parts.dtype), dim=0)
    side, spread = round(tokens.shape[1] ** 0.5), high - low
    stretched = (parts - low) / spread.clamp(
        min=1e-6 * spread.max().item() + 1e-300
    )  # what is nothing but rounding stays dark
    return stretched.clamp(0, 1).reshape(len(tokens), side, side, 3).numpy()


def pca(options: PcaOptions) -> Figure:
    """PCA maps: rows of (checkpoint, t, block, feature), columns of images, above them the images where the set holds them."""
    items, names = chosen_items(options.look, options.items)
    rows: list[Sequence[np.ndarray]] = [items.data.images(items.index)] if items.data.has_images else []
    said = ["images"] if rows else []
    for where, what, tokens in views(options.look, items):
        rows.append(colours(tokens))
        said.append(f"{where}, {what}")
    return drawing.tiles(rows, said, [names[label] for label in items.labels])


def tsne(options: TsneOptions) -> Figure:
    """t-SNE of mean-pooled, standardised tokens: a panel a feature, a glyph a class."""
    from sklearn.manifold import TSNE

    items, names = chosen_items(options.look, options.items)
    present = sorted(set(items.labels.tolist()))
    require(
        len(present) <= len(GLYPHS),
        f"{len(present)} classes are too many to tell apart: choose up to {len(GLYPHS)} with --classes",
    )
    require(len(items) >= 5, f"--items: {len(items)} images are too few for t-SNE: use at least 5")
    panels = [(f"{where}\n{what}", x) for where, what, x in views(options.look, items, pooled=True)]
    columns = min(len(panels), 4)
    figure = drawing.canvas(3.2 * columns, 3.4 * -(-len(panels) // columns) + 0.4)
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
    for axes in grid:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, (title, x) in zip(grid, progress.bar(panels, desc="t-SNE", unit="panel")):
        points = TSNE(
            perplexity=min(30.0, (len(x) - 1) / 3), init="pca", random_state=options.look.seed % 2**32
        ).fit_transform(representation.standardise(x, x).numpy())
        for number, label in enumerate(present):
            mine = points[items.labels.numpy() == label]
            axes.scatter(
                *mine.T,
                marker=f"${GLYPHS[number]}$",
                s=22,
                linewidths=0.3,
                color=drawing.style(number)["color"],
                label=names[label],
            )
        axes.set_title(title, fontsize=8)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=10, fontsize=7)
    return figure


def steps(options: StepsOptions) -> Figure:
    """Scores against steps, with a vertical line where an alignment ended."""
    points, metric = (
        histories.from_logs(options.runs, options.metric)
        if options.runs
        else histories.from_scores(options.scores, options.metric)
    )
    figure = drawing.canvas(6.4, 4.2)
    axes = figure.subplots()
    drawing.curves(axes, points)
    ended = histories.stops(options.runs)
    for number, name in enumerate(points):
        if name in ended:
            axes.axvline(ended[name], linewidth=1, **{**drawing.style(number), "marker": None})
    axes.set(xlabel="steps", ylabel=metric)
    return figure


def seeds(options: SeedsOptions) -> Figure:
    """One noise across checkpoints: a row a run (and class), a column a step."""
    from sampling.source import Source

    table: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for name in progress.bar(options.ckpt, desc="sampling", unit="checkpoint"):
        source = Source.open(SourceOptions(ckpt=name), options.sampling)
        labels = np.array(labels_of(options.classes, names_of(source.checkpoint)))
        images = source.sampler(options.sampling, len(labels), labels).images(range(len(labels)))
        for label, image in zip(options.classes, images, strict=True):
            row = table.setdefault((label, source.name.split("@")[0]), {})
            require(
                source.checkpoint.step not in row, f"two checkpoints are called {source.name}: rename one of the runs"
            )
            row[source.checkpoint.step] = image
    across = sorted({step for row in table.values() for step in row})
    order = sorted(table, key=lambda key: options.classes.index(key[0]))
    names = [run if len(options.classes) == 1 else f"{run}, {label}" for label, run in order]
    return drawing.tiles(
        [[table[key].get(step) for step in across] for key in order], names, [str(step) for step in across]
    )


def time(options: TimeOptions) -> None:
    """Print the time table of runs: hours of their steps, and those of stage 1 that stage 2 needed."""
    times = [histories.time_of(word) for word in options.runs]
    print(histories.time_table(times))
    if options.out is not None:
        files.write_json(options.out, [dataclasses.asdict(one) | {"total": one.total} for one in times])


KINDS: dict[str, tuple[type, Callable[[Any], Figure | None]]] = {
    "pca": (PcaOptions, pca),
    "tsne": (TsneOptions, tsne),
    "steps": (StepsOptions, steps),
    "seeds": (SeedsOptions, seeds),
    "time": (TimeOptions, time),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    if words[0] not in KINDS:
        raise UserError(f"there is no figure {words[0]}{nearest(words[0], KINDS)}; there are {', '.join(KINDS)}")
    schema, draw = KINDS[words[0]]
    options = read(schema, words[1:], prog=f"python -m evaluations.figures {words[0]}", description=draw.__doc__)
    figure = draw(options)
    if figure is not None:
        print("wrote", *drawing.save(figure, Path(options.out)), flush=True)


if __name__ == "__main__":
    errors.run(main)
