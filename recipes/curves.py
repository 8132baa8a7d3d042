"""Golden curves: the losses of every method over 200 steps on the digits, committed, and compared within a band.

    python -m recipes check curves            measure again and compare
    python -m recipes.curves --write          measure and commit (after a change that is meant to move them)

Bits differ between processors and torch releases, so curves are compared within `BAND`; it is narrow enough that a wrong
factor of two in any term of a loss falls outside (a test makes sure that it does).
"""

from __future__ import annotations

import contextlib
import datetime
import io
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from preprocessing import digits
from recipes.encoder import train_encoder
from runtime import errors, files, progress
from runtime.errors import require
from runtime.options import option, read
from training.log import read as read_log

FILE = Path(__file__).with_name("curves.json")
BAND = 0.02
"""Relative difference of a value of a curve that still counts as the same."""
EVERY = 10
"""Steps that one value of a curve is the mean of."""
METHODS: dict[str, tuple[str, ...]] = {
    "none": (),
    "lightningdit": (
        "--model",
        "LightningDiT-Tiny/1",
        "--velocity-loss",
        "mse+cosine",
        "--time-sampling",
        "logit-normal",
    ),
    "latent": ("--align", "latent"),
    "latent-upstream": ("--align", "latent", "--preset", "upstream"),
    "latent-sra2": ("--align", "latent", "--preset", "sra2"),
    "guided": ("--align-stop-steps", "100"),
    "guided-upstream": ("--preset", "upstream"),
    "repa": ("--align", "repa"),
    "haste": ("--align", "haste"),
    "dispersive": ("--align", "dispersive"),
    "layersync": ("--align", "layersync"),
    "sra": ("--align", "sra"),
}


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """Options of the measurement."""

    steps: int = option(200, help="optimiser steps of each curve")
    write: bool = option(False, help="write the golden curves instead of comparing with them")
    methods: tuple[str, ...] = option(tuple(METHODS), help="which curves")

    def __post_init__(self) -> None:
        require(
            self.steps > 0 and self.steps % EVERY == 0, f"--steps {self.steps} must be a positive multiple of {EVERY}"
        )
        unknown = set(self.methods) - set(METHODS)
        require(not unknown, f"no curve is called {min(unknown, default='')}; there are {', '.join(METHODS)}")


def measure(method: str, steps: int, work: Path, more: Sequence[str] = ()) -> dict[str, list[float]]:
    """The curves of one method: each logged loss, the mean of every ten steps. `work` holds what several methods share."""
    import train
    import train_guide

    data, encoder, exps = work / "digits", work / "encoder", work / "exps"
    words = [
        "--recipe",
        "digits",
        "--data-dir",
        str(data),
        "--output-dir",
        str(exps),
        "--batch-size",
        "16",
        "--log-steps",
        str(EVERY),
        "--mixed-precision",
        "no",
        "--compile",
        "off",
    ]
    hidden = ["--align-hidden", "64"]
    with contextlib.redirect_stdout(io.StringIO()):
        if not (data / "manifest.json").is_file():
            digits.main(["--out", str(data)])
        if method.startswith("guided") and not (exps / "teacher").is_dir():
            train.main(
                [
                    *words,
                    *hidden,
                    "--exp-name",
                    "teacher",
                    "--align",
                    "latent",
                    "--align-depth",
                    "3",
                    "--max-train-steps",
                    "20",
                ]
            )
        if method in ("repa", "haste") and not (encoder / "accuracy.json").is_file():
            train_encoder(encoder, epochs=1)
        argv = [*words, "--exp-name", method, "--max-train-steps", str(steps), *METHODS[method], *more]
        argv += hidden if method.startswith(("latent", "guided", "repa", "haste")) else []
        argv += ["--align-encoder", str(encoder)] if method in ("repa", "haste") else []
        if method.startswith("guided"):
            run = train_guide.main([*argv, "--guiding-ckpt", str(exps / "teacher")])
        else:
            run = train.main(argv)
    lines = read_log(run / "log.jsonl")
    names = [
        name
        for name in lines[0]
        if name in ("grad_norm", "loss/diffusion") or (name.startswith("loss/") and " " not in name)
    ]
    return {name: [line[name] for line in lines if name in line] for name in names}


def differences(measured: dict[str, list[float]], golden: dict[str, list[float]]) -> list[str]:
    """Where curves leave the band: the first place of each, in words. A shorter measurement is held against the beginning."""
    faults = [f"{name} is missing" for name in golden if name not in measured]
    faults += [f"{name} is new" for name in measured if name not in golden]
    for name in golden.keys() & measured.keys():
        for place, (now, then) in enumerate(zip(measured[name], golden[name])):
            if abs(now - then) > BAND * abs(then):
                faults.append(f"{name} at step {EVERY * (place + 1)} is {now:.6g}, not {then:.6g}")
                break
    return faults


def check(methods: Sequence[str] = tuple(METHODS), steps: int = 200) -> dict[str, list[str]]:
    """The faults of each method's curves, measured anew on one thread."""
    golden = files.read_json(FILE)["curves"]
    return {method: differences(values, golden[method]) for method, values in measured(methods, steps).items()}


def measured(methods: Sequence[str], steps: int) -> dict[str, dict[str, list[float]]]:
    """The curves of several methods, with a progress bar."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return {
                method: measure(method, steps, Path(folder))
                for method in progress.bar(methods, desc="curves", unit="curve")
            }
    finally:
        torch.set_num_threads(threads)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = read(
        CurvesConfig, sys.argv[1:] if argv is None else argv, prog="python -m recipes.curves", description=__doc__
    )
    if config.write:
        about: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "every": EVERY,
            "steps": config.steps,
        }
        kept = files.read_json(FILE)["curves"] if FILE.is_file() else {}
        files.write_json(FILE, {**about, "curves": {**kept, **measured(config.methods, config.steps)}})
        print(f"wrote {FILE.name}: {', '.join(config.methods)}")
        return
    report(check(config.methods, config.steps))


def report(faults: dict[str, list[str]]) -> None:
    """Print a line for each method. Raises UserError where a curve left the band."""
    for method, found in faults.items():
        print(f"{method}: {'; '.join(found) or f'within {BAND:.0%}'}")
    wrong = [method for method, found in faults.items() if found]
    require(
        not wrong, f"the losses of {', '.join(wrong)} left the band; if that is meant, python -m recipes.curves --write"
    )


if __name__ == "__main__":
    errors.run(main)
