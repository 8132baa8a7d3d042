"""Train an autoencoder for small images: a diffusers `AutoencoderKL`, on one core in minutes.

    python -m preprocessing.train_vae --images data/fashion/train --grey --resolution 32 --out pretrained/vae-fashion

The loss of an image is L1 + L2 over its pixels in [-1, 1], --kl times the divergence of the posterior from a standard
normal (nats per latent value), and --perceptual times a distance of features of torchvision's MobileNetV2: at three of
its stages, the squared difference of features of unit length (Zhang et al., 2018, without their learned weights).

A run is a function of its options and its images: draws are those of (seed, name, step), and a command that was killed
continues from the checkpoint in --run and ends with the same bits (on one kind of device, with as many threads).
`log.jsonl` beside the checkpoint holds the losses. At the end, --out gets what `save_pretrained` writes, with shift and
scale of the latents measured on the training images, and `training.json`, from which
`python -m evaluations.reconstruction --card` writes the model card.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import errors, files, jsonlines, locks, progress, signals
from runtime.errors import require
from runtime.options import as_dict, option, read

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from torch import Tensor

    from models.mobilenet import Perceptual

CHECKPOINT, LOG, SETTINGS, TRAINING = "checkpoint.safetensors", "log.jsonl", "settings.json", "training.json"
LARGEST = 8 * 2**30  # bytes of images that are held in memory
MEASURED = 4096  # images on which shift and scale are measured
GROUPS = 8  # of the group norms
WARMUP = 100  # steps
FREE = ("out", "run", "images", "save_steps", "log_steps", "perceptual_weights")  # may change on resume


@dataclass(frozen=True, kw_only=True)
class Options:
    images: str = option(help="folder or ZIP file of training images", heading="images")
    resolution: int = option(within="[4, 1024]", help="side of the square images, in pixels")
    grey: bool = option(False, help="one channel instead of RGB")
    out: str = option(help="folder of the autoencoder to write", heading="output")
    run: str | None = option(None, help="folder of checkpoint and log (default: exps/ and the name of --out)")
    save_steps: int = option(500, within="[1, inf)", help="steps between checkpoints")
    log_steps: int = option(50, within="[1, inf)", help="steps between lines of the log")
    widths: tuple[int, ...] = option(
        (16, 32, 64),
        help="channels at each resolution, from the full down; each after the first halves it",
        heading="network",
    )
    latent_channels: int = option(4, within="[1, 1024]", help="channels of the latents")
    steps: int = option(5000, within="[1, inf)", help="optimiser steps", heading="training")
    batch_size: int = option(32, within="[1, inf)", help="images in a step")
    learning_rate: float = option(2e-3, within="(0, 1]", help="of AdamW; falls to 0 along a cosine")
    l1: float = option(1.0, within="[0, inf)", help="weight of the absolute error")
    l2: float = option(1.0, within="[0, inf)", help="weight of the squared error")
    kl: float = option(1e-4, within="[0, inf)", help="weight of the divergence from the normal distribution")
    perceptual: float = option(
        0.0, within="[0, inf)", help="weight of the distance of MobileNet's features; 0: without"
    )
    perceptual_weights: str | None = option(None, help="torchvision's mobilenet_v2-b0353104.pth, for --perceptual")
    seed: int = option(0, help="seed of the run")

    def __post_init__(self) -> None:
        require(
            bool(self.widths) and all(width > 0 and width % GROUPS == 0 for width in self.widths),
            f"--widths {' '.join(map(str, self.widths))} must be multiples of {GROUPS}, the groups of the norms",
        )
        stride = 2 ** (len(self.widths) - 1)
        require(
            self.resolution % stride == 0,
            f"--resolution {self.resolution} is not a multiple of {stride}, the stride of {len(self.widths)} --widths",
        )
        require(self.l1 + self.l2 > 0, "--l1 0 --l2 0 leave nothing that compares pixels: give one of them a weight")
        require(
            (self.perceptual > 0) == (self.perceptual_weights is not None),
            "--perceptual and --perceptual-weights go together: give a weight above 0 and the file, or leave out both",
        )

    @property
    def folder(self) -> Path:
        """The folder of checkpoint and log."""
        return Path(self.run or Path("exps") / Path(self.out).name)


def build(options: Options) -> AutoencoderKL:
    """The network before its first step, a function of the seed."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels, channels = len(options.widths), 1 if options.grey else 3
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=options.widths,
            layers_per_block=1,
            latent_channels=options.latent_channels,
            norm_num_groups=GROUPS,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            sample_size=options.resolution,
            scaling_factor=1.0,
        )


