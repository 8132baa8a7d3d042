"""Tables of records beside published numbers, each number with a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from models.published import Published
from recipes import costs
from recipes import rows as known
from recipes.record import METRICS, finished, newest
from recipes.record import key as protocol_key
from recipes.row import Row, printed
from recipes.scale import find
from runtime.errors import require
from runtime.text import aligned, spread

# A number is reproduced within this share of the published one, or within this distance if that is more.
SHARE, DISTANCE = 0.03, 0.1
# Scores, each behind its record.
Scored = list[tuple[dict[str, Any], dict[str, Any]]]


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean of two or more values, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def verdict(published: float, ours: Sequence[float]) -> str:
    """What several seeds say of a published number: an equivalence test.

    `reproduced` if the 95 % interval of at least three seeds lies within the larger of 3 % and 0.1 of the published
    number, `differs` if it lies outside, else `undecided`; `not run`.
    """
    if not ours:
        return "not run"
    if len(ours) < 3:
        return "undecided"
    margin, away = max(SHARE * published, DISTANCE), abs(statistics.mean(ours) - published)
    half = half_interval(ours)
    return "reproduced" if away + half <= margin else "differs" if away - half > margin else "undecided"


def declared(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest record of each row and each seed that the row declares; other seeds do not count."""
    seeds = {name: row.seeds for name, row in known.rows().items()}
    return [record for record in newest(records) if record["seed"] in seeds.get(record["row"], ())]


def require_one_protocol(records: Sequence[dict[str, Any]], what: str) -> None:
    """Raise UserError if the scores of `records`, which are `what`, are of several protocols.

    A scale of guidance, and the evaluations that it doubles, do not count: it is a setting of its row, like a weight.
    """
    scores = [score for record in records for score in record["scores"]]
    keys = {protocol_key({**score["protocol"], "cfg_scale": None, "evaluations": None}) for score in scores}
    require(
        len(keys) < 2, f"{what} are of {len(keys)} protocols, and scores of two are never compared: keep those of one"
    )


def failed(records: Sequence[dict[str, Any]], row: str, scale: str) -> set[int]:
    """The seeds of a row that failed and have not finished since."""
    here = [record for record in records if (record["row"], record["scale"]) == (row, scale)]
    return {record["seed"] for record in here} - {record["seed"] for record in finished(here)}


def counted(seeds: Collection[int], declared: Sequence[int], failed: Collection[int]) -> str:
    """How many of the declared seeds `seeds` are, and what became of the others: '3 of 5; failed: 2; missing: 4'."""
    lost = [seed for seed in declared if seed not in seeds]
    parts = {
        "failed": [seed for seed in lost if seed in failed],
        "missing": [seed for seed in lost if seed not in failed],
    }
    text = [f"{title}: {' '.join(map(str, some))}" for title, some in parts.items() if some]
    return "; ".join([f"{len(declared) - len(lost)} of {len(declared)}", *text])


