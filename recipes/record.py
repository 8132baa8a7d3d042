"""A record: one folder for every result, written by the runner alone.

    results/records/DATE-ROW-SCALE-sSEED/
      record.json    row, scale, seed, status, commands, commit, versions, device, digests, steps, hours, rate, digest of each file
      config.json    the run's options and resolved choices, from its checkpoint
      metrics.json   each score: preset, epochs, metrics, the protocol under which it was made, and what it took: device hours,
                     and FLOPs of training with stage 1 counted
      log.jsonl      the run's log

`results/ledger.csv` is generated from the folders. Two scores belong in one column only if their protocol keys are equal.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import TypedDict

from evaluations.histories import protocol, spent
from models.checkpoint import Checkpoint, versions
from recipes import costs, rows, scale
from recipes.chain import Chain
from recipes.scale import Scale
from runtime import files, launch, schema
from runtime.errors import require
from runtime.schema import Number
from training.log import read

RESULTS = Path("results")
METRICS = ("fid", "fd")
"""The Frechet distance of a score: the first of these that it has is what a table shows."""


def key(values: dict[str, Any]) -> str:
    """A protocol in eight hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def write(
    chain: Chain,
    *,
    size: Scale,
    seed: int,
    commands: list[str],
    processes: int,
    results: Path,
    failure: str | None = None,
) -> Path:
    """Write the record of a chain that has run, or that failed with `failure`; returns its folder."""
    today = datetime.date.today().isoformat()
    folder = _free(results / "records" / f"{today}-{chain.row.name.replace('/', '-')}-{size.name}-s{seed}")
    with files.replacing(folder) as made:
        made.mkdir()
        summary: dict[str, Any] = {
            "row": chain.row.name,
            "table": chain.row.table,
            "scale": size.name,
            "seed": seed,
            "date": today,
            "status": "failed" if failure else "finished",
            "failure": failure,
            "commands": commands,
            "commit": launch.commit(),
            "versions": {"python": platform.python_version(), **versions()},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
            "processes": processes,
        }
        if failure is None:
            summary |= _results(chain, size, made, processes)
        summary["files"] = {file.name: files.digest(file) for file in sorted(made.iterdir())}
        files.write_json(made / "record.json", summary)
    write_ledger(results)
    return folder


