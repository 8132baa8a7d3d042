"""A checkpoint -> a weight file of REPA's or SiT's own code.

    python -m models.export exps/stage2 --layout repa --out stage2.pt
    python -m models.export exps/stage2 --layout sit --out stage2.pt

The inverse of `models.convert`, for SiT networks. Both layouts hold `ema`, `model` if the checkpoint has it, and the
table of positions. REPA's time runs in our direction; a checkpoint does not have its projectors, so load the file with
strict=False. SiT's time runs the other way, so the reversal is folded into the weights, and its doubled head gets rows
of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import models
from models.checkpoint import Checkpoint
from runtime import errors, files
from runtime.errors import require
from runtime.options import option, read
from runtime.text import quoted

if TYPE_CHECKING:
    from torch import Tensor

    from models import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `python -m models.export CKPT`."""

    ckpt: str = option(
        help="checkpoint: a folder, a run (its latest), RUN@STEP or hub:user/name (may be given as first word)"
    )
    layout: str = option(choices=("repa", "sit"), help="whose code will read it")
    out: str = option(help="file to write (.pt)")


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; returns the file."""
    options = read(
        Options,
        argv,
        prog="python -m models.export",
        description=__doc__,
        first="ckpt",
    )
    import torch

    out = Path(options.out)
    # a start that was killed after its last rename has left more than the file
    files.remove_leftovers(out.parent, out.name)
    require(not out.exists(), f"--out {out} exists: choose another name, or remove it")
    source = Checkpoint.open(options.ckpt)
    require(
        source.spec.architecture == "sit" and source.spec.position_span is None,
        f"{source.path} is a {source.spec.name}{' with stretched positions' if source.spec.position_span else ''}: "
        f"REPA's and SiT's code reads only SiT networks as published",
    )
    # their loaders take "ema" for sampling and "model" for training
    sets = {"ema": source.tensors("ema")} | ({"model": source.tensors("raw")} if "raw" in source.weights else {})
    for name, weights in sets.items():
        models.require_finite(weights, f"{source.path} ({name})")
    archive = {name: layout(weights, source.spec, options.layout) for name, weights in sets.items()}
    with files.replacing(out) as temporary:
        torch.save({**archive, "steps": source.step}, temporary)
    print(f"written: {quoted(out)} ({' and '.join(archive)}, {options.layout}'s layout, step {source.step})")
    return out


def layout(weights: Mapping[str, Tensor], spec: ModelSpec, kind: str) -> dict[str, Tensor]:
    """A network's tensors with the names and order of `kind`, repa or sit."""
    import torch

    from models.layouts import reverse_time

    tensors = {name: value.clone() for name, value in weights.items()}
    tensors["pos_embed"] = models.build(spec, weights=weights).pos_embed
    if kind == "sit":
        reverse_time(tensors)  # its own inverse
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            # (patch elements, channels, ...), then as many unused channels
            rows = tensors[name].unflatten(0, (spec.patch_size**2, spec.in_channels))
            tensors[name] = torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)
    return tensors


if __name__ == "__main__":
    errors.run(main)
