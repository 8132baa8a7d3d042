"""Every method on the embedded digits, for the same number of steps over several seeds, in one table.

    python -m recipes.compare_digits --steps 800 --seeds 0 1 2 3 4

All rows share the network, its initial weights, the data order, the noise and the optimiser; only the alignment differs.
Settings are the published ones, with blocks as the same shares of the depth and stops as the same shares of the run
(HASTE and the guided stage 2: a quarter, as 100,000 of 400,000 steps; the teacher: half, 200,000 of 400,000). A row
marked "ours" departs from them and says how. `repa` and `haste` need an encoder: a small classifier ViT, trained here on
four fifths of the digits, its accuracy on the last fifth printed in the row. Run it again to continue: finished runs are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recipes.encoder import train_encoder
from recipes.quickstart import METRICS
from runtime import errors, files
from runtime.errors import require
from runtime.options import option, read
from runtime.text import aligned, spread


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Options of the comparison."""

    out: str = option("runs/compare", help="folder of everything it trains and draws")
    results: str = option(
        "benchmarks/results/compare-digits", help="where the table goes: this name with .txt and .json"
    )
    steps: int = option(800, help="optimiser steps of every row")
    seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), help="seeds of every row")
    batch_size: int = option(64, help="samples per step")
    samples: int = option(1000, help="samples per row and seed")
    rows: tuple[str, ...] | None = option(None, help="keys of the rows to run (default: all)")

    def __post_init__(self) -> None:
        require(
            self.steps >= 4 and self.steps % 4 == 0, f"--steps {self.steps} must be a multiple of 4: stops are quarters"
        )
        unknown = set(self.rows or ()) - {row.key for row in ROWS}
        require(
            not unknown, f"no row is called {min(unknown, default='')}; there are {', '.join(row.key for row in ROWS)}"
        )


@dataclass(frozen=True)
class Row:
    """One line of the table. Words may hold {quarter}, {teacher} and {encoder}."""

    key: str
    name: str
    words: str = ""
    program: str = "train"


