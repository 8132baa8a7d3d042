"""Which guiding block, guided block and omega suit your data: what each block encodes of the class and of the mask.

    python -m evaluations.probe --ckpt exps/stage1 --data-dir data/photos --out probes/stage1
    python -m evaluations.probe --ckpt exps/plain@1000 exps/stage1@1000 --data-dir data/fashion-latents \\
        --masks masks.npz --t 0.3 0.5 0.7 --omega 3 10 30 --out probes/both

For each checkpoint, block and time (1 is noise), the probe measures f_u (null label), f_c (label) and
f_g = f_u + omega (f_c - f_u), beside the clean latents and, with --encoder, an external encoder. `accuracy` is logistic
regression of the class on mean-pooled tokens, `knn` their nearest neighbours. `miou` predicts the mask of a token's
patch by ridge regression on that token, over foreground and background. `cknna` is the alignment with classes, clean
latents and encoder by the formula of its paper, `cknna-hsic` by the code of its authors. All numbers are of held-out
images; `evaluations.representation` defines them.
f_c and f_g were computed with the label as input, so their accuracy measures how strongly they encode it and saturates
at 1. With --labels shuffled the network gets the label of another image: then the accuracy for the image's own class
measures what the network sees in the image.

Writes probe.json, probe.png and probe.svg. The last line printed holds flags for train_guide.py, unless the score
cannot tell settings apart: without masks, or where the weakest guidance reaches its ceiling, as with few classes. The
flags are chosen by a heuristic: the block and omega of f_g with the largest sqrt(knn x miou), averaged over the times.
The student regresses f_g by squared error, so what counts is how far apart classes lie in f_g (knn) rather than whether
they are linearly separable (accuracy), and how much structure it keeps (miou). knn grows with omega; miou eventually
falls. Among settings within `TIE` of the best, the smallest omega wins, then the shallowest block, which costs least.
The guided block is half the depth, as in the paper, but at least one below the guiding block if there is one: a probe
of the teacher cannot tell where its student learns best.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluations import drawing
from evaluations.config import KINDS, TapOptions
from models.checkpoint import versions
from runtime import errors, files, progress
from runtime.errors import require
from runtime.locks import locked
from runtime.options import as_dict, option, read
from runtime.text import aligned, quoted

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evaluations.reading import Reading, Row
    from evaluations.taps import Items, Probed
    from models.encoders import Encoder

TIE = 0.005  # two settings whose scores differ by less are level
CANNOT_TELL = "cannot tell: keep the defaults"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(TapOptions):
    """Options of the command."""

    t: tuple[float, ...] = option((0.3, 0.5, 0.7), within="[0, 1]", help="times, 1 is noise")
    omega: tuple[float, ...] = option((3.0, 10.0, 30.0), within="[0, inf)", help="guidance scales of f_g")
    features: tuple[str, ...] = option(KINDS, choices=KINDS, help="which features")
    out: str = option(help="folder of the result", heading="how to probe")
    masks: str | None = option(
        None, help=".npz with masks (N, H, H) of 0 and 1 in the order of the set, and perhaps groups (N,)"
    )
    labels: str = option(
        "true", choices=("true", "shuffled"), help="labels given to the network: the images' own, or other images'"
    )
    items: int = option(2000, within="[1, inf)", help="images, drawn by the seed")


def best(rows: Sequence[Row]) -> tuple[str, float, int] | None:
    """Checkpoint, omega and guiding block by the heuristic at the head of this file; None if no f_g was measured.

    Without masks the score is `knn` alone.
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


def undecided(rows: Sequence[Row]) -> str:
    """Why the score cannot tell the settings of f_g apart; an empty text if it can.

    It is saturated where `knn` stands within `TIE` of 1 for most settings at the smallest omega, as it does when
    classes are few and far apart: then the rule for ties would choose, not the data.
    """
    guided = [row for row in rows if row["features"] == "g"]
    if not guided:
        return ""
    if "miou" not in guided[0]:
        return "without --masks structure was not measured, and nothing speaks against a larger omega"
    smallest = min(row["omega"] for row in guided)
    weakest = [row["knn"] for row in guided if row["omega"] == smallest]
    if 2 * sum(knn >= 1 - TIE for knn in weakest) > len(weakest):
        return f"knn is saturated at omega {smallest:g} already: the classes are too few, or too far apart, to tell"
    return ""


