"""What the logs of runs say: scores against steps, where an alignment ended, hours and rates with stage 1 counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from models.checkpoint import Checkpoint
from runtime import schema
from runtime.errors import require
from runtime.jsonlines import read
from runtime.schema import Number
from runtime.text import aligned

Curves = dict[str, dict[float, list[float]]]
"""Name -> step -> values, one a seed."""
FIRST = ("fid", "fd")
"""The metrics that a curve shows where none is asked for, in this order."""


def named(word: str) -> tuple[str, Path]:
    """NAME=PATH as its two parts; a path alone is called after its last part."""
    name, at, path = word.partition("=")
    return (name, Path(path)) if at else (Path(word).name, Path(word))


def from_logs(words: Sequence[str], metric: str | None) -> tuple[Curves, str]:
    """The curves of runs (NAME=RUN, one name for all seeds of a setting) and the metric that they show.

    `metric` is a name of the logs without `eval/`, such as fid@5000; None takes the first FID or Frechet distance in all logs.

    Raises:
        UserError: a run without a log or without scores, a metric that a run lacks.
    """
    logs = [(name, run, read(run / "log.jsonl")) for name, run in map(named, words)]
    for _, run, lines in logs:
        require(bool(lines), f"{run} has no log.jsonl with lines in it: name a run's folder")
    known = [
        {key.removeprefix("eval/") for line in lines for key in line if key.startswith("eval/")} for _, _, lines in logs
    ]
    shared = sorted(set.intersection(*known))
    if metric is None:
        metric = next((name for kind in FIRST for name in shared if name.split("/")[-1].split("@")[0] == kind), None)
    require(
        bool(shared),
        "the runs' logs share no score: give runs that train.py --eval-steps has scored (scores of files: --scores)",
    )
    require(
        metric in shared,
        f"the runs' logs share no score {metric or 'that is a Frechet distance'}; shared are {', '.join(shared)}: "
        f"choose --metric among them",
    )
    curves: Curves = {}
    for name, _, lines in logs:
        for line in lines:
            if f"eval/{metric}" in line:
                curves.setdefault(name, {}).setdefault(line["step"], []).append(line[f"eval/{metric}"])
    return curves, metric


class _Samples(TypedDict):
    settings: dict[str, Any]


class _Reference(TypedDict):
    sha256: str


class ScoreFile(TypedDict):
    """What is read of a metrics.json of `generate.py --reference`."""

    metrics: dict[str, Number]
    samples: _Samples
    features: Any
    reference: _Reference
    precision_recall: Any


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
"""Settings of the samples that a number depends on; seeds and the network are not among them."""


def protocol(score: ScoreFile) -> dict[str, Any]:
    """All that two numbers must share to stand in one column or figure."""
    settings = score["samples"]["settings"]
    # a scale of 1 does not guide: it is no part of the protocol, as in records without the option
    guides = settings.get("internal_scale", 1) != 1
    internal = {name: settings[name] for name in ("internal_scale", "internal") if guides and name in settings}
    return {
        **{name: settings.get(name) for name in PROTOCOL},
        **internal,
        "features": score["features"],
        "reference": score["reference"]["sha256"],
        "precision_recall": score["precision_recall"],
    }


def from_scores(words: Sequence[str], metric: str | None) -> tuple[Curves, str]:
    """The curves of score files (NAME=metrics.json, one name for all files of a curve), as `generate.py --reference` writes them.

    Raises:
        UserError: a file that is no such score, does not say which step it scored or lacks the metric, or files under different protocols.
    """
    curves: Curves = {}
    first: tuple[str, Any] | None = None
    for name, file in map(named, words):
        score = schema.read(
            ScoreFile, file, "give metrics.json of one file of samples, as generate.py --reference writes it"
        )
        step, told = score["samples"]["settings"].get("step"), protocol(score)
        require(isinstance(step, int), f"{file} does not say which step it scored: give scores of a run's checkpoint")
        metric = metric or next((known for known in FIRST if known in score["metrics"]), None)
        require(
            metric in score["metrics"], f"{file} has no {metric}; choose --metric among {', '.join(score['metrics'])}"
        )
        first = first or (str(file), told)
        other = next((key for key, value in told.items() if value != first[1][key]), None)
        require(
            other is None,
            f"{file} and {first[0]} have different {other} ({told.get(other or '')} and {first[1].get(other or '')}): "
            f"they do not belong into one figure",
        )
        curves.setdefault(name, {}).setdefault(step, []).append(score["metrics"][metric])
    return curves, metric


def stops(words: Sequence[str]) -> dict[str, int]:
    """Curve name -> the last logged step with an alignment, for runs that went on without it."""
    found = {}
    for name, run in map(named, words):
        lines = [line for line in read(run / "log.jsonl") if "loss/diffusion" in line]
        aligned_at = [
            line["step"]
            for line in lines
            if any(key.startswith("loss/") and key != "loss/diffusion" and " " not in key for key in line)
        ]
        if aligned_at and aligned_at[-1] < lines[-1]["step"]:
            found[name] = aligned_at[-1]
    return found


def spent(run: Path, batch_size: int, step: int) -> tuple[float, float]:
    """Hours of the steps up to `step`, from the rates in the run's log, and their mean rate in images per second."""
    seconds, before = 0.0, 0
    for line in read(run / "log.jsonl"):
        if line.get("images_per_second", 0) > 0 and before < line["step"] <= step:
            seconds += (line["step"] - before) * batch_size / line["images_per_second"]
            before = line["step"]
    return seconds / 3600, before * batch_size / seconds if seconds else 0.0


