"""What perfect samples of the photographs would score: training images, as they are and through the autoencoder.

    python -m benchmarks.floors --feature-weights mobilenet_v2-b0353104.pth --out benchmarks/results/floors.json

The reference is the 10,000 test images of Fashion-MNIST, as in `recipes`; a classifier is fitted to `--fitted` training
images. Every choice of some images takes the first of each class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from evaluations import evaluate, reference
from models.pixels import to_signed, to_uint8
from models.vae import open_codec
from preprocessing import fashion
from runtime import errors, files
from runtime.options import option

MOBILENET = "timm:mobilenetv2_100@96"


@dataclass(frozen=True, kw_only=True)
class FloorsConfig:
    features: tuple[str, ...] = option((MOBILENET, "pixels"), help="features that scores compare")
    feature_weights: str | None = option(None, help="file of their weights (default: downloaded once)")
    source: str | None = option(None, help="folder of the IDX files (default: as preprocessing.fashion)")
    vae: str = option("pretrained/vae-fashion", help="autoencoder")
    fitted: int = option(10_000, help="training images of the classifier")
    counts: tuple[int, ...] = option((5_000, 10_000), help="numbers of images in place of samples")
    out: str | None = option(None, help="result file")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns the result that is written to --out."""
    return measure.run("floors", FloorsConfig, argv, __doc__, rows, report)


def rows(config: FloorsConfig, folder: Path, known: Mapping[str, Any]) -> measure.Rows:
    """The rows that are not known yet."""
    source = fashion.find_source(config.source)
    test = save(folder / "test.npz", *fashion.load(source, "test")[:2])
    fitted = save(folder / "fitted.npz", *fashion.load(source, "train", config.fitted)[:2])
    compared = {"the test images themselves": test, **samples(config, source, folder)}
    for place, features in enumerate(config.features):
        scored = ["--features", features]
        if config.feature_weights and features != "pixels":
            scored += ["--feature-weights", config.feature_weights]
        train, target = (str(folder / f"{place}-{name}.npz") for name in ("train", "test"))
        reference.main([*scored, "--images", fitted, "--out", train])
        reference.main([*scored, "--images", test, "--classifier", train, "--out", target])
        for name, path in compared.items():
            if f"{name}, {features}" not in known:
                evaluate.main([*scored, "--mind", "--samples", path, "--reference", target, "--out", f"{path}.json"])
                yield f"{name}, {features}", files.read_sealed(f"{path}.json")["metrics"]


def samples(config: FloorsConfig, source: Path, folder: Path) -> dict[str, str]:
    """What stands in place of samples: name -> .npz file."""
    codec, made = open_codec(config.vae), {}
    for count in config.counts:
        images, labels, _ = fashion.load(source, "train", count)
        made[f"{count:,} training images"] = save(folder / f"{count}.npz", images, labels)
        restored = [
            to_uint8(codec.decode(codec.space.normalise(codec.encode(to_signed(torch.from_numpy(part[..., None])))[0])))
            for part in np.array_split(images, -(-count // 250))
        ]
        decoded = torch.cat(restored).numpy()[..., 0]
        made[f"{count:,} training images through the autoencoder"] = save(folder / f"{count}d.npz", decoded, labels)
    return made


def save(path: Path, images: np.ndarray, labels: np.ndarray) -> str:
    """Write grey images (N, H, W) and their labels as samples; returns the file."""
    np.savez(path, arr_0=images[..., None], labels=labels)
    return str(path)


def report(rows: Mapping[str, Any]) -> str:
    """The table of a result."""
    metrics = next(iter(rows.values()))
    return measure.table(rows, {name: lambda row, name=name: f"{row[name]:.3f}" for name in metrics})


if __name__ == "__main__":
    errors.run(main)
