"""The quickstart's training step and sampling in float32 and in bf16, in turns: which one a CPU should run it in.

    python -m benchmarks.digits --out benchmarks/results/digits.json

Training is stage 2's step (guidance and its teacher) and the plain one; sampling a batch of 250 by 20 Heun steps. The
quickstart's time is put together from them, in the numbers of steps and samples that it takes.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.train_step import training_step
from preprocessing import digits
from recipes import quickstart
from runtime import errors
from runtime.options import option, read
from sampling.config import SamplingConfig, SourceOptions
from sampling.source import Source
from training import command
from training.run import Run

PRECISIONS = {"float32": "no", "bf16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Options of the benchmark."""

    repetitions: int = option(5, help="repetitions")
    steps: int = option(5, help="timed steps per repetition")
    samples: int = option(250, help="samples of a batch")
    out: str | None = option(None, help="result file")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = read(DigitsConfig, words, prog="python -m benchmarks.digits", description=__doc__)
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    results = measure.Results(config.out, f"python -m benchmarks.digits {shlex.join(words)}".strip(), settings)
    with tempfile.TemporaryDirectory() as folder:
        for kind, calls, images, device in kinds(config, Path(folder)):
            rows = measure.alternate(
                calls,
                images,
                device,
                steps=1 if kind == "sampling" else config.steps,
                warmup=1,
                repetitions=config.repetitions,
            )
            for precision, row in rows.items():
                results.add(f"{kind}, {precision}", row)
    results.add(
        "quickstart, bf16",
        {"float32, times as long": round(hours(results.rows, "float32") / hours(results.rows, "bf16"), 3)},
    )
    print(measure.table(results.rows, measure.RATE))
    print(
        f"float32 takes {results.rows['quickstart, bf16']['float32, times as long']} times as long over the whole quickstart"
    )
    return results.result()


def hours(rows: dict[str, Any], precision: str) -> float:
    """Processor time of the quickstart's steps and samples at the rates found."""
    guided, alone = quickstart.GUIDED_STEPS, 2 * quickstart.TEACHER + 2 * quickstart.FULL - quickstart.GUIDED_STEPS
    counts = {"plain": 64 * alone, "guided": 64 * guided, "sampling": 1000 * len(quickstart.ROWS)}
    return (
        sum(count / rows[f"{kind}, {precision}"]["images_per_second"]["median"] for kind, count in counts.items())
        / 3600
    )


def kinds(config: DigitsConfig, folder: Path):
    """What is timed: its name, one call for each precision, the images of a call and the device."""
    with contextlib.redirect_stdout(io.StringIO()):
        digits.main(["--out", str(folder / "data")])

    def run(name: str, precision: str, *more: str) -> Run:
        argv = [
            "--recipe",
            "digits",
            "--data-dir",
            str(folder / "data"),
            "--output-dir",
            str(folder),
            "--exp-name",
            f"{name}-{precision}",
            "--mixed-precision",
            precision,
            "--max-train-steps",
            "100000000",
            *more,
        ]
        return Run(*command.resolve(argv, "benchmarks.digits", None, ("guided",) if name == "guided" else ()))

    plain = {name: run("plain", word) for name, word in PRECISIONS.items()}
    device = plain["bf16"].device
    yield "plain", {name: training_step(one) for name, one in plain.items()}, 64, device
    plain["bf16"].save()
    teacher = ("--guiding-ckpt", str(plain["bf16"].folder), "--align-stop-steps", "0", "--guiding-precision", "run")
    guided = {name: run("guided", word, *teacher) for name, word in PRECISIONS.items()}
    yield "guided", {name: training_step(one) for name, one in guided.items()}, 64, device
    settings = SamplingConfig(mode="ode", solver="heun", num_steps=20, labels="balanced")
    samplers = {
        name: Source.open(SourceOptions(ckpt=str(plain["bf16"].folder), mixed_precision=word), settings).sampler(
            settings, 1000
        )
        for name, word in PRECISIONS.items()
    }
    yield (
        "sampling",
        {name: lambda one=one: one.latents(range(config.samples)) for name, one in samplers.items()},
        config.samples,
        device,
    )


if __name__ == "__main__":
    errors.run(main)
