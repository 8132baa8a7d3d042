"""Options: typed dataclasses, and the command line derived from them.

Every command declares its options as one frozen dataclass whose fields are made with `option`. `parse` turns the fields
into flags (`max_train_steps` -> `--max-train-steps`), refuses unknown flags with the nearest known one, and returns
the words that were given, so that recipes and presets can stand between the defaults and the command line:
defaults < recipe < preset < command line.

This file knows nothing of tensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn, TypeVar

from errors import UserError, nearest

T = TypeVar("T")


def option(default: Any = MISSING, *, help: str, choices: Sequence[str] | None = None, flag: str | None = None) -> Any:
    """A dataclass field that is also a command-line flag. Without `default` the flag is required."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "flag": flag})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(schema: type, argv: Sequence[str], *, prog: str, description: str | None = None) -> dict[str, Any]:
    """The options that `argv` gives, by field name, typed as the dataclass `schema` says.

    Raises:
        UserError: an unknown flag (with the nearest known one), a value of the wrong type.
    """
    return parse_sections({"": schema}, argv, prog=prog, description=description)[""]


def parse_sections(schemas: dict[str, type], argv: Sequence[str], *, prog: str,
                   description: str | None = None) -> dict[str, dict[str, Any]]:
    """`parse` for several dataclasses at once. The section called "" has plain flags (`--seed`).

    Every other section is an alignment: `depth` of section `repa` is set by `--repa-depth`, and by `--align-depth` too
    where it is the only alignment that has it.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    owners = Counter(f.name for section, schema in schemas.items() if section for f in dataclasses.fields(schema))
    for section, schema in schemas.items():
        hints = typing.get_type_hints(schema)
        group = parser.add_argument_group(f"alignment {section}") if section else parser
        for field in dataclasses.fields(schema):
            if field.metadata:
                flags = flags_of(field, section, alone=owners[field.name] == 1)
                _add(group, field, hints[field.name], flags, dest=f"{section}.{field.name}")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], flags)}; see --help")
    found: dict[str, dict[str, Any]] = {section: {} for section in schemas}
    for key, value in vars(given).items():
        section, name = key.split(".")
        found[section][name] = tuple(value) if isinstance(value, list) else value
    return found


def peek(schema: type, name: str, argv: Sequence[str]) -> Any:
    """The value that `argv` gives to one field of `schema`, other words unread; its default where it gives none."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    field = next(f for f in dataclasses.fields(schema) if f.name == name)
    _add(parser, field, typing.get_type_hints(schema)[name], flags_of(field), dest=name)
    parser.set_defaults(**{name: field.default})
    return getattr(parser.parse_known_args(argv)[0], name)


def flags_of(field: dataclasses.Field, section: str = "", alone: bool = False) -> list[str]:
    """The flags that set `field`."""
    word = field.name.replace("_", "-")
    if field.metadata.get("flag"):
        return [f"--{field.metadata['flag']}"]
    if not section:
        return [f"--{word}"]
    return [f"--{section}-{word}"] + ([f"--align-{word}"] if alone else [])


def _add(parser: Any, field: dataclasses.Field, hint: Any, flags: list[str], dest: str) -> None:
    kind, count = _kind(hint)
    text = field.metadata["help"]
    if field.default is MISSING:
        text += " (required)"  # by `build`: an unknown flag is the better thing to complain about first
    elif field.default not in (None, ""):
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text += f" (default {shown})"
    arguments: dict[str, Any] = {"dest": dest, "help": text.replace("%", "%%")}
    if kind is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **arguments)
    else:
        choices = field.metadata["choices"]
        metavar = None if choices else kind.__name__.upper()
        parser.add_argument(*flags, type=finite if kind is float else kind, nargs=count, choices=choices, metavar=metavar, **arguments)


def finite(word: str) -> float:
    """A finite number; the type of every float option."""
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(word)
    return value


finite.__name__ = "float"  # what argparse calls it


