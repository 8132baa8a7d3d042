"""The whole method on photographs of clothes, in minutes on two CPU cores: `make quickstart`.

    8,000 images -> latents by the committed autoencoder
        -> one core: stage 1 (the teacher), then stage 2 (guided), samples of each, scores
        -> the other core: plain SiT from the same initial weights and data order, samples, scores
        -> one table, one figure of the losses, one picture of the samples

The paper's proportions: a teacher of 600 steps (40 epochs), students of 1,200 (80), omega 30, guidance for the first
300 (20). Both students have the same hyper-parameters. Scores compare pixels with 1,000 test images that no training
saw. Every command is printed as a user would type it; those of the second core go to plain.log of their seed.
"""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
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

MODEL = "SiT-Nano/2"
TEACHER, HALF, FULL = 600, 600, 1200
GUIDED_STEPS = 300
PLAIN, GUIDED = "plain", "guided"
VAE, REFERENCE = "pretrained/vae-fashion", "reference.npz"
# The first two were tuned on SiT-Tiny/2 (recipes/photographs.py); at the third both losses have gradients of one size.
RATE, STAGE1_WEIGHT, STAGE2_WEIGHT = 4e-3, 1.5, 0.005


@dataclass(frozen=True)
class Row:
    """One line of the table: a checkpoint and what it cost."""

    name: str
    run: str
    step: int
    total: int  # optimiser steps, stage 1 included


