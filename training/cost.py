"""What a configuration costs, before it runs: `train.py --dry-run`.

Nothing is computed: the very learner that would train runs once, forward and backward, on tensors without values
(torch's FakeTensorMode), while FlopCounterMode counts the products of matrices, and what is alive between the two is what the
backward pass will need. So an alignment has no cost to declare or to forget, and the count is that of the code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import models
from alignment import Alignment, AlignOptions, Setting
from alignment.interval import expected_share
from config import TrainConfig
from dataset import LatentSet
from loss import Batch
from models import Backbone, published
from models.checkpoint import Checkpoint
from models.recompute import recompute
from runtime import launch
from runtime.streams import Stream
from runtime.text import aligned
from training.setup import Setup


@dataclass(frozen=True)
class Part:
    """One line of the account. FLOPs are of one training step, per image of the batch (a multiply-add is two)."""

    name: str
    parameters: int
    trained: bool
    flops: float
    stop: int | None = None
    """The step after which it is gone, None for never."""


@dataclass(frozen=True)
class Cost:
    """The account of one configuration; memory in bytes on each process."""

    parts: list[Part]
    steps: int
    epoch_steps: int
    batch_size: int
    micro_batch: int
    accumulation: int
    kept: float
    """Activations kept for the backward pass, per image, and those of the one block that is being computed again."""
    casts: float
    """Copies of weights in lower precision, kept for the backward pass."""
    recomputed: float
    """FLOPs per image that activation checkpointing adds."""
    dtype: torch.dtype | None
    averages: int = 1
    """Moving averages of the network."""

    @property
    def plain(self) -> float:
        """FLOPs per image of plain training."""
        return self.parts[0].flops

    def ratio(self, step: int = 0) -> float:
        """FLOPs of step `step` (from 0) in units of a plain step."""
        return sum(part.flops for part in self.parts if part.stop is None or step < part.stop) / self.plain

    def mean_ratio(self) -> float:
        """FLOPs of the whole run in units of a plain run of as many steps."""
        return sum(part.flops * min(1.0, (self.steps if part.stop is None else part.stop) / self.steps)
                   for part in self.parts) / self.plain

    def flops(self, step: int) -> float:
        """FLOPs of the run up to `step`."""
        return self.batch_size * sum(part.flops * (step if part.stop is None else min(step, part.stop)) for part in self.parts)

    def memory(self) -> dict[str, float]:
        """Bytes at the peak of a step: trained parameters with gradient and Adam's two moments (16 bytes each), the EMA,
        frozen networks, and the activations. The allocator's slack, workspaces and frozen networks' passing activations
        are left out; compilation keeps less."""
        trained = sum(part.parameters for part in self.parts if part.trained)
        frozen = sum(part.parameters for part in self.parts if not part.trained)
        return {"parameters, gradients, Adam": 16.0 * trained, "EMA": 4.0 * self.averages * self.parts[0].parameters,
                "frozen networks": (2.0 if self.dtype else 4.0) * frozen,
                "activations": self.kept * self.micro_batch + self.casts}

    def largest(self, gigabytes: float) -> int | None:
        """The largest micro-batch that divides a process's share of the batch and leaves a tenth of the memory free, None if none."""
        share = self.micro_batch * self.accumulation
        fixed = sum(self.memory().values()) - self.kept * self.micro_batch
        fitting = [size for size in range(1, share + 1) if share % size == 0 and fixed + self.kept * size <= 0.9 * gigabytes * 1e9]
        return max(fitting, default=None)

    def hours(self, rate: float) -> tuple[float, float]:
        """Hours at `rate` images per second: throughout, and if the rate grows as the FLOPs fall after a stop."""
        slow = self.steps * self.batch_size / rate / 3600
        return slow, slow * self.mean_ratio() / self.ratio()


