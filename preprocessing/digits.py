"""The embedded data: 1,797 real images of handwritten digits, as a latent set in the space of pixels.

    python -m preprocessing.digits --out data/digits

Source and licence: digits.txt beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
import errors
from dataset import MANIFEST, LatentSet
from preprocessing import shards


@dataclass(frozen=True, kw_only=True)
class Options:
    out: str = config.option("data/digits", help="folder of the latent set to write")


def load() -> tuple[np.ndarray, np.ndarray]:
    """The images, grey uint8 (1797, 8, 8, 1) on 0..255 (ink 0..16 times 255/16, rounded), and labels int64 (1797,)."""
    with np.load(Path(__file__).with_name("digits.npz")) as archive:
        ink, labels = archive["images"], archive["labels"]
    return np.round(ink[..., None] * (255 / 16)).astype(np.uint8), labels.astype(np.int64)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the digits as a latent set."""
    options = config.build(Options, config.parse(Options, sys.argv[1:] if argv is None else argv,
                                                 prog="python -m preprocessing.digits"))
    from models.latents import pixels

    folder = Path(options.out)
    images, labels = load()
    with shards.locked(folder):
        if not (folder / MANIFEST).exists():
            latents = (images.transpose(0, 3, 1, 2)[:, None, None] / 127.5 - 1).astype(np.float32)
            entry = shards.write_shard(folder, 0, latents, labels)
            shards.write_manifest(folder, space=pixels(1), resolution=8, latent_size=8, views=1, parts=1, dtype="float32",
                                  crop="none", class_names=list("0123456789"), images=False, shards=[entry],
                                  source="UCI optical recognition of handwritten digits, doi 10.24432/C50P49")
    print(f"{folder}: {len(LatentSet(folder))} items")


if __name__ == "__main__":
    errors.run(main)