def _kind(hint: Any) -> tuple[type, int | str | None]:
    """The scalar type of an annotation, and how many values its flag takes (None: one; '+': a tuple of any length)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return parts[0], "+" if parts[-1] is Ellipsis else len(parts)
    return hint, None


def build(schema: type[T], *layers: dict[str, Any]) -> T:
    """The dataclass `schema` with the values of `layers`, later layers winning; lists become tuples."""
    values: dict[str, Any] = {}
    for layer in layers:
        values.update(layer)
    names = {field.name for field in dataclasses.fields(schema)}
    for name in values:
        if name not in names:
            raise UserError(f"{schema.__name__} has no option {name}{nearest(name, names)}")
    missing = [flags_of(f)[0] for f in dataclasses.fields(schema)
               if f.name not in values and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; see --help")
    return schema(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()}


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of `train.py` and `train_guide.py`. Batch sizes are global, steps are optimiser updates."""

    data_dir: str = option(help="latent set (folder with manifest.json)")
    resident: str = option("disk", choices=("disk", "ram", "device"), help="where the latents stay: mapped, in memory, on the device")
    model: str = option("SiT-B/2", help="network, e.g. SiT-XL/2")
    qk_norm: bool = option(False, help="normalise queries and keys")
    align: tuple[str, ...] = option(("none",), help="alignment(s) beside the flow-matching loss; none is plain training")
    preset: str | None = option(None, help="named settings of the alignment: paper, upstream, ...")
    recipe: str = option("sit", choices=("sit", "lightningdit", "lightningdit-800ep", "digits"),
                         help="optimiser, batch, EMA and times of a family")
    init_ckpt: str | None = option(None, help="start from this checkpoint's network (a new label table if classes differ)")

    batch_size: int = option(256, help="samples per optimiser step over all processes")
    gradient_accumulation_steps: int = option(1, help="micro-batches per optimiser step")
    max_train_steps: int = option(400_000, help="optimiser steps in all")
    learning_rate: float = option(1e-4, help="AdamW's constant rate")
    adam_beta1: float = option(0.9, help="AdamW's first decay")
    adam_beta2: float = option(0.999, help="AdamW's second decay")
    adam_weight_decay: float = option(0.0, help="AdamW's weight decay")
    adam_epsilon: float = option(1e-8, help="AdamW's epsilon")
    max_grad_norm: float = option(1.0, help="clip the global gradient norm; 0 for no clipping")
    ema_decay: float = option(0.9999, help="decay of the weights' moving average")
    ema_warmup: bool = option(False, help="shorten the average early on: min(decay, (1 + s) / (10 + s))")
    cfg_prob: float = option(0.1, help="share of labels replaced by the null label")
    time_sampling: str = option("uniform", choices=("uniform", "logit-normal"), help="law of t")
    uniform_from_epoch: float | None = option(None, help="draw t uniformly from this epoch on")
    velocity_loss: str = option("mse", choices=("mse", "mse+cosine"), help="flow-matching loss")

    seed: int = option(0, help="seed of everything")
    mixed_precision: str | None = option(None, help="no or bf16 (default: bf16 on CUDA hardware that has it)")
    compile: str | None = option(None, choices=("on", "off"), help="compile each block (default: on with CUDA)")
    deterministic: bool = option(False, help="bitwise reproducible kernels on CUDA")

    output_dir: str = option("exps", help="folder of all runs")
    exp_name: str = option(help="name of this run; the same command again continues it")
    checkpointing_steps: int = option(50_000, help="write a checkpoint every so many steps, and at the end")
    sampling_steps: int = option(0, help="write a grid of samples every so many steps; 0 for never")
    eval_steps: int = option(0, help="score samples of the EMA weights every so many steps; 0 for never")
    eval_reference: str | None = option(None, help="reference to score against (see evaluations.evaluate)")
    eval_samples: int = option(5000, help="samples per score; not to be compared with scores of 50,000")
    eval_features: str = option("inception", help="what the scores compare: inception, pixels, or timm:NAME[@SIDE]")
    inception_weights: str | None = option(None, help="file of the Inception weights (default: downloaded once)")
    feature_weights: str | None = option(None, help="file of the timm model's weights (default: downloaded once)")
    vae: str | None = option(None, help="VAE for grids and scores (default: the one that the data names)")
    log_steps: int = option(100, help="log every so many steps")
    report_to: str = option("none", choices=("none", "wandb", "tensorboard"), help="tracker beside the JSON-lines log")
    dry_run: bool = option(False, help="print what the run would cost, and train nothing")
    images_per_second: float | None = option(None, help="with --dry-run: a rate measured at the start of such a run, for the hours")

    def __post_init__(self) -> None:
        require(self.batch_size > 0 and self.gradient_accumulation_steps > 0 and self.max_train_steps > 0,
                "--batch-size, --gradient-accumulation-steps and --max-train-steps must be positive")
        require(self.checkpointing_steps > 0 and self.log_steps > 0, "--checkpointing-steps and --log-steps must be positive")
        require((self.eval_steps > 0) == (self.eval_reference is not None),
                "--eval-steps and --eval-reference go together: give both, or neither")
        require(self.eval_samples > 3, f"--eval-samples {self.eval_samples} must be at least 4")
        require(self.images_per_second is None or (self.dry_run and self.images_per_second > 0),
                "--images-per-second is a positive rate and belongs to --dry-run")
        require(self.sampling_steps >= 0 and self.eval_steps >= 0, "--sampling-steps and --eval-steps must not be negative; 0 is for never")
        require(self.learning_rate > 0 and self.adam_epsilon > 0, "--learning-rate and --adam-epsilon must be positive")
        require(self.adam_weight_decay >= 0 and self.max_grad_norm >= 0,
                "--adam-weight-decay and --max-grad-norm must not be negative")
        require(0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1, "--adam-beta1 and --adam-beta2 must lie in [0, 1)")
        require(self.exp_name.strip("./") != "", "--exp-name must name the run")
        require(self.uniform_from_epoch is None or self.time_sampling != "uniform",
                "--uniform-from-epoch ends another --time-sampling: add --time-sampling logit-normal")
        require(0 <= self.cfg_prob <= 1, f"--cfg-prob {self.cfg_prob} must lie in [0, 1]")
        require(0 <= self.ema_decay < 1, f"--ema-decay {self.ema_decay} must lie in [0, 1)")
        if self.mixed_precision not in (None, "no", "bf16"):
            raise UserError(f"--mixed-precision {self.mixed_precision} is not supported: use bf16 (fp16 overflows in these "
                            f"networks' features, fp8 does not pay at these widths) or no")


