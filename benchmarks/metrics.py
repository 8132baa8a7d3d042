"""Time and memory of the metric maths at the size of a full evaluation, and agreement with scipy's matrix square root.

    python -m benchmarks.metrics --out benchmarks/results/metrics.json

Synthetic features stand for Inception's: non-negative, squared norms of a few hundred, correlated. The extractor is not
part of this. Each part runs once, in a process of its own, so that its peak memory is its own. On a machine that is busy
otherwise, CPU seconds over threads are nearer to the truth than seconds; the load average at the start is recorded.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evaluations import metrics
from evaluations.metrics import Statistics
from runtime import errors, files
from runtime.options import option, read
from runtime.streams import Stream

PARTS = ("features", "statistics", "frechet", "inception_score", "adm_fp16", "fp32", "class_accuracy")
AGREEMENT = (
    ("full rank", 512, 2000, 3000),
    ("ill-conditioned", 512, 520, 3000),
    ("few samples on one side", 512, 200, 3000),
    ("few on both sides", 512, 200, 300),
    ("full size", 2048, 5000, 5000),
)
"""Name, dimensions, samples, reference images of the five comparisons with scipy."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Options of the benchmark."""

    samples: int = option(50_000, help="samples")
    reference: int = option(10_000, help="reference images")
    dimensions: int = option(2048, help="features of each")
    threads: int = option(2, help="CPU threads")
    part: str | None = option(None, choices=(*PARTS, "agreement"), help="run one part here and print it as JSON")
    out: str | None = option(None, help="result file")


def features(seed: int, count: int, dimensions: int, shift: float = 0.0) -> torch.Tensor:
    """(count, dimensions) float32: rectified combinations of a few hundred normal factors."""
    factors = max(4, dimensions // 8)
    mixing = Stream(0, "benchmark/mixing").normal((factors, dimensions)) / factors**0.5
    parts = []
    for index, start in enumerate(range(0, count, 5000)):
        stream = Stream(seed, "benchmark/features", index)
        size = min(5000, count - start)
        noise = 0.3 * stream.normal((size, dimensions))
        parts.append((stream.normal((size, factors)) @ mixing + noise + shift).mul_(0.7).relu_())
    return torch.cat(parts)


def measure(config: MetricsConfig, part: str) -> dict[str, Any]:
    """Run one part: its value, seconds, seconds of CPU over all threads, peak memory in GiB with the inputs."""
    x = features(1, config.samples, config.dimensions, 0.05)
    r = features(2, config.reference, config.dimensions)
    if part == "frechet":
        pair = metrics.statistics(x), metrics.statistics(r)
    elif part == "inception_score":
        logits = x[:, :1008] * 4
    elif part == "class_accuracy":
        labels, reference_labels = torch.arange(len(x)) % 1000, torch.arange(len(r)) % 1000
    start, busy = time.perf_counter(), time.process_time()
    value: Any = None
    if part == "features":
        value = x.square().sum(1).mean().item()
    elif part == "statistics":
        value = metrics.statistics(x).covariance.trace().item()
    elif part == "frechet":
        value = metrics.frechet(*pair)
    elif part == "inception_score":
        value = metrics.inception_score(logits)
    elif part == "class_accuracy":
        value = metrics.class_accuracy(x, labels, r, reference_labels)
    else:
        value = metrics.precision_recall(x, r, mode=part)
    seconds = time.perf_counter() - start
    return {
        "value": value,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - busy,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def agreement() -> list[dict[str, Any]]:
    """Frechet distances beside those by scipy's sqrtm."""
    import scipy.linalg

    rows = []
    for name, dimensions, samples, reference in AGREEMENT:
        a, b = (
            metrics.statistics(features(seed, count, dimensions, shift))
            for seed, count, shift in ((3, samples, 0.05), (4, reference, 0.0))
        )
        start = time.perf_counter()
        ours = metrics.frechet(a, b)
        middle = time.perf_counter()
        root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
        scipy_distance = _distance(a, b, float(np.trace(root).real))
        rows.append(
            {
                "case": name,
                "dimensions": dimensions,
                "samples": samples,
                "reference": reference,
                "frechet": ours,
                "scipy": scipy_distance,
                "relative_difference": abs(ours - scipy_distance) / scipy_distance,
                "seconds": middle - start,
                "scipy_seconds": time.perf_counter() - middle,
            }
        )
    return rows


def _distance(a: Statistics, b: Statistics, trace: float) -> float:
    return ((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace).item()


def in_process(part: str, config: MetricsConfig) -> Any:
    """The JSON that this module prints for one part, in a fresh process."""
    words = [f"--{name}={getattr(config, name)}" for name in ("samples", "reference", "dimensions", "threads")]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.metrics", *words, "--part", part],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(config.threads)},
    )
    return json.loads(process.stdout)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run the benchmark; returns the result that is written to --out."""
    import scipy

    words = list(sys.argv[1:] if argv is None else argv)
    config = read(MetricsConfig, words, prog="python -m benchmarks.metrics", description=__doc__)
    if config.part:
        torch.set_num_threads(config.threads)
        print(json.dumps(agreement() if config.part == "agreement" else measure(config, config.part)))
        return None
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.metrics {shlex.join(words)}",
        "cpu_threads": config.threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "size": [config.samples, config.reference, config.dimensions],
        "parts": {},
    }
    print(f"{config.samples} samples, {config.reference} reference images, {config.dimensions} features")
    for part in PARTS:
        row = result["parts"][part] = in_process(part, config)
        print(
            f"{part:18}{row['seconds']:>10.1f} s{row['cpu_seconds']:>10.1f} CPU s{row['peak_gib']:>8.2f} GiB"
            f"   {row['value']}",
            flush=True,
        )
    result["agreement"] = in_process("agreement", config)
    for row in result["agreement"]:
        print(
            f"{row['case']:26}{row['frechet']:>14.6f}{row['scipy']:>14.6f}{row['relative_difference']:>12.1e}"
            f"{row['seconds']:>8.1f} s{row['scipy_seconds']:>8.1f} s"
        )
    if config.out:
        files.write_json(config.out, result)
    return result


if __name__ == "__main__":
    errors.run(main)
