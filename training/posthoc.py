"""Post-hoc EMA: averages of a run's weights of any length, made after training (EDM2, arXiv 2312.02696, section 3).

    python train.py ... --ema-lengths 0.05 0.1
    python -m training.posthoc exps/stage2 --lengths 0.03 0.08 0.15
    python generate.py --ckpt exps/stage2/posthoc/0400000-0.08

A run with `--ema-lengths` keeps averages whose profile is a power of time,

    p(s; t) = (gamma + 1) s^gamma / t^(gamma + 1)    for 0 <= s <= t,

and stores them every so many steps. Its length is the profile's standard deviation divided by t. The average of another length
is the sum of the stored ones whose profile is nearest to it (least squares); how near is told as a share of its norm. Each result
is a checkpoint. Snapshots of the run that a run branched from are used up to there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from config import require_lengths
from models import checkpoint
from models.checkpoint import Checkpoint
from runtime import errors, progress
from runtime.errors import note, require
from runtime.options import option, read
from training.ema import exponent, stored_name

NEAR = 0.02
"""A result whose profile is farther than this from the one asked for is warned of."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `python -m training.posthoc RUN`."""

    run: str = option(help="run that kept averages with --ema-lengths (may be given as first word)")
    lengths: tuple[float, ...] = option(help="lengths to make, as shares of the time trained")
    step: int | None = option(None, help="after this step (default: the last one that was kept)")
    out: str | None = option(None, help="folder of the checkpoints, STEP-LENGTH each (default: RUN/posthoc)")

    def __post_init__(self) -> None:
        require(bool(self.lengths), "--lengths names none: give one or more, such as 0.05 0.1")
        require_lengths("--lengths", self.lengths)


def inner_products(
    steps: np.ndarray, exponents: np.ndarray, other_steps: np.ndarray, other_exponents: np.ndarray
) -> np.ndarray:
    """Integrals over time of the products of two profiles, given by their last steps and exponents (eq. 151); broadcasts."""
    early = np.where(steps < other_steps, other_exponents, -exponents)
    return (
        (exponents + 1)
        * (other_exponents + 1)
        * (steps / other_steps) ** early
        / ((exponents + other_exponents + 1) * np.maximum(steps, other_steps))
    )


def coefficients(stored: Sequence[tuple[int, float]], step: int, length: float) -> tuple[np.ndarray, float]:
    """What each stored average, a (step, length), counts in the average of `length` at `step`; they sum to 1 (algorithm 3).

    Returns them and the distance of the two profiles as a share of the norm of the one wanted.
    """
    steps, exponents = np.array([at for at, _ in stored], float), np.array([exponent(of) for _, of in stored])
    at, wanted = np.float64(step), np.float64(exponent(length))
    gram = inner_products(steps[:, None], exponents[:, None], steps, exponents)
    target = inner_products(steps, exponents, at, wanted)
    solved = np.linalg.lstsq(gram, target, rcond=None)[0]
    solved /= solved.sum()
    norm = inner_products(at, wanted, at, wanted)
    return solved, math.sqrt(max(0.0, norm - 2 * solved @ target + solved @ gram @ solved) / norm)


def snapshots(run: Path | str) -> list[Checkpoint]:
    """The stored averages of `run`, the earliest first, those of the run that it branched from among them."""
    kept = [Checkpoint.open(folder) for folder in reversed(checkpoint.saved(Path(run) / "averages"))]
    trunk = kept[0].config["train"].get("branch_from") if kept else None
    if trunk is None:
        return kept
    trunk, _, step = trunk.rpartition("@")
    return [earlier for earlier in snapshots(trunk) if earlier.step <= int(step)] + kept


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the command; returns the checkpoints written."""
    options = read(
        Options,
        sys.argv[1:] if argv is None else argv,
        prog="python -m training.posthoc",
        description=__doc__,
        first="run",
    )
    kept = snapshots(options.run)
    require(bool(kept), f"{options.run} keeps no averages to make others of: train with --ema-lengths 0.05 0.1")
    step = kept[-1].step if options.step is None else options.step
    known = [one.step for one in kept]
    require(
        step in known,
        f"--step {step}: {options.run} keeps no averages of that step; choose one of {', '.join(map(str, known))}",
    )
    kept = [earlier for earlier in kept if earlier.step <= step]
    out = Path(options.out or Path(options.run) / "posthoc")
    return [write(out / f"{step:07d}-{length:g}", kept, length) for length in options.lengths]


def write(path: Path, kept: Sequence[Checkpoint], length: float) -> Path:
    """Write the average of `length` at the step of the last of `kept` as a checkpoint; says how near its profile comes."""
    last = kept[-1]
    stored = [(one, of) for one in kept for of in one.config["train"]["ema_lengths"]]
    shares, distance = coefficients([(one.step, of) for one, of in stored], last.step, length)
    suffix = stored_name(stored[-1][1])
    whose = [
        name.removesuffix(f"{suffix}.safetensors") for name in last.files if name.endswith(f"{suffix}.safetensors")
    ]
    whose = [name for name in whose if all(f"{name}{stored_name(of)}.safetensors" in one.files for one, of in stored)]
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in whose}
    with progress.bar(total=len(stored), desc=f"length {length:g}") as bar:
        for (one, of), share in zip(stored, shares.tolist(), strict=True):
            for name, total in sums.items():
                for key, value in one.tensors(f"{name}{stored_name(of)}").items():
                    total[key] = share * value if key not in total else total[key].add_(value, alpha=share)
            bar.update()
    about: dict[str, Any] = {
        key: last.config[key]
        for key in ("data", "train", "align", "resolved", "velocity_heads", "precision")
        if key in last.config
    }
    checkpoint.write(
        path,
        spec=last.spec,
        space=last.space,
        step=last.step,
        network={},
        ema=sums.pop(""),
        averages={f"{name}ema": total for name, total in sums.items()},
        **about,
        posthoc={"length": length, "distance": distance, "snapshots": len(kept)},
    )
    print(
        f"written: {path}, the average of length {length:g} after step {last.step}; its profile is off by {distance:.2%}"
    )
    if distance > NEAR:
        note(
            f"{len(kept)} snapshots do not hold an average of length {length:g}: train with a smaller --ema-snapshot-steps, or ask for a "
            f"length nearer to {' and '.join(map(str, last.config['train']['ema_lengths']))}"
        )
    return path


if __name__ == "__main__":
    errors.run(main)