ROWS = (
    Row("plain", "plain SiT"),
    Row("latent", "stage 1 (clean latent)", "--align latent --align-depth 3"),
    Row("guided", "stage 2 (guided, omega 30)", "--guiding-ckpt {teacher} --align-stop-steps {quarter}", "train_guide"),
    Row(
        "guided-3",
        "stage 2, ours: omega 3",
        "--guiding-ckpt {teacher} --align-stop-steps {quarter} --guide-scale 3",
        "train_guide",
    ),
    Row("repa", "REPA, {encoder_name}", "--align repa --align-encoder {encoder} --align-cache"),
    Row(
        "haste",
        "HASTE, {encoder_name}",
        "--align haste --align-encoder {encoder} --align-cache --align-stop-steps {quarter}",
    ),
    Row("dispersive", "Dispersive (paper)", "--align dispersive --align-weight 0.5 --align-temperature 0.5"),
    Row(
        "dispersive-pytorch",
        "Dispersive (authors' PyTorch)",
        "--align dispersive --align-weight 0.25 --align-temperature 1 --align-depth 6",
    ),
    Row(
        "dispersive-weak",
        "Dispersive, ours: weight 0.05",
        "--align dispersive --align-weight 0.05 --align-temperature 0.5",
    ),
    Row("layersync", "LayerSync", "--align layersync"),
    Row("layersync-weak", "LayerSync, ours: weight 0.02", "--align layersync --align-weight 0.02"),
    Row("sra", "SRA (smooth-L1)", "--align sra"),
    Row(
        "sra-cosine",
        "SRA (authors' token cosine)",
        "--align sra --align-distance token-cosine --align-weight 0.5 --align-schedule constant",
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = read(
        CompareConfig,
        sys.argv[1:] if argv is None else argv,
        prog="python -m recipes.compare_digits",
        description=__doc__,
    )
    out = Path(config.out)
    prepare(out)
    accuracy = train_encoder(out / "encoder")
    rows = [row for row in ROWS if config.rows is None or row.key in config.rows]
    results: dict[str, dict[int, dict[str, float]]] = {row.key: {} for row in rows}
    for seed in config.seeds:  # seeds outermost, so that whatever is finished can be compared
        for row in rows:
            results[row.key][seed] = run_row(row, config, out, seed)
        report(rows, results, config, accuracy)


def prepare(out: Path) -> None:
    """The digits as a latent set and as a reference, below `out`, unless they are there."""
    from preprocessing import digits

    if not (out / "data" / "manifest.json").is_file():
        digits.main(["--out", str(out / "data")])
    if not (out / "reference.npz").is_file():
        images, labels = digits.load()
        with files.replacing(out / "reference.npz") as temporary, open(temporary, "wb") as handle:
            np.savez(handle, arr_0=images, labels=labels)


def run_row(row: Row, config: CompareConfig, out: Path, seed: int) -> dict[str, float]:
    """Train, sample and score one row under one seed, or read what an earlier run found; returns its metrics."""
    import generate
    import train
    import train_guide
    from evaluations import evaluate

    folder = out / f"steps{config.steps}-batch{config.batch_size}" / f"seed{seed}"
    exps, drawn = folder / "exps", folder / "samples" / row.key
    if not (drawn / "metrics.json").is_file():
        words = row.words.format(
            teacher=exps / "latent" / "checkpoints" / f"{config.steps // 2:07d}",
            quarter=config.steps // 4,
            encoder=out / "encoder",
        )
        argv = [
            "--recipe",
            "digits",
            "--data-dir",
            str(out / "data"),
            "--output-dir",
            str(exps),
            "--exp-name",
            row.key,
            "--seed",
            str(seed),
            "--batch-size",
            str(config.batch_size),
            "--max-train-steps",
            str(config.steps),
            "--checkpointing-steps",
            str(config.steps // 2),
            *words.split(),
        ]
        print(f"\n$ python {row.program}.py {' '.join(argv)}", flush=True)
        {"train": train, "train_guide": train_guide}[row.program].main(argv)
        generate.main(
            [
                "--ckpt",
                str(exps / row.key),
                "--num-fid-samples",
                str(config.samples),
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
                "--out",
                str(drawn),
            ]
        )
        evaluate.main(
            [
                "--samples",
                str(drawn / "samples.npz"),
                "--reference",
                str(out / "reference.npz"),
                "--features",
                "pixels",
                "--out",
                str(drawn / "metrics.json"),
            ]
        )
    metrics = files.read_json(drawn / "metrics.json")["metrics"]
    return {key: metrics[key] for key in METRICS}


def report(
    rows: Sequence[Row], results: dict[str, dict[int, dict[str, float]]], config: CompareConfig, accuracy: float
) -> None:
    """Print the table and write it, with every number behind it, beside `config.results`."""
    encoder = f"ViT of the digits (64 x 4, {100 * accuracy:.1f}% held-out)"
    names = {row.key: row.name.format(encoder_name=encoder) for row in rows}
    seeds = sorted(next(iter(results.values())))
    text = (
        f"Digits, SiT-Tiny/2, {config.steps} steps of {config.batch_size}, seeds {' '.join(map(str, seeds))}, "
        f"{config.samples} samples (Heun, 12 steps, EMA weights, no guidance); mean ± standard deviation over seeds.\n"
        f"Frechet distance in pixels; the last column pairs each seed with plain SiT's of the same seed.\n"
        f"Stage 2 and HASTE end after a quarter of the steps; the {config.steps // 2} steps of stage 2's teacher are not counted.\n\n"
        f"{table(rows, names, results)}\n"
    )
    print(f"\n{text}", flush=True)
    with files.replacing(f"{config.results}.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    files.write_json(
        f"{config.results}.json",
        {
            "steps": config.steps,
            "batch_size": config.batch_size,
            "seeds": seeds,
            "samples": config.samples,
            "encoder_accuracy": accuracy,
            "torch": torch.__version__,
            "device": "cpu",
            "rows": [
                {
                    "key": row.key,
                    "name": names[row.key],
                    "program": row.program,
                    "words": row.words,
                    "metrics": {str(seed): values for seed, values in results[row.key].items()},
                }
                for row in rows
            ],
        },
    )


def table(rows: Sequence[Row], names: dict[str, str], results: dict[str, dict[int, dict[str, float]]]) -> str:
    """The aligned table: means over seeds with standard deviations, and the paired difference to plain SiT."""
    lines = [["method", *METRICS.values(), "Frechet - plain"]]
    for row in rows:
        values = results[row.key]
        cells = [names[row.key], *(spread([metrics[key] for metrics in values.values()], 3) for key in METRICS)]
        plain = results.get("plain", {})
        paired = [metrics["fd"] - plain[seed]["fd"] for seed, metrics in values.items() if seed in plain]
        lines.append([*cells, spread(paired, 3) if paired and row.key != "plain" else ""])
    return aligned(lines)


if __name__ == "__main__":
    errors.run(main)
