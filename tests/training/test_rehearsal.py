"""Every kind of run on a GPU that is not there (`tests/fake_gpu.py`): places, waits, refused kernels, operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import models
import train
from evaluations import metrics, monitor
from models import attention
from models.checkpoint import Checkpoint
from models.layers import Attention
from models.lightningdit import LightningDiT
from models.pixels import PixelCodec
from models.sit import SiT
from models.vae import open_codec
from sampling.config import SamplingConfig
from sampling.internal import open_inner
from sampling.sampler import Sampler
from tests import fake_gpu
from tests.fake_gpu import GPU, FakeGPU, Seen
from tests.helpers import Words, build_run, tiny_vae
from training import loop
from training.log import Meter
from training.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")


@pytest.fixture(scope="module", autouse=True)
def two_blocks() -> Iterator[None]:
    """Networks of two blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SiT.sizes, "SiT-Two/2", (2, 32, 4, 2))
        patch.setitem(LightningDiT.sizes, "LightningDiT-Two/1", (2, 32, 4, 1))
        yield


@pytest.fixture
def gpu() -> Iterator[FakeGPU]:
    with FakeGPU() as gpu:
        yield gpu


@pytest.fixture(scope="module")
def small(words: Words) -> Words:
    """Words of a run of two eager blocks: small(output_dir, name, *more, **settings without a flag)."""

    def build(output: Path, name: str, *more: object, **rare: object) -> list[str]:
        return words(output, name, "--model", "SiT-Two/2", "--compile", "off", *more, **rare)

    return build


@pytest.fixture(scope="module")
def tutor(tmp_path_factory: pytest.TempPathFactory, small: Words) -> Path:
    """A plain run of one step, made on the CPU."""
    return train.main(small(tmp_path_factory.mktemp("tutor"), "run", "--max-train-steps", 1))


def rehearsed(gpu: FakeGPU, run: Run, before: int = 2) -> Seen:
    """What happens in the step after `before` others, which make the optimiser's state and fill the meter."""
    networks = [run.network, *run.alignments.values(), *(average.network for average in run.averages.values())]
    networks += [network for alignment in run.alignments.values() for network in alignment.frozen]
    for network in networks:
        off = [name for name, tensor in [*network.named_parameters(), *network.named_buffers()] if tensor.device != GPU]
        assert not off, off
    stepping = loop.steps(run, before + 1, Meter(run.accelerator))
    for _ in range(before):
        next(stepping)
    with gpu.watching() as seen:
        next(stepping)
    return seen