@dataclass(frozen=True)
class Time:
    """What a run took, in wall-clock hours of its steps."""

    name: str
    steps: int
    epochs: float
    rate: float
    """Images per second."""
    hours: float
    stage1: float | None
    """Hours of its teacher up to the step that taught; 0 without one, None where that run's log is not there."""

    @property
    def total(self) -> float | None:
        return None if self.stage1 is None else self.hours + self.stage1


def time_of(word: str) -> Time:
    """The time of NAME=RUN, up to its newest checkpoint (or NAME=RUN@STEP). Raises UserError where it has no log or checkpoint."""
    name, path = named(word)
    checkpoint = Checkpoint.open(path)
    run, train = _run(checkpoint.path), checkpoint.config.get("train")
    require(
        train is not None and (run / "log.jsonl").is_file(),
        f"{path} is not a run with a log.jsonl: its time is not known",
    )
    hours, rate = spent(run, train["batch_size"], checkpoint.step)
    teacher = checkpoint.config.get("resolved", {}).get("guided", {}).get("teacher")
    stage1: float | None = 0.0
    if teacher is not None:
        source, folder = _run(Path(teacher["path"])), Path(teacher["path"])
        known = (folder / "config.json").is_file() and (source / "log.jsonl").is_file()
        stage1 = (
            spent(source, Checkpoint.open(folder).config["train"]["batch_size"], teacher["step"])[0] if known else None
        )
    return Time(name, checkpoint.step, checkpoint.epochs or 0.0, rate, hours, stage1)


def _run(checkpoint: Path) -> Path:
    """The run's folder of a checkpoint in its `checkpoints`."""
    return checkpoint.parent.parent


def time_table(times: Sequence[Time]) -> str:
    """The table of section 4.5: steps, rate, hours, and hours with stage 1."""
    lines = [["run", "steps", "epochs", "images/s", "hours", "stage 1", "in all"]]
    for one in times:
        lines.append(
            [
                one.name,
                str(one.steps),
                f"{one.epochs:.4g}",
                f"{one.rate:.4g}",
                f"{one.hours:.3g}",
                "?" if one.stage1 is None else f"{one.stage1:.3g}",
                "?" if one.total is None else f"{one.total:.3g}",
            ]
        )
    return aligned(lines)
