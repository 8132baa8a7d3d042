"""Small vision transformers that classify the embedded data: they stand in for DINOv2 in REPA and HASTE.

    python -m recipes.encoder --out runs/encoder
    python -m recipes.encoder --data scenes --epochs 24 --out runs/scenes    # evaluations/scenes, which scores scenes

A fifth of the handwriting is held out of training; the accuracy on that fifth is written beside the encoder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing import digits
from preprocessing.scenes import GROUPS, Dials, Scenes
from runtime import errors, files, progress
from runtime.errors import require
from runtime.options import group, option, read
from runtime.streams import Stream
from runtime.text import quoted

ENCODER = {"embed_dim": 64, "depth": 4, "num_heads": 4}
# Scenes it learns from. A sixth as many are held out, drawn with handwriting that it never saw.
SCENES = 12_000


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Options of its training."""

    out: str = option(help="folder to write, as timm's save_for_hf does")
    data: str = option("digits", choices=("digits", "scenes"), help="what it learns")
    epochs: int = option(30, help="passes over the data it learns from", within="[1, inf)")
    scenes: Dials = group(Dials)

    def __post_init__(self) -> None:
        require(self.data == "scenes" or self.scenes == Dials(), "the dials belong to scenes: add --data scenes")


# uint8 images (N, H, W, C) and labels (N,), those held out last, and how many are held out.
Examples = tuple[np.ndarray, np.ndarray, int]


def digit_examples() -> Examples:
    """The digits, a random fifth of them held out."""
    images, labels = digits.load()
    held = len(labels) // 5
    order = np.roll(Stream(0, "encoder/split").permutation(len(labels)), -held)
    return images[order], labels[order], held


def scene_examples(dials: Dials) -> Examples:
    """Scenes of the first four groups of handwriting, and of the last, which is held out."""
    sets = (Scenes(dials, SCENES, 1, range(GROUPS - 1)), Scenes(dials, SCENES // 6, 2, (GROUPS - 1,)))
    images = [
        scenes.draw(index)[0]
        for scenes in sets
        for index in progress.bar(range(len(scenes.names)), desc="scenes", unit="image")
    ]
    labels = np.concatenate([scenes.labels for scenes in sets])
    return np.stack(images), labels, len(images) - SCENES


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = read(EncoderConfig, argv, prog="python -m recipes.encoder", description=__doc__)
    accuracy = train_encoder(Path(config.out), config.epochs, config.scenes if config.data == "scenes" else None)
    print(f"{quoted(config.out)}: {100 * accuracy:.1f}% of what was held out")


def train_encoder(folder: Path, epochs: int = 30, scenes: Dials | None = None) -> float:
    """Train the classifier of the digits, or of `scenes`, unless `folder` has it; returns the held-out accuracy.

    timm's `save_for_hf` writes the folder, so any timm user can open it.
    """
    wanted: dict[str, Any] = {"epochs": epochs}
    if scenes is not None:
        wanted["scenes"] = json.loads(json.dumps(dataclasses.asdict(scenes)))
    report = folder / "accuracy.json"
    if report.is_file():
        there = files.read_json(report)
        require(
            {key: there[key] for key in ("epochs", "scenes") if key in there} == wanted,
            f"{folder} holds an encoder of other data or dials, or of {there.get('epochs')} epochs: "
            f"choose another folder",
        )
        return there["accuracy"]
    import timm
    import torch

    images, labels, held = digit_examples() if scenes is None else scene_examples(scenes)
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
        # on scenes the rate falls to zero; the digits' committed numbers are of a constant rate
        optimizer.param_groups[0]["lr"] = 1e-3 if scenes is None else 1e-3 * (1 - epoch / epochs)
        order = Stream(0, "encoder/order", epoch).permutation(count)
        for index in torch.from_numpy(order).split(64):
            torch.nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[count:]).argmax(1) == y[count:]).float().mean().item()
    pixels = {"mean": (0.5,) * channels, "std": (0.5,) * channels, "tag": "digits" if scenes is None else "scenes"}
    with files.replacing(folder) as temporary:
        timm.models.save_for_hf(
            model,
            str(temporary),
            model_config={"pretrained_cfg": pixels},
            model_args=shape,
            safe_serialization=True,
        )
        files.write_json(
            temporary / report.name, {"accuracy": accuracy, "held_out": held, "trained_on": count, **wanted}
        )
    return accuracy


if __name__ == "__main__":
    errors.run(main)