def recommend(rows: Sequence[Row], depths: Mapping[str, int], given: Mapping[str, str]) -> str | None:
    """The flags for train_guide.py, CANNOT_TELL if the score decides nothing, None if no f_g was measured.

    depths: checkpoint -> its number of blocks; given: checkpoint -> what was typed for it. With several checkpoints the
    flags name the best one.
    """
    from models.backbone import block_number

    chosen = best(rows)
    if chosen is None:
        return None
    if undecided(rows):
        return CANNOT_TELL
    name, omega, guiding = chosen
    guided = max(1, min(block_number(depths[name], 1 / 2, None, ""), guiding - 1))
    source = f"--guiding-ckpt {shlex.quote(given[name])} " if len(depths) > 1 else ""
    return f"{source}--guiding-depth {guiding} --guided-depth {guided} --guide-scale {omega:g}"


def caveats(rows: Sequence[Row]) -> list[str]:
    """Reasons not to rely on the recommendation."""
    chosen, omegas = best(rows), {row["omega"] for row in rows if row["features"] == "g"}
    if chosen is None:
        return []
    if reason := undecided(rows):
        return [reason]
    if len(omegas) > 1 and chosen[1] == max(omegas):
        return ["the best omega is the largest given: a larger one may be better, widen --omega"]
    return []


def label(row: Row) -> str:
    """The name of a feature: f_u, f_c, f_g 10, latents."""
    omega = "" if row["omega"] is None else f" {row['omega']:g}"
    return f"f_{row['features']}{omega}" if row["features"] in ("u", "c", "g") else row["features"]


def table(rows: Sequence[Row]) -> str:
    """All rows as aligned text."""
    metrics = [name for name in rows[0] if name not in ("checkpoint", "t", "features", "omega", "block")]
    lines = [["checkpoint", "features", "t", "block", *metrics]]
    lines += [
        [
            row["checkpoint"] or "-",
            label(row),
            "-" if row["t"] is None else f"{row['t']:g}",
            str(row["block"] or "-"),
            *(f"{row[name]:.3f}" for name in metrics),
        ]
        for row in rows
    ]
    return aligned(lines, left=(0, 1))


def plot(rows: Sequence[Row]) -> Figure:
    """The probes against the block: a column for each time, a line for each feature, level if it has no block.

    A grey bar marks the recommended block of its checkpoint.
    """
    names = list(dict.fromkeys(row["checkpoint"] for row in rows if row["checkpoint"]))
    times = sorted({row["t"] for row in rows if row["t"] is not None})
    metrics = [metric for metric in ("accuracy", "knn", "miou") if metric in rows[0]]
    figure = drawing.canvas(3.2 * len(times) + 1.4, 2.4 * len(names) * len(metrics) + 0.6)
    grid = figure.subplots(len(names) * len(metrics), len(times), squeeze=False, sharey="row", sharex=True)
    # from top to bottom: the metrics of the first checkpoint, then those of the next
    panels = [(name, metric) for name in names for metric in metrics]
    for (line, column), axes in np.ndenumerate(grid):
        name, metric = panels[line]
        _panel(axes, rows, name, metric, times[column])
    for axes in grid[-1]:
        axes.set_xlabel("block")
        axes.locator_params(axis="x", integer=True)
    # every panel draws the same features in the same styles, so one legend serves all
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _panel(axes: Axes, rows: Sequence[Row], name: str, metric: str, t: float) -> None:
    """Draw `metric` of checkpoint `name` at time t, with the same styles in every panel."""
    for number, feature in enumerate(dict.fromkeys(map(label, rows))):
        values = [row for row in rows if label(row) == feature]
        if values[0]["block"] is None:
            axes.axhline(values[0][metric], label=feature, **{**drawing.style(number), "marker": None})
            continue
        points = sorted((row["block"], row[metric]) for row in values if (row["checkpoint"], row["t"]) == (name, t))
        axes.plot(*zip(*points, strict=True), label=feature, markersize=4, **drawing.style(number))
    chosen = best(rows)
    if chosen is not None and name == chosen[0] and not undecided(rows):
        axes.axvline(chosen[2], color="0.85", linewidth=8, zorder=0)
    if metric == "accuracy":  # the first of a checkpoint's metrics
        axes.set_title(f"{name}\nt = {t:g}", fontsize=8)
    axes.set_ylabel("mIoU" if metric == "miou" else metric)
    axes.grid(alpha=0.3)


