"""What to sample from: a checkpoint's network and the decoder of its latents, on this process's device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from models import Backbone, attention
from models.checkpoint import Checkpoint
from models.hub_client import PREFIX
from models.latents import Codec
from models.layers import cast_block_linears
from models.vae import open_codec
from runtime import launch
from runtime.errors import require
from runtime.options import as_dict
from sampling import internal, presets
from sampling.config import SamplingConfig, SourceOptions
from sampling.internal import Inner
from sampling.sampler import Sampler


@dataclass(frozen=True)
class Source:
    """A checkpoint, ready to be sampled from on this process."""

    options: SourceOptions
    accelerator: Accelerator
    checkpoint: Checkpoint
    network: Backbone
    codec: Codec
    dtype: torch.dtype | None
    precision: str
    # The VAE's name.
    decoder: str
    # The velocity of a shallow block, under internal guidance.
    inner: Inner | None = None

    @classmethod
    def open(cls, options: SourceOptions, sampling: SamplingConfig, preset: str | None = None) -> Source:
        """Load what `options` names, with the weights that `sampling` asks for and the decoder of `preset`, if any.

        Raises:
            UserError: a checkpoint or VAE that is missing or damaged, guidance for a network without a null class,
                internal guidance for one without a velocity head.
        """
        accelerator = launch.accelerator()
        device = accelerator.device
        checkpoint = Checkpoint.open(options.ckpt)
        require(
            checkpoint.has_null or sampling.cfg_scale == 1,
            f"{checkpoint.path} was trained without label dropout, so it has no null class to guide "
            f"with: use --cfg-scale 1",
        )
        dtype = launch.precision(options.mixed_precision, device)
        tf32, note = launch.tf32(options.tf32, dtype, device)
        if note:
            accelerator.print(note)
        network = checkpoint.network(sampling.weights).to(device)
        inner = internal.open_inner(checkpoint, sampling, device) if sampling.internal_scale != 1 else None
        compiling, _ = launch.compiles(options.compile, device)
        if compiling:
            launch.compile_network(network, [inner.head] if inner else [], options.compile, device)
        # Autocast would cast these weights at every call, to the same bits.
        cast_block_linears(network, dtype)
        if device.type == "cuda":
            accelerator.print(f"attention: {attention.choose(network, options.batch_size, dtype, backward=False)}")
        space = checkpoint.space
        vae = options.vae or presets.decoder(preset, space) or space.vae
        codec = open_codec(vae, space=space, device=device, compile=compiling)
        return cls(
            options,
            accelerator,
            checkpoint,
            network,
            codec,
            dtype,
            launch.precision_name(dtype, tf32),
            vae or space.name,
            inner,
        )

    def sampler(self, sampling: SamplingConfig, count: int, chosen: np.ndarray | None = None) -> Sampler:
        """A sampler of `count` images, of the labels `chosen` (count,) if they are given."""
        return Sampler(self.network, self.codec, sampling, count, self.dtype, chosen, self.inner)

    @property
    def folder(self) -> Path:
        """Where results go without --out: the run, the checkpoint folder, or exps/user--name for one from the hub."""
        if self.options.ckpt.startswith(PREFIX):
            return Path("exps") / self.options.ckpt.removeprefix(PREFIX).replace("/", "--")
        path = self.checkpoint.path
        return path.parent.parent if path.parent.name == "checkpoints" else path

    def introduction(self, sampling: SamplingConfig, count: int) -> str:
        """The samples to come, in one line: network, solver, guidance, decoder, precision."""
        s, each = sampling, sampling.evaluations
        solver = f"SDE, {s.num_steps} steps" if s.mode == "sde" else f"ODE by {s.solver}"
        guidance = (
            f"guidance {s.cfg_scale:g} for t in {s.guidance_low:g} to {s.guidance_high:g}"
            if s.cfg_scale != 1
            else "no guidance"
        )
        guidance += f", internal guidance {s.internal_scale:g} by {self.inner}" if self.inner else ""
        return (
            f"{count:,} samples of {self.checkpoint.name} ({self.checkpoint.spec.name}, {s.weights} weights): "
            f"{solver}, "
            f"{'an adaptive number of' if each is None else each} network evaluations each, {guidance}, seed {s.seed}, "
            f"decoder {self.decoder}, {self.precision}"
        )

    def settings(self, sampling: SamplingConfig, count: int) -> dict[str, Any]:
        """All that `count` samples depend on, as JSON values: the checkpoint and its VAE by digest."""
        # An adaptive solver chooses its steps for a whole batch.
        batch = {"batch_size": self.options.batch_size} if sampling.adaptive else {}
        return {
            **as_dict(sampling),
            "num_fid_samples": count,
            "mixed_precision": self.options.mixed_precision,
            "evaluations": sampling.evaluations,
            "precision": self.precision,
            **batch,
            "model": self.checkpoint.spec.name,
            "checkpoint": self.checkpoint.digest,
            "step": self.checkpoint.step,
            "space": self.checkpoint.space.to_json(),
            "decoder": self.decoder,
            **({"internal": self.inner.describe()} if self.inner else {}),
        }
