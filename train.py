"""Stage 1 and every single-stage method: train a diffusion transformer on a latent set.

    python train.py --data-dir data/imagenet256 --exp-name stage1 --model SiT-XL/2 --align latent
    accelerate launch --num_processes 8 train.py ...      # the same command on many GPUs

`--align none` (the default) is plain SiT. `--align NAME --help` lists that alignment's options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from evaluations import monitor
from runtime import errors
from training import command


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; returns the run's folder."""
    return command.main(sys.argv[1:] if argv is None else argv, "train.py", __doc__, monitor.watch)


if __name__ == "__main__":
    errors.run(main)
