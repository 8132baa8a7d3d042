"""Options of training and of scores, and the recipes of model families.

Each class is a command line (`runtime.options`). Between the defaults and the command line stand the recipe (below),
the preset of an alignment (in its own file) and a file of options (`--config`).

The list of training's flags is closed: a new setting goes into a preset, into the file of its method, or is `rare`.
This file does not know tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import UserError, require
from runtime.options import group, option

MOST_SAMPLES = 100_000_000
# How distances of precision and recall are computed: as ADM does, in part in float16, or in float32.
PRECISION_MODES = ("adm_fp16", "fp32")
# The first steps at which gradient norms are compared: an alignment may last a few hundred steps.
EARLY = (1, 10, 30, 100, 300)


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """The features that a score compares."""

    features: str = option(
        "inception",
        help="features that scores compare: inception, pixels, or timm:NAME[@SIDE], a model name or a folder "
        "(fdr:NAME[@SIDE]: pooled as FDr does)",
        heading="scores",
    )
    feature_weights: str | None = option(None, help="file of that network's weights (default: downloaded once)")
    mind: bool | None = option(
        None, help="compute MIND too; needs a reference with images or features (default: only while training)"
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of `train.py` and `train_guide.py`. Batch sizes are global, steps are optimiser updates.

    Raises:
        UserError: a value out of its bounds, options that contradict each other.
    """

    data_dir: str = option(help="latent set (folder with manifest.json)", heading="data")
    resident: str = option(
        "disk",
        choices=("disk", "ram", "device"),
        help="where latents are held: memory-mapped files, RAM, or the device",
    )

    model: str = option("SiT-B/2", help="network, e.g. SiT-XL/2 (all names below)", heading="network")
    qk_norm: bool = option(False, help="normalise queries and keys")
    route: tuple[float, float, float] | None = option(
        None,
        within="[0, 1000]",
        help="A B SHARE: while training, this share of the tokens, drawn for each sample, leaves out blocks A to B "
        "(TREAD: 3 9 0.5 of 12 blocks)",
    )
    init_ckpt: str | None = option(
        None,
        help="start from this checkpoint's network: a folder, a run or RUN@STEP (the label table is "
        "new if the number of classes differs, positions are stretched if the latent size does)",
    )
    init_weights: str = option("ema", rare=True, help="weights of --init-ckpt: ema, raw, or ema-DECAY")
    branch_from: str | None = option(
        None,
        help="continue the checkpoint RUN@STEP of another run under other alignment options (stop, weight, schedule)",
    )

    align: tuple[str, ...] = option(
        ("none",),
        heading="method",
        help="alignment(s) beside the flow-matching loss (all names below); none is plain training",
    )
    preset: str | None = option(None, help="named settings of the alignment: paper, upstream, ...")
    recipe: str = option(
        "sit",
        choices=("sit", "lightningdit", "lightningdit-800ep", "digits"),
        help="optimiser, batch, EMA and t sampling of a model family",
    )
    cfg_prob: float = option(0.1, within="[0, 1]", help="share of labels replaced by the null label")
    time_sampling: str = option("uniform", choices=("uniform", "logit-normal"), help="distribution of t")
    uniform_from_epoch: float | None = option(
        None, within="[0, inf)", rare=True, help="epoch from which on t is drawn uniformly"
    )
    velocity_loss: str = option("mse", choices=("mse", "mse+cosine"), help="flow-matching loss")

    batch_size: int = option(
        256, within="[1, inf)", heading="optimisation", help="samples per optimiser step over all processes"
    )
    gradient_accumulation_steps: int = option(1, within="[1, inf)", help="micro-batches per optimiser step")
    max_train_steps: int = option(400_000, within="[1, inf)", help="last optimiser step")
    optimizer: str = option(
        "adamw", choices=("adamw", "muon"), help="muon: Muon for the blocks' matrices, AdamW for the rest"
    )
    learning_rate: float = option(1e-4, within="(0, inf)", help="learning rate after the warm-up")
    lr_warmup_steps: int = option(0, within="[0, inf)", help="steps over which the rate rises linearly from 0")
    lr_scheduler: str = option(
        "constant",
        choices=("constant", "cosine"),
        help="rate after the warm-up: constant, or a cosine that reaches 0 at --max-train-steps",
    )
    adam_beta1: float = option(0.9, within="[0, 1)", rare=True, help="AdamW's beta1")
    adam_beta2: float = option(0.999, within="[0, 1)", help="AdamW's beta2")
    adam_weight_decay: float = option(0.0, within="[0, inf)", help="weight decay")
    adam_epsilon: float = option(1e-8, within="(0, inf)", rare=True, help="AdamW's epsilon")
    max_grad_norm: float = option(1.0, within="[0, inf)", help="clip the global gradient norm; 0: no clipping")
    ema_decay: float = option(0.9999, within="[0, 1)", help="decay of the weights' moving average")
    ema_extra_decays: tuple[float, ...] = option(
        (),
        within="[1e-4, 1)",
        rare=True,
        help="decays of further averages, saved beside the first: --weights ema-DECAY",
    )
    ema_lengths: tuple[float, ...] = option(
        (),
        help="lengths, as shares of the time trained, of averages from which any other can be computed later, "
        "such as 0.05 0.1 (python -m training.posthoc)",
    )
    ema_snapshot_steps: int | None = option(
        None,
        within="[1, inf)",
        rare=True,
        help="steps between snapshots of those averages (default: a 32nd of the run)",
    )
    ema_warmup: bool = option(False, help="shorten the average early on: min(decay, (1 + s) / (10 + s))")

    mixed_precision: str | None = option(
        None, heading="precision", help="no or bf16 (default: bf16 on CUDA hardware that has it)"
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

    config: str | None = option(
        None, heading="run", help="JSON file of options, such as a run's run.json; flags override it"
    )
    output_dir: str = option("exps", help="folder of all runs")
    exp_name: str = option(help="name of this run; the same command again continues it")
    seed: int = option(0, help="seed of all random numbers")
    checkpointing_steps: int = option(
        50_000, within="[1, inf)", help="write a checkpoint every N steps, and at the end"
    )
    checkpoints_total_limit: int | None = option(
        None, within="[1, inf)", help="number of latest checkpoints to keep (default: all)"
    )
    keep_every: int | None = option(
        None, within="[1, inf)", rare=True, help="with a limit: also keep the checkpoints of every N steps"
    )
    checkpointing_minutes: float = option(
        60.0,
        within="[0, inf)",
        rare=True,
        help="also save after this many minutes without a checkpoint (0: off); only the last two of these are kept",
    )
    max_hours: float | None = option(
        None,
        within="(0, inf)",
        help="save and exit with code 75 before this many hours; the same command continues",
    )
    skip_steps: tuple[int, int] | None = option(None, help="first and last optimiser step to skip, if they break a run")
    verify: bool = option(True, rare=True, help="check the digest of every shard while training")
    timeout_minutes: float | None = option(
        None,
        within="(0, 525600]",
        rare=True,
        help="minutes that a process waits for the others before it gives up (default: torch's)",
    )
    dry_run: bool = option(False, help="print what the run would cost, and do not train")
    measure: int | None = option(
        None, within="[1, inf)", help="with --dry-run: time this many real steps here, in place of computed hours"
    )

    log_steps: int = option(100, within="[1, inf)", heading="logging", help="log every N steps")
    grad_ratio_steps: int = option(
        1000,
        within="[0, inf)",
        help="compare the gradient norms of alignments and denoising every N steps, and at steps "
        f"{', '.join(map(str, EARLY))}, each time at the cost of about two steps; 0: never",
    )
    report_to: str = option("none", choices=("none", "wandb", "tensorboard"), help="tracker beside the JSON-lines log")
    sampling_steps: int = option(0, within="[0, inf)", help="write a grid of samples every N steps; 0: never")
    eval_steps: int = option(0, within="[0, inf)", help="score samples every N steps; 0: never")
    eval_preset: str | None = option(
        None, rare=True, help="sampling preset of the scores (default: the ODE by Heun in 25 steps)"
    )
    eval_weights: tuple[str, ...] = option(("ema",), rare=True, help="weights to score: ema, raw, or both")
    reference: str | None = option(None, help="reference to score against (see evaluations.evaluate)")
    num_fid_samples: int = option(
        5000, within="[4, 1e8]", help="samples per score; not comparable with scores of 50,000"
    )
    vae: str | None = option(None, help="VAE for grids and scores (default: the one that the data names)")
    scores: FeatureOptions = group(FeatureOptions, without=("mind",))

    def __post_init__(self) -> None:
        self._require_names()
        self._require_schedule()
        self._require_scores()

    def _require_names(self) -> None:
        """Names of runs, checkpoints, weights, precisions and alignments."""
        require(
            self.exp_name.strip("./") != "" and not {"/", "\\", "\0"} & set(self.exp_name),
            f"--exp-name {self.exp_name!r} must be the name of one folder inside --output-dir",
        )
        require(
            self.branch_from is None or self.init_ckpt is None,
            "give --branch-from (continues everything) or --init-ckpt (starts anew from its network), not both",
        )
        require_weights("init_weights", self.init_weights)
        require(
            self.align == ("none",) or "none" not in self.align,
            f"--align {' '.join(self.align)}: none is plain training, leave it out",
        )
        require(
            len(set(self.align)) == len(self.align),
            f"--align {' '.join(self.align)} names an alignment twice; give it once",
        )
        require_precision(self.mixed_precision, self.tf32)

    def _require_schedule(self) -> None:
        """Steps, rates and averages that go together."""
        require(
            self.skip_steps is None or 0 < self.skip_steps[0] <= min(self.skip_steps[1], self.max_train_steps),
            f"--skip-steps {' '.join(map(str, self.skip_steps or ()))}: give the first and the last step, counted from "
            f"1 up to --max-train-steps {self.max_train_steps}",
        )
        require(self.measure is None or self.dry_run, "--measure belongs to --dry-run; add it")
        require(
            self.uniform_from_epoch is None or self.time_sampling != "uniform",
            "uniform_from_epoch ends another --time-sampling: add --time-sampling logit-normal",
        )
        require(
            self.lr_scheduler == "constant" or self.lr_warmup_steps < self.max_train_steps,
            f"--lr-warmup-steps {self.lr_warmup_steps} takes all {self.max_train_steps} steps from --lr-scheduler "
            f"cosine: give fewer",
        )
        require(
            len({self.ema_decay, *self.ema_extra_decays}) == 1 + len(self.ema_extra_decays),
            f"ema_extra_decays {' '.join(map(str, self.ema_extra_decays))} must differ from --ema-decay and from "
            f"each other",
        )
        require_lengths("--ema-lengths", self.ema_lengths)
        require(self.ema_snapshot_steps is None or bool(self.ema_lengths), "ema_snapshot_steps needs --ema-lengths")
        require(
            self.keep_every is None or self.checkpoints_total_limit is not None,
            "keep_every needs --checkpoints-total-limit",
        )

    def _require_scores(self) -> None:
        """Options of scores only with scores."""
        require(
            (self.eval_steps > 0) == (self.reference is not None),
            "--eval-steps and --reference go together: give both, or neither",
        )
        given = (self.eval_preset, self.eval_weights, self.num_fid_samples, self.scores)
        require(
            self.eval_steps > 0 or given == (None, ("ema",), 5000, FeatureOptions()),
            "--num-fid-samples, --features, --feature-weights, eval_preset and eval_weights are "
            "options of scores while training: add --eval-steps and --reference",
        )
        require(
            0 < len(set(self.eval_weights)) == len(self.eval_weights) and set(self.eval_weights) <= {"ema", "raw"},
            f"eval_weights {' '.join(self.eval_weights)} must be ema, raw, or ema raw",
        )

    def skips(self, step: int) -> bool:
        """Whether --skip-steps leaves out optimiser step `step`, counted from 1."""
        return self.skip_steps is not None and self.skip_steps[0] <= step <= self.skip_steps[1]

    def compares_gradients_at(self, step: int) -> bool:
        """Whether the gradient norms of alignments and denoising are compared in optimiser step `step`, from 1."""
        every = self.grad_ratio_steps
        return every > 0 and (step in EARLY or step % every == 0)

    def keeps_averages_at(self, step: int) -> bool:
        """Whether the averages of --ema-lengths are stored after optimiser step `step`, counted from 1."""
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


# Greatest length of an average. At 1 / sqrt(12) all steps weigh alike; beyond, early steps would weigh more than late
# ones.
LONGEST = 0.28


def require_lengths(flag: str, lengths: Sequence[float]) -> None:
    """Raise UserError unless an average can have each length, and each is given once."""
    require(
        all(0.005 <= length <= LONGEST for length in lengths) and len(set(lengths)) == len(lengths),
        f"{flag} {' '.join(f'{length:g}' for length in lengths)}: give lengths from 0.005 to {LONGEST}, each once",
    )


def require_samples(count: int, least: int = 1) -> None:
    """Raise UserError unless `count` samples can be drawn and are at least `least`."""
    require(
        least <= count <= MOST_SAMPLES,
        f"--num-fid-samples {count} must be at least {least} and at most {MOST_SAMPLES:,}",
    )


def require_precision(wanted: str | None, tf32: bool | None) -> None:
    """Raise UserError unless `wanted` is no, bf16 or None; with TF32 it must be no."""
    require(not tf32 or wanted == "no", "--tf32 is a precision of its own: write --mixed-precision no --tf32")
    if wanted not in (None, "no", "bf16"):
        raise UserError(
            f"--mixed-precision {wanted} is not supported: use bf16 (fp16 overflows in these networks' features, fp8 "
            f"does not pay at these widths) or no"
        )


_LIGHTNINGDIT: dict[str, Any] = {
    "model": "LightningDiT-XL/1",
    "batch_size": 1024,
    "max_train_steps": 80_000,
    "learning_rate": 2e-4,
    "adam_beta2": 0.95,
    "max_grad_norm": 0.0,
    "time_sampling": "logit-normal",
    "velocity_loss": "mse+cosine",
}

# Values between the defaults and the command line: options of the run.
RECIPES: dict[str, dict[str, Any]] = {
    # SiT and REPA: ImageNet, 256 latents a step
    "sit": {},
    # LightningDiT, 64 epochs of 1,251 steps
    "lightningdit": _LIGHTNINGDIT,
    # LightningDiT, 800 epochs: times are uniform from epoch 480 on
    "lightningdit-800ep": {**_LIGHTNINGDIT, "max_train_steps": 1_000_000, "uniform_from_epoch": 480.0},
    # the embedded digits: minutes on a CPU
    "digits": {
        "model": "SiT-Tiny/2",
        "batch_size": 64,
        "max_train_steps": 800,
        "learning_rate": 1e-3,
        "ema_warmup": True,
        "checkpointing_steps": 400,
        "log_steps": 20,
    },
}

# What most commands give, in the order in which `--help` shows it first.
COMMON = (
    "data_dir",
    "exp_name",
    "output_dir",
    "model",
    "align",
    "preset",
    "recipe",
    "batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "learning_rate",
    "mixed_precision",
    "init_ckpt",
    "seed",
    "checkpointing_steps",
    "max_hours",
    "sampling_steps",
    "eval_steps",
    "report_to",
    "dry_run",
)

# Options that may differ when a run is continued: no number of the steps already taken depends on them.
FREE_ON_RESUME = frozenset(
    {
        "config",
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
        "feature_weights",
        "gradient_accumulation_steps",
        "compile",
        "activation_checkpointing",
        "dry_run",
        "measure",
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
