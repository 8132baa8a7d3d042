"""Tables of pages from files of `benchmarks/results`: the quickstart, floors, times, Muon, internal guidance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime import files
from runtime.text import spread

FOLDER = Path(__file__).parents[1] / "benchmarks" / "results"
Lines = list[list[str]]
# Metrics of the quickstart's table.
_QUICKSTART = {
    "fd": "pixel Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
}


def _read(name: str) -> Any:
    return files.read_json(FOLDER / f"{name}.json")


def quickstart() -> Lines:
    """The rows of `python -m recipes.quickstart` over its seeds."""
    lines = [["network", "steps", "total steps, stage 1 counted", *_QUICKSTART.values()]]
    for rows in zip(*_read("quickstart")["seeds"].values(), strict=True):
        name, step, total = (str(rows[0][key]) for key in ("name", "step", "total"))
        lines.append([name, step, total, *(spread([row[key] for row in rows], 3) for key in _QUICKSTART)])
    return lines


def floors() -> Lines:
    """What images in place of samples score on the photographs, by `python -m benchmarks.floors`."""
    rows = _read("2026-11-29-floors")["rows"]
    metrics = [*next(iter(rows.values()))]
    # + 0.0 makes a rounded -0.0 positive
    return [
        ["images, features", *metrics],
        *([name, *(f"{round(row[metric], 3) + 0.0:.3f}" for metric in metrics)] for name, row in rows.items()),
    ]


def steps() -> Lines:
    """A step of each method in units of a plain step of SiT-Tiny/2, by `python -m benchmarks.train_step`."""
    rates = {name: row["images_per_second"] for name, row in _read("2026-11-29-train-SiT-Tiny-2")["rows"].items()}
    plain = rates.pop("plain")["median"]
    return [
        ["step", "time, of a plain step", "lowest to highest"],
        *(
            [name, f"{plain / rate['median']:.2f}", f"{plain / rate['high']:.2f} to {plain / rate['low']:.2f}"]
            for name, rate in rates.items()
        ),
    ]


def _less(values: Mapping[str, float], others: Mapping[str, float]) -> str:
    """Mean and deviation of the differences, seed by seed."""
    return spread([values[seed] - others[seed] for seed in values], 3)


def _by_seed(rows: Mapping[str, Mapping[str, float]], name: str) -> str:
    return spread([*rows[name].values()], 3) if name in rows else ""


def muon() -> Lines:
    """Muon beside AdamW on the digits."""
    rows = _read("muon-digits")["rows"]["muon"]
    ours = "muon, rate 0.003, 800 steps"
    lines = [["optimiser", "rate", "steps", "Fréchet distance", "minus Muon's, paired by seed"]]
    for title, rate, steps, name in (
        ("AdamW", "0.001", "800", "adamw, rate 0.001, 800 steps"),
        ("AdamW, for as long as Muon takes", "0.001", "1,415", "adamw, rate 0.001, 1415 steps (as long as muon)"),
        ("Muon", "0.003", "800", ours),
    ):
        lines.append([title, rate, steps, _by_seed(rows, name), "" if name == ours else _less(rows[name], rows[ours])])
    return lines


def internal() -> Lines:
    """Internal guidance on the digits."""
    rows = _read("internal-digits")["rows"]["internal"]
    lines = [["network", "w = 1", "w = 1.4", "w = 1.8", "1.4 minus 1"]]
    for title, name in (
        ("plain SiT", "plain"),
        ("`--align internal`", "second velocity"),
        ("stage 1, `--latent-target velocity`", "stage 1, velocity target"),
        ("stage 2 with `--align internal`", "stage 2, second velocity"),
    ):
        at = [f"{name}, w = {scale}" for scale in ("1", "1.4", "1.8")]
        paired = _less(rows[at[1]], rows[at[0]]) if at[1] in rows else ""
        lines.append([title, *(_by_seed(rows, key) for key in at), paired])
    return lines
