"""A record: one folder for every result, written by the runner alone.

    results/records/DATE-ROW-SCALE-sSEED/
      record.json           row, scale, seed, status, commands, commit, versions, device, processor, threads, load,
                            precision, digests, steps, hours, rate, and a digest of each file
      config.json           the run's options and resolved choices, from its checkpoint
      metrics.json          each score: preset, epochs, metrics, the protocol under which it was made, device hours,
                            FLOPs of training, stage 1 included, and what it was computed from
      features.safetensors  of each score, mean and covariance of the samples' features (`evaluations.projection`)
      log.jsonl             the run's log; before that of a branch, its trunk's
    results/references/DIGEST.safetensors    the same statistics of a reference, once for all its scores

`results/ledger.csv` is generated from the folders. Only scores with equal protocol keys belong in one column. Paths are
written as if the work folder were `work`. docs/records.md says which of this can be verified.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from evaluations.histories import protocol, spent, whole_log
from models.checkpoint import Checkpoint, versions
from recipes import costs, recompute, rows, scale
from recipes.chain import WORK, Chain, build, in_place
from recipes.scale import Places, Scale
from runtime import files, schema
from runtime.errors import require
from runtime.jsonlines import read
from runtime.schema import Number

if TYPE_CHECKING:
    from torch import Tensor

# Names of the Frechet distance; a table shows the first of these that a score has.
METRICS = ("fid", "fd")
# Of record.json.
FORMAT = 2
FEATURES = "features.safetensors"


def key(values: dict[str, Any]) -> str:
    """A protocol in eight hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def write(
    chain: Chain,
    *,
    size: Scale,
    seed: int,
    work: Path,
    processes: int,
    nodes: int,
    results: Path,
    failure: str | None = None,
) -> Path:
    """Write the record of a chain that has run, or that failed with `failure`; returns its folder.

    A chain that has the same scores of the same checkpoint as a record keeps that record. `processes` are those of a
    node.
    """
    from runtime import launch

    files.remove_leftovers(results / "records")
    if failure is None and (earlier := _recorded(chain, size, seed, results)):
        write_ledger(results)  # a kill may have come between the record and the ledger
        return earlier
    today = datetime.date.today().isoformat()
    name = f"{today}-{chain.row.name.replace('/', '-')}-{size.name}-s{seed}"
    folder, number = results / "records" / name, 1
    while folder.exists():  # a record is never replaced
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    with files.replacing(folder) as made:
        made.mkdir()
        summary: dict[str, Any] = {
            "format": FORMAT,
            "row": chain.row.name,
            "table": chain.row.table,
            "scale": size.name,
            "seed": seed,
            "date": today,
            "status": "failed" if failure else "finished",
            "failure": failure,
            "commands": [link.command(processes, nodes) for link in build(chain.row, size, seed, WORK).links],
            "places": asdict(size.places),
            "commit": launch.commit(),
            "versions": {"python": platform.python_version(), **versions()},
            **launch.machine(),
            "load": os.getloadavg()[0],
            "processes": processes * nodes,
            "nodes": nodes,
        }
        if failure is None:
            summary |= _results(chain, size, made, processes * nodes, work, results)
        summary["files"] = {file.name: files.digest(file) for file in sorted(made.iterdir())}
        files.write_json(made / "record.json", summary)
    write_ledger(results)
    return folder


def _recorded(chain: Chain, size: Scale, seed: int, results: Path) -> Path | None:
    """The folder of the record that holds what `chain` has made, if there is one."""
    checkpoint = Checkpoint.open(f"{chain.run}@{chain.step}").digest
    made = [(score.preset, score.step, files.read_sealed(score.link.makes)["metrics"]) for score in chain.scores]
    for entry in finished(load(results), row=chain.row.name, scale=size.name, seed=seed):
        scores = [(score["preset"], score["step"], score["metrics"]) for score in entry["scores"]]
        if entry["digests"].get("checkpoint") == checkpoint and scores == made:
            return results / "records" / entry["folder"]
    return None


def _normal(value: Any, work: Path) -> Any:
    """JSON with paths in `work` as if that were `WORK`."""
    if isinstance(value, dict):
        return {key: _normal(part, work) for key, part in value.items()}
    if isinstance(value, list):
        return [_normal(part, work) for part in value]
    return in_place(value, work) if isinstance(value, str) else value


