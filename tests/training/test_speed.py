"""What a step costs, without a clock: counts of reads, calls, operators and compilations."""

from __future__ import annotations

import dataclasses
import threading
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor import metrics
from torch._inductor.async_compile import AsyncCompile
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import models
from alignment.interval import Selection
from models import vae
from models.latents import Codec
from models.pixels import PixelCodec, pixels
from models.routing import Route, Segments
from runtime import launch
from runtime.streams import Stream
from sampling import solvers
from sampling.config import SamplingConfig, SourceOptions
from sampling.sampler import Sampler
from sampling.source import Source
from tests.helpers import Words, build_run, perturbed, tiny_vae
from training import loop
from training.batches import AHEAD, Batches
from training.ema import EMA, Exponential
from training.log import Meter

SPEC = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10)


def test_two_steps_are_read_ahead_but_not_beyond_the_end(tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch):
    run = build_run(words(tmp_path, "run"))
    source = Batches(run.config, run.data, run.device, 0, 1)
    read, known = [], threading.Condition()
    inner = source._read

    def counted(step: int, columns: set[str]):
        with known:
            read.append(step)
            known.notify_all()
        return inner(step, columns)

    monkeypatch.setattr(source, "_read", counted)
    for step, (batch,) in enumerate(source.steps(0, 5, {})):
        wanted = min(step + AHEAD, 4)
        with known:  # the reader is a thread: it gets there on its own while this step is held
            assert known.wait_for(lambda wanted=wanted: read[-1] == wanted, timeout=10)
        assert torch.equal(batch.t, torch.from_numpy(inner(step, set())[0].t))
    assert read == [0, 1, 2, 3, 4]


