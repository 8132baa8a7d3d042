"""Which guiding block, guided block and omega suit your data: what each block knows of the class and of the mask, as numbers.

    python -m evaluations.probe --ckpt exps/stage1 --data-dir data/photos --out probes/stage1
    python -m evaluations.probe --ckpt exps/plain@1000 exps/stage1@1000 --data-dir data/scenes --masks masks.npz \\
        --t 0.3 0.5 0.7 --omega 3 10 30 --out probes/both

For each checkpoint, block and time (1 is noise): f_u (null label), f_c (label) and f_g = f_u + omega (f_c - f_u), beside the clean
latents and, with --encoder, an external encoder. `accuracy`: logistic regression of the class on mean-pooled tokens; `knn`: their
nearest neighbours; `miou`: the mask of a token's patch by ridge regression on that token, over foreground and background;
`cknna`: alignment with classes, clean latents and encoder. All on held-out images; definitions in `evaluations.representation`.
f_c and f_g have been told the label: their accuracy says how plainly they pass it on, and is soon 1. --labels shuffled tells
the label of another image instead, and what is then found of the image's own class was seen, not told.

Writes probe.json, probe.png and probe.svg; the last line printed is what to give to train_guide.py, by a heuristic: the block and
omega of f_g with the largest sqrt(knn x miou), mean over the times given. The student regresses f_g by squared error, so what
counts is how far classes lie apart in it (knn), not whether a line can be found (accuracy), together with the structure it keeps
(miou): the first grows with omega, the second falls in the end. Among those within `TIE` of the best, the smallest omega, then
the shallowest block, which costs least. The guided block is half the depth, as in the paper, but at least one below the
guiding block where there is one: a probe of the teacher cannot tell where its student learns best.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import models
from evaluations import drawing, representation
from evaluations.reading import Row, as_they_are, compared, measure, of_blocks
from evaluations.taps import Items, Probed, encoded
from models.backbone import block_number
from models.checkpoint import versions
from models.encoders import open_encoder
from runtime import errors, files, progress
from runtime.errors import require
from runtime.locks import locked
from runtime.options import as_dict, option, read
from runtime.text import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("u", "c", "g", "latents")
TIE = 0.005
"""Difference of the score below which two settings are level."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Options of the command."""

    ckpt: tuple[str, ...] = option(
        help="checkpoints: folders, runs (their latest), RUN@STEP", heading="what to look at"
    )
    data_dir: str = option(help="latent set with the images")
    out: str = option(help="folder of the result")
    masks: str | None = option(
        None, help=".npz with masks (N, H, H) of 0 and 1 in the order of the set, and perhaps groups (N,)"
    )
    weights: str = option("ema", help="weights: ema, raw or ema-DECAY")
    blocks: tuple[int, ...] | None = option(None, help="blocks, from 1 (default: all)")
    t: tuple[float, ...] = option((0.3, 0.5, 0.7), help="times, 1 is noise")
    omega: tuple[float, ...] = option((3.0, 10.0, 30.0), help="guidance scales of f_g")
    features: tuple[str, ...] = option(KINDS, help=f"which features: {', '.join(KINDS)}")
    encoder: str | None = option(None, help="an external encoder too: a vision transformer of timm, or a folder of one")
    encoder_weights: str | None = option(None, help="file of its weights (default: timm's, from the hub)")
    labels: str = option(
        "true", choices=("true", "shuffled"), help="what the network is told: the images' labels, or other images'"
    )
    items: int = option(2000, help="images, drawn by the seed")
    seed: int = option(0, help="of the images drawn, their noise and their split")
    batch_size: int = option(64, help="images per pass through the network", heading="how")

    def __post_init__(self) -> None:
        require(all(0 <= t <= 1 for t in self.t), f"--t {' '.join(map(str, self.t))} must lie between 0 and 1")
        wrong = sorted(set(self.features) - set(KINDS))
        require(
            not wrong,
            f"--features has no {wrong[0] if wrong else ''}{errors.nearest(wrong[0], KINDS) if wrong else ''}; "
            f"there are {', '.join(KINDS)}",
        )
        require(
            all(omega >= 0 for omega in self.omega), f"--omega {' '.join(map(str, self.omega))} must not be negative"
        )
        require(self.items > 0 and self.batch_size > 0, "--items and --batch-size must be positive")
        require(
            self.encoder_weights is None or self.encoder is not None,
            "--encoder-weights belong to an encoder: give --encoder too",
        )

    def kinds(self) -> list[tuple[str, float | None]]:
        """The features of blocks, each with its omega: ("g", 10.0)."""
        plain = [(kind, None) for kind in ("u", "c") if kind in self.features]
        return plain + ([("g", omega) for omega in self.omega] if "g" in self.features else [])


