"""Score samples against a reference: an aligned table, and metrics.json with all that the numbers depend on.

    python -m evaluations.evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    accelerate launch -m evaluations.evaluate ...        # the same numbers, features extracted by all GPUs
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import errors
import files
from config import build, option, parse, require
from errors import UserError
from evaluations import metrics
from evaluations.features import open_extractor
from evaluations.images import NpzArchive, NpzImages
from evaluations.reference import Reference
from evaluations.score import Scorer, collect

PROG = "python -m evaluations.evaluate"


@dataclass(frozen=True, kw_only=True)
class Options:
    samples: str = option(help="samples.npz: arr_0 uint8 (N, H, W, C), perhaps labels")
    reference: str = option(help="reference.npz: ADM's, or one made by evaluations.reference")
    features: str = option("pixels", help="pixels")
    precision_mode: str | None = option(None, choices=metrics.MODES, help="distances of precision and recall "
                                        "(default adm_fp16 for inception, as in published tables, else fp32)")
    batch_size: int = option(64, help="images per pass through the extractor, on each process")
    out: str = option("metrics.json", help="where the result goes")


def open_samples(path: str) -> NpzImages:
    """A samples file. Raises UserError for one that is no samples file, statistics of another set inside included."""
    names = NpzArchive(path).names
    if "mu" in names or "sigma" in names:
        raise UserError(f"{path} holds stored statistics (mu, sigma); it is a reference, not samples")
    return NpzImages(path)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Results as an aligned table, one line each."""
    cells = [["samples", "N", *rows[0]["metrics"]]]
    cells += [[row["samples"]["name"], str(row["num_samples"]), *(f"{value:.4f}" for value in row["metrics"].values())]
              for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells)


def main(argv: Sequence[str] | None = None) -> None:
    import torch
    from accelerate import Accelerator

    options = build(Options, parse(Options, sys.argv[1:] if argv is None else argv, prog=PROG, description=__doc__))
    require(options.batch_size > 0, f"--batch-size is {options.batch_size}; it must be at least 1")
    samples = open_samples(options.samples)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    extractor = open_extractor(options.features, device=accelerator.device)
    how = {"accelerator": accelerator, "batch_size": options.batch_size}
    reference = Reference.open(options.reference, extractor, **how)
    reference.require_shape(options.samples, samples.shape)
    scorer = Scorer(reference, extractor, accelerator=accelerator, precision_mode=options.precision_mode)
    result = scorer.compare(collect(samples, extractor, title="samples", **how))
    if accelerator.is_main_process:
        sidecar = Path(options.samples).with_suffix(".json")
        result["samples"] = {"name": samples.name, "sha256": samples.digest(),
                             "settings": files.read_json(sidecar) if sidecar.is_file() else None}
        files.write_json(options.out, result)
        print(table([result]))
        print(f"reference {reference.name} ({len(reference.pool)} images), precision and recall in "
              f"{scorer.precision_mode}; written to {options.out}")


if __name__ == "__main__":
    errors.run(main)