GUIDED = ("--align-hidden", 32, "--guiding-ckpt", "{tutor}")
ENCODER = ("--align-hidden", 32, "--align-depth", 1, "--align-encoder", "{encoder}")
SYNC = ("--align", "layersync", "--align-target-depth", 2)
# Name -> words, and the most operators (views aside) of a step of two blocks.
CASES: dict[str, tuple[tuple[object, ...], int]] = {
    "plain": ((), 332),
    "float32": (("--mixed-precision", "no", "--no-tf32"), 246),
    "TF32": (("--mixed-precision", "no", "--tf32"), 246),
    "accumulation": (("--gradient-accumulation-steps", 2), 641),
    "Muon": (("--optimizer", "muon"), 446),
    "no clipping": (("--max-grad-norm", 0), 327),
    "deterministic": (("--deterministic",), 332),
    "products kept": (("--activation-checkpointing", "selective"), 382),
    "blocks computed twice": (("--activation-checkpointing", "full"), 394),
    "latents on the device": (("--resident", "device"), 330),
    "averages": (("--ema-lengths", 0.1), 333),
    "gradient ratio": (("--align", "latent", "--align-hidden", 32, "--grad-ratio-steps", 1), 1091),
    "latent": (("--align", "latent", "--align-hidden", 32), 392),
    "plateau": (("--align", "latent", "--align-hidden", 32, "--align-schedule", "plateau"), 417),
    "plateau, interval": ((*SYNC, "--align-schedule", "plateau", "--align-interval", 0.4, 0.7), 413),
    "token weights": (("--align", "latent", "--align-hidden", 32, "--align-token-weights", "residual"), 402),
    "time weights": (("--align", "latent", "--align-hidden", 32, "--align-time-weights", "smooth"), 395),
    "guided": (GUIDED, 436),
    "guided, interval": ((*GUIDED, "--align-interval", 0.4, 0.7), 447),
    "guided, upstream": ((*GUIDED, "--preset", "upstream"), 456),
    "guided, skip": ((*GUIDED, "--guiding-labels", "skip"), 447),
    "sra": (("--align", "sra"), 433),
    "sra2": (("--align", "latent", "--preset", "sra2", "--align-hidden", 32), 409),
    "layersync": (SYNC, 376),
    "dispersive": (("--align", "dispersive"), 376),
    "contrastive": (("--align", "contrastive"), 386),
    "label-code": (("--align", "label-code", "--align-hidden", 32), 392),
    "internal": (("--align", "internal"), 400),
    "self-flow": (("--align", "self-flow", "--align-depth", 1, "--align-target-depth", 2), 611),
    "dts-as": (("--align", "self-flow", "--preset", "dts-as", "--align-depth", 1, "--align-target-depth", 2), 673),
    "dts-as, some samples whole": (
        ("--align", "self-flow", "--preset", "dts-as", "--align-depth", 1, "--align-full-share", 0.5),
        629,
    ),
    "route": (("--route", 1, 1, 0.5), 354),
    "route, LightningDiT at two times": (
        ("--model", "LightningDiT-Two/1", "--align", "self-flow", "--align-depth", 1, "--route", 1, 2, 0.5),
        702,
    ),
    "repa": (("--align", "repa", *ENCODER), 471),
    "haste": (("--align", "haste", *ENCODER), 505),
    "LightningDiT": (("--model", "LightningDiT-Two/1"), 413),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_stays_on_the_device_and_waits_for_nothing(
    name: str, gpu: FakeGPU, small: Words, tutor: Path, encoder: Path, tmp_path: Path
) -> None:
    more, most = CASES[name]
    argv = small(tmp_path, "run", *(str(word).format(tutor=tutor, encoder=encoder) for word in more))
    try:
        seen = rehearsed(gpu, build_run(argv, "train_guide" if GUIDED[-2] in more else "train"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not seen.waits
    assert seen.launches <= most, seen.operators
    assert seen.operators["_foreach_lerp_"] >= 1 and seen.operators["_fused_adamw_"] in (1, 2)


def test_the_largest_network_takes_a_step(gpu: FakeGPU, data: Path, tmp_path: Path) -> None:
    """SiT-XL/2 as it is but for the values of its weights, which would take seconds to draw."""
    build = models.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", lambda *args, **kwargs: gpu.call(build, *args, **kwargs))
        argv = ["--data-dir", data, "--output-dir", tmp_path, "--exp-name", "run", "--model", "SiT-XL/2"]
        run = build_run([*map(str, argv), "--batch-size", "8", "--compile", "off"])
    assert not rehearsed(gpu, run, before=1).waits


# --- samples


@pytest.fixture(scope="module")
def inner(tmp_path_factory: pytest.TempPathFactory, small: Words) -> Path:
    """A run of one step with a second velocity."""
    folder = tmp_path_factory.mktemp("inner")
    return train.main(small(folder, "run", "--align", "internal", "--max-train-steps", 1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("solver", ["euler", "heun", "heun2", "sde"])
def test_samples_of_every_solver_wait_for_their_images_alone(
    solver: str, dtype: torch.dtype | None, gpu: FakeGPU, inner: Path, tmp_path: Path
) -> None:
    """Guidance by class and by the inner velocity; a decoder with real weights."""
    kind = {"mode": "sde"} if solver == "sde" else {"mode": "ode", "solver": solver}
    settings = SamplingConfig(num_steps=2, cfg_scale=2.0, internal_scale=1.5, **kind)
    checkpoint = Checkpoint.open(inner)
    network = checkpoint.network("ema").to(GPU)
    attention.choose(network, 8, torch.bfloat16, False)
    sampler = Sampler(
        network, PixelCodec(checkpoint.space), settings, 8, dtype, inner=open_inner(checkpoint, settings, GPU)
    )
    sampler.images(range(4))  # makes constants, for which the host waits once
    with gpu.watching() as seen:
        drawn = list(sampler.stream([range(4), range(4, 8)]))
    assert [images.shape for _, _, images in drawn] == [(4, 8, 8, 1)] * 2
    assert len(seen.waits) == 2 and all("synchronize at sampling/sampler.py" in why for why in seen.waits)


def test_a_decoder_waits_for_nothing(gpu: FakeGPU, tmp_path: Path) -> None:
    codec = open_codec(tiny_vae(tmp_path / "vae"), device=GPU)
    latents = torch.zeros(3, 4, 4, 4, device=GPU)
    codec.decode(latents)
    with gpu.watching() as seen:
        images = codec.decode(latents)
    assert images.shape == (3, 3, 16, 16) and images.device == GPU and not seen.waits


@pytest.mark.parametrize("precision", [("--mixed-precision", "bf16"), ("--mixed-precision", "no", "--tf32")])
@pytest.mark.parametrize("preset", [None, "table1-sde"])
def test_scores_and_previews_in_every_precision(
    preset: str | None,
    precision: tuple[str, ...],
    gpu: FakeGPU,
    small: Words,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A preset samples in float32 with TF32 inside a bf16 run, whose attention kernel refuses float32."""
    # it would compare made-up numbers, on the host
    monkeypatch.setattr(metrics, "frechet", lambda *_: 0.0)
    wanted = ("--eval-steps", 2, "--reference", data, "--features", "pixels", "--num-fid-samples", 8)
    rare = {"eval_preset": preset} if preset else {}
    run = build_run(small(tmp_path, "run", *wanted, "--sampling-steps", 2, *precision, **rare))
    for watched in monitor.watch(run.config, run.folder, run.spec, run.data, run.accelerator):
        watched.rehearse(run.ema.network, run.dtype)
        if isinstance(watched, monitor.Scores):
            watched.settings = SamplingConfig(num_steps=2)
            assert watched(1, {"ema": run.ema.network}, run.dtype)


# --- what is planted is seen


def planted(gpu: FakeGPU, small: Words, folder: Path, patch: Callable[[Run], None]) -> Seen:
    run = build_run(small(folder, "run"))
    patch(run)
    return rehearsed(gpu, run)


def test_a_constant_on_the_cpu_is_seen(gpu: FakeGPU, small: Words, tmp_path: Path) -> None:
    def constant(run: Run) -> None:
        run.network.register_forward_pre_hook(lambda _, args: (args[0] + torch.ones(8), *args[1:]))

    with pytest.raises(RuntimeError, match="at least two devices"):
        planted(gpu, small, tmp_path, constant)


def test_a_read_of_the_host_is_seen(gpu: FakeGPU, small: Words, tmp_path: Path) -> None:
    def read(run: Run) -> None:
        run.network.register_forward_pre_hook(lambda _, args: args[0].mean().item() and None)

    (why,) = planted(gpu, small, tmp_path, read).waits
    assert why.startswith("_local_scalar_dense at tests/training/test_rehearsal.py:")


def test_a_copy_from_pageable_memory_is_seen(gpu: FakeGPU, small: Words, tmp_path: Path) -> None:
    def copy(run: Run) -> None:
        run.network.register_forward_pre_hook(lambda _, args: (args[0] + torch.ones(8).to(GPU), *args[1:]))

    (why,) = planted(gpu, small, tmp_path, copy).waits
    assert why.startswith("copy of (8,) from pageable memory at")


def test_a_kernel_of_half_precision_that_is_called_in_float32_is_seen(
    gpu: FakeGPU, small: Words, tmp_path: Path
) -> None:
    def flash(run: Run) -> None:
        run.dtype = None
        for module in run.network.modules():
            if isinstance(module, Attention):
                module.kernels = {torch.float32: "flash"}

    with pytest.raises(RuntimeError, match="No available kernel"):
        planted(gpu, small, tmp_path, flash)


def test_gradients_of_the_fake_engine_are_those_of_the_real_one() -> None:
    """On the CPU, where both run: broadcasting, a shared weight, two outputs, a gradient of a feature."""
    layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        first, second = (layers(x) * layers[0].weight.sum()).unbind(1)
        return (first.square() + second.exp()).mean()

    expected = torch.autograd.grad(loss(), list(layers.parameters()))
    assert all(map(torch.equal, fake_gpu._grad(loss(), list(layers.parameters())), expected))
    fake_gpu._backward([loss()])
    assert all(torch.equal(parameter.grad, value) for parameter, value in zip(layers.parameters(), expected))
