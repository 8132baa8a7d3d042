"""What a run writes at a step: its checkpoint, and snapshots of the averages of --ema-lengths."""

from __future__ import annotations

from typing import Any

from models import checkpoint
from runtime import launch
from runtime.options import as_dict
from training import ema, optimizers, resume
from training.run import Run


def save(run: Run) -> None:
    """Write the checkpoint of the current step on the main process; the others wait for it."""
    config = run.config
    if run.accelerator.is_main_process:
        averages = {name: average.network.state_dict() for name, average in run.averages.items()}
        heads = {
            f"{name}.{key}": value
            for name, alignment in run.alignments.items()
            for key, value in alignment.state_dict().items()
        }
        checkpoint.write(
            run.folder / "checkpoints" / f"{run.step:07d}",
            **_description(run),
            network=run.network.state_dict(),
            ema=averages.pop("ema"),
            averages=averages,
            heads=heads,
            optimizer=optimizers.state_of(run.optimizer, run.parameter_names()),
            # pruning keeps only the last two that the clock or a signal asked for
            kept=run.step % config.checkpointing_steps == 0 or run.step == config.max_train_steps,
        )
        resume.prune(run.folder, config.checkpoints_total_limit, config.keep_every)
    run.accelerator.wait_for_everyone()


def save_averages(run: Run) -> None:
    """Write the averages of --ema-lengths alone, from which `training.posthoc` computes others; main process."""
    if run.accelerator.is_main_process:
        averages = {
            name: average.network.state_dict()
            for name, average in run.averages.items()
            if isinstance(average.decay, ema.Power)
        }
        folder = run.folder / "averages" / f"{run.step:07d}"
        checkpoint.write(folder, **_description(run), network={}, averages=averages)


def _description(run: Run) -> dict[str, Any]:
    """The part of a checkpoint that describes it: network, data, options, resolved choices, precision."""
    data = run.data
    velocity_heads = {
        name: as_dict(alignment.velocity_head)
        for name, alignment in run.alignments.items()
        if alignment.velocity_head is not None
    }
    return {
        "spec": run.spec,
        "space": data.space,
        "step": run.step,
        "data": {
            "path": str(run.config.data_dir),
            "digest": data.digest,
            "count": len(data),
            "class_names": data.manifest["class_names"],
        },
        "train": as_dict(run.config),
        "align": {name: as_dict(options) for name, options in run.setup.options.items()},
        "resolved": run.resolved,
        **({"velocity_heads": velocity_heads} if velocity_heads else {}),
        "precision": launch.precision_name(run.dtype, run.tf32),
    }
