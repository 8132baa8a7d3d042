"""The contract of an alignment: an auxiliary objective on what the network computes inside.

An alignment is one file with one class. Its `name` registers it, its `Options` dataclass is its command line, and the
training loop has no code for any one of them. It declares what it reads and returns one loss per sample:

    name      word after --align, key in logs and checkpoints
    Options   frozen dataclass of its options, a child of `AlignOptions`
    resolve   fills in the defaults that depend on the student
    presets   named settings: {"paper": {"options": {...}, "train": {...}}}
    coupled   True if the loss depends on which samples share a rank; forward then returns a scalar
    reads_ema True if the context must hold the EMA network
    labelled_only  True if samples whose label was dropped have no loss; forward does not see them
    columns   extra data columns that it reads: "image" (N, R, R, channels) uint8, mirrored as the latent is, "row"
              (N,) int64, item x views + view, or "time" (N,), a second time from the run's distribution
    segmented True if a sample's tokens form segments with a time each: `segments` says which. One alignment may
    whole_time True if it needs a single time for each sample
    tokenwise True if forward gives `weigh(context)` to a mean over tokens (`squared_error`, `smooth_l1`, `cosine`) of
              distances that are zero at perfect agreement: token weights and the measured release need it
    taps      what it reads of the student: n for f_n, the raw output of block n (from 1); QK(n) for the queries and
              keys of block n; CONDITION for the vector that conditions the blocks; VELOCITY for the prediction
    velocity_head  describes how its module `head` predicts the velocity, if it does (`models.heads`); an average of the
              head is then kept beside the network's, and sampling may guide with it
    draw      its own random numbers, one row per sample of the global batch
    frozen    its frozen networks, which are neither trained, saved nor synchronised; `compiled` lists those to compile
    notes     lines to print before the first step
    sizes     more such lines, about what it sees of a few batches
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignment import interval as intervals
from alignment import weights
from alignment.release import STEPS, Release
from models import Backbone, ModelSpec, Tap
from models.heads import VelocityHead
from models.latents import LatentSpace
from models.layers import cast_block_linears, patchify
from models.routing import Segments
from runtime.errors import require
from runtime.options import option
from runtime.streams import Stream

if TYPE_CHECKING:
    from dataset import LatentSet

T = TypeVar("T")
# Sees the distances of the tokens (N, T), without a gradient, and returns their weights (N, T); None: equal weights.
Weigh = Callable[[Tensor], Tensor | None]
SCHEDULES = ("constant", "cosine", "linear", "plateau")


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """Options that every alignment has."""

    weight: float = option(0.5, within="[0, inf)", help="lambda, the weight of this loss beside the flow-matching loss")
    schedule: str = option(
        "constant",
        choices=SCHEDULES,
        help="lambda until the stop: constant, or decaying to 0 there; plateau: it stops once its loss no longer falls",
    )
    plateau_steps: int | None = option(
        None, within="[50, inf)", help=f"with schedule plateau: warm-up and length of the decay (default {STEPS})"
    )
    stop_steps: int | None = option(
        None, within="[0, inf)", help="drop this loss after this many optimiser steps; 0: never"
    )
    stop_epochs: float | None = option(None, within="[0, inf)", help="drop this loss after this many epochs; 0: never")
    interval: tuple[float, float] | None = option(None, help="times a b: align samples with a <= t <= b only")
    mask: str = option(
        "select",
        choices=intervals.MASKS,
        help="what the interval does: select the samples, or (upstream) weigh all by the share in range",
    )
    token_weights: str = option(
        "none", choices=("none", "residual"), help="weigh tokens alike, or those more that are far from their target"
    )
    time_weights: str = option(
        "none", choices=intervals.WEIGHTS, help="weigh times alike, or (smooth) those near noise less"
    )

    def __post_init__(self) -> None:
        require(
            self.stop_steps is None or self.stop_epochs is None,
            "--align-stop-steps and --align-stop-epochs say the same: give one of them",
        )
        require(
            self.plateau_steps is None or self.schedule == "plateau",
            "--align-plateau-steps belongs to --align-schedule plateau: add it",
        )
        intervals.check(self.interval, self.mask)

    @property
    def ramp(self) -> int:
        """Steps in which lambda falls to 0 with schedule `plateau`; its warm-up is as long."""
        return self.plateau_steps or STEPS

    @property
    def ends(self) -> bool:
        """Whether these options say when the loss ends, so that no published stop is put in."""
        return self.stop_steps is not None or self.stop_epochs is not None or self.schedule == "plateau"

    @property
    def trained_times(self) -> tuple[float, float]:
        """The times (a, b) whose samples a head learns from."""
        return self.interval if self.interval is not None and self.mask == "select" else (0.0, 1.0)

    def stop(self, epoch_steps: int) -> int | None:
        """The optimiser step after which the loss is gone, None for never; with schedule `plateau` the latest."""
        if self.stop_steps is not None:
            stop = self.stop_steps or None
        else:
            stop = max(1, math.floor(self.stop_epochs * epoch_steps + 0.5)) if self.stop_epochs else None
        require(
            stop is not None or self.schedule not in ("cosine", "linear"),
            f"--align-schedule {self.schedule} falls to 0 at the stop: give --align-stop-steps or --align-stop-epochs",
        )
        require(
            stop is None or self.schedule != "plateau" or stop >= 2 * self.ramp,
            f"--align-schedule plateau with a latest end at step {stop} leaves no step to measure: warm-up and decay "
            f"take {self.ramp} steps each; give a later end, or a smaller --align-plateau-steps",
        )
        return stop

    def weight_at(self, step: int, stop: int | None, epoch_steps: int) -> float:
        """Lambda of optimiser step `step`, counted from 0; 0 from `stop` on.

        `stop` is `stop(epoch_steps)`, or with schedule `plateau` what has been measured.
        """
        if stop is None:
            return self.weight
        if step >= stop:
            return 0.0
        if self.schedule == "plateau":
            return self.weight * (1 + math.cos(math.pi * max(0, step - stop + self.ramp) / self.ramp)) / 2
        if self.schedule == "cosine":
            return self.weight * (1 + math.cos(math.pi * step / stop)) / 2
        return self.weight * (1 - step / stop) if self.schedule == "linear" else self.weight


OptionsT = TypeVar("OptionsT", bound=AlignOptions)


@dataclass(frozen=True)
class BuildContext:
    """What an alignment may know when it is built."""

    student: ModelSpec
    space: LatentSpace
    seed: int
    device: torch.device
    # bfloat16 under mixed precision, else None
    dtype: torch.dtype | None
    # opens a checkpoint folder (`models.checkpoint.Checkpoint`)
    load: Callable[[str], Any]
    data: LatentSet | None = None
    # samples that one process sees at once
    micro_batch: int = 0
    # True where only shapes matter: external networks come without their weights
    dry: bool = False


@dataclass(frozen=True)
class Context:
    """Everything a step knows about its samples, and nothing it can change. N is the number of aligned samples."""

    x0: Tensor  # (N, C, H, W) clean latent
    eps: Tensor  # (N, C, H, W) noise
    xt: Tensor  # (N, C, H, W) noisy latent
    t: Tensor  # (N,) time, 1 is noise
    y: Tensor  # (N,) labels as the student saw them, after dropout
    labels: Tensor  # (N,) true labels
    # Each tap's tensor: n (N, T, D), the raw output of block n of the student; QK (N, 2, heads, T, head_dim);
    # CONDITION (N, D); VELOCITY (N, C, H, W)
    features: dict[Tap, Tensor]
    columns: dict[str, Tensor]
    draws: dict[str, Tensor]
    ema: Backbone | None = None
    # the order of the student's tokens, and times (N, S) of segments that have their own
    segments: Segments | None = None
    times: Tensor | None = None
    # (N, T) weights of the tokens with mean 1, 0 for those that count for nothing; None: all count alike
    token_weight: Tensor | None = None

    def take(self, index: Tensor) -> Context:
        """The context of the samples at `index`."""

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[index]
            if isinstance(value, Segments):
                return value.take(index)
            return {key: item[index] for key, item in value.items()} if isinstance(value, dict) else value

        return Context(**{field.name: pick(getattr(self, field.name)) for field in dataclasses.fields(self)})


class Alignment(nn.Module, Generic[OptionsT]):
    """Base of all alignments; the docstring of this file is the contract."""

    name: ClassVar[str]
    Options: ClassVar[type[AlignOptions]] = AlignOptions
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {}
    coupled: ClassVar[bool] = False
    tokenwise: ClassVar[bool] = False
    reads_ema: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Alignment]]] = {}

    segmented: ClassVar[bool] = False
    whole_time: ClassVar[bool] = False
    labelled_only: bool = False
    columns: tuple[str, ...] = ()
    taps: tuple[Tap, ...] = ()
    velocity_head: VelocityHead | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Alignment.registry[cls.name] = cls

    @classmethod
    def summary(cls) -> str:
        """One line for `--help`: the first of its file."""
        text = sys.modules[cls.__module__].__doc__ if cls.__module__ in sys.modules else cls.__doc__
        return (text or cls.name).splitlines()[0].rstrip(".:")

    @classmethod
    def resolve(cls, options: Any, student: ModelSpec, batch_size: int = 256) -> Any:
        """`options` with the defaults that depend on the student and the global batch: blocks, scales, stops."""
        return options

    @classmethod
    def check(cls, options: OptionsT) -> None:
        """Raise UserError for options that need a loss per token, or per sample, which this class lacks."""
        require(
            cls.tokenwise or options.token_weights == "none",
            f"--{cls.name}-token-weights {options.token_weights}: {cls.name} has no distance per token to weigh by; "
            f"leave it out",
        )
        require(
            cls.tokenwise or options.schedule != "plateau",
            f"--{cls.name}-schedule plateau measures a distance that is zero at perfect agreement, and {cls.name} has "
            f"none: give another schedule, with a stop",
        )
        require(
            not cls.coupled or options.time_weights == "none",
            f"--{cls.name}-time-weights {options.time_weights}: the loss of {cls.name} is not a mean over samples that "
            f"could be weighed; leave it out",
        )

    def __init__(self, options: OptionsT, build_context: BuildContext) -> None:
        super().__init__()
        self.options = options
        self.release = Release(options.ramp) if options.schedule == "plateau" else None
        # (N,) mean distance of the tokens in the latest forward pass, if there is a `release`
        self.residual: Tensor | None = None

    def forward(self, context: Context) -> Tensor:
        """(N,) loss per sample in float32, or a scalar if `coupled`."""
        raise NotImplementedError

    def weigh(self, context: Context) -> Weigh | None:
        """What a mean over the tokens of `context` calls with their distances; notes the residual on the way."""
        route, by_residual = context.token_weight, self.options.token_weights == "residual"
        if route is None and not by_residual and self.release is None:
            return None

        def weights_of(distances: Tensor) -> Tensor | None:
            if self.release is not None:
                self.residual = weights.present_mean(distances, route)
            return weights.by_residual(distances, route) if by_residual else route

        return weights_of

    def draw(self, stream: Stream, count: int) -> dict[str, np.ndarray]:
        """Its own random numbers for a global batch of `count` samples, one row per sample."""
        return {}

    def segments(self, t: Tensor, second: Tensor, draws: dict[str, Tensor]) -> tuple[Segments, Tensor]:
        """The segments of N samples, and their times (N, S), if it is `segmented`.

        Args:
            t, second: (N,) two times of each sample.
            draws: its own random numbers (`draw`).
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Resolved choices (block numbers, teacher digest) for the printout and the checkpoint."""
        batch = {"batch": "of one process and micro-batch"} if self.coupled else {}
        return {"taps": list(self.taps), **batch}

    def notes(self) -> list[str]:
        """Lines to print before the first step: departures from what was published, and what it was given."""
        return []

    def sizes(self, contexts: Iterable[Context]) -> list[str]:
        """Lines to print before the first step about its target in `contexts`, which lack the student's features."""
        return []

    @property
    def frozen(self) -> list[nn.Module]:
        """Its frozen networks."""
        return []

    @property
    def compiled(self) -> list[nn.Module]:
        """The frozen networks whose `blocks` may be compiled."""
        return self.frozen


