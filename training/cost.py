"""What a configuration costs before it runs: `train.py --dry-run`.

The learner that would train runs once, forward and backward, while FlopCounterMode counts the products of matrices. So
no part declares its cost, and the count is that of the code. Unless networks are small, nothing is computed: tensors
have no values (torch's FakeTensorMode).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import models
from alignment import Alignment, AlignOptions, BuildContext
from alignment.interval import expected_share
from config import TrainConfig
from dataset import LatentSet
from loss import Batch
from models import Backbone, published
from models.checkpoint import Checkpoint
from models.recompute import recompute
from models.routing import Route
from runtime import launch
from runtime.peaks import PEAKS, SHARE
from runtime.streams import Stream
from runtime.text import aligned
from training import muon
from training.batches import arranged
from training.setup import Setup

# GPUs for which hours are computed.
SHOWN = ("A800", "H100", "H200")
# Images of the counted batch. FLOPs per image do not depend on it.
IMAGES = 2
# Parameters below which the step of the counted batch takes less time than fake tensors take to start, two seconds.
SMALL = 10_000_000


@dataclass(frozen=True)
class Part:
    """One line of the table. FLOPs are of one training step, per image of the batch (a multiply-add is two)."""

    name: str
    parameters: int
    trained: bool
    flops: float
    # The step after which the part is gone, None for never.
    stop: int | None = None


@dataclass(frozen=True)
class Cost:
    """Parameters and FLOPs of one configuration."""

    parts: list[Part]
    steps: int
    epoch_steps: int
    batch_size: int
    # FLOPs per image that activation checkpointing adds.
    recomputed: float
    # FLOPs before the first step: an encoder's pass over the set, where its output is kept.
    once: float = 0.0

    @property
    def plain(self) -> float:
        """FLOPs per image of plain training."""
        return self.parts[0].flops

    def ratio(self, step: int = 0) -> float:
        """FLOPs of step `step` (from 0) in units of a plain step."""
        return sum(part.flops for part in self.parts if part.stop is None or step < part.stop) / self.plain

    def flops(self, step: int) -> float:
        """FLOPs of the run's steps up to `step`."""
        ends = [step if part.stop is None else min(step, part.stop) for part in self.parts]
        return self.batch_size * sum(part.flops * end for part, end in zip(self.parts, ends, strict=True))

    def mean_ratio(self) -> float:
        """FLOPs of the whole run in units of a plain run of as many steps."""
        return self.flops(self.steps) / (self.batch_size * self.steps * self.plain)

    def hours(self, rate: float) -> tuple[float, float]:
        """Hours at `rate` images per second: throughout, and if the rate grows as the FLOPs fall after a stop."""
        slow = self.steps * self.batch_size / rate / 3600
        return slow, slow * self.mean_ratio() / self.ratio()

    def computed_hours(self, peak: float) -> float:
        """Hours of one device that sustains `SHARE` of `peak` FLOPs a second, recomputation included."""
        flops = self.once + self.flops(self.steps) + self.recomputed * self.batch_size * self.steps
        return flops / (SHARE * peak) / 3600