def best(rows: Sequence[Row]) -> tuple[str, float, int] | None:
    """Checkpoint, omega and guiding block by the heuristic at the head of this file; None where no f_g was measured.

    Without masks it is by `knn` alone.
    """
    scores: dict[tuple[str, float, int], list[float]] = {}
    for row in rows:
        if row["features"] == "g":
            score = math.sqrt(row["knn"] * row.get("miou", row["knn"]))
            scores.setdefault((row["checkpoint"], row["omega"], row["block"]), []).append(score)
    if not scores:
        return None
    means = {key: sum(values) / len(values) for key, values in scores.items()}
    level = [key for key, value in means.items() if value >= max(means.values()) - TIE]
    return min(level, key=lambda key: (key[1], key[2]))


def recommend(rows: Sequence[Row], depths: Mapping[str, int], given: Mapping[str, str]) -> str | None:
    """The flags for train_guide.py, None where no f_g was measured.

    `depths`: checkpoint -> its number of blocks, `given`: -> what was typed for it; of several the best is named too.
    """
    chosen = best(rows)
    if chosen is None:
        return None
    name, omega, guiding = chosen
    guided = max(1, min(block_number(depths[name], 1 / 2, None, ""), guiding - 1))
    source = f"--guiding-ckpt {shlex.quote(given[name])} " if len(depths) > 1 else ""
    return f"{source}--guiding-depth {guiding} --guided-depth {guided} --guide-scale {omega:g}"


def doubts(rows: Sequence[Row]) -> list[str]:
    """What speaks against the recommendation, in words; nothing where there is none."""
    found, chosen, omegas = [], best(rows), {row["omega"] for row in rows if row["features"] == "g"}
    if chosen is None:
        return []
    if "miou" not in rows[0]:
        found.append("without --masks structure was not measured, and nothing speaks against a larger omega")
    elif len(omegas) > 1 and chosen[1] == max(omegas):
        found.append("the best omega is the largest given: a larger one may be better, widen --omega")
    return found


def label(row: Row) -> str:
    """What a feature is called: f_u, f_c, f_g 10, latents."""
    omega = "" if row["omega"] is None else f" {row['omega']:g}"
    return f"f_{row['features']}{omega}" if row["features"] in ("u", "c", "g") else row["features"]


def table(rows: Sequence[Row]) -> str:
    """All rows as aligned text."""
    metrics = [name for name in rows[0] if name not in ("checkpoint", "t", "features", "omega", "block")]
    lines = [["checkpoint", "features", "t", "block", *metrics]]
    for row in rows:
        lines.append(
            [
                row["checkpoint"] or "-",
                label(row),
                "-" if row["t"] is None else f"{row['t']:g}",
                str(row["block"] or "-"),
                *(f"{row[name]:.3f}" for name in metrics),
            ]
        )
    return aligned(lines, left=(0, 1))