def _free(folder: Path) -> Path:
    """`folder`, or with the next number behind it: a record is never replaced."""
    number = 1
    while (chosen := folder if number == 1 else folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return chosen


def _results(chain: Chain, size: Scale, folder: Path, processes: int) -> dict[str, Any]:
    checkpoint = Checkpoint.open(f"{chain.run}@{chain.step}")
    told = ("model", "train", "align", "resolved", "precision")
    files.write_json(folder / "config.json", {name: checkpoint.config[name] for name in told})
    shutil.copy(chain.run / "log.jsonl", folder / "log.jsonl")
    batch = checkpoint.config["train"]["batch_size"]
    hours, rate = spent(chain.run, batch, chain.step)
    stage1 = 0.0
    if chain.teacher is not None:
        run, step = chain.teacher
        stage1, _ = spent(run, Checkpoint.open(f"{run}@{step}").config["train"]["batch_size"], step)
    scores = []
    for score in chain.scores:
        metrics = files.read_json(score.link.makes)
        about = protocol(metrics)
        scores.append(
            {
                "preset": score.preset,
                "epochs": score.epochs,
                "step": score.step,
                "metrics": metrics["metrics"],
                "num_samples": metrics["num_samples"],
                "key": key(about),
                "protocol": about,
                "device_hours": {
                    "training": spent(chain.run, batch, score.step)[0] * processes,
                    "stage 1": stage1 * processes,
                },
                "flops": costs.flops(chain.row, size, score.epochs),
            }
        )
    files.write_json(folder / "metrics.json", {"scores": scores})
    return {
        "digests": {
            "data": checkpoint.config["data"]["digest"],
            "checkpoint": checkpoint.digest,
            "teacher": checkpoint.config["resolved"].get("guided", {}).get("teacher", {}).get("digest"),
        },
        "step": chain.step,
        "device_hours": {"training": hours * processes, "stage 1": stage1 * processes},
        "images_per_second": rate,
    }


DeviceHours = TypedDict("DeviceHours", {"training": Number, "stage 1": Number})


class Score(TypedDict):
    """One entry of metrics.json."""

    preset: str
    epochs: Number
    step: int
    metrics: dict[str, Number]
    num_samples: int
    key: str
    protocol: dict[str, Any]
    device_hours: DeviceHours
    flops: Number


class Scores(TypedDict):
    """metrics.json."""

    scores: list[Score]


class _Train(TypedDict):
    batch_size: int


class RecordedConfig(TypedDict):
    """What is read of config.json."""

    train: _Train


class Summary(TypedDict):
    """What is read of record.json."""

    row: str
    table: str
    scale: str
    seed: int
    date: str
    status: Literal["finished", "failed"]
    processes: int
    files: dict[str, str]


class Finished(Summary):
    """... and where it finished."""

    step: int
    images_per_second: Number


def folders(results: Path) -> list[Path]:
    """Those of all records, in the order of their names."""
    return sorted(path for path in (results / "records").glob("*") if not path.name.startswith("."))


def open_record(folder: Path) -> dict[str, Any]:
    """A record with its folder's name and, where it finished, its scores. Raises UserError where it is none, or damaged."""
    require(
        (folder / "record.json").is_file(),
        f"{folder} is not a record: it has no record.json; give the folder of one, or remove it",
    )
    summary, scores = files.read_json(folder / "record.json"), []
    if schema.checked(Summary, summary, folder / "record.json")["status"] == "finished":
        schema.checked(Finished, summary, folder / "record.json")
        metrics = files.read_json(folder / "metrics.json")
        schema.checked(Scores, metrics, folder / "metrics.json")
        scores = metrics["scores"]
        for score in scores:
            require(
                bool({*METRICS} & score["metrics"].keys()),
                f"{folder / 'metrics.json'} has a score without {' or '.join(METRICS)}; restore it from a copy",
            )
    return {**summary, "folder": folder.name, "scores": scores}


def load(results: Path) -> list[dict[str, Any]]:
    """All records."""
    return [open_record(folder) for folder in folders(results)]


def newest(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The finished records, of those of one row, scale, seed and protocol the last: a seed that was run twice is one sample."""
    last = {
        (one["row"], one["scale"], one["seed"], *sorted({score["key"] for score in one["scores"]})): one
        for one in records
        if one["status"] == "finished"
    }
    return list(last.values())


def ledger(results: Path) -> str:
    """The text of `ledger.csv` from the folders: one line for each score, one for each failure."""
    columns = (
        "record",
        "row",
        "scale",
        "seed",
        "status",
        "preset",
        "epochs",
        "step",
        "key",
        "num_samples",
        "metric",
        "value",
    )
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(columns)
    for record in load(results):
        head = (record["folder"], record["row"], record["scale"], record["seed"], record["status"])
        if not record["scores"]:
            lines.writerow([*head, *[""] * 7])
        for score in record["scores"]:
            for metric, value in score["metrics"].items():
                lines.writerow(
                    [
                        *head,
                        score["preset"],
                        score["epochs"],
                        score["step"],
                        score["key"],
                        score["num_samples"],
                        metric,
                        f"{value:.6g}",
                    ]
                )
    return text.getvalue()


def write_ledger(results: Path) -> None:
    """Generate `ledger.csv`."""
    with files.replacing(results / "ledger.csv") as temporary:
        temporary.write_text(ledger(results), encoding="utf-8")


def check(folder: Path) -> list[str]:
    """Recompute what a record says of itself; returns what does not hold, in words.

    Digests of its files, the key of each protocol, the step and FLOPs of each score from row and scale, rate and hours from its log.
    Hours of stage 1 are not among them: that run's log is in its own record, if anywhere.

    Raises UserError where it is no record, or damaged.
    """
    summary, faults = open_record(folder), []
    if summary["row"] not in rows.rows() or summary["scale"] not in scale.SCALES:
        return [f"there is no row {summary['row']} at scale {summary['scale']} any more"]
    row, size = rows.find(summary["row"]), scale.find(summary["scale"])
    names = {file.name for file in folder.iterdir()} - {"record.json"}
    if names != set(summary["files"]):
        faults.append(f"its files are {sorted(names)}, not {sorted(summary['files'])}")
    faults += [
        f"{name} has changed since"
        for name, digest in summary["files"].items()
        if name in names and files.digest(folder / name) != digest
    ]
    if not folder.name.startswith(
        f"{summary['date']}-{summary['row'].replace('/', '-')}-{summary['scale']}-s{summary['seed']}"
    ):
        faults.append(
            f"its folder should be called after {summary['date']}, {summary['row']}, {summary['scale']} and {summary['seed']}"
        )
    if summary["status"] != "finished" or faults:
        return faults
    train = schema.read(RecordedConfig, folder / "config.json")["train"]
    for score in summary["scores"]:
        step, flops = size.steps(row, score["epochs"]), costs.flops(row, size, score["epochs"])
        if score["step"] != step or abs(score["flops"] - flops) > 1e-6 * flops:
            faults.append(
                f"{score['epochs']:g} epochs of its row are {step} steps and {flops:.6g} FLOPs, not {score['step']} and "
                f"{score['flops']:.6g}"
            )
        if key(score["protocol"]) != score["key"]:
            faults.append(f"the protocol of {score['preset']} does not give its key {score['key']}")
        hours = spent(folder, train["batch_size"], score["step"])[0] * summary["processes"]
        if abs(hours - score["device_hours"]["training"]) > 1e-6 * hours:
            faults.append(
                f"its log gives {hours:.6g} device hours up to step {score['step']}, not {score['device_hours']['training']:.6g}"
            )
    log = read(folder / "log.jsonl")
    if not log or max(line["step"] for line in log) < summary["step"]:
        faults.append(f"its log ends before step {summary['step']}")
    _, rate = spent(folder, train["batch_size"], summary["step"])
    if abs(rate - summary["images_per_second"]) > 1e-6 * max(rate, 1):
        faults.append(f"its log gives {rate:.6g} images per second, not {summary['images_per_second']:.6g}")
    return faults
