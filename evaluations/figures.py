"""Figures of what networks learn, as PNG and SVG that are legible in black and white.

    python -m evaluations.figures pca --ckpt exps/plain@100000 exps/stage2@100000 --data-dir data/imagenet256
    python -m evaluations.figures tsne --ckpt exps/stage1 --data-dir data/imagenet256 --classes 207 88 974 \\
        --features g latents --encoder dinov2-vit-b
    python -m evaluations.figures steps --runs plain=exps/plain guided=exps/stage2
    python -m evaluations.figures seeds --ckpt exps/plain@5000 exps/plain@9000 exps/stage2@5000 exps/stage2@9000
    python -m evaluations.figures time --runs plain=exps/plain guided=exps/stage2

pca (Figs. 1, 9, 10): a row of pictures for each checkpoint, time, block and feature; red, green and blue are the first
three principal components of the tokens. Each row has one basis, fitted to the tokens of all its images, so colours can
be compared along a row but not between rows. tsne (Fig. 2): a panel for each feature. Both show clean VAE latents
(--features latents) and an external encoder (--encoder) too. steps (Figs. 4, 8): scores from the logs of runs, or from
files (--scores NAME=metrics.json); runs with the same NAME are seeds. A vertical line marks the end of an alignment.
seeds (Fig. 5): a row for each run, a column for each step, the same noise everywhere. time: the table of section 4.5.
Figs. 6 and 7 are `generate.py --classes`; Figs. 4 and 8 from records are `python -m recipes figure`. See each kind's
--help.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluations import drawing, histories
from evaluations.config import TapOptions
from runtime import errors, files, progress
from runtime.errors import UserError, nearest, require
from runtime.options import group, option, read
from runtime.slices import slices
from runtime.text import quoted
from sampling.classes import labels_of, names_of
from sampling.config import SamplingConfig, SourceOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from evaluations.taps import Items, Probed

# Markers of classes in t-SNE, which differ without colour.
GLYPHS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """The option that all pictures share."""

    out: str | None = option(
        None, help="the files' name, without .png and .svg (default: the kind of figure)", heading="output"
    )

    def __post_init__(self) -> None:
        require(
            self.out is None or Path(self.out).name not in ("", ".."),
            f"--out {self.out} is a folder: name the files, without .png and .svg",
        )


@dataclass(frozen=True, kw_only=True)
class LookOptions(TapOptions, FigureOptions):
    """The features that pca and tsne show."""

    classes: tuple[str, ...] = option((), help="images of these classes only, by name or number")

    def __post_init__(self) -> None:
        TapOptions.__post_init__(self)
        FigureOptions.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class PcaOptions(LookOptions):
    """Options of `pca`."""

    items: int = option(8, within="[1, 100]", help="images, the columns")


@dataclass(frozen=True, kw_only=True)
class TsneOptions(LookOptions):
    """Options of `tsne`."""

    items: int = option(500, within="[1, 50000]", help="images, one point each")


@dataclass(frozen=True, kw_only=True)
class StepsOptions(FigureOptions):
    """Options of `steps`."""

    runs: tuple[str, ...] = option(
        (), help="runs with scores in their logs, NAME=RUN; runs with the same NAME are seeds", heading="curves"
    )
    scores: tuple[str, ...] = option(
        (), help="or score files, NAME=metrics.json; files with the same NAME are one curve"
    )
    metric: str | None = option(
        None, help="metric to show, such as fid@5000 (default: the first FID or Frechet distance)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.runs) != bool(self.scores), "give --runs or --scores, one of them")


@dataclass(frozen=True, kw_only=True)
class SeedsOptions(FigureOptions):
    """Options of `seeds`."""

    ckpt: tuple[str, ...] = option(
        help="checkpoints RUN@STEP: a row for each run, a column for each step", heading="what to draw"
    )
    classes: tuple[str, ...] = option(("0",), help="classes by name or number; each has its own rows")
    sampling: SamplingConfig = group(SamplingConfig, without=("labels",))


@dataclass(frozen=True, kw_only=True)
class TimeOptions:
    """Options of `time`."""

    runs: tuple[str, ...] = option(help="runs, NAME=RUN or NAME=RUN@STEP", heading="table")
    out: str | None = option(None, help="also write the table to this JSON file")


def views(look: LookOptions, items: Items, pooled: bool = False) -> Iterator[tuple[str, str, Tensor]]:
    """Source, name and tokens (N, T, D), or (N, D) `pooled`, of each checkpoint, time, block and feature.

    Latents and an encoder's features come first, on the token grid of the first checkpoint.
    """
    import torch

    import interpolant
    from evaluations.taps import Probed, open_external, unblocked
    from models.checkpoint import Checkpoint

    kinds = look.kinds()
    side = Checkpoint.open(look.ckpt[0]).spec.side
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, read_at in unblocked(look, items, side, open_external(look, side, device), device):
        parts = [read_at(chunk) for chunk in slices(np.arange(len(items)), look.batch_size)]
        yield "clean images", name, torch.cat([part.mean(1) for part in parts] if pooled else parts)
    # f_c alone needs no pass with the null label
    both = any(kind != "c" for kind, _ in kinds)
    for name in progress.bar(look.ckpt if kinds else (), desc="reading features", unit="checkpoint"):
        probed = Probed.open(name, items, look.weights, look.blocks)
        if both:
            probed.require_null()
        for t in look.t:
            for block, (u, c) in _pairs(probed, items, t, both, look.batch_size, pooled).items():
                for kind, omega in kinds:
                    feature = {"u": u, "c": c}[kind] if omega is None else interpolant.guide(u, c, omega)
                    title = f"f_{kind}" if omega is None else f"f_{kind} {omega:g}"
                    yield f"{probed.name}, t {t:g}, block {block}", title, feature


def _pairs(
    probed: Probed, items: Items, t: float, both: bool, batch: int, pooled: bool
) -> dict[int, tuple[Tensor, Tensor]]:
    """Block -> f_u and f_c of all items, both (N, T, D), or (N, D) `pooled`."""
    import torch

    parts: list[dict[int, tuple[Tensor, Tensor]]] = []
    for chunk in slices(np.arange(len(items)), batch):
        pairs = probed.pairs(items, chunk, t, both)
        # Pool every batch at once, so that the tokens of all images need not fit into memory.
        parts.append(
            {
                block: ((u.mean(1).cpu(), c.mean(1).cpu()) if pooled else (u.cpu(), c.cpu()))
                for block, (u, c) in pairs.items()
            }
        )
    return {
        block: (torch.cat([part[block][0] for part in parts]), torch.cat([part[block][1] for part in parts]))
        for block in probed.blocks
    }


def chosen_items(look: LookOptions, count: int) -> tuple[Items, list[str]]:
    """The images to show, and the names of all classes of the set."""
    from evaluations.taps import Items
    from models.checkpoint import Checkpoint

    names = names_of(Checkpoint.open(look.ckpt[0]))
    items = Items(look.data_dir, count, look.seed, classes=labels_of(look.classes, names))
    require(len(items) > 0, "--classes: the data set has no such images; name classes that it holds")
    return items, names


def colours(tokens: Tensor) -> np.ndarray:
    """(N, side, side, 3) in [0, 1]: the principal components of tokens (N, T, D).

    Each component is stretched between its 1st and 99th percentile.
    """
    import torch

    from evaluations import representation

    parts = representation.principal(tokens.flatten(0, 1))
    low, high = torch.quantile(parts, torch.tensor([0.01, 0.99], dtype=parts.dtype), dim=0)
    side, spread = round(tokens.shape[1] ** 0.5), high - low
    # A component that is only rounding error stays dark.
    stretched = (parts - low) / spread.clamp(min=1e-6 * spread.max().item() + 1e-300)
    return stretched.clamp(0, 1).reshape(len(tokens), side, side, 3).numpy()


def pca(options: PcaOptions) -> Figure:
    """PCA maps: rows of (checkpoint, t, block, feature), columns of images; the images on top if the set holds them."""
    items, names = chosen_items(options, options.items)
    rows: list[Sequence[np.ndarray]] = [list(items.data.images(items.index))] if items.data.has_images else []
    titles = ["images"] if rows else []
    for source, feature, tokens in views(options, items):
        rows.append(list(colours(tokens)))
        titles.append(f"{source}, {feature}")
    return drawing.tiles(rows, titles, [names[label] for label in items.labels])


def tsne(options: TsneOptions) -> Figure:
    """t-SNE of mean-pooled, standardised tokens: a panel for each feature, a glyph for each class."""
    from sklearn.manifold import TSNE

    from evaluations import representation

    items, names = chosen_items(options, options.items)
    present = sorted(set(items.labels.tolist()))
    require(
        len(present) <= len(GLYPHS),
        f"{len(present)} classes are too many to tell apart: choose up to {len(GLYPHS)} with --classes",
    )
    require(len(items) >= 5, f"--items: {len(items)} images are too few for t-SNE: use at least 5")
    panels = [(f"{source}\n{feature}", x) for source, feature, x in views(options, items, pooled=True)]
    columns = min(len(panels), 4)
    figure = drawing.canvas(3.2 * columns, 3.4 * -(-len(panels) // columns) + 0.4)
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
    for axes in grid:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, (title, x) in zip(grid, progress.bar(panels, desc="t-SNE", unit="panel")):
        # a perplexity of 30 needs three times as many points; sklearn's seed has 32 bits
        points = TSNE(
            perplexity=min(30.0, (len(x) - 1) / 3), init="pca", random_state=options.seed % 2**32
        ).fit_transform(representation.standardise(x, x).numpy())
        for number, label in enumerate(present):
            axes.scatter(
                *points[items.labels.numpy() == label].T,
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
    # empty with --scores: score files do not say when an alignment ended
    ended = histories.stops(options.runs)
    for number, name in enumerate(points):
        if name in ended:
            axes.axvline(ended[name], linewidth=1, **{**drawing.style(number), "marker": None})
    axes.set(xlabel="steps", ylabel=metric)
    return figure


def seeds(options: SeedsOptions) -> Figure:
    """The same noise across checkpoints: a row for each run (and class), a column for each step."""
    from sampling.source import Source

    table: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for name in progress.bar(options.ckpt, desc="sampling", unit="checkpoint"):
        source = Source.open(SourceOptions(ckpt=name), options.sampling)
        labels = np.array(labels_of(options.classes, names_of(source.checkpoint)))
        images = source.sampler(options.sampling, len(labels), labels).images(range(len(labels)))
        for label, image in zip(options.classes, images, strict=True):
            # a checkpoint of a run is called RUN@STEP: the run chooses the row, the step the column
            row = table.setdefault((label, source.checkpoint.name.split("@")[0]), {})
            require(
                source.checkpoint.step not in row,
                f"two checkpoints are called {source.checkpoint.name}: rename one of the runs",
            )
            row[source.checkpoint.step] = image
    across = sorted({step for row in table.values() for step in row})
    # classes in the order given, and the runs of each in theirs, because `sorted` is stable
    order = sorted(table, key=lambda key: options.classes.index(key[0]))
    names = [run if len(options.classes) == 1 else f"{run}, {label}" for label, run in order]
    # None, a gap, where a run has no checkpoint of that step
    rows = [[table[key].get(step) for step in across] for key in order]
    return drawing.tiles(rows, names, [str(step) for step in across])


def times(options: TimeOptions) -> None:
    """Print the time table of runs: hours of their steps, and of the stage 1 that they build on."""
    rows = [histories.time_of(word) for word in options.runs]
    print(histories.time_table(rows))
    if options.out is not None:
        files.write_json(options.out, [dataclasses.asdict(time) | {"total": time.total} for time in rows])


KINDS: dict[str, tuple[type, Callable[[Any], Figure | None]]] = {
    "pca": (PcaOptions, pca),
    "tsne": (TsneOptions, tsne),
    "steps": (StepsOptions, steps),
    "seeds": (SeedsOptions, seeds),
    "time": (TimeOptions, times),
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
    options: Any = read(schema, words[1:], prog=f"python -m evaluations.figures {words[0]}", description=draw.__doc__)
    figure = draw(options)
    # `time` draws no figure: it prints its table and writes --out itself
    if figure is not None:
        print("wrote", *map(quoted, drawing.save(figure, Path(options.out or words[0]))), flush=True)


if __name__ == "__main__":
    errors.run(main)
