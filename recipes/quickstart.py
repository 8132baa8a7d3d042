"""The whole method on the embedded digits, in minutes on a CPU: `make quickstart`.

    data -> stage 1 (the teacher) -> stage 2 (guided) and plain SiT from the same initial weights and data order
         -> samples of each -> one table, one figure of the losses, one picture of the samples

The paper's proportions at a thousandth of its length: a teacher of 400 steps, students of 800 steps, omega 30,
guidance for the first 100 steps. Both students have the same hyper-parameters. It runs in bf16 if the processor or
the GPU multiplies bf16 natively, else in float32. It prints every command as a user would type it.
"""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from config import require_precision
from evaluations import drawing
from recipes import runner
from runtime import errors, files
from runtime.errors import require
from runtime.jsonlines import read as read_log
from runtime.options import option, read
from runtime.text import aligned, spread
from sampling import picture

MODEL = "SiT-Tiny/2"
TEACHER, HALF, FULL = 400, 400, 800
GUIDED_STEPS = 100


@dataclass(frozen=True)
class Row:
    """One line of the table: a checkpoint and what it cost."""

    name: str
    run: str
    step: int
    total: int  # optimiser steps, stage 1 included


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
    samples: int = option(1000, help="samples per row; at least one of each digit", within="[10, inf)")
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
        require_precision(self.mixed_precision, None)

    def scaled(self, steps: int) -> int:
        """`steps` of the default run in proportion to this run's length."""
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
        argv,
        prog="python -m recipes.quickstart",
        description=__doc__,
    )
    out, started = Path(config.out), time.perf_counter()
    if not (out / "data" / "manifest.json").is_file():
        _call("-m", "preprocessing.digits", "--out", out / "data")
    _call("-m", "evaluations.reference", "--images", out / "data", "--features", "none", "--out", out / "reference.npz")
    results = {seed: run_seed(out / f"seed{seed}", config, seed) for seed in config.seeds}
    files.write_json(out / "results.json", {str(seed): rows for seed, rows in results.items()})
    first = out / f"seed{config.seeds[0]}"
    loss_figure(first, out / "losses", config)
    sample_picture(first, out / "samples.png", config)
    print(f"\n{table(results)}\n\n{verdict(results)}")
    print(
        f"\n{time.perf_counter() - started:.0f} s. Look at {out}/samples.png and {out}/losses.png; numbers are in "
        f"{out}/results.json. Next: python generate.py --ckpt {first}/exps/guided --cfg-scale 2 --num-fid-samples 64, "
        f"or the ImageNet commands of README.md."
    )


def run_seed(folder: Path, config: QuickstartConfig, seed: int) -> list[dict[str, Any]]:
    """Train the three runs under one seed, sample and score every row; returns the rows with their metrics."""
    precision = config.mixed_precision or _precision()
    _train(folder / "exps", config, seed, precision)
    return [
        {"name": row.name, "step": row.step, "total": row.total, **_score(row, folder, config, precision)}
        for row in config.rows
    ]


def _train(runs: Path, config: QuickstartConfig, seed: int, precision: str) -> None:
    """The teacher, the guided student, and plain SiT for as many steps as both together."""
    scaled = config.scaled
    places = ["--data-dir", Path(config.out) / "data", "--output-dir", runs]
    length = ["--model", config.model, "--checkpointing-steps", scaled(HALF)]
    common = ["--recipe", "digits", *places, *length, "--seed", seed, "--mixed-precision", precision]
    stage1 = ["--exp-name", "stage1", "--align", "latent"]
    if config.model == MODEL:
        # half of its six blocks, as in the committed numbers; the default would be the first block
        stage1 += ["--align-depth", "3"]
    guided = ["--exp-name", "guided", "--guiding-ckpt", runs / "stage1", "--align-stop-steps", scaled(GUIDED_STEPS)]
    _call("train.py", *common, *stage1, "--max-train-steps", scaled(TEACHER))
    _call("train_guide.py", *common, *guided, "--max-train-steps", scaled(FULL))
    _call("train.py", *common, "--exp-name", "plain", "--max-train-steps", scaled(TEACHER + FULL))


def _score(row: Row, folder: Path, config: QuickstartConfig, precision: str) -> dict[str, float]:
    """The metrics of samples from a row's checkpoint."""
    checkpoint = folder / "exps" / row.run / "checkpoints" / f"{row.step:07d}"
    drawn, target = folder / "samples" / f"{row.run}-{row.step}", Path(config.out) / "reference.npz"
    sampler = ["--mode", "ode", "--solver", "heun", "--num-steps", 20, "--labels", "balanced", "--batch-size", 250]
    words = ["--ckpt", checkpoint, "--num-fid-samples", config.samples, *sampler, "--mixed-precision", precision]
    _call("generate.py", *words, "--out", drawn)
    words = ["--samples", drawn / "samples.npz", "--reference", target, "--features", "pixels"]
    _call("-m", "evaluations.evaluate", *words, "--out", drawn / "metrics.json")
    metrics = files.read_sealed(drawn / "metrics.json")["metrics"]
    return {key: metrics[key] for key in METRICS}


