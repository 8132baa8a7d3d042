"""Golden curves: the losses of every method over 200 steps on the digits, committed, and compared within a band.

    python -m tests.golden            measure again and compare
    python -m tests.golden --write    measure and commit (after a change that is meant to move them)

Bits differ between processors and torch releases, so curves are compared within `BAND`. It is narrow enough that a
wrong factor of two in any term of a loss falls outside; a test makes sure of that.
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

import torch

import train
import train_guide
from preprocessing import digits
from recipes.encoder import train_encoder
from runtime import errors, files, jsonlines, progress
from runtime.errors import require
from runtime.options import option, read

# Each logged loss and the gradient norm, as means of every ten steps.
Curves = dict[str, list[float]]

FILE = Path(__file__).with_name("curves.json")
# Relative difference of a value of a curve that still counts as the same.
BAND = 0.02
# Steps that one value of a curve is the mean of.
EVERY = 10
METHODS = {
    "none": "",
    "lightningdit": "--model LightningDiT-Tiny/1 --velocity-loss mse+cosine --time-sampling logit-normal",
    "latent": "--align latent --align-hidden 64",
    "latent-upstream": "--align latent --align-hidden 64 --preset upstream",
    "latent-sra2": "--align latent --align-hidden 64 --preset sra2",
    "guided": "--guiding-ckpt {work}/exps/teacher --align-hidden 64 --align-stop-steps 100",
    "guided-upstream": "--guiding-ckpt {work}/exps/teacher --align-hidden 64 --preset upstream",
    "repa": "--align repa --align-encoder {work}/encoder --align-hidden 64",
    "haste": "--align haste --align-encoder {work}/encoder --align-hidden 64",
    "dispersive": "--align dispersive",
    "layersync": "--align layersync",
    "sra": "--align sra",
}
TEACHER = "--align latent --align-hidden 64 --align-depth 3 --max-train-steps 20"


@dataclass(frozen=True, kw_only=True)
class Options:
    steps: int = option(200, help="optimiser steps of each curve")
    write: bool = option(False, help="write the golden curves instead of comparing with them")
    methods: tuple[str, ...] = option(tuple(METHODS), choices=tuple(METHODS), help="which curves")

    def __post_init__(self) -> None:
        positive = self.steps > 0 and self.steps % EVERY == 0
        require(positive, f"--steps {self.steps} must be a positive multiple of {EVERY}")


def measure(method: str, steps: int, work: Path, words: Sequence[str] = (), name: str | None = None) -> Curves:
    """The curves of one method.

    Args:
        work: folder of the runs, and of the data, teacher and encoder that several methods share.
        words: more options of the run.
        name: name of the run (default: the method).
    """
    with contextlib.redirect_stdout(io.StringIO()):
        _prepare(method, work)
        argv = ["--exp-name", name or method, "--max-train-steps", str(steps), *METHODS[method].split(), *words]
        command = train_guide if method.startswith("guided") else train
        run = command.main([*_common(work), *(word.format(work=work) for word in argv)])
    lines = jsonlines.read(run / "log.jsonl")
    # "loss/guided t<0.5" and the like are parts of a loss
    names = [key for key in lines[0] if key == "grad_norm" or (key.startswith("loss/") and " " not in key)]
    return {key: [line[key] for line in lines if key in line] for key in names}


def _prepare(method: str, work: Path) -> None:
    """Make what the runs of `method` read and `work` lacks."""
    if not (work / "digits" / "manifest.json").is_file():
        digits.main(["--out", str(work / "digits")])
    if method.startswith("guided") and not (work / "exps" / "teacher").is_dir():
        train.main([*_common(work), "--exp-name", "teacher", *TEACHER.split()])
    if method in ("repa", "haste") and not (work / "encoder" / "accuracy.json").is_file():
        train_encoder(work / "encoder", epochs=1)


def _common(work: Path) -> list[str]:
    places = ["--data-dir", str(work / "digits"), "--output-dir", str(work / "exps")]
    return [*places, *f"--recipe digits --batch-size 16 --log-steps {EVERY} --mixed-precision no --compile off".split()]


def differences(measured: Curves, golden: Curves) -> list[str]:
    """The first place of each curve that leaves the band, in words. A shorter curve is compared with the beginning."""
    problems = [f"{name} is missing" for name in golden if name not in measured]
    problems += [f"{name} is new" for name in measured if name not in golden]
    for name in [name for name in golden if name in measured]:
        for place, (actual, expected) in enumerate(zip(measured[name], golden[name]), start=1):
            if abs(actual - expected) > BAND * abs(expected):
                problems.append(f"{name} at step {EVERY * place} is {actual:.6g}, not {expected:.6g}")
                break
    return problems


def main(argv: Sequence[str] | None = None) -> None:
    """Write the curves, or compare. Raises UserError if a curve left the band."""
    words = sys.argv[1:] if argv is None else argv
    options = read(Options, words, prog="python -m tests.golden", description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        methods = progress.bar(options.methods, desc="curves", unit="curve")
        measured = {method: measure(method, options.steps, Path(folder)) for method in methods}
    golden = files.read_json(FILE)
    if options.write:
        about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine()}
        scale = {"every": EVERY, "steps": options.steps}
        files.write_json(FILE, {**about, **scale, "curves": {**golden["curves"], **measured}})
        print(f"wrote {FILE.name}: {', '.join(measured)}")
        return
    problems = {method: differences(curves, golden["curves"][method]) for method, curves in measured.items()}
    for method, places in problems.items():
        print(f"{method}: {'; '.join(places) or f'within {BAND:.0%}'}")
    wrong = [method for method, places in problems.items() if places]
    remedy = "if the change is meant, run python -m tests.golden --write"
    require(not wrong, f"the losses of {', '.join(wrong)} left the band; {remedy}")


if __name__ == "__main__":
    errors.run(main)
