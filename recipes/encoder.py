"""A small vision transformer that knows the digits: what stands in for DINOv2 where REPA and HASTE run on them.

    python -m recipes.encoder --out runs/encoder
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from runtime import errors, files, progress
from runtime.errors import require
from runtime.options import option, read
from runtime.streams import Stream

ENCODER = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Options of its training."""

    out: str = option(help="folder to write, as timm's save_for_hf does")
    epochs: int = option(30, help="passes over four fifths of the digits")

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"--epochs {self.epochs} must be positive")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = read(EncoderConfig, sys.argv[1:] if argv is None else argv, prog="python -m recipes.encoder", description=__doc__)
    accuracy = train_encoder(Path(config.out), config.epochs)
    print(f"{config.out}: {100 * accuracy:.1f}% of the held-out fifth")


def train_encoder(folder: Path, epochs: int = 30) -> float:
    """Train the classifier ViT unless it is there; returns its accuracy on the held-out fifth.

    The folder is what timm's `save_for_hf` writes, so that any timm user can open it.
    """
    if (folder / "accuracy.json").is_file():
        return files.read_json(folder / "accuracy.json")["accuracy"]
    import timm

    from preprocessing import digits

    images, labels = digits.load()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = torch.from_numpy(labels)
    order = torch.from_numpy(Stream(0, "encoder/split").permutation(len(y)))
    held, train = order[: len(y) // 5], order[len(y) // 5 :]
    with torch.random.fork_rng():  # timm initialises from the global generator
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **ENCODER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for epoch in progress.bar(range(epochs), desc="encoder", unit="epoch"):
        for index in train[torch.from_numpy(Stream(0, "encoder/order", epoch).permutation(len(train)))].split(64):
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[held]).argmax(1) == y[held]).float().mean().item()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5,), "std": (0.5,), "tag": "digits"}
    with files.replacing(folder) as temporary:
        timm.models.save_for_hf(model, temporary, model_args=ENCODER, safe_serialization=True)
        files.write_json(temporary / "accuracy.json", {"accuracy": accuracy, "held_out": len(held), "trained_on": len(train)})
    return accuracy


if __name__ == "__main__":
    errors.run(main)