def estimate(config: TrainConfig, options: dict[str, AlignOptions], data: LatentSet | None = None,
             load: Callable[[str], Any] = Checkpoint.open, memory: bool = True) -> Cost:
    """The cost of a run. Raises UserError as the run itself would; external encoders need no weights here.

    `data` and `load` stand in for a data set and for teachers that are not there yet: only their shapes are asked for.
    Without `memory` its activations are not counted, which takes most of the time; they are NaN then.
    """
    setup = Setup.of(config, options, data=data)
    data, spec, epoch_steps = setup.data, setup.spec, setup.epoch_steps
    dtype = launch.precision(config.mixed_precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    cpu = torch.device("cpu")
    # bfloat16 alone is the setting of Frozen, whose casts would only blur the count
    setting = Setting(spec, data.space, config.seed, cpu, None, load, data, dry=True)
    alignments = setup.alignments(list(setup.options), setting)
    images = any("image" in alignment.columns for alignment in alignments.values())
    probe = _Probe(setup, dtype, data.images([0]).shape[1:] if images else ())
    plain, _, _ = probe.run({})
    parts = [Part("network", models.parameter_count(probe.network), True, plain)]
    for name, alignment in alignments.items():
        total, frozen, _ = probe.run({name: alignment})
        share = expected_share(alignment.options.interval, alignment.options.mask, config.time_sampling)
        stop = setup.stops[name]
        parts.append(Part(f"{name}: head and loss", _count(alignment), True, share * (total - plain - frozen), stop))
        # a cache has the whole set encoded once, before the first step
        each_step = 0.0 if getattr(alignment.options, "cache", False) else share
        for role, network in _frozen(alignment).items():
            parts.append(Part(f"{name}: {role}", _count(network), False, each_step * frozen, stop))
        if alignment.reads_ema:
            parts.append(Part(f"{name}: EMA as teacher", 0, False, share * frozen, stop))
    kept, casts, recomputed = probe.memory(alignments) if memory else (math.nan, math.nan, 0.0)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return Cost(parts, config.max_train_steps, epoch_steps, config.batch_size,
                config.batch_size // world // config.gradient_accumulation_steps, config.gradient_accumulation_steps, kept, casts,
                recomputed, dtype, 1 + len(config.ema_extra_decays) + len(config.ema_lengths))


def main(config: TrainConfig, options: dict[str, AlignOptions]) -> None:
    """Print the account of a run, once, and what its authors report for the model."""
    cost = estimate(config, options)
    if os.environ.get("RANK", "0") != "0":
        return
    cached = [f"{name}: its encoder runs over the set once before the first step, and keeps the tokens of every image in memory: "
              f"neither is counted" for name, chosen in options.items() if getattr(chosen, "cache", False)]
    known = reported(config.model, options) if config.preset in (None, "paper") else []
    print(report(cost, config.images_per_second), *cached, *known, sep="\n")


def reported(model: str, names: Iterable[str]) -> list[str]:
    """What the authors of these alignments report for this model under their own settings, one line each."""
    results = {name: published.first(method=name, variant="", model=model, resolution=256, guidance="none", samples=50_000)
               for name in list(names) or ["none"]}
    return [f"published with {name}: FID {result.metrics['fid']:.2f} after {result.epochs} epochs ({result.protocol()})"
            for name, result in results.items() if result]


class Alive(TorchDispatchMode):
    """Knows the storages that operators have made, and which of them are still held by anything."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}  # what a view would be of
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and (storage := value.untyped_storage())._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        """Bytes of what is held now."""
        return sum(size for reference, size in self._made.values() if not reference.expired())


class _Probe:
    """Runs learners of one network on batches without values; `image` is the shape of one item's image."""

    def __init__(self, setup: Setup, dtype: torch.dtype | None, image: tuple[int, ...]) -> None:
        self.setup, self.dtype, self.latent, self.image = setup, dtype, setup.data.shape[1:], image
        self.network, self.ema = hollow(setup.spec), hollow(setup.spec)
        self._known: dict[tuple, tuple[float, float, float]] = {}

    def run(self, alignments: dict[str, Alignment], count: int = 2, mode: str = "none") -> tuple[float, float, float]:
        """FLOPs per image of one training step, those of frozen networks among them, and bytes alive before its backward pass.

        `mode` is that of activation checkpointing.
        """
        key = (count, mode, *alignments)
        if key not in self._known:
            self._known[key] = self._run(alignments, count, mode)
        return self._known[key]

    def _run(self, alignments: dict[str, Alignment], count: int, mode: str) -> tuple[float, float, float]:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils.flop_counter import FlopCounterMode

        learner = self.setup.learner(self.network, alignments, self.dtype, self.ema)
        recompute(self.network, mode)
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            batch = self._batch(alignments, count)
            with Alive() as alive:
                losses = learner(batch)
                kept = alive.bytes()
            sum(value.mean() for value in losses.values()).backward()
        for parameter in learner.parameters():
            parameter.grad = None
        by_root = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items() if "." not in name}
        frozen = sum(flops for name, flops in by_root.items() if name not in ("Global", "Learner"))
        return counter.get_total_flops() / count, frozen / count, float(kept)

    def memory(self, alignments: dict[str, Alignment]) -> tuple[float, float, float]:
        """Bytes kept for the backward pass, per image and of bf16 copies of weights (in float32 it keeps the weights), and the
        FLOPs per image that are computed twice."""
        mode = self.setup.config.activation_checkpointing
        (work, _, small), (_, _, large) = (self.run(alignments, count, mode) for count in (2, 4))
        each = (large - small) / 2
        casts = small - 2 * each if self.dtype else 0.0
        if mode == "none":
            return each, casts, 0.0
        everything = (self.run(alignments, 4)[2] - self.run(alignments, 2)[2]) / 2
        return each + (everything - each) / self.setup.spec.depth, casts, work - self.run(alignments)[0]

    def _batch(self, alignments: dict[str, Alignment], count: int) -> Batch:
        x, t, labels = torch.zeros(count, *self.latent), torch.zeros(count), torch.zeros(count, dtype=torch.long)
        wanted = {column for alignment in alignments.values() for column in alignment.columns}
        columns = {"image": torch.zeros(count, *self.image, dtype=torch.uint8)} if "image" in wanted else {}
        draws = {name: {key: torch.zeros(value.shape) for key, value in alignment.draw(Stream(0, "cost"), count).items()}
                 for name, alignment in alignments.items()}
        return Batch(x, x.clone(), t, labels, labels, columns, draws)