def report(cost: Cost, rate: float | None = None) -> str:
    """The cost as aligned text, with hours: at `rate`, measured images per second, else computed from peaks of GPUs."""

    def flops(label: str, parameters: str, ratio: float) -> list[str]:
        return [label, parameters, f"{ratio * cost.plain / 1e9:.2f}", f"{ratio:.4f}"]

    # ratios are to a step of plain training, the unit in which methods are compared at equal compute
    rows = [["", "parameters", "GFLOP per image", "of a plain step"]]
    rows += [flops(part.name, f"{part.parameters / 1e6:.2f}M", part.flops / cost.plain) for part in cost.parts]
    rows.append(flops("total", f"{sum(part.parameters for part in cost.parts) / 1e6:.2f}M", cost.ratio()))
    for stop in sorted({part.stop for part in cost.parts if part.stop is not None and part.stop < cost.steps}):
        rows.append(flops(f"from step {stop} on", "", cost.ratio(stop)))
    rows.append(flops("mean over the run", "", cost.mean_ratio()))
    lines = [
        aligned(rows, rule=False),
        f"steps: {cost.epoch_steps} per epoch, {cost.steps} in all = {cost.steps / cost.epoch_steps:.1f} epochs",
    ]
    if cost.recomputed:
        lines.append(
            f"computed twice in the backward pass: {cost.recomputed / 1e9:.2f} GFLOP per image, "
            f"{cost.recomputed / cost.plain:.4f} of a plain step"
        )
    if cost.once:
        lines.append(f"before the first step: {cost.once / 1e12:.3g} TFLOP, the encoder once over the set")
    if rate is None:
        hours = {name: cost.computed_hours(PEAKS[name]) for name in SHOWN}
        lines.append(
            f"computed, not measured: hours of one GPU at {SHARE:.0%} of its bf16 peak: "
            + ", ".join(f"{name} {value:.3g}" for name, value in hours.items())
            + "; --measure N times N real steps here"
        )
    else:
        slow, fast = cost.hours(rate)
        faster = f", or {fast:.2f} if the rate grows as the FLOPs fall" if fast < slow else ""
        lines.append(f"time at {rate:g} images per second: {slow:.2f} hours{faster}")
    return "\n".join(lines)