def read_images(options: Options) -> tuple[np.ndarray, str]:
    """All images, uint8 (N, R, R, C), and the fingerprint of their set. Raises UserError if they are too many."""
    from preprocessing.images import ImageFiles, cropped

    source = ImageFiles(options.images)
    count, shape = len(source.names), (options.resolution, options.resolution, 1 if options.grey else 3)
    require(options.batch_size <= count, f"--batch-size {options.batch_size}: {options.images} holds {count} images")
    require(
        count * math.prod(shape) <= LARGEST,
        f"{options.images} holds {count:,} images, more than {LARGEST >> 30} GiB of pixels; give fewer",
    )
    images = np.empty((count, *shape), np.uint8)
    for index in progress.bar(range(count), desc="reading", unit="image"):
        images[index] = cropped(source, index, options.resolution, options.grey)
    return images, source.fingerprint


class Training:
    """Network, optimiser and step of a run. `advance` takes one step; `save` and `resume` carry the whole state.

    Args:
        images: uint8 (N, R, R, C).
        perceptual: the distance of features, if it has a weight.
    """

    def __init__(
        self, options: Options, images: np.ndarray, perceptual: Perceptual | None, device: torch.device
    ) -> None:
        import torch

        self.options, self.step, self._images, self._device = options, 0, images, device
        self.vae = torch.nn.Module.to(build(options), device)
        self._perceptual = perceptual
        self._names = dict(self.vae.named_parameters())
        self._optimizer = torch.optim.AdamW(
            self._names.values(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )

    def learning_rate(self) -> float:
        """Of the present step: a linear rise over the first steps, then a cosine to 0."""
        share = self.step / self.options.steps
        return self.options.learning_rate * min(1, (self.step + 1) / WARMUP) * (1 + math.cos(math.pi * share)) / 2

    def advance(self) -> dict[str, Tensor]:
        """One step; returns its losses, detached."""
        import torch

        from dataset import order
        from models.pixels import to_signed
        from runtime.streams import Stream

        options = self.options
        chosen = order(options.seed, self.step, options.batch_size, len(self._images))
        images = to_signed(torch.from_numpy(self._images[chosen]).to(self._device))
        posterior = self.vae.encode(images).latent_dist
        noise = Stream(options.seed, "vae/noise", self.step).normal(posterior.mean.shape, self._device)
        restored = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = restored - images
        terms = {
            "l1": (options.l1, error.abs().mean()),
            "l2": (options.l2, error.square().mean()),
            "kl": (options.kl, posterior.kl().mean() / posterior.mean[0].numel()),
        }
        if self._perceptual is not None:
            terms["perceptual"] = (options.perceptual, self._perceptual(restored, images))
        loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
        self._optimizer.param_groups[0]["lr"] = self.learning_rate()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._names.values(), 1.0)
        self._optimizer.step()
        self.step += 1
        return {"loss": loss.detach(), **{name: value.detach() for name, (_, value) in terms.items()}}

    def save(self, path: Path) -> None:
        """Write the whole state, atomically."""
        import torch

        state = {f"network.{name}": value for name, value in self.vae.state_dict().items()}
        for name, parameter in self._names.items():
            state |= {f"{key}.{name}": value for key, value in self._optimizer.state[parameter].items()}
        files.save_tensors(path, {**state, "taken": torch.tensor(self.step)})

    def resume(self, path: Path) -> None:
        """Continue from a file that `save` wrote. Raises UserError if it is damaged."""
        tensors = files.load_tensors(path)
        own = {f"network.{name}" for name in self.vae.state_dict()}
        own |= {f"{key}.{name}" for name in self._names for key in ("step", "exp_avg", "exp_avg_sq")}
        require(
            tensors.keys() == own | {"taken"}, f"{path} is of another network; delete its folder, or choose another"
        )
        self.vae.load_state_dict({name: tensors[f"network.{name}"] for name in self.vae.state_dict()})
        for name, parameter in self._names.items():
            self._optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"] if key == "step" else tensors[f"{key}.{name}"].to(self._device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step = int(tensors["taken"])