def _results(chain: Chain, size: Scale, folder: Path, processes: int, work: Path, results: Path) -> dict[str, Any]:
    """Write the files of a finished chain into `folder`; returns what its record adds."""
    checkpoint = Checkpoint.open(f"{chain.run}@{chain.step}")
    config = {name: checkpoint.config[name] for name in ("model", "train", "align", "resolved", "precision")}
    config = _normal(config, work)
    files.write_json(folder / "config.json", config)
    (folder / "log.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in whole_log(chain.run)), encoding="utf-8"
    )

    # hours are counted from the logs: pauses between two starts of a run are left out
    batch_size, stage1 = config["train"]["batch_size"], 0.0
    if chain.teacher is not None:
        run, step = chain.teacher
        stage1, _ = spent(run, Checkpoint.open(f"{run}@{step}").config["train"]["batch_size"], step)

    def device_hours(step: int) -> dict[str, float]:
        return {"training": spent(chain.run, batch_size, step)[0] * processes, "stage 1": stage1 * processes}

    scores: list[dict[str, Any]] = []
    statistics: dict[str, Tensor] = {}
    for number, score in enumerate(chain.scores):
        metrics = files.read_sealed(score.link.makes)
        conditions = {**protocol(metrics), "training_precision": config["precision"]}
        samples, reference = _statistics(score.link.makes, metrics)
        statistics |= {f"{number}.{name}": x for name, x in samples.items()}
        scores.append(
            {
                "preset": score.preset,
                "epochs": score.epochs,
                "step": score.step,
                "metrics": metrics["metrics"],
                "fd64": metrics["projected"]["fd"],
                "feature_width": metrics["projected"]["width"],
                "reference_statistics": _write_reference(reference, results),
                "checkpoint": metrics["samples"]["settings"]["checkpoint"],
                "num_samples": metrics["num_samples"],
                "key": key(conditions),
                "protocol": conditions,
                "device_hours": device_hours(score.step),
                "flops": costs.flops(chain.row, size, score.epochs),
            }
        )
    files.write_json(folder / "metrics.json", {"scores": scores})
    files.save_tensors(folder / FEATURES, statistics)
    return {
        # of the last start of the run, which may have been on another machine
        **files.read_json(chain.run / "run.json").get("machine", {}),
        "precision": config["precision"],
        "digests": {
            "data": checkpoint.config["data"]["digest"],
            "checkpoint": checkpoint.digest,
            "teacher": config["resolved"].get("guided", {}).get("teacher", {}).get("digest"),
        },
        "step": chain.step,
        "device_hours": device_hours(chain.step),
        "images_per_second": spent(chain.run, batch_size, chain.step)[1],
    }


