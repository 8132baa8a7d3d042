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
from models import Backbone, ModelSpec, Tap
from models.heads import VelocityHead
from models.latents import LatentSpace
from models.layers import cast_block_linears
from models.routing import Segments
from runtime.errors import require
from runtime.options import option
from runtime.streams import Stream

if TYPE_CHECKING:
    from dataset import LatentSet

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """Options that every alignment has."""

    weight: float = option(0.5, within="[0, inf)", help="lambda, the weight of this loss beside the flow-matching loss")
    schedule: str = option(
        "constant",
        choices=("constant", "cosine", "linear"),
        help="lambda until the stop: constant, or decaying to 0 there",
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

    def __post_init__(self) -> None:
        require(
            self.stop_steps is None or self.stop_epochs is None,
            "--align-stop-steps and --align-stop-epochs say the same: give one of them",
        )
        intervals.check(self.interval, self.mask)

    @property
    def trained_times(self) -> tuple[float, float]:
        """The times (a, b) whose samples a head learns from."""
        return self.interval if self.interval is not None and self.mask == "select" else (0.0, 1.0)

    def stop(self, epoch_steps: int) -> int | None:
        """The optimiser step after which the loss is gone, None for never."""
        if self.stop_steps is not None:
            stop = self.stop_steps or None
        else:
            stop = max(1, math.floor(self.stop_epochs * epoch_steps + 0.5)) if self.stop_epochs else None
        require(
            stop is not None or self.schedule not in ("cosine", "linear"),
            f"--align-schedule {self.schedule} falls to 0 at the stop: give --align-stop-steps or --align-stop-epochs",
        )
        return stop

    def weight_at(self, step: int, stop: int | None, epoch_steps: int) -> float:
        """Lambda of optimiser step `step`, counted from 0; 0 from `stop`, which is `stop(epoch_steps)`, on."""
        if stop is None:
            return self.weight
        if step >= stop:
            return 0.0
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

    def __init__(self, options: OptionsT, build_context: BuildContext) -> None:
        super().__init__()
        self.options = options

    def forward(self, context: Context) -> Tensor:
        """(N,) loss per sample in float32, or a scalar if `coupled`."""
        raise NotImplementedError

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


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference over all axes but the first, in float32: (N, ...) -> (N,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def smooth_l1(prediction: Tensor, target: Tensor, beta: float = 0.05) -> Tensor:
    """Mean smooth-L1 distance over all axes but the first, in float32: (N, ...) -> (N,).

    Quadratic below `beta`, as SRA and SRA 2 have it.
    """
    return F.smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="none").flatten(1).mean(1)


def cosine(a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """Cosine similarity along `dim`, averaged over all other axes but the first, in float32: (N, ...) -> (N,)."""
    return F.cosine_similarity(a.float(), b.float(), dim=dim).flatten(1).mean(1)