def not_complete(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each row that has records of some of its seeds alone, or of others."""
    lines = []
    for row, scale in dict.fromkeys((record["row"], record["scale"]) for record in records):
        wanted = known.rows()[row].seeds if row in known.rows() else ()
        seeds = {record["seed"] for record in finished(records, row=row, scale=scale)}
        others = sorted(seeds - {*wanted})
        if others or not {*wanted} <= seeds:
            more = f"; not declared: {' '.join(map(str, others))}" if others else ""
            lines.append(
                f"seeds of {row} at scale {scale}: {counted(seeds, wanted, failed(records, row, scale))}{more}"
            )
    return lines


def by_epochs(records: Sequence[dict[str, Any]], row: str, key: str | None = None) -> dict[float, Scored]:
    """Epochs, in order -> the scores of `row` there; with `key`, those of one protocol."""
    at: dict[float, Scored] = {}
    for record in records:
        for score in record["scores"] if record["row"] == row else ():
            if key in (None, score["key"]):
                at.setdefault(score["epochs"], []).append((record, score))
    return dict(sorted(at.items()))


def columns(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Protocol key -> the title of its block, for each protocol among the scores of `records`."""
    titles: dict[str, str] = {}
    for record in records:
        for score in record["scores"]:
            titles.setdefault(score["key"], f"{score['preset']} [{score['key']}]")
    return titles


# Further metrics by title, with their decimals.
MORE = {"sFID": ("sfid", 2), "IS": ("is", 1), "precision": ("precision", 2), "recall": ("recall", 2)}
HEAD = (
    "row",
    "parameters",
    "epochs",
    "published",
    "ours",
    "difference",
    "verdict",
    *MORE,
    "less the first row's",
    "class accuracy",
    "device hours",
    "with stage 1",
    "images/s",
    "PFLOPs",
)
# Columns that are left out if they are empty.
OPTIONAL = (*MORE, "less the first row's", "class accuracy")


def render(rows: Sequence[Row], records: Sequence[dict[str, Any]], scale: str) -> str:
    """The table of `rows` at one scale: a block for each protocol, published numbers at the paper's scale alone.

    Two numbers in a cell are published | ours. The last block of the paper's scale holds systems that are not run here.
    At other scales each seed is compared with the same seed of the first row, after equal epochs.
    """
    shown = _of(rows, records, scale)
    blocks = []
    for key, title in columns(shown).items() or {"": "no record yet"}.items():
        first = {} if scale == "paper" else by_epochs(shown, rows[0].name, key)
        lines = [
            line
            for row in rows
            for line in _lines(row, by_epochs(shown, row.name, key), first, scale, failed(records, row.name, scale))
        ]
        head = [column for column in HEAD if column not in OPTIONAL or any(line.get(column) for line in lines)]
        blocks.append(f"{title}\n{aligned([head, *([line.get(column, '') for column in head] for line in lines)])}")
    if scale == "paper" and (alone := _alone(rows)):
        blocks.append(f"published numbers alone, of systems that are not run here\n{aligned(alone, left=(0, 7))}")
    return "\n\n".join(blocks)


def _alone(rows: Sequence[Row]) -> list[list[str]]:
    """Title and lines of the published numbers of this table that do not belong to `rows`."""
    ours = [row.published for row in rows]
    lines = [
        [
            row.system,
            str(row.epochs or ""),
            f"{row.metrics['fid']:.2f}",
            *(f"{row.metrics[name]:g}" if name in row.metrics else "" for name, _ in MORE.values()),
            row.protocol(),
        ]
        for row in printed(rows[0].table)
        if row not in ours
    ]
    return [["system", "epochs", "FID", *MORE, "protocol"], *lines] if lines else []


def _of(rows: Sequence[Row], records: Sequence[dict[str, Any]], scale: str) -> list[dict[str, Any]]:
    """The newest records of `rows` at one scale, row by row."""
    records = [record for record in declared(records) if record["scale"] == scale]
    return [record for row in rows for record in records if record["row"] == row.name]


def _lines(
    row: Row, scored: dict[float, Scored], first: dict[float, Scored], scale: str, lost: Collection[int]
) -> list[dict[str, str]]:
    """A line for each number of epochs at which the row is scored. The published number belongs to its end."""
    printed_row = row.published if scale == "paper" else None
    published = printed_row.metrics.get("fid") if printed_row else None
    size = _beside(printed_row.parameters if printed_row else None, f"{costs.parameters(row, find(scale)):.4g} M")
    name = {"row": row.name.split("/", 1)[1], "parameters": size}
    at_end = {} if published is None else {"published": f"{published:.2f}"}
    if not scored:
        hours = f" ({costs.paper_hours()[row.name]:,.3g} h)" if scale == "paper" else ""  # computed, of an H100
        state = f"failed: {' '.join(map(str, sorted(lost)))}" if lost else "not run" + hours
        why = "; ".join(filter(None, (state, "" if published is None else _no_verdict(row))))
        return [{**name, "epochs": f"{row.epochs:g}", **at_end, "verdict": why, **_more(printed_row, [])}]
    lines = []
    for epochs, scores in scored.items():
        ours = [quality(score) for _, score in scores]
        seeds = counted({record["seed"] for record, _ in scores}, row.seeds, lost)
        line = {**name, "epochs": f"{epochs:g}", "ours": f"{spread(ours)} ({seeds})"}
        line |= {**_costs(scores), **_more(printed_row if epochs == row.epochs else None, scores)}
        if epochs in first and scores != first[epochs]:
            base = {record["seed"]: quality(score) for record, score in first[epochs]}
            line["less the first row's"] = spread(
                [quality(score) - base[record["seed"]] for record, score in scores if record["seed"] in base]
            )
        if published is not None and epochs == row.epochs:
            line |= {**at_end, "difference": f"{statistics.mean(ours) - published:+.2f}"}
            line["verdict"] = _no_verdict(row, scores[0][1]["preset"]) or verdict(published, ours)
        lines.append(line)
    return lines


def _beside(published: float | None, ours: str) -> str:
    """published | ours; ours alone if none is published."""
    return ours if published is None else f"{published:g} | {ours or '-'}"


def _more(printed_row: Published | None, scored: Scored) -> dict[str, str]:
    """The further metrics and the device hours, published | ours."""
    hours = [score["device_hours"]["training"] for _, score in scored]
    spent = f"{statistics.mean(hours):.3g}" if hours else ""
    cells = {"device hours": _beside(printed_row.device_hours if printed_row else None, spent)}
    for title, (name, decimals) in MORE.items():
        ours = [score["metrics"][name] for _, score in scored if name in score["metrics"]]
        cells[title] = _beside(printed_row.metrics.get(name) if printed_row else None, spread(ours, decimals))
    return cells


def _no_verdict(row: Row, preset: str | None = None) -> str:
    """Why samples of a row, made under `preset`, get no verdict; empty if they get one."""
    if row.published is not None and not row.published.comparable:
        return "guidance not known"
    return "" if preset in (None, row.presets[0]) else f"{row.presets[0]} counts"


def _costs(scored: Scored) -> dict[str, str]:
    """What the scores took, as means over seeds, and their class accuracy."""
    hours = [score["device_hours"] for _, score in scored]
    means = {
        "with stage 1": statistics.mean(hour["training"] + hour["stage 1"] for hour in hours),
        "images/s": statistics.mean(record["images_per_second"] for record, _ in scored),
        "PFLOPs": statistics.mean(training_flops(*entry) for entry in scored) / 1e15,
    }
    accuracy = [score["metrics"]["class_accuracy"] for _, score in scored if "class_accuracy" in score["metrics"]]
    return {"class accuracy": spread(accuracy), **{name: f"{mean:.3g}" for name, mean in means.items()}}


def quality(score: dict[str, Any]) -> float:
    """The Frechet distance of a score."""
    return next(score["metrics"][name] for name in METRICS if name in score["metrics"])


def training_flops(record: dict[str, Any], score: dict[str, Any]) -> float:
    """FLOPs of a score's training: of its steps, as recorded, and of an encoder's pass over the set before them."""
    return float(score["flops"]) + costs.encoding(known.find(record["row"]), find(record["scale"]))


def at_flops(points: Mapping[float, float], flops: float) -> float:
    """A distance on a curve, FLOPs -> distance, at `flops`: a power law between neighbours, nan beyond both ends."""
    curve = np.log(sorted(points.items()))
    return float(np.exp(np.interp(math.log(flops), curve[:, 0], curve[:, 1], left=math.nan, right=math.nan)))


def epochs_to(rows: Sequence[Row], records: Sequence[dict[str, Any]], scale: str, target: float) -> str:
    """For each row that is scored along the way, the first epochs with a mean of at most `target`, by protocol."""
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
            row: {epochs: [quality(score) for _, score in scores] for epochs, scores in at.items()}
            for row, at in of_row.items()
            if at
        }
        for key, of_row in scored.items()
    }
