"""Where the device's time goes in a training step: its longest kernels as a table, and a trace for a viewer.

    python -m benchmarks.trace --model SiT-XL/2 --out trace.json --chrome trace-chrome.json

Three steps of plain training after a warm-up, as `benchmarks.train_step` builds them. On a CPU the operators are listed.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, train_step
from runtime import errors, files
from runtime.options import group, option, read


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """Options of the benchmark."""

    step: train_step.TrainStepConfig = group(
        train_step.TrainStepConfig, without=("rows", "ablation", "peer", "out", "repetitions", "steps")
    )
    top: int = option(10, help="kernels in the table")
    chrome: str | None = option(None, help="also write a trace for chrome://tracing or Perfetto here")
    out: str | None = option(None, help="result file")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = read(TraceConfig, words, prog="python -m benchmarks.trace", description=__doc__)
    settings = {**asdict(config.step), "rows": [], "top": config.top}
    results = measure.Results(config.out, f"python -m benchmarks.trace {shlex.join(words)}", settings)
    with tempfile.TemporaryDirectory() as folder:
        run = train_step.Bench(config.step, Path(folder)).run("")
        step, cuda = train_step.training_step(run), run.device.type == "cuda"
        for _ in range(config.step.warmup):
            step()
        kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
        with torch.profiler.profile(activities=kinds) as profile:
            for _ in range(3):
                step()
    if config.chrome:
        with files.replacing(Path(config.chrome)) as temporary:
            profile.export_chrome_trace(str(temporary))
    spent = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
        for event in profile.key_averages()
        if not cuda or str(event.device_type).endswith("CUDA")
    }
    total = sum(time for time, _ in spent.values())
    for name, (time, count) in sorted(spent.items(), key=lambda item: -item[1][0])[: config.top]:
        results.add(name, {"share": round(time / total, 4), "milliseconds": round(time / 3e3, 3), "calls": count / 3})
    print(
        measure.table(
            {name[:90]: row for name, row in results.rows.items()},
            {
                "share": lambda row: f"{row['share']:.1%}",
                "ms a step": lambda row: f"{row['milliseconds']:.3f}",
                "calls a step": lambda row: f"{row['calls']:g}",
            },
        )
    )
    return results.result()


if __name__ == "__main__":
    errors.run(main)