def open_all(config: ProbeConfig, items: Items) -> list[Probed]:
    """Open the checkpoints. Raises UserError if two share a name, their token grids differ, or one lacks a feature."""
    from evaluations.taps import Probed

    opened = [Probed.open(name, items, config.weights, config.blocks) for name in config.ckpt]
    names = [probed.name for probed in opened]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"two checkpoints are called {twice}: give it once, or rename one of the runs")
    for probed in opened:
        require(
            probed.checkpoint.spec.side == opened[0].checkpoint.spec.side,
            f"{probed.name} and {opened[0].name} have other token grids: probe them one by one",
        )
        if any(kind != "c" for kind, _ in config.kinds()):
            probed.require_null()
    return opened


def readings(
    config: ProbeConfig, items: Items, opened: Sequence[Probed], encoder: Encoder | None, device: torch.device
) -> Iterator[tuple[str | None, float | None, Reading]]:
    """Each measurement: checkpoint and time (both None for latents and encoder), and how to read its tokens."""
    from evaluations.reading import of_blocks, unmapped
    from evaluations.taps import unblocked

    for name, tokens in unblocked(config, items, opened[0].checkpoint.spec.side, encoder, device):
        yield None, None, unmapped(name, tokens)
    for probed in opened if config.kinds() else ():
        for t in config.t:
            yield probed.name, t, of_blocks(probed, items, t, config.kinds())


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Measure all that `config` asks for; returns the content of probe.json."""
    from evaluations import representation
    from evaluations.reading import compared, measure
    from evaluations.taps import Items, open_external

    items = Items(config.data_dir, config.items, config.seed, config.masks, config.labels == "shuffled")
    opened = open_all(config, items)
    held_out, side, device = len(items.parts.test), opened[0].checkpoint.spec.side, opened[0].device
    encoder = open_external(config, side, device)
    references = compared(items, encoder, config.batch_size, device)
    # listed first, so that the bar knows its end
    todo = list(readings(config, items, opened, encoder, device))
    require(bool(todo), "--features and --encoder leave nothing to measure: give some of u, c, g and latents")
    rows: list[Row] = []
    with progress.bar(total=len(todo) * len(items), desc="probing", unit="image") as bar:
        for name, t, reading in todo:
            measured = measure(reading, items, side, references, config.batch_size, bar)
            rows += [{"checkpoint": name, "t": t, **row} for row in measured]
    # paths and the batch size do not change a number, so they are no part of the protocol
    unlisted = ("ckpt", "data_dir", "out", "masks", "batch_size")
    protocol = {
        **{key: value for key, value in as_dict(config).items() if key not in unlisted},
        "items": len(items),
        "held_out": held_out,
        "data": items.data.digest,
        "masks": config.masks and files.digest(config.masks),
        "encoder_digest": encoder and encoder.digest(),
        "penalties": list(representation.PENALTIES),
        "versions": versions(),
    }
    checkpoints = {probed.name: probed.checkpoint for probed in opened}
    return {
        "protocol": protocol,
        "checkpoints": {
            name: {"digest": checkpoint.digest, "step": checkpoint.step, "model": checkpoint.spec.name}
            for name, checkpoint in checkpoints.items()
        },
        "rows": rows,
        "recommended": recommend(
            rows,
            {name: checkpoint.spec.depth for name, checkpoint in checkpoints.items()},
            dict(zip(checkpoints, config.ckpt, strict=True)),
        ),
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; returns the result's folder."""
    config = read(ProbeConfig, argv, prog="python -m evaluations.probe", description=__doc__)
    out = Path(config.out)
    with locked(out, "wait for it, or choose another --out"):
        result = probe(config)
        files.write_json(out / "probe.json", result)
        print(table(result["rows"]))
        written = [out / "probe.json"]
        # latents and an external encoder have no blocks to draw their numbers against
        if any(row["block"] for row in result["rows"]):
            written += drawing.save(plot(result["rows"]), out / "probe")
    print(
        f"{result['protocol']['items']} images, {result['protocol']['held_out']} of them held out; written to "
        f"{' '.join(map(quoted, written))}"
    )
    for caveat in caveats(result["rows"]):
        print(f"note: {caveat}")
    print(result["recommended"] or "no recommendation: it needs --features g", flush=True)
    return out


if __name__ == "__main__":
    errors.run(main)