def plot(rows: Sequence[Row]) -> Figure:
    """The probes against the block, a column for each time, one line a feature; what has no block is a level line.

    A grey bar stands behind the block that is recommended, of its checkpoint.
    """
    names = list(dict.fromkeys(row["checkpoint"] for row in rows if row["checkpoint"]))
    times = sorted({row["t"] for row in rows if row["t"] is not None})
    metrics = [metric for metric in ("accuracy", "knn", "miou") if metric in rows[0]]
    chosen, labels = best(rows), list(dict.fromkeys(map(label, rows)))
    figure = drawing.canvas(3.2 * len(times) + 1.4, 2.4 * len(names) * len(metrics) + 0.6)
    grid = figure.subplots(len(names) * len(metrics), len(times), squeeze=False, sharey="row", sharex=True)
    for place, axes in np.ndenumerate(grid):
        name, metric, t = names[place[0] // len(metrics)], metrics[place[0] % len(metrics)], times[place[1]]
        for number, said in enumerate(labels):
            found = [row for row in rows if label(row) == said]
            level = next((row[metric] for row in found if row["block"] is None), None)
            if level is not None:
                axes.axhline(level, label=said, **{**drawing.style(number), "marker": None})
                continue
            points = sorted((row["block"], row[metric]) for row in found if row["checkpoint"] == name and row["t"] == t)
            axes.plot(*zip(*points), label=said, markersize=4, **drawing.style(number))
        if chosen is not None and name == chosen[0]:
            axes.axvline(chosen[2], color="0.85", linewidth=8, zorder=0)
        if metric == metrics[0]:
            axes.set_title(f"{name}\nt = {t:g}", fontsize=8)
        axes.set_ylabel("mIoU" if metric == "miou" else metric)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("block")
        axes.locator_params(axis="x", integer=True)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Measure all that `config` asks for; returns what probe.json holds."""
    items = Items(config.data_dir, config.items, config.seed, config.masks, config.labels == "shuffled")
    probed = [Probed.open(name, items, config.weights, config.blocks) for name in config.ckpt]
    names = [one.name for one in probed]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"two checkpoints are called {twice}: give it once, or rename one of the runs")
    held_out, kinds, side = len(items.parts.test), config.kinds(), probed[0].checkpoint.spec.side
    for one in probed:
        require(
            one.checkpoint.spec.side == side,
            f"{one.name} and {probed[0].name} have other token grids: probe them one by one",
        )
        if any(kind != "c" for kind, _ in kinds):
            one.require_null()
    device = probed[0].device
    encoder = (
        None
        if config.encoder is None
        else open_encoder(config.encoder, grid=side, weights=config.encoder_weights).to(device)
    )
    references = compared(items, encoder, config.batch_size, device)
    patch = items.data.latent_size // side
    readings = (
        [(None, None, as_they_are("latents", lambda places: models.patchify(items.clean(places), patch).double()))]
        if "latents" in config.features
        else []
    )
    if encoder is not None:
        readings.append(
            (None, None, as_they_are("encoder", lambda places: encoded(encoder, items, places, device).cpu()))
        )
    readings += [(one, t, of_blocks(one, items, t, kinds)) for one in probed if kinds for t in config.t]
    rows: list[Row] = []
    with progress.bar(total=len(readings) * len(items), desc="probing", unit="image") as bar:
        for one, t, reading in readings:
            found = measure(reading, items, side, references, config.batch_size, bar)
            rows += [{"checkpoint": one and one.name, "t": t, **row} for row in found]
    require(bool(rows), "--features and --encoder leave nothing to measure: give some of u, c, g and latents")
    protocol = {
        **{
            key: value
            for key, value in as_dict(config).items()
            if key not in ("ckpt", "data_dir", "out", "masks", "batch_size")
        },
        "items": len(items),
        "held_out": held_out,
        "data": items.data.digest,
        "masks": config.masks and files.digest(config.masks),
        "encoder_digest": encoder and encoder.digest(),
        "penalties": list(representation.PENALTIES),
        "versions": versions(),
    }
    return {
        "protocol": protocol,
        "checkpoints": {
            one.name: {"digest": one.checkpoint.digest, "step": one.checkpoint.step, "model": one.checkpoint.spec.name}
            for one in probed
        },
        "rows": rows,
        "recommended": recommend(
            rows, {one.name: one.checkpoint.spec.depth for one in probed}, dict(zip(names, config.ckpt))
        ),
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; returns the result's folder."""
    config = read(
        ProbeConfig, sys.argv[1:] if argv is None else argv, prog="python -m evaluations.probe", description=__doc__
    )
    out = Path(config.out)
    with locked(out, "wait for it, or choose another --out"):
        result = probe(config)
        files.write_json(out / "probe.json", result)
        print(table(result["rows"]))
        written = [out / "probe.json"]
        if any(row["block"] for row in result["rows"]):
            written += drawing.save(plot(result["rows"]), out / "probe")
    print(
        f"{result['protocol']['items']} images, {result['protocol']['held_out']} of them held out; written to "
        f"{', '.join(map(str, written))}"
    )
    for doubt in doubts(result["rows"]):
        print(f"note: {doubt}")
    print(result["recommended"] or "no recommendation: it needs --features g", flush=True)
    return out


if __name__ == "__main__":
    errors.run(main)
