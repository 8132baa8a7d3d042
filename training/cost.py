"""What a configuration costs, before it runs: `train.py --dry-run`.

Nothing is computed: the very learner that would train runs once, forward and backward, on tensors without values
(torch's FakeTensorMode), while FlopCounterMode counts the products of matrices, and what is alive between the two is what the
backward pass will need; the run's own optimiser and averages, on the meta device, say what is held between steps. So nothing has a
cost to declare or to forget, and the count is that of the code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import models
from alignment import Alignment, AlignOptions, BuildContext
from alignment.interval import expected_share
from config import TrainConfig
from dataset import LatentSet
from loss import Batch
from models import Backbone, published
from models.checkpoint import Checkpoint
from models.recompute import recompute
from runtime import launch
from runtime.streams import Stream
from training import ema, optimizers
from training.account import Cost, Part, report
from training.setup import Setup


def estimate(
    config: TrainConfig,
    options: dict[str, AlignOptions],
    data: LatentSet | None = None,
    load: Callable[[str], Any] = Checkpoint.open,
    memory: bool = True,
) -> Cost:
    """The cost of a run. Raises UserError as the run itself would; external encoders need no weights here.

    `data` and `load` stand in for a data set and for teachers that are not there yet: only their shapes are asked for.
    Without `memory` it is not counted, which takes most of the time; the activations are NaN then.
    """
    setup = Setup.of(config, options, data=data)
    data, spec, epoch_steps = setup.data, setup.spec, setup.epoch_steps
    dtype = launch.precision(config.mixed_precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    cpu = torch.device("cpu")
    # bfloat16 alone is the setting of Frozen, whose casts would only blur the count
    setting = BuildContext(spec, data.space, config.seed, cpu, None, load, data, dry=True)
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
    world = launch.world_size()
    return Cost(
        parts,
        config.max_train_steps,
        epoch_steps,
        config.batch_size,
        config.batch_size // world // config.gradient_accumulation_steps,
        config.gradient_accumulation_steps,
        kept,
        casts,
        recomputed,
        dtype,
        held(setup, alignments) if memory else {},
    )


def main(config: TrainConfig, options: dict[str, AlignOptions]) -> None:
    """Print the account of a run, once, and what its authors report for the model."""
    cost = estimate(config, options)
    if os.environ.get("RANK", "0") != "0":
        return
    cached = [
        f"{name}: its encoder runs over the set once before the first step, and keeps the tokens of every image in memory: "
        f"neither is counted"
        for name, chosen in options.items()
        if getattr(chosen, "cache", False)
    ]
    known = reported(config.model, options) if config.preset in (None, "paper") else []
    print(report(cost, config.images_per_second), *cached, *known, sep="\n")


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


class Alive(TorchDispatchMode):
    """Knows the storages that operators have made, and which of them are still held by anything."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)
        }  # what a view would be of
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
        self.network, self.ema = empty_network(setup.spec), empty_network(setup.spec)
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
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            FlopCounterMode(display=False, custom_mapping=attention_on_cpu()) as counter,
        ):
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
        draws = {
            name: {key: torch.zeros(value.shape) for key, value in alignment.draw(Stream(0, "cost"), count).items()}
            for name, alignment in alignments.items()
        }
        return Batch(x, x.clone(), t, labels, labels, columns, draws)


def attention_on_cpu() -> dict[Any, Callable[..., int]]:
    """FLOPs of attention's kernel for CPUs, forward and backward: torch 2.10 has no formula for it and would count none."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda out, q, k, v, *_, **__: (
            sdpa_backward_flop_count(out, q, k, v)
        ),
    }


def empty_network(spec: models.ModelSpec, depth: int | None = None) -> Backbone:
    """A network (or its first `depth` blocks) whose parameters are never touched, so that they take no memory."""
    network = models.outline(spec, depth=depth)
    network.load_state_dict(
        {name: torch.empty(value.shape) for name, value in network.state_dict().items()}, assign=True
    )
    return network


def held(setup: Setup, alignments: Mapping[str, Alignment]) -> dict[str, int]:
    """Bytes that a run holds from step to step, but for frozen networks, by what they are: those of its own optimiser and averages.

    `alignments` go to the meta device, where these are built, and are of no use afterwards.
    """
    network = models.outline(setup.spec)
    heads = {name: alignment.to("meta") for name, alignment in alignments.items()}
    trained = [parameter for module in (network, *heads.values()) for parameter in module.parameters()]
    buffers = [buffer for module in (network, *heads.values()) for buffer in module.buffers()]
    optimizer = optimizers.build(setup.config, network, heads, fused=False)
    members = [(group["name"], parameter) for group in optimizer.param_groups for parameter in group["params"]]
    alike = {
        (name, parameter.shape): parameter for name, parameter in members
    }  # one step of these shows the state of all
    for parameter in alike.values():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    states = [optimizer.state[alike[name, parameter.shape]].values() for name, parameter in members]
    averages = [average.network for average in ema.averages(setup.config, network, heads).values()]
    return {
        "parameters and gradients": _bytes(trained) * 2 + _bytes(buffers),
        "optimizer": sum(map(_bytes, states)),
        "EMA": sum(_bytes(average.parameters()) + _bytes(average.buffers()) for average in averages),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _frozen(alignment: Alignment) -> dict[str, nn.Module]:
    return {"teacher" if isinstance(network, Backbone) else "encoder": network for network in alignment.frozen}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
