"""Milliseconds of one attention, forward and with its backward pass, by kernel and shape: what `models.attention` decides by.

    python -m benchmarks.attention --out benchmarks/results/attention.json

On CUDA the kernels that take the shape in bf16; on a CPU its one fused kernel in float32 and in bf16, in processor time.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import measure
from models import attention
from runtime import errors, launch
from runtime.options import option, read

SHAPES = {
    "SiT-B/2": (12, 256, 64),
    "SiT-L/2": (16, 256, 64),
    "SiT-XL/2": (16, 256, 72),
    "LightningDiT-XL/1": (16, 256, 72),
    "SiT-XL/2, 512 pixels": (16, 1024, 72),
}
SMALL = {"digits": (4, 16, 32), "SiT-S/2": (6, 256, 64)}


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Options of the benchmark."""

    batch_size: tuple[int, ...] = option((256, 32), help="images at once")
    repetitions: int = option(10, help="calls of each")
    out: str | None = option(None, help="result file")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = read(AttentionConfig, words, prog="python -m benchmarks.attention", description=__doc__)
    settings = {name: value for name, value in asdict(config).items() if name != "out"} | {
        "batch_size": list(config.batch_size)
    }
    results = measure.Results(config.out, f"python -m benchmarks.attention {shlex.join(words)}".strip(), settings)
    device = launch.accelerator().device
    for name, row in rows(config, device, results.rows):
        results.add(name, row)
    names = sorted({kernel for row in results.rows.values() for kernel in row})
    print(measure.table(results.rows, {kernel: lambda row, kernel=kernel: f"{row[kernel]:.3f}" for kernel in names}))
    return results.result()


def rows(
    config: AttentionConfig, device: torch.device, known: dict[str, Any]
) -> Iterator[tuple[str, dict[str, float]]]:
    """The rows that are not known yet: a shape and a direction, with milliseconds by kernel."""
    for batch in config.batch_size:
        for shape, (heads, tokens, width) in (SHAPES if device.type == "cuda" else SMALL).items():
            for backward in (False, True):
                name = f"{shape}, {batch} images, {'both passes' if backward else 'forward'}"
                if name in known:
                    continue
                if device.type == "cuda":
                    yield (
                        name,
                        attention.milliseconds(
                            heads, tokens, width, batch, torch.bfloat16, device, backward, config.repetitions
                        ),
                    )
                else:
                    yield (
                        name,
                        {
                            str(dtype).removeprefix("torch."): processor(
                                (batch, heads, tokens, width), dtype, backward, config.repetitions
                            )
                            for dtype in (torch.float32, torch.bfloat16)
                        },
                    )


def processor(shape: tuple[int, ...], dtype: torch.dtype, backward: bool, repetitions: int) -> float:
    """Median milliseconds of processor time of PyTorch's fused attention on a CPU."""
    q, k, v = (torch.ones(shape, dtype=dtype).requires_grad_(backward) for _ in range(3))
    spent = []
    for _ in range(repetitions + 1):  # the first warms up
        started = time.process_time()
        mixed = F.scaled_dot_product_attention(q, k, v)
        if backward:
            torch.autograd.grad(mixed, (q, k, v), mixed.detach())
        spent.append(time.process_time() - started)
    return round(1e3 * statistics.median(spent[1:]), 3)


if __name__ == "__main__":
    errors.run(main)