def _precision() -> str:
    """bf16 if the device multiplies it natively, which saves a third of the time on a CPU; else float32."""
    import torch

    from runtime import launch

    return "bf16" if launch.native_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "no"


def _call(*words: object) -> None:
    """Print a command as a user would type it, and run it in this process."""
    argv = [str(word) for word in words]
    print(f"\n$ python {shlex.join(argv)}", flush=True)
    runner.call(argv)


def table(results: dict[int, list[dict[str, Any]]]) -> str:
    """The table: means over seeds, with standard deviations if there are several."""
    lines = [["network", "steps", "total steps", *METRICS.values()]]
    for rows in zip(*results.values(), strict=True):
        name, step, total = (str(rows[0][key]) for key in ("name", "step", "total"))
        lines.append([name, step, total, *(spread([row[key] for row in rows], 3) for key in METRICS)])
    return aligned(lines)


# Rows of the self-guided network and of plain SiT, by their place in `ROWS`, and at what length they are compared.
COMPARISONS = (
    (4, 0, "at {step} of its own steps"),
    (5, 1, "at {step}"),
    (5, 2, "at {total} total steps, stage 1 counted,"),
)


def verdict(results: dict[int, list[dict[str, Any]]]) -> str:
    """One sentence that states what the table shows, whatever the result.

    Over several seeds two networks are level if the mean of their paired differences is within two standard errors.
    """
    sentences = []
    for ours, other, length in COMPARISONS:
        guided, plain = ([rows[place]["fd"] for rows in results.values()] for place in (ours, other))
        gaps = [a - b for a, b in zip(guided, plain, strict=True)]
        side = "ahead of" if statistics.mean(gaps) < 0 else "behind"
        if len(gaps) > 1 and abs(statistics.mean(gaps)) < 2 * statistics.stdev(gaps) / len(gaps) ** 0.5:
            side = "level with"
        sentences.append(
            f"{length.format(**next(iter(results.values()))[ours])} the self-guided network is {side} plain SiT "
            f"(Frechet {statistics.mean(guided):.2f} against {statistics.mean(plain):.2f})"
        )
    seeds = f"{len(results)} seeds" if len(results) > 1 else f"one seed ({next(iter(results))}; other seeds differ)"
    return f"Over {seeds}: {'; '.join(sentences[:-1])}; and {sentences[-1]}."


def loss_figure(folder: Path, stem: Path, config: QuickstartConfig) -> None:
    """Draw the flow-matching loss of the three runs by step, and by total steps with stage 1 included."""
    figure = drawing.canvas(10, 4)
    by_step, by_total = figure.subplots(1, 2, sharey=True)
    for run, name in (("stage1", "stage 1 (teacher)"), ("plain", "plain SiT"), ("guided", "self-guided SiT")):
        # scores and gradient ratios have lines of their own
        lines = [line for line in read_log(folder / "exps" / run / "log.jsonl") if "loss/diffusion" in line]
        loss = [line["loss/diffusion"] for line in lines]
        by_step.plot([line["step"] for line in lines], loss, label=name)
        before = config.scaled(TEACHER) if run == "guided" else 0
        by_total.plot([before + line["step"] for line in lines], loss)
    by_step.axvline(config.scaled(GUIDED_STEPS), color="grey", linewidth=0.8, linestyle=":")
    by_step.set(xlabel="optimiser steps (dotted: guidance ends)", ylabel="flow-matching loss", yscale="log")
    by_total.set(xlabel="total optimiser steps, stage 1 included")
    by_step.legend()
    drawing.save(figure, stem)


def sample_picture(folder: Path, path: Path, config: QuickstartConfig) -> None:
    """Draw samples of every row below each other: same noise and labels, two of each digit."""
    rows = []
    for row in config.rows:
        with np.load(folder / "samples" / f"{row.run}-{row.step}" / "samples.npz") as drawn:
            images, labels = drawn["arr_0"], drawn["labels"]
        rows.append(images[[place for digit in range(10) for place in np.flatnonzero(labels == digit)[:2]]])
    picture.write(path, rows, [f"{row.name}, {row.step} steps ({row.total} in all)" for row in config.rows])


if __name__ == "__main__":
    errors.run(main)
