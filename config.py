"""The options of training and of scores, and the recipes: everything that a run can be told.

Each class is a command line (`runtime.options`). Values between the defaults and the command line come from recipes
(below), from presets of an alignment (its own file) and from sampling presets (`sampling/presets.py`).

This file knows nothing of tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import UserError, require
from runtime.options import group, option

YEAR = 525_600  # minutes
MOST_SAMPLES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What a score compares."""

    features: str = option(
        "inception",
        help="what scores compare: inception, pixels, scenes, or timm:NAME[@SIDE], a "
        "model or a folder (fdr:NAME[@SIDE]: as FDr pools it)",
        heading="scores",
    )
    inception_weights: str | None = option(None, help="file of the Inception weights (default: downloaded once)")
    feature_weights: str | None = option(None, help="file of the timm model's weights (default: downloaded once)")
    mind: bool | None = option(
        None,
        help="MIND too: for few samples; needs a reference with images or features (default: while "
        "training, with such a reference)",
        later=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of `train.py` and `train_guide.py`. Batch sizes are global, steps are optimiser updates."""

    data_dir: str = option(help="latent set (folder with manifest.json)", heading="data")
    resident: str = option(
        "disk", choices=("disk", "ram", "device"), help="where latents are kept: memory-mapped, in RAM, on the device"
    )

    model: str = option("SiT-B/2", help="network, e.g. SiT-XL/2 (all names below)", heading="network")
    qk_norm: bool = option(False, help="normalise queries and keys")
    init_ckpt: str | None = option(
        None,
        help="start from this checkpoint's network: a folder, a run or RUN@STEP (the label table is "
        "new if the number of classes differs, positions are stretched if the latent size does)",
    )
    init_weights: str = option("ema", help="which of its weights: ema, raw, or ema-DECAY where it has several averages")
    branch_from: str | None = option(
        None,
        help="start as a branch of a run: continue everything from its checkpoint RUN@STEP under "
        "other alignment options (stop, weight, schedule)",
    )

    align: tuple[str, ...] = option(
        ("none",),
        help="alignment(s) beside the flow-matching loss (all names below); none is plain training",
        heading="method",
    )
    preset: str | None = option(None, help="named settings of the alignment: paper, upstream, ...")
    recipe: str = option(
        "sit",
        choices=("sit", "sit-400ep", "lightningdit", "lightningdit-400ep", "lightningdit-800ep", "digits"),
        help="optimiser, batch, EMA and t sampling of a model family",
    )
    cfg_prob: float = option(0.1, help="share of labels replaced by the null label")
    time_sampling: str = option("uniform", choices=("uniform", "logit-normal"), help="distribution of t")
    uniform_from_epoch: float | None = option(None, help="draw t uniformly from this epoch on")
    velocity_loss: str = option("mse", choices=("mse", "mse+cosine"), help="flow-matching loss")

    batch_size: int = option(256, help="samples per optimiser step over all processes", heading="optimisation")
    gradient_accumulation_steps: int = option(1, help="micro-batches per optimiser step")
    max_train_steps: int = option(400_000, help="optimiser steps in all")
    optimizer: str = option(
        "adamw", choices=("adamw", "muon"), help="muon: on the blocks' matrices, AdamW on all else", later=True
    )
    learning_rate: float = option(1e-4, help="AdamW's rate, after the warm-up")
    lr_warmup_steps: int = option(0, help="steps over which the rate rises linearly from 0")
    lr_scheduler: str = option(
        "constant",
        choices=("constant", "cosine"),
        help="the rate after that: as it is, or falling to 0 at --max-train-steps along a cosine",
    )
    adam_beta1: float = option(0.9, help="AdamW's beta1")
    adam_beta2: float = option(0.999, help="AdamW's beta2")
    adam_weight_decay: float = option(0.0, help="AdamW's weight decay")
    adam_epsilon: float = option(1e-8, help="AdamW's epsilon")
    max_grad_norm: float = option(1.0, help="clip the global gradient norm; 0 for no clipping")
    ema_decay: float = option(0.9999, help="decay of the weights' moving average")
    ema_extra_decays: tuple[float, ...] = option(
        (), help="decays of further averages, kept beside the first: --weights ema-DECAY"
    )
    ema_lengths: tuple[float, ...] = option(
        (),
        help="lengths of averages of which any other can be made later (python -m "
        "training.posthoc), such as 0.05 0.1: shares of the time trained",
        later=True,
    )
    ema_snapshot_steps: int | None = option(
        None, help="keep those every N steps (default: a 32nd of --max-train-steps)", later=True
    )
    ema_warmup: bool = option(False, help="shorten the average early on: min(decay, (1 + s) / (10 + s))")

    mixed_precision: str | None = option(
        None, help="no or bf16 (default: bf16 on CUDA hardware that has it)", heading="precision"
    )
    tf32: bool | None = option(
        None,
        help="float32 matmuls in TF32 (with --mixed-precision no; default: off, unless a preset's authors have it on)",
    )
    compile: str | None = option(
        None,
        choices=("on", "combined", "off"),
        help="compile each block (default: on with CUDA); combined: small CUDA kernels in one launch",
    )
    deterministic: bool = option(False, help="bitwise reproducible kernels on CUDA")

    activation_checkpointing: str = option(
        "none",
        choices=("none", "selective", "full"),
        heading="memory",
        help="what the backward pass recomputes: nothing, all but matmuls, whole blocks",
    )

    output_dir: str = option("exps", help="folder of all runs", heading="run")
    exp_name: str = option(help="name of this run; the same command again continues it")
    seed: int = option(0, help="seed of everything")
    checkpointing_steps: int = option(50_000, help="write a checkpoint every N steps, and at the end")
    checkpoints_total_limit: int | None = option(None, help="keep the latest so many checkpoints (default: all)")
    keep_every: int | None = option(None, help="with a limit: keep those of every N steps too")
    checkpointing_minutes: float = option(
        60.0, help="also after this many minutes without one; the last two of these are kept; 0: never"
    )
    max_hours: float | None = option(
        None, help="save and exit with code 75 before this many hours; the same command resumes"
    )
    skip_steps: tuple[int, int] | None = option(None, help="skip optimiser steps A to B, if they break a run")
    verify: bool = option(True, help="check the digest of every shard while training; --no-verify if already checked")
    timeout_minutes: float | None = option(
        None, help="how long a process waits for the others before it gives up (default: torch's)"
    )
    dry_run: bool = option(False, help="print what the run would cost, and train nothing")
    images_per_second: float | None = option(None, help="with --dry-run: measured training rate, to estimate hours")

    log_steps: int = option(100, help="log every N steps", heading="logging")
    grad_ratio_steps: int = option(
        1000,
        help="compare the gradient norms of alignments and denoising every N steps (each time costs "
        "about two steps); 0: never",
    )
    report_to: str = option("none", choices=("none", "wandb", "tensorboard"), help="tracker beside the JSON-lines log")
    sampling_steps: int = option(0, help="write a grid of samples every N steps; 0: never")
    eval_steps: int = option(0, help="score samples every N steps; 0: never")
    eval_preset: str | None = option(
        None, help="sampling preset of the scores (generate.py --list-presets; default: the ODE by Heun in 25 steps)"
    )
    eval_weights: tuple[str, ...] = option(("ema",), help="score the ema weights, the raw ones, or both: ema raw")
    reference: str | None = option(None, help="reference to score against (see evaluations.evaluate)")
    num_fid_samples: int = option(5000, help="samples per score; not to be compared with scores of 50,000")
    vae: str | None = option(None, help="VAE for grids and scores (default: the one that the data names)")
    scores: FeatureOptions = group(FeatureOptions)

    def __post_init__(self) -> None:
        require(
            self.batch_size > 0 and self.gradient_accumulation_steps > 0 and self.max_train_steps > 0,
            "--batch-size, --gradient-accumulation-steps and --max-train-steps must be positive",
        )
        require(
            self.checkpointing_steps > 0 and self.log_steps > 0,
            "--checkpointing-steps and --log-steps must be positive",
        )
        require(
            self.checkpointing_minutes >= 0,
            f"--checkpointing-minutes {self.checkpointing_minutes} must not be negative; 0 is never",
        )
        require(self.max_hours is None or self.max_hours > 0, f"--max-hours {self.max_hours} must be positive")
        require(
            self.timeout_minutes is None or 0 < self.timeout_minutes <= YEAR,
            f"--timeout-minutes {self.timeout_minutes} must be positive and at most {YEAR}, a year",
        )
        require(
            self.skip_steps is None or 0 < self.skip_steps[0] <= min(self.skip_steps[1], self.max_train_steps),
            f"--skip-steps {' '.join(map(str, self.skip_steps or ()))}: give the first and the last step, counted from 1 up to "
            f"--max-train-steps {self.max_train_steps}",
        )
        require(
            (self.eval_steps > 0) == (self.reference is not None),
            "--eval-steps and --reference go together: give both, or neither",
        )
        require(
            self.eval_steps > 0 or (self.eval_preset, self.eval_weights) == (None, ("ema",)),
            "--eval-preset and --eval-weights say how to score while training: add --eval-steps and --reference",
        )
        require_samples(self.num_fid_samples, 4)
        require(
            self.eval_steps > 0 or (self.num_fid_samples, self.scores) == (5000, FeatureOptions()),
            "--num-fid-samples, --features, --inception-weights, --feature-weights and --mind say how to score while training: add "
            "--eval-steps and --reference",
        )
        require(
            0 < len(set(self.eval_weights)) == len(self.eval_weights) and set(self.eval_weights) <= {"ema", "raw"},
            f"--eval-weights {' '.join(self.eval_weights)} must be ema, raw, or ema raw",
        )
        require(
            self.images_per_second is None or (self.dry_run and self.images_per_second > 0),
            "--images-per-second is a positive rate and belongs to --dry-run",
        )
        require(
            min(self.sampling_steps, self.eval_steps, self.grad_ratio_steps) >= 0,
            "--sampling-steps, --eval-steps and --grad-ratio-steps must not be negative; 0 means never",
        )
        require(self.learning_rate > 0 and self.adam_epsilon > 0, "--learning-rate and --adam-epsilon must be positive")
        require(
            self.adam_weight_decay >= 0 and self.max_grad_norm >= 0,
            "--adam-weight-decay and --max-grad-norm must not be negative",
        )
        require(
            0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1, "--adam-beta1 and --adam-beta2 must lie in [0, 1)"
        )
        require(
            self.exp_name.strip("./") != "" and not {"/", "\\", "\0"} & set(self.exp_name),
            f"--exp-name {self.exp_name!r} must name the run, one folder inside --output-dir",
        )
        require(
            self.uniform_from_epoch is None or self.time_sampling != "uniform",
            "--uniform-from-epoch ends another --time-sampling: add --time-sampling logit-normal",
        )
        require(
            (self.uniform_from_epoch or 0) >= 0, f"--uniform-from-epoch {self.uniform_from_epoch} must not be negative"
        )
        require(0 <= self.cfg_prob <= 1, f"--cfg-prob {self.cfg_prob} must lie in [0, 1]")
        require(0 <= self.ema_decay < 1, f"--ema-decay {self.ema_decay} must lie in [0, 1)")
        require(self.lr_warmup_steps >= 0, f"--lr-warmup-steps {self.lr_warmup_steps} must not be negative")
        require(
            self.lr_scheduler == "constant" or self.lr_warmup_steps < self.max_train_steps,
            f"--lr-warmup-steps {self.lr_warmup_steps} leaves none of the {self.max_train_steps} steps to --lr-scheduler cosine: give "
            f"fewer",
        )
        require(
            all(1e-4 <= decay < 1 and decay != self.ema_decay for decay in self.ema_extra_decays)
            and len(set(self.ema_extra_decays)) == len(self.ema_extra_decays),
            f"--ema-extra-decays {' '.join(map(str, self.ema_extra_decays))} must lie in [0.0001, 1) and differ from --ema-decay and "
            f"from each other",
        )
        require_lengths("--ema-lengths", self.ema_lengths)
        require(
            self.ema_snapshot_steps is None or (self.ema_snapshot_steps > 0 and bool(self.ema_lengths)),
            "--ema-snapshot-steps is a positive number of steps and goes with --ema-lengths",
        )
        require(
            self.checkpoints_total_limit is None or self.checkpoints_total_limit > 0,
            "--checkpoints-total-limit must be at least 1",
        )
        require(
            self.keep_every is None or (self.keep_every > 0 and self.checkpoints_total_limit is not None),
            "--keep-every is a positive number of steps and goes with --checkpoints-total-limit",
        )
        require_weights("--init-weights", self.init_weights)
        require(
            self.align == ("none",) or "none" not in self.align,
            f"--align {' '.join(self.align)}: none is plain training, leave it out",
        )
        require(
            len(set(self.align)) == len(self.align),
            f"--align {' '.join(self.align)} names an alignment twice; give it once",
        )
        require_precision(self.mixed_precision, self.tf32)
        require(
            self.branch_from is None or self.init_ckpt is None,
            "give --branch-from (everything goes on) or --init-ckpt (the network alone starts anew), not both",
        )

    def keeps_averages_at(self, step: int) -> bool:
        """Whether the averages of --ema-lengths are kept after optimiser step `step`, counted from 1; the last step's always are."""
        every = self.ema_snapshot_steps or max(1, self.max_train_steps // 32)
        return bool(self.ema_lengths) and (step % every == 0 or step == self.max_train_steps)

    def learning_rate_at(self, step: int) -> float:
        """AdamW's rate in optimiser step `step`, counted from 0."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / self.lr_warmup_steps
        if self.lr_scheduler == "constant":
            return self.learning_rate
        progress = (step - self.lr_warmup_steps) / (self.max_train_steps - self.lr_warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def require_weights(flag: str, name: str) -> None:
    """Raise UserError unless `name` can be a checkpoint's weights: raw, ema, ema-DECAY or ema-length-LENGTH."""
    require(
        re.fullmatch(r"raw|ema(-(length-)?0\.\d+)?", name) is not None,
        f"{flag} {name} is neither raw nor ema nor ema-DECAY nor ema-length-LENGTH: give one of them",
    )


LONGEST = 0.28
"""Of an average's lengths: one that weighs all steps alike has 1 / sqrt(12); beyond, early steps would count more than late ones."""


def require_lengths(flag: str, lengths: Sequence[float]) -> None:
    """Raise UserError unless each length is one that an average can have, and is given once."""
    require(
        all(0.005 <= length <= LONGEST for length in lengths) and len(set(lengths)) == len(lengths),
        f"{flag} {' '.join(f'{length:g}' for length in lengths)}: give lengths from 0.005 to {LONGEST}, each once",
    )


def require_samples(count: int, least: int = 1) -> None:
    """Raise UserError unless `count` is a number of samples that can be drawn, at least `least`."""
    require(
        least <= count <= MOST_SAMPLES,
        f"--num-fid-samples {count} must be at least {least} and at most {MOST_SAMPLES:,}",
    )


def require_precision(wanted: str | None, tf32: bool | None) -> None:
    """Raise UserError unless `wanted` is no, bf16 or None, and no where TF32 is asked for."""
    require(not tf32 or wanted == "no", "--tf32 is a precision of its own: write --mixed-precision no --tf32")
    if wanted not in (None, "no", "bf16"):
        raise UserError(
            f"--mixed-precision {wanted} is not supported: use bf16 (fp16 overflows in these networks' features, fp8 "
            f"does not pay at these widths) or no"
        )


_XL_400 = {"model": "SiT-XL/2", "max_train_steps": 2_000_000}
_LIGHTNINGDIT = {
    "model": "LightningDiT-XL/1",
    "batch_size": 1024,
    "max_train_steps": 80_000,
    "learning_rate": 2e-4,
    "adam_beta2": 0.95,
    "max_grad_norm": 0.0,
    "time_sampling": "logit-normal",
    "velocity_loss": "mse+cosine",
}

# Values between the defaults and the command line: options of the run, and of any alignment that has them.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # SiT and REPA: ImageNet, 256 latents a step
    "sit": {"train": {}, "align": {}},
    # LightningDiT, 64 epochs of 1,251 steps
    "lightningdit": {"train": _LIGHTNINGDIT, "align": {}},
    # the paper's Table 2: 400 epochs of SiT-XL (5,004 steps each) and of LightningDiT-XL (1,251 steps each); the paper says
    # nothing of the distribution of t there, so it stays logit-normal
    "sit-400ep": {"train": _XL_400, "align": {}},
    "lightningdit-400ep": {"train": {**_LIGHTNINGDIT, "max_train_steps": 500_000}, "align": {}},
    # and LightningDiT's 800 epochs: times are uniform from epoch 480 on
    "lightningdit-800ep": {
        "train": {**_LIGHTNINGDIT, "max_train_steps": 1_000_000, "uniform_from_epoch": 480.0},
        "align": {},
    },
    # the embedded digits: minutes on a CPU
    "digits": {
        "train": {
            "model": "SiT-Tiny/2",
            "batch_size": 64,
            "max_train_steps": 800,
            "learning_rate": 1e-3,
            "ema_warmup": True,
            "checkpointing_steps": 400,
            "log_steps": 20,
        },
        "align": {"hidden": 512},
    },
}

# Options that may differ when a run is continued: they move no number of the steps already taken.
FREE_ON_RESUME = frozenset(
    {
        "data_dir",
        "resident",
        "max_train_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "keep_every",
        "sampling_steps",
        "log_steps",
        "report_to",
        "output_dir",
        "exp_name",
        "vae",
        "eval_steps",
        "eval_preset",
        "eval_weights",
        "reference",
        "num_fid_samples",
        "features",
        "inception_weights",
        "feature_weights",
        "mind",
        "gradient_accumulation_steps",
        "compile",
        "activation_checkpointing",
        "dry_run",
        "images_per_second",
        "checkpointing_minutes",
        "max_hours",
        "skip_steps",
        "verify",
        "timeout_minutes",
        "mixed_precision",
        "tf32",
        "grad_ratio_steps",
        "ema_snapshot_steps",
    }
)
