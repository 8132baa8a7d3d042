"""Before the first step: check disk space, write and read back a file, and try previews and scores at tiny size.

What would fail hours later fails now.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from runtime import files, launch
from runtime.errors import UserError, note, require
from training.between import Callback
from training.ema import Power
from training.run import Run


def check(run: Run, callbacks: Sequence[Callback]) -> None:
    """Try everything that the run will do besides training, at tiny size and without a trace.

    Raises:
        UserError: too little disk for one checkpoint, a folder that loses what is written, a preview or a score that
            cannot be made.
    """
    launch.on_main(run.accelerator, lambda: _disk(run))
    launch.on_main(run.accelerator, lambda: _written_is_read(run.folder))
    for callback in callbacks:
        callback.rehearse(run.ema.network, run.dtype)


def checkpoint_bytes(run: Run) -> int:
    """Bytes of one checkpoint in float32: network and heads with AdamW's two moments, and the averages."""
    return 4 * (
        3 * _count(run.network, *run.alignments.values())
        + _count(*(average.network for average in run.averages.values()))
    )


def snapshot_bytes(run: Run) -> int:
    """Bytes of one snapshot of the averages of --ema-lengths."""
    return 4 * _count(*(average.network for average in run.averages.values() if isinstance(average.decay, Power)))


def _count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _disk(run: Run) -> None:
    """Compare free disk space with what the run has yet to write."""
    config, size = run.config, checkpoint_bytes(run)
    last, every = config.max_train_steps, config.checkpointing_steps
    to_come = max(0, -(-last // every) - run.step // every)
    passing = 2 if config.checkpointing_minutes else 0
    free = shutil.disk_usage(_existing(run.folder)).free
    snapshots = snapshot_bytes(run) * sum(map(config.keeps_averages_at, range(run.step + 1, last + 1)))
    shown = f"{size / 2**30:.2f} GiB each, {free / 2**30:.1f} GiB are free"
    require(
        free > 1.05 * size or not to_come,
        f"{run.folder} has no room for a checkpoint ({shown}); free some space or choose another --output-dir",
    )
    if free < 1.05 * (size * (to_come + passing) + snapshots):
        averages = f", with {snapshots / 2**30:.1f} GiB of --ema-lengths" if snapshots else ""
        note(
            f"{to_come} checkpoints are to come at --checkpointing-steps {every}, and {passing} more by the clock, "
            f"{shown}: they do not all fit{averages}"
        )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def _written_is_read(folder: Path) -> None:
    """Write a small file the way checkpoints are written, and read it back."""
    file = folder / ".preflight.safetensors"
    tensor = torch.arange(1000, dtype=torch.float32)
    files.save_tensors(file, {"tensor": tensor})
    try:
        same = torch.equal(files.load_tensors(file)["tensor"], tensor)
    except UserError as error:
        raise UserError(f"{folder} loses what is written there ({error}); choose another --output-dir") from error
    finally:
        file.unlink(missing_ok=True)
    require(same, f"{folder} loses what is written there; choose another --output-dir")
