"""The embedded data: 1,797 real images of handwritten digits, as a latent set in the space of pixels.

    python -m preprocessing.digits --out data/digits

Source and licence: digits.txt beside this file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from preprocessing import job
from runtime import errors
from runtime.options import option, read


@dataclass(frozen=True, kw_only=True)
class Options:
    out: str = option("data/digits", help="folder of the latent set to write")


class Digits:
    """The digits as an image set: grey pictures of 8 x 8 pixels."""

    description = "UCI optical recognition of handwritten digits, doi 10.24432/C50P49"

    def __init__(self) -> None:
        self.class_names = [str(digit) for digit in range(10)]
        self.images, self.labels = load()
        self.names = [f"digit-{index:04d}" for index in range(len(self.labels))]
        self.photographs: list[str] = []
        self.fingerprint = hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()
        self.summary = f"the embedded digits: {len(self.names):,} images, 10 classes"

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index, ..., 0])


def load() -> tuple[np.ndarray, np.ndarray]:
    """The images, grey uint8 (1797, 8, 8, 1) on 0..255 (ink 0..16 times 255/16, rounded), and labels int64 (1797,)."""
    with np.load(Path(__file__).with_name("digits.npz")) as archive:
        ink, labels = archive["images"], archive["labels"]
    return np.round(ink[..., None] * (255 / 16)).astype(np.uint8), labels.astype(np.int64)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the digits as a latent set, unless it is there already."""
    options = read(Options, argv, prog="python -m preprocessing.digits", description=__doc__)
    from preprocessing.encoding import encode

    encode(
        Digits(),
        job.Options(
            images="digits",
            vae="pixels",
            resolution=8,
            grey=True,
            dtype="float32",
            batch_size=256,
            workers=0,
            out=options.out,
        ),
    )


if __name__ == "__main__":
    errors.run(main)
