"""Latent spaces: what a network sees, how it is normalised, and the VAE behind it.

A latent set stores raw latents; a network sees x = (raw - shift) * scale, channel by channel. `open_codec` opens the
VAE of a space: any diffusers `AutoencoderKL` (SD-VAE ft-mse and ft-ema, VA-VAE f16d32 after `python -m models.convert`),
or the identity for images that are trained on directly.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

import files
from errors import UserError
from models.archives import read_archive, tensors_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """A latent space; latent sets and checkpoints store it as JSON.

    `shift` and `scale` have one value, or one for each channel: x = (raw - shift) * scale.
    """

    name: str  # "pixels", "sd-vae", "va-vae", or the last part of the VAE's name
    channels: int
    stride: int  # pixels along one side of a latent element
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    vae: str | None = None  # hub id or folder
    digest: str | None = None  # SHA-256 of the encoder's weights: decoders tuned on one encoder share its space

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            values = getattr(self, name)
            if len(values) not in (1, self.channels) or not all(map(math.isfinite, values)):
                raise UserError(f"latent space {self.name}: {name} needs 1 or {self.channels} finite numbers, not {values}")
        if not all(self.scale):
            raise UserError(f"latent space {self.name}: a scale of 0 leaves nothing of a channel")

    def normalise(self, raw: Tensor) -> Tensor:
        """(N, C, H, W) raw latents -> what the network sees."""
        return (raw - _channelwise(self.shift, raw.dtype, raw.device)) * _channelwise(self.scale, raw.dtype, raw.device)

    def denormalise(self, x: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return x / _channelwise(self.scale, x.dtype, x.device) + _channelwise(self.shift, x.dtype, x.device)

    def difference(self, other: LatentSpace) -> str | None:
        """Why a network of this space cannot read latents of `other`, in a few words; None where it can."""
        for name in ("channels", "stride"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} {getattr(self, name)} against {getattr(other, name)}"
        for name in ("shift", "scale"):
            here, there = ((values * self.channels if len(values) == 1 else values)
                           for values in (getattr(self, name), getattr(other, name)))
            if not all(map(functools.partial(math.isclose, rel_tol=1e-5), here, there)):
                return f"{name} {getattr(self, name)[0]:g}... against {getattr(other, name)[0]:g}..."
        if None not in (self.digest, other.digest) and self.digest != other.digest:
            return f"the encoder of {self.vae} against that of {other.vae}"
        return None

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "shift": list(self.shift), "scale": list(self.scale)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LatentSpace:
        """Raises UserError where a field is missing or unknown."""
        known = {field.name for field in dataclasses.fields(cls)}
        wrong = sorted((known - {"vae", "digest"} - set(value)) | (set(value) - known))
        if wrong:
            raise UserError(f"the latent space's description is damaged or from another version: {', '.join(wrong)}")
        return cls(**{**value, "shift": tuple(value["shift"]), "scale": tuple(value["scale"])})


@functools.lru_cache(maxsize=16)
def _channelwise(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(C, 1, 1) constants, made once: a copy to the device in every step would make the host wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


class Codec(Protocol):
    """Images (N, C, R, R) in [-1, 1] to latents and back."""

    space: LatentSpace

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (N, C, H, W) of the raw latents, float32."""

    def decode(self, x: Tensor) -> Tensor:
        """Images in [-1, 1], not clamped, float32, of normalised latents (N, C, H, W)."""


def pixels(channels: int, shift: Sequence[float] = (0.0,), scale: Sequence[float] = (1.0,)) -> LatentSpace:
    """The space of images themselves, in [-1, 1] before shift and scale."""
    return LatentSpace(name="pixels", channels=channels, stride=1, shift=tuple(shift), scale=tuple(scale))


class PixelCodec:
    """The identity: an image is its own latent, known without spread."""

    def __init__(self, space: LatentSpace) -> None:
        self.space = space

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.float(), torch.zeros_like(images, dtype=torch.float32)

    def decode(self, x: Tensor) -> Tensor:
        return self.space.denormalise(x.float())