def test_the_average_follows_parameters_that_have_moved(tmp_path: Path, words: Words):
    """`Module.to` and `copy_` keep the parameter and replace or fill its storage: the average must follow both."""
    network = build_run(words(tmp_path, "run")).network
    ema = EMA(network, Exponential(0.5))
    weight, average = network.x_embedder.proj.weight, ema.network.x_embedder.proj.weight
    start = average.clone()
    held = weight.data_ptr()
    network.to(torch.float64).to(torch.float32)
    ema.network.to(torch.float64).to(torch.float32)
    assert network.x_embedder.proj.weight is weight and weight.data_ptr() != held
    with torch.no_grad():
        weight.add_(1)
    ema.update(1)
    torch.testing.assert_close(ema.network.x_embedder.proj.weight, start + 0.5)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Module.compile` traces and guards as usual, and runs the traced graph without minutes of code generation."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, *args, **kwargs: original(
            self, *args, **{name: value for name, value in kwargs.items() if name != "options"}, backend="eager"
        ),
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> tuple[int, int]:
    """Compiled graphs so far, and breaks between them."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def sampler_of(settings: SamplingConfig, codec: Codec | None = None, count: int = 7) -> Sampler:
    return Sampler(perturbed(SPEC), codec or PixelCodec(pixels(1)), settings, count)


def test_an_sdes_noise_is_drawn_one_step_ahead_by_threads_and_is_the_same(monkeypatch: pytest.MonkeyPatch):
    """Noise that is drawn in turn gives the same bits; each draw begins one step early."""
    sampler = sampler_of(SamplingConfig(num_steps=4))
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: set(range(8)))
    events: list[tuple[str, str]] = []
    lock, fill = threading.Condition(), Stream.fill_normal

    def noted(kind: str) -> None:
        with lock:
            events.append((kind, threading.current_thread().name.partition("_")[0]))
            lock.notify_all()

    def filled(stream: Stream, out: np.ndarray) -> None:
        fill(stream, out)
        noted("draw")

    predict = sampler.network.forward

    def called(*args: Any, **kwargs: Any) -> Any:
        steps = 1 + sum(kind == "network" for kind, _ in events)  # counted from 1
        with lock:  # the draw for the end of this step arrives before the sampler asks for it
            assert lock.wait_for(lambda: sum(kind == "draw" for kind, _ in events) >= 3 * min(steps + 1, 4), timeout=10)
        noted("network")
        return predict(*args, **kwargs)

    monkeypatch.setattr(Stream, "fill_normal", filled)
    monkeypatch.setattr(sampler.network, "forward", called)
    latents = sampler.latents(range(3))
    assert {name for kind, name in events if kind == "draw"} == {"noise"} and len(events) == 3 * 4 + 4
    monkeypatch.undo()
    streams = [Stream(0, "sample/noise", i) for i in range(3)]

    def draw(_: int) -> torch.Tensor:
        return torch.stack([stream.normal(sampler.shape) for stream in streams]).double()

    velocity = sampler._velocity(torch.from_numpy(sampler.labels(range(3))))
    with torch.no_grad():
        assert torch.equal(latents, solvers.euler_maruyama(velocity, draw(0), sampler.grid, draw))


def test_the_next_batch_is_queued_before_the_last_is_waited_for():
    sampler = sampler_of(SamplingConfig(mode="ode", num_steps=2))
    order: list[str] = []
    drawn = sampler._drawn

    def noted(indices: range, labels: Any = None) -> Any:
        order.append(f"queue {indices.start}")
        wait = drawn(indices, labels)
        return lambda: (order.append(f"wait {indices.start}"), wait())[1]

    sampler._drawn = noted
    streamed = list(sampler.stream([range(3), range(3, 6), range(6, 7)]))
    assert order == ["queue 0", "queue 3", "wait 0", "queue 6", "wait 3", "wait 6"]
    assert [indices for indices, _, _ in streamed] == [range(3), range(3, 6), range(6, 7)]
    for indices, _, images in streamed:
        assert np.array_equal(images, sampler.images(indices))
    assert list(sampler.stream([])) == []


@pytest.mark.parametrize("compiled", [False, True])
def test_images_are_decoded_in_chunks_of_one_shape(
    tmp_path: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch, eager_compile: None
):
    whole = vae.open_codec(tiny_vae(tmp_path / "vae"))
    x = torch.randn(7, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = whole.decode(x)
    monkeypatch.setattr(vae, "CHUNK", 3 * 16 * 16)
    codec = vae.open_codec(str(tmp_path / "vae"), compile=compiled)
    sizes, decode = [], codec._vae.decode
    monkeypatch.setattr(codec._vae, "decode", lambda part, **more: (sizes.append(len(part)), decode(part, **more))[1])
    torch.testing.assert_close(codec.decode(x), expected, rtol=1e-4, atol=1e-4)
    assert codec.decode(x[:1]).shape == (1, 3, 16, 16)
    assert sizes == ([3, 3, 3, 3] if compiled else [3, 3, 1, 1]) and graphs() == ((1, 0) if compiled else (0, 0))


def test_a_sampler_in_bf16_keeps_its_weights_in_bf16_and_its_bits(guided: Path, monkeypatch: pytest.MonkeyPatch):
    settings = SamplingConfig(mode="ode", num_steps=3, cfg_scale=2.0)
    source = Source.open(SourceOptions(ckpt=str(guided), mixed_precision="bf16"), settings)
    held = {module.weight.dtype for module in source.network.blocks.modules() if isinstance(module, torch.nn.Linear)}
    assert held == {torch.bfloat16} and source.network.final_layer.linear.weight.dtype == torch.float32
    latents = source.sampler(settings, 4).latents(range(4))
    monkeypatch.setattr("sampling.source.cast_block_linears", lambda *_: None)
    cast_at_every_call = Source.open(SourceOptions(ckpt=str(guided), mixed_precision="bf16"), settings)
    assert next(cast_at_every_call.network.blocks.parameters()).dtype == torch.float32
    assert torch.equal(latents, cast_at_every_call.sampler(settings, 4).latents(range(4)))


# --- compilation -----------------------------------------------------------------------------------------------------


def test_selected_samples_are_filled_up_to_few_sizes_and_the_gradient_is_the_same(
    tmp_path: Path, words: Words, teacher: Path
):
    run = build_run(
        words(
            tmp_path,
            "run",
            "--guiding-ckpt",
            teacher,
            "--align-hidden",
            32,
            "--align-interval",
            0.4,
            0.7,
            "--batch-size",
            64,
        ),
        "train_guide",
    )
    learner, sizes = run.learner(), set()
    for step, (batch,) in enumerate(Batches(run.config, run.data, run.device, 0, 1).steps(0, 8, run.alignments)):
        t = batch.t.numpy()
        exact, filled = (Selection.of((0.4, 0.7), "select", t, slice(None), run.device, few) for few in (False, True))
        sizes.add(len(filled.index))
        assert len(filled.index) % 4 == 0 and torch.equal(filled.index[: filled.count], exact.index)
        if step:
            continue
        assert len(filled.index) > filled.count
        gradients = []
        for selection in (exact, filled):
            losses = learner(dataclasses.replace(batch, selections={"guided": selection}))
            (losses["diffusion"].mean() + losses["guided"]).backward()
            gradients.append([p.grad.clone() for p in learner.parameters()])
            learner.zero_grad()
        for gradient, other in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)
        assert all(p.grad is None for p in learner.parameters()) and gradients[0][-1].any()
    assert len(sizes) < 6
    nothing = Selection.of((0.0, 0.0), "select", t, slice(None), run.device, few_sizes=True)
    assert nothing.count == 0 and len(nothing.index) == 4 and nothing.factor == 0


def test_no_graph_breaks_and_no_recompilation_once_both_shapes_are_known(
    tmp_path: Path, words: Words, teacher: Path, eager_compile: None
):
    """The block compiles for the student and for the teacher's varying number of selected samples, then never again."""
    run = build_run(
        words(
            tmp_path,
            "run",
            "--guiding-ckpt",
            teacher,
            "--align-hidden",
            32,
            "--align-interval",
            0.2,
            0.8,
            "--max-train-steps",
            12,
            "--compile",
            "on",
            "--mixed-precision",
            "bf16",
        ),
        "train_guide",
    )
    seen = [graphs() for _ in loop.steps(run, 12)]
    assert seen[3][0] <= 4 and seen[-1] == (seen[3][0], 0), seen


def test_on_cuda_the_final_layer_and_the_heads_are_compiled_too_and_kernels_combined_on_request(
    monkeypatch: pytest.MonkeyPatch,
):
    called: list[tuple[torch.nn.Module, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: called.append((self, more["options"])))
    network, head = perturbed(SPEC), torch.nn.Linear(2, 2)
    blocks = list(network.blocks)
    for device, wanted, modules, options in (
        ("cuda", "on", [*blocks, network.final_layer, head], None),
        ("cuda", "combined", [*blocks, network.final_layer, head], {"combo_kernels": True}),
        ("cpu", "combined", blocks, None),
    ):
        called.clear()
        launch.compile_network(network, [head], wanted, torch.device(device))
        assert [module for module, _ in called] == modules and all(chosen == options for _, chosen in called)
    assert "combo_kernels" in torch._inductor.list_options()
    truncated = models.build(SPEC, depth=2)
    called.clear()
    launch.compile_network(truncated, [], None, torch.device("cuda"))  # a teacher has no final layer
    assert [module for module, _ in called] == list(truncated.blocks)


def kernels_of_a_block(network: models.Backbone) -> tuple[int, int]:
    """Number of kernels that Inductor makes of a block's forward and backward pass on a CPU; they are not built.

    Matrix products and attention are library calls, which are not counted. On a GPU the numbers differ, but the same
    operators are fused.
    """
    launch.compile_network(network, [], "on", torch.device("cpu"))
    width = network.spec.hidden_size
    tokens, condition = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for shape in ((2, network.spec.tokens, width), (2, 1, width))
    )
    torch._dynamo.reset()
    metrics.reset()
    with (
        inductor.patch(force_disable_caches=True),
        mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_, **__: _nothing),
        mock.patch("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list),
    ):  # the last patch keeps Inductor from compiling a probe of the processor
        output = network.blocks[0](tokens, condition, network.rotation())
        forward = metrics.generated_kernel_count
        output.sum().backward()
    torch._dynamo.reset()  # other tests must not run these empty kernels
    return forward, metrics.generated_kernel_count - forward


def _nothing(*_: Any) -> None:
    """A kernel that does nothing."""


class Summed(torch.nn.Module):
    """A norm, then an operator that cannot be fused with its neighbours."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x).cumsum(1)


def small(name: str) -> models.Backbone:
    return models.build(models.spec(name, in_channels=4, input_size=8, num_classes=10, qk_norm="Lightning" in name))


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("name, most", [("SiT-Tiny/2", (14, 33)), ("LightningDiT-Tiny/1", (20, 33))])
def test_a_compiled_block_has_few_kernels(name: str, most: tuple[int, int]):
    forward, backward = kernels_of_a_block(small(name))
    assert 0 < forward <= most[0] and 0 < backward <= most[1], (forward, backward)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_a_compiled_block_inside_ddp_has_no_more_kernels(monkeypatch: pytest.MonkeyPatch):
    """At the bounds of DDP's buckets, here a block has several, Dynamo would cut its graph."""
    spec = models.spec("SiT-S/2", in_channels=4, input_size=4, num_classes=10)
    network = models.build(dataclasses.replace(spec, name="custom", depth=1))
    alone = kernels_of_a_block(network)
    inside = types.SimpleNamespace(bucket_bytes_cap=2 * 2**20)
    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", inside)
    assert kernels_of_a_block(network) == alone


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_the_count_of_kernels_sees_what_is_not_fused():
    fused = kernels_of_a_block(small("SiT-Tiny/2"))
    network = small("SiT-Tiny/2")
    for block in network.blocks:
        block.norm1 = Summed(block.norm1)
    apart = kernels_of_a_block(network)
    assert apart[0] > fused[0] and apart[1] > fused[1], (fused, apart)


@pytest.mark.parametrize("separate", [False, True])
def test_two_times_are_one_graph_for_all_blocks(separate: bool, eager_compile: None):
    network = perturbed(SPEC)
    launch.compile_network(network, [], "on", torch.device("cpu"))
    segments = Segments.shuffled(torch.rand(2, 16), (4, 12), separate)
    for _ in range(2):
        network(torch.rand(2, 1, 8, 8), torch.rand(2, 2), torch.zeros(2, dtype=torch.long), segments=segments)
    assert graphs() == (1, 0)


def test_a_route_is_compiled_once_more(eager_compile: None):
    """Its blocks see fewer tokens: the second size makes one graph for any size."""
    network = perturbed(SPEC)
    launch.compile_network(network, [], "on", torch.device("cpu"))
    segments = Segments.shuffled(torch.rand(2, 16), (16,))
    for _ in range(3):
        t, y = torch.rand(2), torch.zeros(2, dtype=torch.long)
        network(torch.rand(2, 1, 8, 8), t, y, segments=segments, route=Route(2, 4, 0.5))
    assert graphs() == (2, 0)


def test_the_average_compiles_with_the_network_and_previews_run_it_compiled(
    tmp_path: Path, words: Words, eager_compile: None
):
    run = build_run(words(tmp_path, "run", "--compile", "on"))
    assert all(block._compiled_call_impl is not None for block in [*run.network.blocks, *run.ema.network.blocks])
    assert graphs() == (0, 0)  # nothing is compiled before it is called
    Sampler(run.ema.network, PixelCodec(pixels(1)), SamplingConfig(mode="ode", num_steps=2), 4).latents(range(4))
    assert graphs() == (1, 0)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_activation_checkpointing_keeps_less_computes_more_and_changes_nothing(tmp_path: Path, words: Words):
    results = {}
    for mode in ("none", "selective", "full"):
        run = build_run(words(tmp_path, mode, "--activation-checkpointing", mode))
        learner = run.learner()
        ((batch,),) = Batches(run.config, run.data, run.device, 0, 1).steps(0, 1, run.alignments)
        with FlopCounterMode(display=False) as flops, Alive() as alive:
            losses = learner(batch)
            memory = alive.bytes()
            sum(value.mean() for value in losses.values()).backward()
        results[mode] = memory, flops.get_total_flops(), {name: p.grad for name, p in learner.named_parameters()}
    (memory, work, expected), (some, same, gradients), (least, more, again) = results.values()
    assert least < some / 3 < memory / 5 and same == work and 1.25 * work < more < 1.35 * work
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient) and torch.equal(again[name], gradient), name


# --- the step --------------------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Records the storages that operators make, and which of them are still held."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            value.untyped_storage()._cdata for value in args if isinstance(value, torch.Tensor)
        }  # what a view would be of
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage())._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        """Bytes of the storages that are still held."""
        return sum(size for reference, size in self._made.values() if not reference.expired())


def test_a_step_reads_its_rows_once_and_half_precision_stays_half_on_the_way(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
):
    run = build_run(words(tmp_path, "run"))
    gathered: list[int] = []
    gather = run.data._gather
    monkeypatch.setattr(
        run.data, "_gather", lambda rows: (lambda values: (gathered.append(values.nbytes), values)[1])(gather(rows))
    )
    list(loop.steps(run, 3))
    row = int(np.prod(run.data.shape)) * np.dtype(run.data.manifest["dtype"]).itemsize
    assert gathered == [16 * row] * 3


def test_what_a_step_does_around_its_network_takes_little_of_the_hosts_time(tmp_path: Path, words: Words):
    """Draws, rows, meter and EMA against the bare forward, backward and update of the same tiny network, in turns."""
    run, bare = build_run(words(tmp_path, "real")), build_run(words(tmp_path, "bare"))
    ((batch,),) = Batches(bare.config, bare.data, bare.device, 0, 1).steps(0, 1, {})
    learner, stepping = bare.learner(), loop.steps(run, 100, Meter(run.accelerator))
    spent: dict[str, list[float]] = {"real": [], "bare": []}
    for _ in range(9):
        for name, call in (
            ("real", lambda: next(stepping)),
            ("bare", lambda: loop.update(learner, [batch], {}, bare.optimizer, 1.0)),
        ):
            started = time.process_time()
            call()
            call()
            spent[name].append(time.process_time() - started)
    assert min(spent["real"]) < 1.4 * min(spent["bare"]), spent