def estimate(
    config: TrainConfig,
    options: dict[str, AlignOptions],
    data: LatentSet | None = None,
    load: Callable[[str], Any] = Checkpoint.open,
) -> Cost:
    """The cost of a run. External encoders need no weights here.

    Args:
        data, load: stand in for a data set and for teachers that do not exist yet; only their shapes are read.

    Raises:
        UserError: as the run itself would.
    """
    setup = Setup.of(config, options, data=data)
    data, spec = setup.data, setup.spec
    dtype = launch.precision(config.mixed_precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # bf16 weights of frozen networks would not change the count
    context = BuildContext(spec, data.space, config.seed, torch.device("cpu"), None, load, data, dry=True)
    alignments = setup.alignments(list(setup.options), context)
    counter = _Counter(setup, dtype, alignments)
    plain, _ = counter.count([], whole=True)
    parts = [Part("network", models.parameter_count(counter.network), True, plain)]
    if config.route is not None:
        whole, (plain, _) = plain, counter.count([])
        parts.append(Part("route: what tokens leave out", 0, False, plain - whole))
    if config.optimizer == "muon":
        parts.append(Part("Muon: orthogonalisation", 0, False, muon.flops(counter.network) / config.batch_size))
    once = 0.0
    for name, alignment in alignments.items():
        total, frozen = counter.count([name])
        share = expected_share(alignment.options.interval, alignment.options.mask, config.time_sampling)
        if alignment.labelled_only:
            share *= 1 - config.cfg_prob
        stop = setup.stops[name]
        parts.append(
            Part(f"{name}: head and loss", _parameters(alignment), True, share * (total - plain - frozen), stop)
        )
        each_step = share
        if getattr(alignment.options, "cache", False):
            each_step, once = 0.0, once + len(data) * data.views * frozen
        for network in alignment.frozen:
            role = "teacher" if isinstance(network, Backbone) else "encoder"
            parts.append(Part(f"{name}: {role}", _parameters(network), False, each_step * frozen, stop))
        if alignment.reads_ema:
            parts.append(Part(f"{name}: EMA as teacher", 0, False, share * frozen, stop))
    recomputed = 0.0
    if config.activation_checkpointing != "none":
        everything, mode = list(alignments), config.activation_checkpointing
        recomputed = counter.count(everything, mode)[0] - counter.count(everything)[0]
    return Cost(parts, config.max_train_steps, setup.epoch_steps, config.batch_size, recomputed, once)


def main(config: TrainConfig, options: dict[str, AlignOptions], rate: float | None = None) -> None:
    """Print the cost of a run, on the main process; `rate` is that of its steps, images per second, if measured."""
    cost = estimate(config, options)
    if os.environ.get("RANK", "0") != "0":
        return
    notes = [
        f"{name}: its encoder holds the tokens of every image in memory"
        for name, chosen in options.items()
        if getattr(chosen, "cache", False)
    ]
    notes += [
        f"{name} ends by measurement, which nobody knows before: it is counted up to its latest end, or the whole run"
        for name, chosen in options.items()
        if chosen.schedule == "plateau"
    ]
    known = reported(config.model, options) if config.preset in (None, "paper") else []
    print(report(cost, rate), *notes, *known, sep="\n")


def reported(model: str, names: Iterable[str]) -> list[str]:
    """What the authors of these alignments report for this model under their own settings, one line each."""
    results = {
        name: published.first(method=name, variant="", model=model, resolution=256, guidance="none", samples=50_000)
        for name in list(names) or ["none"]
    }
    return [
        f"published with {name}: FID {result.metrics['fid']:.2f} after {result.epochs} epochs ({result.protocol()})"
        for name, result in results.items()
        if result
    ]


class _Counter:
    """Counts the FLOPs of learners of one network on batches without values."""

    def __init__(self, setup: Setup, dtype: torch.dtype | None, alignments: Mapping[str, Alignment]) -> None:
        self.setup, self.dtype, self.alignments = setup, dtype, alignments
        self.network, self.ema = empty_network(setup.spec), empty_network(setup.spec)
        images = any("image" in alignment.columns for alignment in alignments.values())
        frozen = [network for alignment in alignments.values() for network in alignment.frozen]
        self.small = sum(map(_parameters, [self.network, *alignments.values(), *frozen])) < SMALL
        self.image = setup.data.images(np.zeros(1, int)).shape[1:] if images else ()

    def count(self, names: list[str], checkpointing: str = "none", whole: bool = False) -> tuple[float, float]:
        """FLOPs per image of one training step with the alignments `names`, and those of frozen networks among them.

        `whole`: no token takes a route.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils.flop_counter import FlopCounterMode

        alignments = {name: self.alignments[name] for name in names}
        learner = self.setup.learner(self.network, alignments, self.dtype, self.ema)
        recompute(self.network, checkpointing)
        with (
            nullcontext() if self.small else FakeTensorMode(allow_non_fake_inputs=True),
            FlopCounterMode(display=False, custom_mapping=attention_on_cpu()) as counter,
        ):
            losses = learner(self._batch(alignments, None if whole else self.setup.route))
            sum(value.mean() for value in losses.values()).backward()
        for parameter in learner.parameters():
            parameter.grad = None
        # the counter keeps one total per root module: the learner, and each network that it hides
        by_root = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items() if "." not in name}
        frozen = sum(flops for name, flops in by_root.items() if name not in ("Global", "Learner"))
        return counter.get_total_flops() / IMAGES, frozen / IMAGES

    def _batch(self, alignments: Mapping[str, Alignment], route: Route | None) -> Batch:
        data = self.setup.data
        x, t, labels = torch.zeros(IMAGES, *data.shape[1:]), torch.zeros(IMAGES), torch.zeros(IMAGES, dtype=torch.long)
        columns = {}
        if any("image" in alignment.columns for alignment in alignments.values()):
            columns["image"] = torch.zeros(IMAGES, *self.image, dtype=torch.uint8)
        draws = {
            name: {key: torch.zeros(value.shape) for key, value in alignment.draw(Stream(0, "cost"), IMAGES).items()}
            for name, alignment in alignments.items()
        }
        columns["time"] = t
        uniform = torch.zeros(IMAGES, self.setup.spec.tokens) if route else None
        return arranged(Batch(x, x.clone(), t, labels, labels, columns, draws), alignments, route, uniform)


def attention_on_cpu() -> dict[Any, Callable[..., int]]:
    """FLOPs of the CPU's attention kernel, forward and backward, for which torch 2.10 has no formula."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda out, q, k, v, *_, **__: (
            sdpa_backward_flop_count(out, q, k, v)
        ),
    }


def empty_network(spec: models.ModelSpec, depth: int | None = None) -> Backbone:
    """A network (or its first `depth` blocks) whose parameters are never written, so that they take no memory."""
    network = models.outline(spec, depth=depth)
    empty = {name: torch.empty(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict(empty, assign=True)
    return network


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