class VaeCodec:
    """A diffusers `AutoencoderKL`, frozen; its latents are the unnormalised ones."""

    def __init__(self, vae: AutoencoderKL, space: LatentSpace, device: torch.device | str, dtype: torch.dtype) -> None:
        self.space = space
        nn.Module.to(vae, device=device, dtype=dtype)  # diffusers' own `to` warns at every call
        self._vae = vae.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self._vae.encode(images.to(self._vae.device, self._vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        raw = self.space.denormalise(x.float()).to(self._vae.device, self._vae.dtype)
        return self._vae.decode(raw, return_dict=False)[0].float()


def open_codec(vae: str | None, *, space: LatentSpace | None = None, statistics: Path | str | None = None,
               device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Codec:
    """Open a VAE.

    Args:
        vae: hub id or folder of a diffusers `AutoencoderKL`; "pixels" for the identity; None for the VAE of `space`.
        space: the space of existing latents, which the VAE must fit. Without it the VAE's config gives shift and scale.
        statistics: file of per-channel statistics (`read_statistics`) to use instead of the config's.
        device, dtype: of the VAE; images and latents leave it in float32.

    Raises:
        UserError: the VAE is not there, damaged, or not the one that `space` came from.
    """
    if space is not None and statistics is not None:
        raise ValueError("a space has its own statistics")
    if vae is None:
        vae = space.vae if space is not None and space.vae else "pixels"
    if vae == "pixels":
        if space is not None and space.name != "pixels":
            raise UserError(f"latents of {space.name} need their VAE: pass its hub id or folder with --vae")
        return PixelCodec(space or pixels(3))
    model = _load(vae)
    found = _space_of(vae, model, statistics)
    if space is not None:
        same = found.channels == space.channels
        encoder = dataclasses.replace(found, shift=space.shift, scale=space.scale) if same else found
        if difference := space.difference(encoder):
            raise UserError(f"VAE {vae} does not fit these latents ({difference}); pass the one they were made with")
    return VaeCodec(model, space or found, device, dtype)


def _load(vae: str) -> AutoencoderKL:
    """The VAE in float32, complete and verified."""
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    folder = _folder(vae)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"VAE {vae}: {folder / name} is missing; give a folder that diffusers' save_pretrained wrote")
    if (kind := files.read_json(folder / "config.json").get("_class_name")) != "AutoencoderKL":
        raise UserError(f"VAE {vae} is a {kind}; only AutoencoderKL is supported")
    files.load_tensors(folder / WEIGHTS)  # a damaged file is named here
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True,
                                                    ignore_mismatched_sizes=True, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    # diffusers fills a missing tensor with random numbers and drops an unknown one, with no more than a warning
    faults = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if faults:
        raise UserError(f"VAE {vae}: {folder / WEIGHTS} does not fit config.json ({', '.join(map(str, faults[:3]))})")
    return model


def _folder(vae: str) -> Path:
    """The local folder of a VAE: as given, or from the hub's cache, or downloaded there."""
    if Path(vae).is_dir() or vae.count("/") != 1 or vae.startswith((".", "/", "~")):
        return Path(vae).expanduser()
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for name in ("config.json", WEIGHTS):
        if isinstance(path := try_to_load_from_cache(vae, name), str):
            continue
        try:
            path = hf_hub_download(vae, name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"VAE {vae} is no folder, and its {name} is neither in the hub's cache nor can it be downloaded "
                            f"({reason}); where there is a network, run: hf download {vae}") from error
    return Path(path).parent


def _space_of(vae: str, model: AutoencoderKL, statistics: Path | str | None) -> LatentSpace:
    """The space that a VAE's config describes: diffusers decodes x * latents_std / scaling_factor + latents_mean."""
    config = model.config
    if statistics is not None:
        shift, scale = read_statistics(statistics)
    elif config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shift = tuple(config.latents_mean)
        scale = tuple(config.scaling_factor / std for std in config.latents_std)
    else:
        shift, scale = (float(config.get("shift_factor") or 0.0),), (float(config.scaling_factor),)
    name = Path(vae).name
    for family in ("sd-vae", "va-vae"):
        if name.lower().replace("vavae", "va-vae").startswith(family):
            name = family
    return LatentSpace(name=name, channels=config.latent_channels, stride=2 ** (len(config.block_out_channels) - 1),
                       shift=shift, scale=scale, vae=vae, digest=_encoder_digest(model))


def _encoder_digest(model: AutoencoderKL) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            state.update(name.encode())
            state.update(tensor.float().contiguous().numpy())
    return state.hexdigest()


def read_statistics(path: Path | str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(shift, scale) by channel from LightningDiT's `latents_stats.pt` (mean, std) or REPA-E's (latents_bias,
    latents_scale = 1/std); read without running code from the file. Safetensors files of the same names do too.

    Raises:
        UserError: no such file, or it holds neither pair.
    """
    tensors = tensors_of(read_archive(path))
    if {"mean", "std"} <= tensors.keys():
        shift, scale = tensors["mean"], 1 / tensors["std"].double()
    elif {"latents_bias", "latents_scale"} <= tensors.keys():
        shift, scale = tensors["latents_bias"], tensors["latents_scale"]
    else:
        raise UserError(f"{path} holds neither mean and std nor latents_bias and latents_scale, but {', '.join(tensors)}")
    return tuple(shift.double().flatten().tolist()), tuple(scale.double().flatten().tolist())


def to_uint8(images: Tensor, rule: str = "round") -> Tensor:
    """Images (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), clamped.

    `round` is SiT's and LightningDiT's floor(127.5 x + 128); `truncate` is REPA's floor(127.5 x + 127.5), half a level
    darker.
    """
    offset = {"round": 128.0, "truncate": 127.5}[rule]
    return (127.5 * images.float() + offset).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
