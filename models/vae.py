"""VAEs: from the name of a VAE to the codec that encodes and decodes with it.

`open_codec` opens the VAE of a latent space: any diffusers `AutoencoderKL` (SD-VAE ft-mse and ft-ema, VA-VAE f16d32
after `python -m models.convert`), or the identity for training on the images themselves.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from models.archives import digest, read_weights
from models.hub_client import reached
from models.latents import Codec, LatentSpace
from models.pixels import PIXELS, PixelCodec, is_pixels, pixels
from runtime import files, schema
from runtime.errors import UserError, require
from runtime.schema import Field

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Pixels decoded at once: the widest tensor of SD-VAE's decoder takes 1 KiB per pixel, 2 GiB in all.
CHUNK = 32 * 256**2


class Config(TypedDict):
    """The fields that are read of a diffusers `AutoencoderKL`'s config.json."""

    in_channels: Literal[1, 3]
    out_channels: Literal[1, 3]
    latent_channels: Annotated[int, Field(ge=1)]
    block_out_channels: list[int]
    norm_num_groups: Annotated[int, Field(ge=1)]
    scaling_factor: Annotated[float, Field(gt=0)]
    shift_factor: NotRequired[float | None]
    latents_mean: NotRequired[list[float] | None]
    latents_std: NotRequired[list[float] | None]


class VaeCodec:
    """A frozen diffusers `AutoencoderKL`; its latents are raw, not normalised.

    With `compile` the decoder is compiled for one shape, to which chunks are padded.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        space: LatentSpace,
        device: torch.device | str,
        dtype: torch.dtype,
        compile: bool = False,
    ) -> None:
        self.space = space
        self.image_channels: int = vae.config["in_channels"]
        nn.Module.to(vae, device=device, dtype=dtype)  # diffusers' own `to` warns at every call
        if torch.device(device).type == "cuda":
            nn.Module.to(vae, memory_format=torch.channels_last)  # the layout of its fast convolutions
        self._vae = vae.eval().requires_grad_(False)
        self._pad = compile
        if compile:
            self._vae.decoder.compile(dynamic=False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self._vae.encode(images.to(self._vae.device, self._vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        raw = self.space.denormalise(x.float()).to(self._vae.device, self._vae.dtype)
        images = max(1, CHUNK // (x.shape[-1] * x.shape[-2] * self.space.stride**2))
        if self._pad and (missing := -len(raw) % images):
            raw = torch.cat([raw, raw[-1:].expand(missing, -1, -1, -1)])
        return torch.cat([self._vae.decode(part, return_dict=False)[0].float() for part in raw.split(images)])[: len(x)]


def open_codec(
    vae: str | None,
    *,
    space: LatentSpace | None = None,
    statistics: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    otherwise: str = "",
) -> Codec:
    """Open a VAE.

    Args:
        vae: hub id or folder of a diffusers `AutoencoderKL`; "pixels" for the identity; None for the VAE of `space`.
        space: the space of existing latents, which the VAE must fit. Without it, shift and scale come from the VAE's
            config.
        statistics: file of per-channel statistics (`read_statistics`) to use instead of the config's; `space` has its
            own.
        device, dtype: of the VAE; images and latents leave it in float32.
        compile: whether to compile the decoder of a VAE.
        otherwise: what the caller can do without a VAE, for the message if it is missing.

    Raises:
        UserError: the VAE is missing, damaged, or not the one that `space` came from.
    """
    if vae is None:
        vae = space.vae if space is not None and space.vae else PIXELS
    if vae == PIXELS:
        space = space or pixels(3)
        require(is_pixels(space), f"latents of {space.name} need their VAE: pass its hub id or folder with --vae")
        return PixelCodec(space)
    model = _load(vae, otherwise)
    recorded = _space_of(vae, model, statistics)
    if space is not None:
        same = recorded.channels == space.channels
        # shift and scale belong to the set (they may be measured on it), so only the encoder is compared
        encoder = dataclasses.replace(recorded, shift=space.shift, scale=space.scale) if same else recorded
        difference = space.difference(encoder)
        require(
            difference is None,
            f"VAE {vae} does not fit these latents ({difference}); pass the VAE that they were made with",
        )
    return VaeCodec(model, space or recorded, device, dtype, compile)


def _load(vae: str, otherwise: str = "") -> AutoencoderKL:
    """The VAE in float32, complete and checked."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.utils import logging

    folder = _folder(vae, otherwise)
    for name in ("config.json", WEIGHTS):
        require(
            (folder / name).is_file(),
            f"VAE {vae}: {folder / name} is missing; give a folder that diffusers' save_pretrained wrote",
        )
    config = files.read_json(folder / "config.json")
    kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    require(kind == "AutoencoderKL", f"VAE {vae} is a {kind}; give an AutoencoderKL")
    files.load_tensors(folder / WEIGHTS)  # names a damaged file, which diffusers would not
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # low_cpu_mem_usage=False: with it, older releases raise if a tensor is missing, without naming the file
        model, info = AutoencoderKL.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        OSError,
        ZeroDivisionError,
        RuntimeError,
        OverflowError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"VAE {vae}: diffusers cannot build the autoencoder of {folder / 'config.json'} ({reason}); restore it"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    # diffusers fills a missing tensor with random numbers and drops an unknown one, with only a warning
    misfits = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    require(not misfits, f"VAE {vae}: {folder / WEIGHTS} does not fit config.json ({', '.join(map(str, misfits[:3]))})")
    return model


