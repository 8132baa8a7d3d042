"""Images to a latent set.

    python -m preprocessing.encode --images DIR|ZIP --vae ID|DIR|pixels --resolution 256 --out data/imagenet
    accelerate launch --multi_gpu --num_processes 8 -m preprocessing.encode ...

A command that was killed continues where it was, and finishes with the same bytes (`preprocessing.encoding`).
"""

from __future__ import annotations

from collections.abc import Sequence

from preprocessing.images import ImageFiles
from preprocessing.job import Options
from runtime import errors
from runtime.options import read


def main(argv: Sequence[str] | None = None) -> None:
    """Encode a folder or ZIP file of images."""
    options = read(Options, argv, prog="python -m preprocessing.encode", description=__doc__)
    from preprocessing.encoding import encode

    encode(ImageFiles(options.images), options)


if __name__ == "__main__":
    errors.run(main)
