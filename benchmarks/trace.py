"""Where the device's time goes in a training step: its longest kernels as a table, and a trace for a viewer.

    python -m benchmarks.trace --model SiT-XL/2 --out trace.json --chrome trace-chrome.json

Three steps of plain training after a warm-up, as `benchmarks.train_step` builds them. On a CPU it lists the operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, train_step
from runtime import errors, files
from runtime.options import group, option


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    step: train_step.TrainStepConfig = group(
        train_step.TrainStepConfig, without=("rows", "ablation", "peer", "out", "repetitions", "steps")
    )
    top: int = option(10, help="kernels in the table")
    chrome: str | None = option(None, help="also write a trace for chrome://tracing or Perfetto here")
    out: str | None = option(None, help="result file")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    return measure.run("trace", TraceConfig, argv, __doc__, rows, report)


def rows(config: TraceConfig, folder: Path, known: Mapping[str, Any]) -> measure.Rows:
    """The longest kernels of three steps, each with its share; none if an earlier call has measured them."""
    if known:
        return
    run = train_step.Bench(config.step, folder).run("")
    step, cuda = train_step.training_step(run), run.device.type == "cuda"
    for _ in range(config.step.warmup):
        step()
    with torch.profiler.profile() as profile:
        for _ in range(3):
            step()
    if config.chrome:
        with files.replacing(Path(config.chrome)) as temporary:
            profile.export_chrome_trace(str(temporary))
    # on CUDA the host's events are left out: they overlap with the kernels
    spent = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
        for event in profile.key_averages()
        if not cuda or str(event.device_type).endswith("CUDA")
    }
    total = sum(time for time, _ in spent.values())
    for name, (time, count) in sorted(spent.items(), key=lambda item: -item[1][0])[: config.top]:
        yield name, {"share": round(time / total, 4), "milliseconds": round(time / 3e3, 3), "calls": count / 3}


def report(rows: Mapping[str, Any]) -> str:
    """The table of a result."""
    return measure.table(
        {name[:90]: row for name, row in rows.items()},
        {
            "share": lambda row: f"{row['share']:.1%}",
            "ms a step": lambda row: f"{row['milliseconds']:.3f}",
            "calls a step": lambda row: f"{row['calls']:g}",
        },
    )


if __name__ == "__main__":
    errors.run(main)
