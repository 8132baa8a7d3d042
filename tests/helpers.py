"""What tests of several folders share: paths, tiny networks, image sets, a real autoencoder, a held lock, runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import models
from alignment import Alignment, Context
from loss import Batch
from models.checkpoint import Checkpoint
from models.latents import LatentSpace
from runtime import files
from runtime.errors import UserError
from runtime.streams import Stream

if TYPE_CHECKING:
    from training.run import Run

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"

# the network of the parity files
PARITY_SIT = models.ModelSpec(
    name="custom",
    architecture="sit",
    depth=4,
    hidden_size=48,
    num_heads=4,
    patch_size=2,
    in_channels=4,
    input_size=8,
    num_classes=10,
)

Words = Callable[..., list[str]]
"""The fixture `words`: the command line of a tiny run."""

HOLD = """import fcntl, sys
f = open(sys.argv[1], "w")
fcntl.lockf(f, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()"""


def inputs(spec: models.ModelSpec, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, spec.in_channels, spec.input_size, spec.input_size, generator=generator)
    return x, torch.rand(count, generator=generator), torch.arange(count) % (spec.num_classes + 1)


def perturbed(spec: models.ModelSpec, **arguments) -> models.Backbone:
    """A network without zero weights, so that every path carries signal."""
    network = models.build(spec, **arguments)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def parity(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights in a parity file, and everything else in it."""
    tensors = load_file(DATA / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return weights, {key: value for key, value in tensors.items() if not key.startswith("weights.")}


def photograph(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A smooth random RGB picture."""
    coarse = np.random.default_rng(seed).integers(256, size=(4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def class_folders(folder: Path, classes: int = 3, per_class: int = 5) -> Path:
    """`classes` folders of pictures of different sizes and shapes."""
    for label in range(classes):
        (folder / f"n{label:02d}").mkdir(parents=True)
        for number in range(per_class):
            seed = label * per_class + number
            photograph(seed, 20 + 7 * seed, 60 - 2 * seed).save(folder / f"n{label:02d}" / f"{number}.png")
    return folder


def zipped(folder: Path, file: Path) -> Path:
    """The same set as one ZIP file."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return file


def tiny_vae(folder: Path, channels: int = 4) -> str:
    """A real `AutoencoderKL` of stride 4 with random weights, written by `save_pretrained`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.18215,
        sample_size=16,
    )
    vae.save_pretrained(folder)
    return str(folder)


def encoding(images: Path, vae: str, out: Path, *more: str) -> list[str]:
    """The command line of `preprocessing.encode` at 16 x 16 in this process; a later flag wins."""
    words = ["--images", str(images), "--vae", vae, "--out", str(out), "--resolution", "16", "--workers", "0"]
    return [*words, *more]


class SmallCodec:
    """An autoencoder of one convolution and stride 4: a new process opens it without diffusers, which takes seconds."""

    space = LatentSpace(name="small", channels=4, stride=4, shift=(0.0,), scale=(1.0,))
    image_channels = 3

    def __init__(self) -> None:
        self.kernel = torch.randn(8, 3, 7, 7, generator=torch.Generator().manual_seed(0)) / 12

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = torch.nn.functional.conv2d(images, self.kernel, stride=4, padding=3).chunk(2, dim=1)
        return mean, std.exp()

    def decode(self, x: Tensor) -> Tensor:
        return x[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)


@contextmanager
def held_elsewhere(file: Path) -> Iterator[None]:
    """Another process holds `file` inside the block."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        yield
        holder.stdin.close()


def killed_writer(path: Path) -> Path:
    """What a process leaves that is killed while it writes `path`, with a library's own temporary file."""
    before = set(path.parent.glob(".*.tmp"))
    child = os.fork()
    if child == 0:
        with files.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            temporary.with_name(".tmpX1y2Z3").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = {*path.parent.glob(".*.tmp")} - before
    return left


def ended_at(number: int, call: Callable[[], object], fault: int | None = None) -> int | None:
    """Run `call` in a process of its own up to its `number`-th change of the file system; returns the exit code.

    There it is killed, or meets the error `fault` then and ever after, as on a full disk. None if it made no such
    change. The code is negative after a kill, 2 after a UserError, 1 after any other error.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def count_changes(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not opened and event not in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                return
            count += 1
            if count >= number and fault is None:
                os.kill(os.getpid(), signal.SIGKILL)
            # a removal needs no space
            if count >= number and event not in ("os.remove", "os.rmdir"):
                raise OSError(fault, os.strerror(fault))

        sys.addaudithook(count_changes)
        code = 1
        try:
            call()
            code = 0
        except UserError:
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3 if count < number else code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == 3 else code


def micro_batch(alignment: Alignment | None = None, count: int = 6, **more: Any) -> Batch:
    """Draws for images of the digits' size, with those of `alignment`; `image` has nothing to do with the latents."""
    from training import batches  # as in `build_run`

    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(count, 1, 8, 8, generator=generator) for _ in range(2))
    images = torch.randint(0, 256, (count, 8, 8, 1), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 10
    own = alignment.draw(Stream(0, "x"), count) if alignment else {}
    draws = {alignment.name: {key: torch.from_numpy(value) for key, value in own.items()}} if alignment else {}
    dropped = torch.where(labels == 2, 10, labels)
    columns = {"image": images, "time": torch.linspace(0.8, 0.1, count)}
    batch = Batch(x0, eps, torch.linspace(0.01, 0.95, count), dropped, labels, columns, draws, **more)
    return batches.arranged(batch, {alignment.name: alignment} if alignment else {}, None, None)


def context_of(
    network: models.Backbone, samples: Batch, taps: Collection[models.Tap], name: str = "", ema: Any = None
) -> Context:
    """What the alignment `name` sees of `samples` after a forward pass of `network`."""
    times = samples.t if samples.times is None else samples.times
    features = network(samples.xt, times, samples.y, taps=taps, segments=samples.segments).features
    return samples.context(name, features, ema)


def build_run(argv: list[str], program: str = "train") -> Run:
    """The run that a command line asks for, before its first step."""
    # imported here, since small programs in processes of their own import this file too
    from training import command
    from training.run import Run

    return Run(*command.resolve(argv, program, None, ("guided",) if program == "train_guide" else ()))


def saved_tensors(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's latest checkpoint, by file and name."""
    shards = Checkpoint.open(run).path.glob("*.safetensors")
    return {f"{file.name}/{name}": value for file in shards for name, value in load_file(file).items()}


def assert_same_bits(first: Path, second: Path) -> None:
    """The latest checkpoints of two runs hold the same bits after the same number of steps."""
    expected, actual = saved_tensors(first), saved_tensors(second)
    assert Checkpoint.open(first).step == Checkpoint.open(second).step
    assert expected.keys() == actual.keys() and expected
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
