"""Post-hoc EMA: averages of a run's weights of any length, computed after training (EDM2, arXiv 2312.02696, sec. 3).

    python train.py ... --ema-lengths 0.05 0.1
    python -m training.posthoc exps/stage2 --lengths 0.03 0.08 0.15
    python generate.py --ckpt exps/stage2/posthoc/0400000-0.08

A run with `--ema-lengths` stores averages whose profile is a power of time,

    p(s; t) = (gamma + 1) s^gamma / t^(gamma + 1)    for 0 <= s <= t,

as snapshots at regular steps. The length is the profile's standard deviation divided by t. The average of another
length is the weighted sum of snapshots whose profile is nearest to it (least squares); the distance is reported as a
share of its norm. Each result is a checkpoint. A branch also uses the snapshots of its trunk up to where it began.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import require_lengths
from models import checkpoint
from models.checkpoint import Checkpoint
from runtime import errors, progress
from runtime.errors import note, require
from runtime.options import option, read
from runtime.text import quoted

if TYPE_CHECKING:
    from torch import Tensor

# A result gets a warning if its profile is farther than this from the requested one.
NEAR = 0.02


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `python -m training.posthoc RUN`."""

    run: str = option(help="run with --ema-lengths (may be given as first word)")
    lengths: tuple[float, ...] = option(help="lengths of the new averages, as shares of the time trained")
    step: int | None = option(None, help="step of the new averages (default: that of the last snapshot)")
    out: str | None = option(None, help="folder of the checkpoints, STEP-LENGTH each (default: RUN/posthoc)")

    def __post_init__(self) -> None:
        require(bool(self.lengths), "--lengths is empty: give one or more, such as 0.05 0.1")
        require_lengths("--lengths", self.lengths)


def inner_products(
    steps: np.ndarray, exponents: np.ndarray, other_steps: np.ndarray, other_exponents: np.ndarray
) -> np.ndarray:
    """Integrals over time of products of two profiles, from their last steps and exponents (eq. 151); broadcasts."""
    early = np.where(steps < other_steps, other_exponents, -exponents)
    return (
        (exponents + 1)
        * (other_exponents + 1)
        * (steps / other_steps) ** early
        / ((exponents + other_exponents + 1) * np.maximum(steps, other_steps))
    )


def coefficients(stored: Sequence[tuple[int, float]], step: int, length: float) -> tuple[np.ndarray, float]:
    """The weight of each stored average, a (step, length), in the average of `length` at `step` (algorithm 3).

    Returns the weights, which sum to 1, and the distance of the two profiles as a share of the requested one's norm.
    """
    from training.ema import exponent

    steps, exponents = np.array([at for at, _ in stored], float), np.array([exponent(of) for _, of in stored])
    at, wanted = np.float64(step), np.float64(exponent(length))
    gram = inner_products(steps[:, None], exponents[:, None], steps, exponents)
    target = inner_products(steps, exponents, at, wanted)
    solved = np.linalg.lstsq(gram, target, rcond=None)[0]
    solved /= solved.sum()
    norm = inner_products(at, wanted, at, wanted)
    return solved, math.sqrt(max(0.0, norm - 2 * solved @ target + solved @ gram @ solved) / norm)


def snapshots(run: Path | str) -> list[Checkpoint]:
    """The stored averages of `run`, earliest first, with those of its trunk up to where it branched."""
    stored = [Checkpoint.open(folder) for folder in reversed(checkpoint.saved(Path(run) / "averages"))]
    branch_from = stored[0].config["train"].get("branch_from") if stored else None
    if branch_from is None:
        return stored
    trunk, _, step = branch_from.rpartition("@")
    return [earlier for earlier in snapshots(trunk) if earlier.step <= int(step)] + stored


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the command; returns the checkpoints written."""
    options = read(Options, argv, prog="python -m training.posthoc", description=__doc__, first="run")
    stored = snapshots(options.run)
    require(bool(stored), f"{options.run} has no averages to combine: train with --ema-lengths 0.05 0.1")
    step = stored[-1].step if options.step is None else options.step
    known = [snapshot.step for snapshot in stored]
    require(
        step in known,
        f"--step {step}: {options.run} has no averages of that step; choose one of {', '.join(map(str, known))}",
    )
    stored = [snapshot for snapshot in stored if snapshot.step <= step]
    out = Path(options.out or Path(options.run) / "posthoc")
    return [write(out / f"{step:07d}-{length:g}", stored, length) for length in options.lengths]


def write(path: Path, stored: Sequence[Checkpoint], length: float) -> Path:
    """Write the average of `length` at the step of the last of `stored` as a checkpoint; prints its distance."""
    last = stored[-1]
    members = [(snapshot, of) for snapshot in stored for of in snapshot.config["train"]["ema_lengths"]]
    shares, distance = coefficients([(snapshot.step, of) for snapshot, of in members], last.step, length)
    sums = _weighted_sums(members, shares.tolist(), f"length {length:g}")
    # the description is that of the run's last snapshot, of which this is another average
    copied = ("data", "train", "align", "resolved", "velocity_heads", "precision")
    about: dict[str, Any] = {key: last.config[key] for key in copied if key in last.config}
    checkpoint.write(
        path,
        spec=last.spec,
        space=last.space,
        step=last.step,
        network={},
        ema=sums.pop(""),
        averages={f"{name}ema": total for name, total in sums.items()},
        **about,
        posthoc={"length": length, "distance": distance, "snapshots": len(stored)},
    )
    print(f"written: {quoted(path)}, of length {length:g} after step {last.step}; its profile is off by {distance:.2%}")
    if distance > NEAR:
        lengths = " and ".join(map(str, last.config["train"]["ema_lengths"]))
        note(
            f"{len(stored)} snapshots do not hold an average of length {length:g}: train with smaller "
            f"ema_snapshot_steps (--config), or ask for a length nearer to {lengths}"
        )
    return path


def _weighted_sums(
    members: Sequence[tuple[Checkpoint, float]], shares: Sequence[float], title: str
) -> dict[str, dict[str, Tensor]]:
    """Sums of the stored averages, each weighted by its share: of the network ("") and of each head ("NAME-head-")."""
    from training.ema import stored_name

    last, suffix = members[-1][0], f"{stored_name(members[-1][1])}.safetensors"
    prefixes = [name.removesuffix(suffix) for name in last.files if name.endswith(suffix)]
    # a head that an earlier snapshot lacks cannot be averaged
    sums: dict[str, dict[str, Tensor]] = {
        prefix: {}
        for prefix in prefixes
        if all(f"{prefix}{stored_name(of)}.safetensors" in snapshot.files for snapshot, of in members)
    }
    with progress.bar(total=len(members), desc=title) as bar:
        for (snapshot, of), share in zip(members, shares, strict=True):
            for prefix, total in sums.items():
                for key, value in snapshot.tensors(f"{prefix}{stored_name(of)}").items():
                    total[key] = share * value if key not in total else total[key].add_(value, alpha=share)
            bar.update()
    return sums


if __name__ == "__main__":
    errors.run(main)
