"""A small vision transformer that classifies the embedded digits: it stands in for DINOv2 in REPA and HASTE.

    python -m recipes.encoder --out runs/encoder

A fifth of the digits is held out of training; the accuracy on that fifth is written beside the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing import digits
from runtime import errors, files, progress
from runtime.errors import require
from runtime.options import option, read
from runtime.streams import Stream
from runtime.text import quoted

ENCODER = {"embed_dim": 64, "depth": 4, "num_heads": 4}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Options of its training."""

    out: str = option(help="folder to write, as timm's save_for_hf does")
    epochs: int = option(30, help="passes over the data it learns from", within="[1, inf)")


def digit_examples() -> tuple[np.ndarray, np.ndarray, int]:
    """The digits, uint8 (N, 8, 8, 1), their labels (N,), and how many at the end, drawn at random, are held out."""
    images, labels = digits.load()
    held = len(labels) // 5
    order = np.roll(Stream(0, "encoder/split").permutation(len(labels)), -held)
    return images[order], labels[order], held


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = read(EncoderConfig, argv, prog="python -m recipes.encoder", description=__doc__)
    accuracy = train_encoder(Path(config.out), config.epochs)
    print(f"{quoted(config.out)}: {100 * accuracy:.1f}% of what was held out")


def train_encoder(folder: Path, epochs: int = 30) -> float:
    """Train the classifier of the digits, unless `folder` has it; returns the held-out accuracy.

    timm's `save_for_hf` writes the folder, so any timm user can open it.
    """
    report = folder / "accuracy.json"
    if report.is_file():
        there = files.read_json(report)
        require(
            there["epochs"] == epochs,
            f"{folder} holds an encoder of {there['epochs']} epochs: choose another folder",
        )
        return there["accuracy"]
    import timm
    import torch

    images, labels, held = digit_examples()
    count = len(labels) - held  # of the images to learn from
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(labels)
    channels, side = x.shape[1:3]
    shape: dict[str, Any] = {
        **ENCODER,
        "num_classes": int(y.max()) + 1,
        "img_size": side,
        # as many patches as the networks that learn from it have tokens
        "patch_size": side // 4,
        "in_chans": channels,
    }
    with torch.random.fork_rng():  # timm initialises from the global generator
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for epoch in progress.bar(range(epochs), desc="encoder", unit="epoch"):
        order = Stream(0, "encoder/order", epoch).permutation(count)
        for index in torch.from_numpy(order).split(64):
            torch.nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[count:]).argmax(1) == y[count:]).float().mean().item()
    pixels = {"mean": (0.5,) * channels, "std": (0.5,) * channels, "tag": "digits"}
    with files.replacing(folder) as temporary:
        timm.models.save_for_hf(
            model,
            str(temporary),
            model_config={"pretrained_cfg": pixels},
            model_args=shape,
            safe_serialization=True,
        )
        files.write_json(
            temporary / report.name, {"accuracy": accuracy, "held_out": held, "trained_on": count, "epochs": epochs}
        )
    return accuracy


if __name__ == "__main__":
    errors.run(main)
