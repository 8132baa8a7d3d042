"""Internal Guidance and Muon on the embedded digits, over several seeds: two tables.

    python -m recipes.beyond_digits --steps 800 --seeds 0 1 2 3 4

Internal guidance: four networks (plain; with the second velocity; stage 1 with a velocity target; stage 2 with the second velocity),
each drawn at every scale of `--scales`, 1 being none. Muon: both optimisers at their best rate of `--rates`, found on the first seed
by the Frechet distance, after equal steps; and AdamW for as long as Muon takes, by the processor time of those first runs. Run it
again to continue: what is finished is kept.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.checkpoint import versions
from recipes.compare_digits import prepare
from runtime import errors, files
from runtime.errors import require
from runtime.options import option, read
from runtime.text import aligned, spread


@dataclass(frozen=True, kw_only=True)
class BeyondConfig:
    """Options of the measurement."""

    out: str = option("runs/beyond", help="folder of everything it trains and draws")
    results: str = option("benchmarks/results/beyond-digits", help="where the tables go: this name with .txt and .json")
    parts: tuple[str, ...] = option(("internal", "muon"), help="which tables: internal, muon")
    steps: int = option(800, help="optimiser steps of every row")
    seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), help="seeds of every row")
    batch_size: int = option(64, help="samples per step")
    samples: int = option(1000, help="samples per row and seed")
    scales: tuple[float, ...] = option((1.0, 1.2, 1.4, 1.8), help="internal scales, 1 among them")
    rates: tuple[float, ...] = option(
        (3e-4, 1e-3, 3e-3, 1e-2), help="learning rates that both optimisers are tuned over"
    )

    def __post_init__(self) -> None:
        require(
            self.steps >= 4 and self.steps % 4 == 0,
            f"--steps {self.steps} must be a multiple of 4: guidance ends after a quarter",
        )
        require(set(self.parts) <= {"internal", "muon"}, f"--parts {' '.join(self.parts)}: known are internal and muon")
        require(
            1.0 in self.scales, f"--scales {' '.join(map(str, self.scales))} lack 1, which the others are compared with"
        )


NETWORKS = {
    "plain": "",
    "second velocity": "--align internal",
    "stage 1, velocity target": "--align latent --latent-target velocity",
    "stage 2, second velocity": "--align internal --guiding-ckpt {teacher} --guided-stop-steps {quarter}",
}


class Digits:
    """Trains, draws and scores; every result is a file that another call finds again."""

    def __init__(self, config: BeyondConfig) -> None:
        self.config, self.out = config, Path(config.out)
        prepare(self.out)

    def train(self, name: str, seed: int, words: str = "", steps: int | None = None) -> Path:
        """The run `name` under `seed`, to its last step, and beside it the processor seconds that it took."""
        import train
        import train_guide

        steps = steps or self.config.steps
        exps = self.out / f"steps{steps}-batch{self.config.batch_size}" / f"seed{seed}"
        run, program = exps / name, train_guide if "--guiding-ckpt" in words else train
        if not (run / "seconds.json").is_file():
            argv = [
                "--recipe",
                "digits",
                "--data-dir",
                str(self.out / "data"),
                "--output-dir",
                str(exps),
                "--exp-name",
                name,
                "--seed",
                str(seed),
                "--batch-size",
                str(self.config.batch_size),
                "--max-train-steps",
                str(steps),
                "--checkpointing-steps",
                str(max(1, steps // 2)),
                *words.split(),
            ]
            began = time.process_time()
            program.main(argv)
            files.write_json(run / "seconds.json", time.process_time() - began)
        return run

    def score(self, run: Path, *more: str) -> float:
        """The Frechet distance in pixels of samples of `run`."""
        import generate

        drawn = run / "samples" / ("-".join(more).replace("--", "") or "plain")
        if not (drawn / "metrics.json").is_file():
            generate.main(
                [
                    "--ckpt",
                    str(run),
                    "--num-fid-samples",
                    str(self.config.samples),
                    "--mode",
                    "ode",
                    "--solver",
                    "heun",
                    "--num-steps",
                    "12",
                    "--labels",
                    "balanced",
                    "--batch-size",
                    "250",
                    "--reference",
                    str(self.out / "reference.npz"),
                    "--features",
                    "pixels",
                    "--out",
                    str(drawn),
                    *more,
                ]
            )
        return files.read_json(drawn / "metrics.json")["metrics"]["fd"]


def internal(digits: Digits) -> dict[str, dict[int, float]]:
    """'network, scale' -> seed -> Frechet distance."""
    config, found = digits.config, {}
    for seed in config.seeds:
        for name, words in NETWORKS.items():
            teacher = (
                digits.out / f"steps{config.steps}-batch{config.batch_size}" / f"seed{seed}" / "stage-1-velocity-target"
            )
            run = digits.train(
                name.replace(",", "").replace(" ", "-"),
                seed,
                words.format(teacher=f"{teacher}@{config.steps // 2}", quarter=config.steps // 4),
            )
            for scale in config.scales if words else (1.0,):
                more = ("--internal-scale", f"{scale:g}") if scale != 1 else ()
                found.setdefault(f"{name}, w = {scale:g}", {})[seed] = digits.score(run, *more)
    return found


def muon(digits: Digits) -> dict[str, dict[int, float]]:
    """Row -> seed -> Frechet distance; the rates are tuned on the first seed."""
    config, first, found = digits.config, digits.config.seeds[0], {}
    best, seconds = {}, {}
    for optimizer in ("adamw", "muon"):
        runs = {
            rate: digits.train(f"{optimizer}-{rate:g}", first, f"--optimizer {optimizer} --learning-rate {rate:g}")
            for rate in config.rates
        }
        best[optimizer] = min(runs, key=lambda rate, runs=runs: digits.score(runs[rate]))
        seconds[optimizer] = files.read_json(runs[best[optimizer]] / "seconds.json")
    longer = max(config.steps, round(config.steps * seconds["muon"] / seconds["adamw"]))
    for optimizer, steps in (("adamw", config.steps), ("muon", config.steps), ("adamw", longer)):
        rate = best[optimizer]
        row = f"{optimizer}, rate {rate:g}, {steps} steps" + (" (as long as muon)" if steps != config.steps else "")
        found[row] = {
            seed: digits.score(
                digits.train(f"{optimizer}-{rate:g}", seed, f"--optimizer {optimizer} --learning-rate {rate:g}", steps)
            )
            for seed in config.seeds
        }
    return found


def table(found: dict[str, dict[int, float]]) -> str:
    """Mean and standard deviation of each row, and of its difference, seed by seed, to the first row and to the row of the same network
    at scale 1."""

    def less(values: dict[int, float], base: dict[int, float] | None) -> str:
        return "" if base is None or values is base else spread([values[seed] - base[seed] for seed in values], 3)

    first, own = (
        next(iter(found.values())),
        {name: found.get(f"{name.rpartition(', w = ')[0]}, w = 1") for name in found},
    )
    lines = [("row", "Frechet (lower)", "less the first row's", "less its own at w = 1")]
    lines += [
        (name, spread(list(values.values()), 3), less(values, first), less(values, own[name]))
        for name, values in found.items()
    ]
    return aligned(lines if any(own.values()) else [line[:3] for line in lines])


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, dict[int, float]]]:
    """Run the command; returns part -> row -> seed -> Frechet distance."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = read(BeyondConfig, words, prog="python -m recipes.beyond_digits", description=__doc__)
    digits = Digits(config)
    found = {part: {"internal": internal, "muon": muon}[part](digits) for part in config.parts}
    text = (
        f"Digits, SiT-Tiny/2, batch {config.batch_size}, seeds {' '.join(map(str, config.seeds))}, {config.samples} samples (Heun, 12 "
        f"steps, EMA weights); mean ± standard deviation over seeds.\n\n"
        + "\n\n".join(table(rows) for rows in found.values())
        + "\n"
    )
    print(f"\n{text}", flush=True)
    with files.replacing(f"{config.results}.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    files.write_json(
        f"{config.results}.json",
        {
            "command": f"python -m recipes.beyond_digits {shlex.join(words)}",
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} CPU cores, {platform.system()}",
            "versions": versions(),
            "steps": config.steps,
            "batch_size": config.batch_size,
            "samples": config.samples,
            "rows": found,
        },
    )
    return found


if __name__ == "__main__":
    errors.run(main)
