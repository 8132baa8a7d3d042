"""Stage 2: train a fresh network guided by a frozen stage-1 checkpoint.

    python train_guide.py --data-dir data/imagenet256 --exp-name stage2 --model SiT-XL/2 --guiding-ckpt exps/stage1

The teacher is rebuilt from its checkpoint alone. Everything that `train.py` takes is taken here too.
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
    return command.main(
        sys.argv[1:] if argv is None else argv, "train_guide.py", __doc__, monitor.watch, always=("guided",)
    )


if __name__ == "__main__":
    errors.run(main)