def hollow(spec: models.ModelSpec, depth: int | None = None) -> Backbone:
    """A network (or its first `depth` blocks) whose parameters are never touched, so that they take no memory."""
    network = models.outline(spec, depth=depth)
    network.load_state_dict({name: torch.empty(value.shape) for name, value in network.state_dict().items()}, assign=True)
    return network


def _frozen(alignment: Alignment) -> dict[str, nn.Module]:
    return {"teacher" if isinstance(network, Backbone) else "encoder": network for network in alignment.frozen}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def report(cost: Cost, rate: float | None = None) -> str:
    """The account as aligned text; with `rate`, images per second measured at the start of such a run, the hours too."""
    lines = [["", "parameters", "GFLOP per image", "of a plain step"]]
    lines += [[part.name, f"{part.parameters / 1e6:.2f}M", f"{part.flops / 1e9:.2f}", f"{part.flops / cost.plain:.4f}"]
              for part in cost.parts]
    lines.append(["total", f"{sum(part.parameters for part in cost.parts) / 1e6:.2f}M",
                  f"{cost.ratio() * cost.plain / 1e9:.2f}", f"{cost.ratio():.4f}"])
    for stop in sorted({part.stop for part in cost.parts if part.stop is not None and part.stop < cost.steps}):
        lines.append([f"from step {stop} on", "", f"{cost.ratio(stop) * cost.plain / 1e9:.2f}", f"{cost.ratio(stop):.4f}"])
    lines.append(["mean over the run", "", f"{cost.mean_ratio() * cost.plain / 1e9:.2f}", f"{cost.mean_ratio():.4f}"])
    text = [aligned(lines, rule=False)]
    memory = cost.memory()
    text += [f"steps: {cost.epoch_steps} per epoch, {cost.steps} in all = {cost.steps / cost.epoch_steps:.1f} epochs",
             f"memory per process, {launch.precision_name(cost.dtype)}, {cost.micro_batch} images at once: "
             f"{sum(memory.values()) / 2**30:.2f} GiB = "
             + " + ".join(f"{value / 2**30:.2f} {name}" for name, value in memory.items() if value)
             + " (eager; counted from tensor shapes, without the allocator's slack and workspaces)"]
    if cost.recomputed:
        text.append(f"computed twice in the backward pass: {cost.recomputed / 1e9:.2f} GFLOP per image, "
                    f"{cost.recomputed / cost.plain:.4f} of a plain step")
    text.append("largest micro-batch that fits, a tenth of the memory left free: " + ", ".join(_fits(cost, size) for size in memories()))
    if rate is not None:
        slow, fast = cost.hours(rate)
        text.append(f"time at {rate:g} images per second: {slow:.2f} hours" + (
            f", or {fast:.2f} if the rate grows as the FLOPs fall" if fast < slow else ""))
    return "\n".join(text)


CARDS = (24, 40, 80, 141)
"""Gigabytes of memory of common GPUs."""


def memories() -> tuple[float, ...]:
    """Gigabytes of this machine's GPU, of common ones where there is none."""
    return (torch.cuda.get_device_properties(0).total_memory / 1e9,) if torch.cuda.is_available() else CARDS


def _fits(cost: Cost, gigabytes: float) -> str:
    size = cost.largest(gigabytes)
    if size is None:
        return f"{gigabytes:.0f} GB none"
    return f"{gigabytes:.0f} GB {size} (--gradient-accumulation-steps {cost.micro_batch * cost.accumulation // size})"
