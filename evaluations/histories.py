"""Curves and times from the logs of runs: scores against steps, the end of an alignment, hours with stage 1 counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from models.checkpoint import Checkpoint
from runtime import files, schema
from runtime.errors import UserError, require
from runtime.jsonlines import read
from runtime.schema import Number
from runtime.text import aligned

Curves = dict[str, dict[float, list[float]]]  # name -> step -> values, one for each seed
FIRST = ("fid", "fd")  # the metrics that a curve shows by default, in this order


def named(word: str) -> tuple[str, Path]:
    """NAME=PATH as its two parts; the name of a path alone is its last part."""
    name, at, path = word.partition("=")
    return (name, Path(path)) if at else (Path(word).name, Path(word))


def from_logs(words: Sequence[str], metric: str | None) -> tuple[Curves, str]:
    """The curves of runs (NAME=RUN, one name for all seeds of a setting) and the metric that they show.

    `metric` is a name of the logs without `eval/`, such as fid@5000. None takes the first FID or Frechet distance that
    all logs share.

    Raises:
        UserError: a run has no log, no scores, or lacks the metric.
    """
    logs = [(name, run, read(run / "log.jsonl")) for name, run in map(named, words)]
    for _, run, lines in logs:
        require(bool(lines), f"{run} has no log.jsonl with lines in it: name a run's folder")
    metric = _shared([lines for _, _, lines in logs], metric)
    curves: Curves = {}
    for name, _, lines in logs:
        for line in lines:
            if f"eval/{metric}" in line:
                curves.setdefault(name, {}).setdefault(line["step"], []).append(line[f"eval/{metric}"])
    return curves, metric


def _shared(logs: Sequence[Sequence[dict[str, Any]]], metric: str | None) -> str:
    """`metric` if all logs have it; of None, the first FID or Frechet distance that they share."""
    names = [{key.removeprefix("eval/") for line in log for key in line if key.startswith("eval/")} for log in logs]
    shared = sorted(set.intersection(*names))
    require(
        bool(shared),
        "the runs' logs share no score: give runs that train.py --eval-steps has scored (scores of files: --scores)",
    )
    if metric is None:
        metric = next((name for kind in FIRST for name in shared if name.split("/")[-1].split("@")[0] == kind), None)
    if metric not in shared:
        raise UserError(
            f"the runs' logs share no score {metric or 'that is a Frechet distance'}; shared are {', '.join(shared)}: "
            f"choose --metric among them"
        )
    return metric


class _Samples(TypedDict):
    settings: dict[str, Any]


class _Reference(TypedDict):
    sha256: str


class ScoreFile(TypedDict):
    """The fields that are read of a metrics.json of `generate.py --reference`."""

    metrics: dict[str, Number]
    samples: _Samples
    features: Any
    reference: _Reference
    precision_recall: Any


# Settings of the samples that a number depends on, without seeds and the network.
PROTOCOL = (
    "mode",
    "solver",
    "num_steps",
    "grid",
    "timestep_shift",
    "last_step",
    "evaluations",
    "cfg_scale",
    "guidance_low",
    "guidance_high",
    "guidance_channels",
    "weights",
    "labels",
    "rounding",
    "decoder",
    "precision",
    "num_fid_samples",
)


def protocol(score: ScoreFile) -> dict[str, Any]:
    """Everything that two scores must share to be shown in one column or figure."""
    settings = score["samples"]["settings"]
    # a scale of 1 does not guide: it is no part of the protocol, as in records without the option
    guides = settings.get("internal_scale", 1) != 1
    internal = {str(name): settings[name] for name in ("internal_scale", "internal") if guides and name in settings}
    return {
        **{name: settings.get(name) for name in PROTOCOL},
        **internal,
        "features": score["features"],
        "reference": score["reference"]["sha256"],
        "precision_recall": score["precision_recall"],
    }


def from_scores(words: Sequence[str], metric: str | None) -> tuple[Curves, str]:
    """The curves of score files (NAME=metrics.json, one name for all files of a curve) of `generate.py --reference`.

    Raises:
        UserError: a file is not such a score, does not name its step or lacks the metric, or the protocols differ.
    """
    curves: Curves = {}
    first: tuple[str, Any] | None = None
    for name, file in map(named, words):
        remedy = "give metrics.json of one file of samples, as generate.py --reference writes it"
        score = schema.read(ScoreFile, file, remedy, sealed=True)
        step, settings = score["samples"]["settings"].get("step"), protocol(score)
        if not isinstance(step, int):
            raise UserError(f"{file} does not say which step it scored: give scores of a run's checkpoint")
        metric = metric or next((known for known in FIRST if known in score["metrics"]), None)
        if metric not in score["metrics"]:
            raise UserError(f"{file} has no {metric}; choose --metric among {', '.join(score['metrics'])}")
        # one figure shows one protocol: the first file sets it
        first = first or (str(file), settings)
        other = next((key for key, value in settings.items() if value != first[1][key]), "")
        require(
            not other,
            f"{file} and {first[0]} have different {other} ({settings.get(other)} and {first[1].get(other)}): "
            f"they do not belong into one figure",
        )
        curves.setdefault(name, {}).setdefault(step, []).append(score["metrics"][metric])
    assert metric is not None
    return curves, metric


def stops(words: Sequence[str]) -> dict[str, int]:
    """Curve name -> the last logged step with an alignment, for runs that went on without it."""
    ends = {}
    for name, run in map(named, words):
        lines = [line for line in read(run / "log.jsonl") if "loss/diffusion" in line]
        aligned_at = [
            line["step"]
            for line in lines
            if any(key.startswith("loss/") and key != "loss/diffusion" and " " not in key for key in line)
        ]
        if aligned_at and aligned_at[-1] < lines[-1]["step"]:
            ends[name] = int(aligned_at[-1])
    return ends


def whole_log(run: Path) -> list[dict[str, float]]:
    """The lines of a run's log; before those of a branch stand its trunk's, up to where it began.

    Raises UserError if the trunk's log is missing: the rate of its steps is not that of the branch.
    """
    lines, options = read(run / "log.jsonl"), run / "run.json"
    trunk = files.read_json(options)["train"].get("branch_from") if options.is_file() else None
    if trunk is None or not lines:
        return lines
    # --branch-from names a run, RUN@STEP or a folder in RUN/checkpoints
    places = (Path(trunk.rpartition("@")[0] or trunk), Path(trunk).parent.parent)
    folder = next((place for place in places if (place / "log.jsonl").is_file()), None)
    if folder is None:
        raise UserError(f"{run} branches from {trunk}, whose log.jsonl is missing: restore it, for its steps count too")
    return [line for line in whole_log(folder) if line["step"] < lines[0]["step"]] + lines


def spent(run: Path, batch_size: int, step: int) -> tuple[float, float]:
    """Hours of the steps up to `step`, from the rates in the log, and their mean rate in images per second."""
    seconds, before = 0.0, 0
    for line in whole_log(run):
        if line.get("images_per_second", 0) > 0 and before < line["step"] <= step:
            seconds += (line["step"] - before) * batch_size / line["images_per_second"]
            before = int(line["step"])
    return seconds / 3600, before * batch_size / seconds if seconds else 0.0


@dataclass(frozen=True)
class Time:
    """The time that the steps of a run took."""

    name: str
    steps: int
    epochs: float
    rate: float  # images per second
    hours: float  # of wall-clock time
    stage1: float | None  # hours of its teacher up to the step used; 0 without a teacher, None if its log is missing

    @property
    def total(self) -> float | None:
        return None if self.stage1 is None else self.hours + self.stage1


def time_of(word: str) -> Time:
    """The time of NAME=RUN, up to its newest checkpoint (or NAME=RUN@STEP).

    Raises UserError if it has no log or checkpoint.
    """
    name, path = named(word)
    checkpoint = Checkpoint.open(path)
    # A checkpoint lies in RUN/checkpoints.
    run, train = checkpoint.path.parent.parent, checkpoint.config.get("train")
    if train is None or not (run / "log.jsonl").is_file():
        raise UserError(f"{path} is not a run with a log.jsonl: its time is not known")
    hours, rate = spent(run, train["batch_size"], checkpoint.step)
    teacher = checkpoint.config.get("resolved", {}).get("guided", {}).get("teacher")
    stage1: float | None = 0.0
    if teacher is not None:
        folder = Path(teacher["path"])
        source = folder.parent.parent
        known = (folder / "config.json").is_file() and (source / "log.jsonl").is_file()
        stage1 = (
            spent(source, Checkpoint.open(folder).config["train"]["batch_size"], teacher["step"])[0] if known else None
        )
    return Time(name, checkpoint.step, checkpoint.epochs or 0.0, rate, hours, stage1)


def time_table(times: Sequence[Time]) -> str:
    """The table of section 4.5: steps, rate, hours, and hours with stage 1."""
    lines = [["run", "steps", "epochs", "images/s", "hours", "stage 1", "in all"]]
    lines += [
        [
            time.name,
            str(time.steps),
            f"{time.epochs:.4g}",
            f"{time.rate:.4g}",
            f"{time.hours:.3g}",
            "?" if time.stage1 is None else f"{time.stage1:.3g}",
            "?" if time.total is None else f"{time.total:.3g}",
        ]
        for time in times
    ]
    return aligned(lines)