def statistics(vae: AutoencoderKL, images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over draws from the posteriors of images (N, R, R, C)."""
    import torch

    from models.pixels import to_signed
    from preprocessing.quality import spread

    chosen = images[spread(len(images), MEASURED)]
    device = next(vae.parameters()).device
    with torch.no_grad():
        posteriors = [
            vae.encode(to_signed(torch.from_numpy(part).to(device))).latent_dist
            for part in np.array_split(chosen, math.ceil(len(chosen) / 64))
        ]
    means = torch.cat([posterior.mean for posterior in posteriors]).double()
    variances = torch.cat([posterior.var for posterior in posteriors]).double()
    # the variance of a draw is that of the means and that of the noise around them
    variance = means.var((0, 2, 3), correction=0) + variances.mean((0, 2, 3))
    return means.mean((0, 2, 3)).tolist(), variance.sqrt().tolist()


def run(training: Training, folder: Path) -> None:
    """The steps that are left, with log and checkpoints.

    Raises EndedEarly after a signal, with everything saved.
    """
    import torch

    options, log = training.options, folder / LOG
    jsonlines.cut(log, training.step)
    losses: list[dict[str, Tensor]] = []
    since = time.perf_counter()
    with (
        signals.noted() as asked,
        progress.bar(total=options.steps, initial=training.step, desc=folder.name, unit="step") as bar,
    ):
        while training.step < options.steps:
            losses.append(training.advance())
            bar.update()
            if training.step % options.log_steps == 0 or training.step == options.steps:
                means = {f"loss/{key}": float(torch.stack([x[key] for x in losses]).mean()) for key in losses[0]}
                rate = len(losses) * options.batch_size / (time.perf_counter() - since)
                jsonlines.append(log, training.step, {**means, "images_per_second": rate})
                losses, since = [], time.perf_counter()
            if training.step % options.save_steps == 0 or training.step == options.steps or asked.by:
                training.save(folder / CHECKPOINT)
            asked.answered = asked.by is not None
            asked.end()


def write(training: Training, images: np.ndarray, about: dict[str, Any]) -> None:
    """Write the finished autoencoder into --out, atomically."""
    vae = training.vae.eval()
    mean, std = statistics(vae, images)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    # a path of this machine, which diffusers adds to a network that it opened
    vae.register_to_config(_name_or_path="")
    with files.replacing(Path(training.options.out), _is_autoencoder) as temporary:
        vae.save_pretrained(temporary)
        files.write_json(temporary / TRAINING, about)


def _is_autoencoder(folder: Path) -> bool:
    return (folder / TRAINING).is_file()


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or continue."""
    options = read(Options, argv, prog="python -m preprocessing.train_vae", description=__doc__)
    import torch

    from models.checkpoint import versions
    from models.mobilenet import Perceptual
    from runtime.launch import commit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files.require_replaceable(options.out, _is_autoencoder)
    perceptual = None
    if options.perceptual_weights is not None:
        perceptual = Perceptual(options.perceptual_weights).to(device)
    with locks.locked(options.folder, "wait for it, or choose another --run"):
        images, fingerprint = read_images(options)
        settings = {key: value for key, value in as_dict(options).items() if key not in FREE}
        settings = json.loads(json.dumps({**settings, "images": fingerprint}))
        training = Training(options, images, perceptual, device)
        if (options.folder / CHECKPOINT).exists():
            earlier = files.read_json(options.folder / SETTINGS)
            changed = next((key for key in settings if earlier.get(key) != settings[key]), None)
            require(
                changed is None,
                f"{options.folder} holds a run with another {changed}; choose another --run, or delete the folder",
            )
            training.resume(options.folder / CHECKPOINT)
            written = Path(options.out) / TRAINING
            if training.step == options.steps and written.exists() and files.read_json(written)["settings"] == settings:
                print(f"{options.out} is finished already")
                return
            print(f"continuing {options.folder} after step {training.step}")
        files.write_json(options.folder / SETTINGS, settings)
        about = {
            "settings": settings,
            "images": Path(options.images).name,
            "count": len(images),
            "parameters": sum(parameter.numel() for parameter in training.vae.parameters()),
            "commit": commit(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "device": device.type,
        }
        run(training, options.folder)
        write(training, images, about)
    print(f"{options.out}: autoencoder of {about['parameters']:,} parameters after {training.step} steps")


if __name__ == "__main__":
    errors.run(main)