def _statistics(makes: Path, metrics: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Projected statistics of the samples and of the reference behind a score, from the file beside it."""
    file = makes.with_suffix(".safetensors")
    require(
        file.is_file() and files.digest(file) == metrics.get("statistics"),
        f"{file} is missing or not that of {makes.name}: remove {makes.parent}, and give the same command again",
    )
    tensors = files.load_tensors(file)
    samples, reference = (
        {name.removeprefix(f"0.{of}."): x for name, x in tensors.items() if name.startswith(f"0.{of}.")}
        for of in ("samples", "reference")
    )
    return samples, reference


def _write_reference(statistics: dict[str, Tensor], results: Path) -> str:
    """Keep the statistics of a reference in a file that is called after its digest, which is returned."""
    from safetensors.torch import save

    content = save(statistics)
    digest = hashlib.sha256(content).hexdigest()
    file = recompute.reference_file(results, digest)
    if not file.is_file():
        with files.replacing(file) as temporary:
            temporary.write_bytes(content)
    return digest


# What is read of each file, checked when a record is opened.
DeviceHours = TypedDict("DeviceHours", {"training": Number, "stage 1": Number})


class Score(TypedDict):
    preset: str
    epochs: Number
    step: int
    metrics: dict[str, Number]
    num_samples: int
    key: str
    protocol: dict[str, Any]
    device_hours: DeviceHours
    flops: Number
    fd64: Number
    feature_width: int
    reference_statistics: str
    checkpoint: str


class Scores(TypedDict):
    scores: list[Score]


class TrainOptions(TypedDict):
    batch_size: int


class RecordedConfig(TypedDict):
    train: TrainOptions
    model: dict[str, Any]
    align: dict[str, dict[str, Any]]
    resolved: dict[str, dict[str, Any]]
    precision: str


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
    """What is read beside that of a finished one."""

    step: int
    images_per_second: Number
    digests: dict[str, str | None]
    commands: list[str]
    places: Places
    nodes: int
    precision: str
    device: str
    cpu: str
    threads: int
    versions: dict[str, str]


def folders(results: Path) -> list[Path]:
    """The folders of all records, sorted by name."""
    return sorted(path for path in (results / "records").glob("*") if not path.name.startswith("."))


def open_record(folder: Path) -> dict[str, Any]:
    """A record with its folder's name and, if it finished, its scores. Raises UserError for a damaged record."""
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
    """The finished records without those that were repeated later, so that a seed that ran twice is one sample."""
    last = {}
    for record in finished(records):
        keys = frozenset(score["key"] for score in record["scores"])
        last[record["row"], record["scale"], record["seed"], keys] = record
    return list(last.values())


def finished(records: Sequence[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    """The finished records with these values, such as row=... and seed=..."""
    wanted["status"] = "finished"
    return [record for record in records if all(record[name] == value for name, value in wanted.items())]


def ledger(results: Path) -> str:
    """The text of `ledger.csv`: one line for each metric of each score, one for each failure."""
    text = io.StringIO()
    columns = ["record", "row", "scale", "seed", "status", "preset", "epochs", "step", "key", "num_samples"]
    lines = csv.DictWriter(text, [*columns, "metric", "value"], extrasaction="ignore", lineterminator="\n")
    lines.writeheader()
    for record in load(results):
        head = {**record, "record": record["folder"]}
        if not record["scores"]:
            lines.writerow(head)
        for score in record["scores"]:
            for metric, value in score["metrics"].items():
                lines.writerow({**head, **score, "metric": metric, "value": f"{value:.6g}"})
    return text.getvalue()


def write_ledger(results: Path) -> None:
    """Generate `ledger.csv`."""
    with files.replacing(results / "ledger.csv") as temporary:
        temporary.write_text(ledger(results), encoding="utf-8")


def check(folder: Path) -> list[str]:
    """Recompute what a record says of itself; returns what does not hold, in words.

    Digests of its files, the key of each protocol, the step and FLOPs of each score from row and scale, rate and hours
    from its log; commands, options and protocols from the row; a distance from the statistics (`recompute`). Hours of
    stage 1 are left out, since that run's log is in another record, if anywhere.

    Raises UserError if it is damaged or not a record.
    """
    summary = open_record(folder)
    if summary["row"] not in rows.rows() or summary["scale"] not in scale.SCALES:
        return [f"there is no row {summary['row']} at scale {summary['scale']} any more"]
    faults = _changed_files(folder, summary)
    if summary["status"] != "finished" or faults:
        return faults
    # from here on the files are those that were written: compare what they say with what row and log give
    batch_size = schema.read(RecordedConfig, folder / "config.json")["train"]["batch_size"]
    for score in summary["scores"]:
        faults += _wrong_numbers(score, folder, summary, batch_size)
    log = read(folder / "log.jsonl")
    if not log or max(line["step"] for line in log) < summary["step"]:
        faults.append(f"its log ends before step {summary['step']}")
    _, rate = spent(folder, batch_size, summary["step"])
    if not math.isclose(summary["images_per_second"], rate, rel_tol=1e-6):
        faults.append(f"its log gives {rate:.6g} images per second, not {summary['images_per_second']:.6g}")
    return [*faults, *recompute.faults(folder, summary)]


def _changed_files(folder: Path, summary: dict[str, Any]) -> list[str]:
    """How the record's folder differs from what it says of its name and its files."""
    faults = []
    names, digests = {file.name for file in folder.iterdir()} - {"record.json"}, summary["files"]
    if names != set(digests):
        faults.append(f"its files are {sorted(names)}, not {sorted(digests)}")
    changed = [name for name in digests if name in names and files.digest(folder / name) != digests[name]]
    faults += [f"{name} has changed since" for name in changed]
    date, row, size, seed = (summary[name] for name in ("date", "row", "scale", "seed"))
    if not folder.name.startswith(f"{date}-{row.replace('/', '-')}-{size}-s{seed}"):
        faults.append(f"its folder should be called after {date}, {row}, {size} and {seed}")
    return faults


def _wrong_numbers(score: dict[str, Any], folder: Path, summary: dict[str, Any], batch_size: int) -> list[str]:
    """How a score differs from what its row, its protocol and the record's log give."""
    faults = []
    row, size = rows.find(summary["row"]), scale.find(summary["scale"])
    step, flops = size.steps(row, score["epochs"]), costs.flops(row, size, score["epochs"])
    if score["step"] != step or not math.isclose(score["flops"], flops, rel_tol=1e-6):
        faults.append(
            f"{score['epochs']:g} epochs of its row are {step} steps and {flops:.6g} FLOPs, "
            f"not {score['step']} and {score['flops']:.6g}"
        )
    if key(score["protocol"]) != score["key"]:
        faults.append(f"the protocol of {score['preset']} does not give its key {score['key']}")
    hours = spent(folder, batch_size, score["step"])[0] * summary["processes"]
    recorded = score["device_hours"]["training"]
    if not math.isclose(recorded, hours, rel_tol=1e-6):
        faults.append(f"its log gives {hours:.6g} device hours up to step {score['step']}, not {recorded:.6g}")
    return faults