ROWS = (
    Row("plain SiT", PLAIN, HALF, HALF),
    Row("plain SiT", PLAIN, FULL, FULL),
    Row("plain SiT", PLAIN, TEACHER + FULL, TEACHER + FULL),
    Row("stage 1 (teacher)", "stage1", TEACHER, TEACHER),
    Row("self-guided SiT", GUIDED, HALF, TEACHER + HALF),
    Row("self-guided SiT", GUIDED, FULL, TEACHER + FULL),
)


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Options of the quickstart."""

    out: str = option("runs/quickstart", help="folder of everything it writes")
    seeds: tuple[int, ...] = option(
        (0,), help="seeds to run; the table shows means and standard deviations for several"
    )
    samples: int = option(1000, help="samples per row; at least one of each class", within="[10, inf)")
    model: str = option(MODEL, help="network")
    steps: int = option(FULL, help="steps of the students; teacher and guidance keep their share of them")
    mixed_precision: str = option("no", help="no, or bf16: faster for larger networks")
    part: str = option("both", choices=("both", PLAIN, GUIDED), help="chains to run: both side by side, or one")

    def __post_init__(self) -> None:
        require(
            self.steps >= 4 and self.steps % 4 == 0,
            f"--steps {self.steps} must be a multiple of 4: guidance lasts a quarter of them",
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
    config = read(QuickstartConfig, argv, prog="python -m recipes.quickstart", description=__doc__)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each chain
    out, started = Path(config.out), time.perf_counter()
    if not (out / REFERENCE).exists():
        prepare(out)
    for seed in config.seeds:
        if config.part == "both":
            side_by_side(config, seed)
        else:
            run_chain(config.part, config, seed)
    if config.part != "both":
        return
    results = {seed: scores(out / f"seed{seed}", config) for seed in config.seeds}
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


def prepare(out: Path) -> None:
    """Images, latents, and at last the reference; what a killed run has finished stays."""
    images, grey = out / "images", ("--grey", "--images")
    _call("-m", "preprocessing.fashion", "--embedded", "--out", images)
    encode = ["-m", "preprocessing.encode", "--vae", VAE, "--resolution", 32, *grey, images / "train"]
    _call(*encode, "--out", out / "data")
    _call("-m", "evaluations.reference", *grey, images / "test", "--features", "pixels", "--out", out / REFERENCE)


def side_by_side(config: QuickstartConfig, seed: int) -> None:
    """The guided chain in this process and the plain one in another. Raises UserError if that one fails."""
    log = Path(config.out) / f"seed{seed}" / f"{PLAIN}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    given = {"part": PLAIN, "seeds": seed} | {key: getattr(config, key) for key in ("out", "samples", "model", "steps")}
    words = [f"--{key}={value}" for key, value in given.items()] + [f"--mixed-precision={config.mixed_precision}"]
    print(f"\nplain SiT runs beside what follows: {log}", flush=True)
    with open(log, "w", encoding="utf-8") as output:
        other = subprocess.Popen(
            [sys.executable, "-m", "recipes.quickstart", *words], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        run_chain(GUIDED, config, seed)
        print(f"\nwaiting for plain SiT ({log})", flush=True)
        code = other.wait()
    finally:
        other.terminate()
        other.wait()
    require(code == 0, f"plain SiT ended with exit code {code}; {log} says why")


def run_chain(part: str, config: QuickstartConfig, seed: int) -> None:
    """Train what a part trains: plain SiT for as many steps as teacher and student together, or those two. Score it."""
    folder, scaled = Path(config.out) / f"seed{seed}", config.scaled
    runs = folder / "exps"
    places = ["--data-dir", Path(config.out) / "data", "--output-dir", runs, "--seed", seed]
    network = ["--recipe", "digits", "--model", config.model, "--learning-rate", RATE]
    pace = ["--checkpointing-steps", scaled(HALF), "--mixed-precision", config.mixed_precision]
    common = [*network, *places, *pace, "--max-train-steps"]
    if part == PLAIN:
        _call("train.py", *common, scaled(TEACHER + FULL), "--exp-name", PLAIN)
    else:
        stage1 = ["--exp-name", "stage1", "--align", "latent", "--align-weight", STAGE1_WEIGHT]
        _call("train.py", *common, scaled(TEACHER), *stage1)
        guide = ["--guiding-ckpt", runs / "stage1", "--align-weight", STAGE2_WEIGHT]
        stop = ["--align-stop-steps", scaled(GUIDED_STEPS)]
        _call("train_guide.py", *common, scaled(FULL), "--exp-name", GUIDED, *guide, *stop)
    for row in config.rows:
        if (row.run == PLAIN) == (part == PLAIN):
            _score(row, folder, config)


def _samples(row: Row, folder: Path) -> Path:
    return folder / "samples" / f"{row.run}-{row.step}"


def _score(row: Row, folder: Path, config: QuickstartConfig) -> None:
    """Draw samples from a row's checkpoint and compare them with the test images."""
    checkpoint = folder / "exps" / row.run / "checkpoints" / f"{row.step:07d}"
    drawn, reference = _samples(row, folder), Path(config.out) / REFERENCE
    sampler = ["--mode", "ode", "--solver", "heun", "--num-steps", 8, "--labels", "balanced", "--batch-size", 250]
    words = ["--ckpt", checkpoint, "--num-fid-samples", config.samples, *sampler]
    _call("generate.py", *words, "--mixed-precision", config.mixed_precision, "--out", drawn)
    words = ["--samples", drawn / "samples.npz", "--grey", "--reference", reference, "--features", "pixels"]
    _call("-m", "evaluations.evaluate", *words, "--out", drawn / "metrics.json")


def scores(folder: Path, config: QuickstartConfig) -> list[dict[str, Any]]:
    """Every row of a seed with its metrics."""
    rows = []
    for row in config.rows:
        metrics = files.read_sealed(_samples(row, folder) / "metrics.json")["metrics"]
        rows.append({"name": row.name, "step": row.step, "total": row.total, **{key: metrics[key] for key in METRICS}})
    return rows


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
    for run, name in (("stage1", "stage 1 (teacher)"), (PLAIN, "plain SiT"), (GUIDED, "self-guided SiT")):
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
    """Draw samples of every row below each other: same noise and labels, two of each class."""
    rows = []
    for row in config.rows:
        with np.load(_samples(row, folder) / "samples.npz") as drawn:
            images, labels = drawn["arr_0"], drawn["labels"]
        rows.append(images[[place for label in range(10) for place in np.flatnonzero(labels == label)[:2]]])
    picture.write(path, rows, [f"{row.name}, {row.step} steps ({row.total} in all)" for row in config.rows])


if __name__ == "__main__":
    errors.run(main)