class Frozen:
    """Holds a network that is neither trained, saved nor synchronised.

    It is not an nn.Module, so DDP, optimiser and checkpoint do not see the network's parameters. The weights of the
    blocks' linear layers are kept in `dtype`, the type to which autocast would otherwise cast them at every call.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        cast_block_linears(network, dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.network(*args, **kwargs)


def not_none(value: T | None) -> T:
    """`value`, which `resolve` or the training loop has filled in by now."""
    if value is None:
        raise ValueError("a value that should have been filled in before this call is None")
    return value


def squared_error(prediction: Tensor, target: Tensor, weigh: Weigh | None = None, patch: int | None = None) -> Tensor:
    """Mean squared difference over all axes but the first, in float32: (N, ...) -> (N,).

    With `weigh` the tokens (second axis) have weights; images (N, C, H, W) have tokens of `patch` pixels a side.
    """
    return token_mean((prediction.float() - target.float()).square(), weigh, patch)


def smooth_l1(prediction: Tensor, target: Tensor, beta: float = 0.05, weigh: Weigh | None = None) -> Tensor:
    """Mean smooth-L1 distance over all axes but the first, in float32: (N, ...) -> (N,).

    Quadratic below `beta`, as SRA and SRA 2 have it. With `weigh` the tokens have weights.
    """
    return token_mean(F.smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="none"), weigh)


def cosine(a: Tensor, b: Tensor, dim: int = -1, weigh: Weigh | None = None) -> Tensor:
    """Cosine similarity along `dim`, averaged over all other axes but the first, in float32: (N, ...) -> (N,).

    With `weigh` the tokens have weights, by their distance 1 - cosine.
    """
    similarity = F.cosine_similarity(a.float(), b.float(), dim=dim)
    return token_mean(similarity, weigh and (lambda values: weigh(1 - values)))


def cosine_distance(a: Tensor, b: Tensor, kind: str, weigh: Weigh | None, route: Tensor | None) -> Tensor:
    """1 - cosine of tokens (N, T, D) -> (N,): token by token (`cosine`), or along the tokens (`token-cosine`)."""
    return 1 - (cosine(a, b, weigh=weigh) if kind == "cosine" else token_cosine(a, b, route))


def require_distance_per_token(name: str, options: Any) -> None:
    """Raise UserError if options of the alignment `name` need a distance per token that its `distance` lacks."""
    require(
        options.distance != "token-cosine" or (options.token_weights == "none" and options.schedule != "plateau"),
        f"--{name}-token-weights and --{name}-schedule plateau: the distance token-cosine has no value per token; give "
        f"--{name}-distance cosine",
    )


def token_cosine(a: Tensor, b: Tensor, route: Tensor | None = None) -> Tensor:
    """Cosine along the tokens, channel by channel, averaged over the channels, in float32: (N, T, D) -> (N,).

    With the weights of a route (N, T), along its tokens.
    """
    if route is not None:
        present = (route != 0)[..., None]
        a, b = a * present, b * present
    return cosine(a, b, dim=1)


def token_mean(values: Tensor, weigh: Weigh | None = None, patch: int | None = None) -> Tensor:
    """Mean over all axes but the first, (N, ...) -> (N,); with the weights that `weigh` gives to tokens, if any."""
    if weigh is not None:
        tokens = values if patch is None else patchify(values, patch)
        tokens = tokens.flatten(2).mean(2) if tokens.dim() > 2 else tokens
        token_weights = weigh(tokens.detach())
        if token_weights is not None:
            return (tokens * token_weights).mean(1)
    return values.flatten(1).mean(1)
