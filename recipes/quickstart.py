"""The whole method on the embedded digits, in minutes on a CPU: `make quickstart`.

    data -> stage 1 (the teacher) -> stage 2 (guided) and plain SiT from the same initial weights and data order
         -> samples of each -> one table, one figure of the losses, one picture of the samples

The paper's proportions at a thousandth of its length: a teacher of 400 steps, students of 800 steps, omega 30, guidance
over after 100 steps. Both students have the same hyper-parameters. It runs in bf16 where the processor or the GPU multiplies
bf16 natively, in float32 elsewhere. Every step printed is a command to type by hand.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import require_precision
from runtime import errors, files
from runtime.errors import require
from runtime.options import option, read
from runtime.text import aligned, spread

MODEL = "SiT-Tiny/2"
TEACHER, HALF, FULL = 400, 400, 800
GUIDED_STEPS = 100
DEPTH = 3
"""Stage 1's block of the six: half the depth, at which the committed numbers were measured (a sixth would be the first block)."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a checkpoint and what it cost."""

    name: str
    run: str
    step: int
    total: int
    """Optimiser steps spent, stage 1 counted."""


ROWS = (
    Row("plain SiT", "plain", HALF, HALF),
    Row("plain SiT", "plain", FULL, FULL),
    Row("plain SiT", "plain", TEACHER + FULL, TEACHER + FULL),
    Row("stage 1 (teacher)", "stage1", TEACHER, TEACHER),
    Row("self-guided SiT", "guided", HALF, TEACHER + HALF),
    Row("self-guided SiT", "guided", FULL, TEACHER + FULL),
)


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Options of the quickstart."""

    out: str = option("runs/quickstart", help="folder of everything it writes")
    seeds: tuple[int, ...] = option(
        (0,), help="seeds to run; the table shows means and standard deviations for several"
    )
    samples: int = option(1000, help="samples per row")
    model: str = option(MODEL, help="network")
    steps: int = option(FULL, help="steps of the students; teacher and guidance keep their share of them")
    mixed_precision: str | None = option(
        None, help="no or bf16 (default: bf16 where processor or GPU multiplies it natively)"
    )

    def __post_init__(self) -> None:
        require(
            self.steps >= 8 and self.steps % 8 == 0,
            f"--steps {self.steps} must be a multiple of 8: guidance lasts an eighth of them",
        )
        require(self.samples >= 10, f"--samples {self.samples} must be at least 10: one of each digit")
        require_precision(self.mixed_precision, None)

    def scaled(self, steps: int) -> int:
        """So many of the default's steps, in this run's proportion."""
        return steps * self.steps // FULL

    @property
    def rows(self) -> list[Row]:
        """The lines of the table for this many steps."""
        return [replace(row, step=self.scaled(row.step), total=self.scaled(row.total)) for row in ROWS]


METRICS = {"fd": "Frechet (lower)", "precision": "precision", "recall": "recall", "class_accuracy": "class accuracy"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = read(
        QuickstartConfig,
        sys.argv[1:] if argv is None else argv,
        prog="python -m recipes.quickstart",
        description=__doc__,
    )
    out = Path(config.out)
    started = time.perf_counter()
    _prepare(out)
    results = {seed: run_seed(out / f"seed{seed}", config, seed) for seed in config.seeds}
    files.write_json(out / "results.json", {str(seed): rows for seed, rows in results.items()})
    first = out / f"seed{config.seeds[0]}"
    loss_figure(first, out / "losses.png", config)
    sample_figure(first, out / "samples.png", config)
    print("\n" + table(results))
    print(f"\n{verdict(results, config.steps)}")
    print(
        f"\n{time.perf_counter() - started:.0f} s. Look at {out}/samples.png and {out}/losses.png; numbers are in "
        f"{out}/results.json. Next: python generate.py --ckpt {first}/exps/guided --cfg-scale 2 --num-fid-samples 64, "
        f"or the ImageNet commands of README.md."
    )


def _prepare(out: Path) -> None:
    from evaluations import reference
    from preprocessing import digits

    if not (out / "data" / "manifest.json").is_file():
        _call(digits.main, "python -m preprocessing.digits", "--out", out / "data")
    _call(
        reference.main,
        "python -m evaluations.reference",
        "--images",
        out / "data",
        "--features",
        "none",
        "--out",
        out / "reference.npz",
    )


def run_seed(folder: Path, config: QuickstartConfig, seed: int) -> list[dict[str, Any]]:
    """Train the three runs under one seed, sample and score every row; returns the rows with their metrics."""
    import generate
    import train
    import train_guide
    from evaluations import evaluate

    out, scaled = Path(config.out), config.scaled
    precision = ["--mixed-precision", config.mixed_precision or _precision()]
    common = [
        "--recipe",
        "digits",
        "--data-dir",
        out / "data",
        "--output-dir",
        folder / "exps",
        "--seed",
        seed,
        *precision,
    ]
    common += (
        ["--model", config.model, "--checkpointing-steps", scaled(HALF)]
        if config.steps != FULL or config.model != MODEL
        else []
    )
    depth = ["--align-depth", DEPTH] if config.model == MODEL else []
    teacher = ["--exp-name", "stage1", "--align", "latent", *depth, "--max-train-steps", scaled(TEACHER)]
    guided = [
        "--exp-name",
        "guided",
        "--guiding-ckpt",
        folder / "exps" / "stage1",
        "--align-stop-steps",
        scaled(GUIDED_STEPS),
    ]
    _call(train.main, "python train.py", *common, *teacher)
    _call(train_guide.main, "python train_guide.py", *common, *guided, "--max-train-steps", scaled(FULL))
    _call(train.main, "python train.py", *common, "--exp-name", "plain", "--max-train-steps", scaled(TEACHER + FULL))
    rows = []
    for row in config.rows:
        drawn = folder / "samples" / f"{row.run}-{row.step}"
        _call(
            generate.main,
            "python generate.py",
            "--ckpt",
            folder / "exps" / row.run / "checkpoints" / f"{row.step:07d}",
            "--num-fid-samples",
            config.samples,
            "--mode",
            "ode",
            "--solver",
            "heun",
            "--num-steps",
            20,
            "--labels",
            "balanced",
            "--batch-size",
            250,
            *precision,
            "--out",
            drawn,
        )
        _call(
            evaluate.main,
            "python -m evaluations.evaluate",
            "--samples",
            drawn / "samples.npz",
            "--reference",
            out / "reference.npz",
            "--features",
            "pixels",
            "--out",
            drawn / "metrics.json",
        )
        metrics = json.loads((drawn / "metrics.json").read_text())["metrics"]
        rows.append({"name": row.name, "step": row.step, "total": row.total, **{key: metrics[key] for key in METRICS}})
    return rows


def _precision() -> str:
    """bf16 where the device multiplies it natively, which takes two thirds of the time on a CPU, else float32."""
    import torch

    from runtime import launch

    return "bf16" if launch.native_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "no"


def _call(command: Any, name: str, *words: Any) -> None:
    argv = [str(word) for word in words]
    print(f"\n$ {name} {' '.join(argv)}", flush=True)
    command(argv)


def table(results: dict[int, list[dict[str, Any]]]) -> str:
    """The aligned table: means over seeds, with standard deviations where there are several."""
    lines = [["network", "steps", "total steps", *METRICS.values()]]
    for index, row in enumerate(next(iter(results.values()))):
        cells = [row["name"], str(row["step"]), str(row["total"])]
        for key in METRICS:
            cells.append(spread([rows[index][key] for rows in results.values()], 3))
        lines.append(cells)
    return aligned(lines)


def verdict(results: dict[int, list[dict[str, Any]]], steps: int = FULL) -> str:
    """One sentence that states what the table shows, whatever the result.

    Over several seeds two networks are level where the mean of their paired differences is within two standard errors.
    """

    def distances(name: str, key: str, value: int) -> list[float]:
        return [
            next(row["fd"] for row in rows if row["name"] == name and row[key] == value) for rows in results.values()
        ]

    def compare(key: str, value: int, words: str) -> str:
        guided, plain = distances("self-guided SiT", key, value), distances("plain SiT", key, value)
        gaps = [ours - other for ours, other in zip(guided, plain, strict=True)]
        gap = statistics.mean(gaps)
        side = "ahead of" if gap < 0 else "behind"
        if len(gaps) > 1 and abs(gap) < 2 * statistics.stdev(gaps) / len(gaps) ** 0.5:
            side = "level with"
        return (
            f"{words} the self-guided network is {side} plain SiT "
            f"(Frechet {statistics.mean(guided):.2f} against {statistics.mean(plain):.2f})"
        )

    half, total = HALF * steps // FULL, (TEACHER + FULL) * steps // FULL
    seeds = f"{len(results)} seeds" if len(results) > 1 else f"one seed ({next(iter(results))}; other seeds differ)"
    return (
        f"Over {seeds}: {compare('step', half, f'at {half} of its own steps')}; {compare('step', steps, f'at {steps}')}; and "
        f"{compare('total', total, f'at {total} total steps, stage 1 counted,')}."
    )


def loss_figure(folder: Path, path: Path, config: QuickstartConfig) -> None:
    """The flow-matching loss of the three runs by step, and by total steps with stage 1 counted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from training.log import read

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for run, name in (("stage1", "stage 1 (teacher)"), ("plain", "plain SiT"), ("guided", "self-guided SiT")):
        lines = read(folder / "exps" / run / "log.jsonl")
        steps, loss = [line["step"] for line in lines], [line["loss/diffusion"] for line in lines]
        axes[0].plot(steps, loss, label=name)
        axes[1].plot([step + (config.scaled(TEACHER) if run == "guided" else 0) for step in steps], loss, label=name)
    axes[0].axvline(config.scaled(GUIDED_STEPS), color="grey", linewidth=0.8, linestyle=":")
    axes[0].set(xlabel="optimiser steps (dotted: guidance ends)", ylabel="flow-matching loss", yscale="log")
    axes[1].set(xlabel="total optimiser steps, stage 1 counted")
    axes[0].legend()
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def sample_figure(folder: Path, path: Path, config: QuickstartConfig) -> None:
    """The samples of every row side by side: same noise and labels, one digit a column."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from sampling import picture

    figure, axes = plt.subplots(2, 3, figsize=(12, 5.4), layout="constrained")
    for axis, row in zip(axes.flat, config.rows, strict=True):
        with np.load(folder / "samples" / f"{row.run}-{row.step}" / "samples.npz") as drawn:
            images, labels = drawn["arr_0"], drawn["labels"]
        # rows of the picture are repetitions, as many as every class has, columns the ten classes
        shown = min(6, *np.bincount(labels, minlength=10))
        chosen = np.stack([np.flatnonzero(labels == digit)[:shown] for digit in range(10)], axis=1).ravel()
        axis.imshow(picture.composed(np.split(images[chosen], shown)))
        axis.set_title(f"{row.name}, {row.step} steps ({row.total} in all)", fontsize=10)
        axis.axis("off")
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    errors.run(main)