def _folder(vae: str, otherwise: str = "") -> Path:
    """The local folder of a VAE: as given, or from the hub's cache, or downloaded there."""
    if Path(vae).is_dir() or vae.count("/") != 1 or vae.startswith((".", "/", "~")):
        return Path(vae).expanduser()
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for name in ("config.json", WEIGHTS):
        # the cache first, because a download asks the hub even for a cached file; for a file that the hub once did not
        # have, the cache gives a marker, which is neither a path nor None
        cached = try_to_load_from_cache(vae, name)
        if isinstance(cached, str):
            path = cached
            continue
        with reached() as unreached:
            try:
                path = hf_hub_download(vae, name)
            except (OSError, ValueError) as error:
                reason = unreached or str(error).strip().split("\n")[0]
                raise UserError(
                    f"VAE {vae} is not a folder, and its {name} is neither in the hub's cache nor can it be downloaded "
                    f"({reason}); on a machine with a network, run: hf download {vae} --local-dir FOLDER, and give "
                    f"that folder{otherwise}"
                ) from error
    return Path(path).parent


def _space_of(vae: str, model: AutoencoderKL, statistics: Path | str | None) -> LatentSpace:
    """The space that a VAE's config describes: diffusers decodes x * latents_std / scaling_factor + latents_mean."""
    config = schema.checked(Config, json.loads(model.to_json_string()), f"VAE {vae}: its config.json")
    if statistics is not None:
        shift, scale = read_statistics(statistics)
    elif (mean := config.get("latents_mean")) is not None and (std := config.get("latents_std")) is not None:
        require(all(std), f"VAE {vae}: its config.json has a latents_std of 0")
        shift, scale = tuple(mean), tuple(config["scaling_factor"] / value for value in std)
    else:
        shift, scale = (config.get("shift_factor") or 0.0,), (config["scaling_factor"],)
    # a familiar prefix names the space, so that latents of one family are recognised under any folder name
    name = Path(vae).name
    prefix = name.lower().replace("vavae", "va-vae")[: len("sd-vae")]
    encoder = {
        key: value.float() for key, value in model.state_dict().items() if key.startswith(("encoder.", "quant_conv."))
    }
    return LatentSpace(
        name=prefix if prefix in ("sd-vae", "va-vae") else name,
        channels=config["latent_channels"],
        stride=2 ** (len(config["block_out_channels"]) - 1),
        shift=shift,
        scale=scale,
        vae=vae,
        digest=digest(encoder),
    )


def read_statistics(path: Path | str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(shift, scale) by channel from a file of latent statistics, read without running code from it.

    The file has the names of LightningDiT's `latents_stats.pt` (mean, std) or REPA-E's (latents_bias, latents_scale =
    1/std), as .pt or safetensors.

    Raises:
        UserError: no such file, or it holds neither pair.
    """
    tensors = read_weights(path)
    if {"mean", "std"} <= tensors.keys():
        shift, scale = tensors["mean"], 1 / tensors["std"].double()
    elif {"latents_bias", "latents_scale"} <= tensors.keys():
        shift, scale = tensors["latents_bias"], tensors["latents_scale"]
    else:
        raise UserError(
            f"{path} holds neither mean and std nor latents_bias and latents_scale, but {', '.join(tensors)}"
        )
    return tuple(shift.double().flatten().tolist()), tuple(scale.double().flatten().tolist())