_LIGHTNINGDIT = {"model": "LightningDiT-XL/1", "batch_size": 1024, "max_train_steps": 80_000, "learning_rate": 2e-4,
                 "adam_beta2": 0.95, "max_grad_norm": 0.0, "time_sampling": "logit-normal", "velocity_loss": "mse+cosine"}

# Values between the defaults and the command line: options of the run, and of any alignment that has them.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # SiT and REPA: ImageNet, 256 latents a step
    "sit": {"train": {}, "align": {}},
    # LightningDiT, 64 epochs of 1,251 steps
    "lightningdit": {"train": _LIGHTNINGDIT, "align": {}},
    # and its 800 epochs: times are uniform from epoch 480 on
    "lightningdit-800ep": {"train": {**_LIGHTNINGDIT, "max_train_steps": 1_000_000, "uniform_from_epoch": 480.0}, "align": {}},
    # the embedded digits: minutes on a CPU
    "digits": {"train": {"model": "SiT-Tiny/2", "batch_size": 64, "max_train_steps": 800, "learning_rate": 1e-3,
                         "ema_warmup": True, "checkpointing_steps": 400, "log_steps": 20},
               "align": {"hidden": 512}},
}


# Options that may differ when a run is continued: they move no number of the steps already taken.
FREE_ON_RESUME = frozenset({"data_dir", "resident", "max_train_steps", "checkpointing_steps", "sampling_steps", "log_steps", "report_to",
                            "output_dir", "exp_name", "vae", "eval_steps", "eval_reference", "eval_samples",
                            "eval_features", "inception_weights", "feature_weights", "gradient_accumulation_steps", "compile",
                            "dry_run", "images_per_second"})


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """All that decides what a sample looks like, given the weights. Times are in [0, 1], 1 is noise."""

    mode: str = option("sde", choices=("ode", "sde"), help="probability-flow ODE or reverse SDE (Euler-Maruyama)")
    solver: str = option("euler", choices=("euler", "heun", "dopri5"), help="solver of the ODE")
    num_steps: int = option(250, help="steps (see --grid)")
    grid: str = option("evaluations", choices=("evaluations", "points"),
                       help="whether --num-steps counts steps of the ODE, or points of its grid (one step fewer)")
    timestep_shift: float = option(1.0, help="below 1: more ODE steps near noise (LightningDiT: 0.3)")
    last_step: float = option(0.04, help="size of the SDE's last, noise-free step")
    cfg_scale: float = option(1.0, help="guidance scale; 1 is no guidance")
    guidance_low: float = option(0.0, help="guide while t is at least this")
    guidance_high: float = option(1.0, help="guide while t is at most this")
    guidance_channels: str = option("all", choices=("all", "first3"),
                                    help="channels that are guided (SiT's and LightningDiT's published numbers: first3)")
    weights: str = option("ema", choices=("ema", "raw"), help="which of the checkpoint's weights")
    labels: str = option("random", choices=("random", "balanced"),
                         help="labels: drawn for each sample, or equal counts in shuffled order")
    rounding: str = option("round", choices=("round", "truncate"), help="how pixels become integers (REPA truncates)")
    seed: int = option(0, help="seed of noise and labels; sample i depends on (seed, i) alone")

    def __post_init__(self) -> None:
        require(self.num_steps >= 2, f"--num-steps {self.num_steps} must be at least 2")
        require(0 <= self.guidance_low <= self.guidance_high <= 1,
                f"--guidance-low {self.guidance_low} and --guidance-high {self.guidance_high} must satisfy 0 <= low <= high <= 1")
        require(0 < self.last_step < 1, f"--last-step {self.last_step} must lie between 0 and 1")
        require(self.timestep_shift > 0, f"--timestep-shift {self.timestep_shift} must be positive")
        require(self.solver != "dopri5" or (self.num_steps, self.grid, self.timestep_shift) == (250, "evaluations", 1.0),
                "dopri5 chooses its own steps: leave out --num-steps, --grid and --timestep-shift")
        if self.mode == "sde":
            require(self.solver == "euler" and self.grid == "evaluations" and self.timestep_shift == 1,
                    "--solver, --grid and --timestep-shift are options of the ODE: add --mode ode")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Options of `generate.py`."""

    ckpt: str = option(help="checkpoint folder, or a run (its latest checkpoint)")
    preset: str | None = option(None, help="settings of a published number, see --list-presets")
    list_presets: bool = option(False, help="print the presets with their published FIDs, and stop")
    num_fid_samples: int = option(50_000, help="how many samples")
    out: str | None = option(None, help="folder of the samples (default: samples/ beside the checkpoint, named by settings)")
    batch_size: int = option(64, help="samples per network call in each process")
    score: str | None = option(None, help="score against this reference as the samples are drawn, and write no samples")
    features: str = option("inception", help="what --score compares: inception, pixels, or timm:NAME[@SIDE]")
    inception_weights: str | None = option(None, help="file of the Inception weights (default: downloaded once)")
    feature_weights: str | None = option(None, help="file of the timm model's weights (default: downloaded once)")
    vae: str | None = option(None, help="VAE, hub id or folder (default: the one that the checkpoint names)")
    mixed_precision: str | None = option(None, help="no or bf16 (default: bf16 on CUDA hardware that has it)")
    compile: str | None = option(None, choices=("on", "off"), help="compile each block (default: on with CUDA)")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.score is not None or (self.features, self.inception_weights, self.feature_weights) == ("inception", None, None),
                "--features, --inception-weights and --feature-weights say how to score: add --score REFERENCE")
        require(self.num_fid_samples > 0 and self.batch_size > 0, "--num-fid-samples and --batch-size must be positive")
        require(self.score is None or self.num_fid_samples >= 4, f"{self.num_fid_samples} samples are too few for a score: at least 4")
        require(self.mixed_precision in (None, "no", "bf16"),
                f"--mixed-precision {self.mixed_precision} is not supported: bf16 or no")
