"""Published weights -> a checkpoint that everything here reads.

    python -m models.convert 0400000.pt --out checkpoints/repa-xl
    python -m models.convert lightningdit-xl.pt --out checkpoints/lightningdit-xl --statistics latents_stats.pt
    python -m models.convert vavae-imagenet256-f16d32-dinov2.pt --out vaes/va-vae --statistics latents_stats.pt

The keys show the layout (`layouts`): SiT, REPA (legacy names too), SRA, Dispersive Loss, LayerSync, both stages of
Self-Transcendence's authors, Self-Flow, LightningDiT, Internal Guidance on SiT or LightningDiT, and VA-VAE, which
becomes a diffusers folder. No code in the file is run. Tensors that sampling does not need are left out and listed;
any other tensor that does not fit is refused. (DiT's own files have SiT's keys but predict noise at t in 0..999. Their
keys do not show this, so do not give them to this command.)

Internal Guidance's second final layer becomes a velocity head, and `generate.py --internal-scale` guides with it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
from models import checkpoint
from models.latents import LatentSpace
from models.pixels import PIXELS, pixels
from runtime import errors, files
from runtime.errors import UserError, require
from runtime.options import option, read
from runtime.text import quoted

if TYPE_CHECKING:
    from torch import Tensor

    from models import ModelSpec
    from models.layouts import Converted


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `python -m models.convert SRC`."""

    source: str = option(
        help="published weight file: .pt, .pth, .ckpt or .safetensors (may be given as first word)", heading="files"
    )
    out: str = option(help="checkpoint folder to write (a diffusers folder for a VAE)")
    overwrite: bool = option(
        False, help="replace any checkpoint or VAE at --out, not only those that this command wrote"
    )
    num_heads: int | None = option(
        None, within="[1, inf)", help="attention heads, if the size is not a published one", heading="network"
    )
    noise_at: str | None = option(
        None,
        choices=("0", "1"),
        help="time at which the file's network sees noise, if its keys do not show its family (SiT, LightningDiT: 0; "
        "REPA and its descendants: 1)",
    )
    internal_block: int | None = option(
        None, help="block that Internal Guidance's second final layer reads (default: 8, its authors' block)"
    )
    vae: str | None = option(
        None,
        help="VAE of its latents: hub id, folder or pixels (default for 4 channels: SD-VAE)",
        heading="latent space",
    )
    statistics: str | None = option(None, help="file of per-channel latent statistics (LightningDiT's, REPA-E's)")


SD_VAE = LatentSpace(
    name="sd-vae", channels=4, stride=8, shift=(0.0,), scale=(0.18215,), vae="stabilityai/sd-vae-ft-ema"
)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; returns the folder written."""
    options = read(
        Options,
        argv,
        prog="python -m models.convert",
        description=__doc__,
        first="source",
    )
    from models import layouts, vavae
    from models.archives import read_archive

    source = Path(options.source)
    ours = functools.partial(checkpoint.is_converted, any_origin=options.overwrite)
    files.require_replaceable(
        options.out, ours, "choose another place, or add --overwrite to replace a checkpoint or VAE"
    )
    # a file may hold several sets of weights (raw, EMA) beside what nothing here reads
    archive = read_archive(source)
    sets, ignored = weight_sets(archive, source)
    for weights in sets.values():
        models.require_finite(weights, source)
    # the digest ties the checkpoint to the published file
    origin: dict[str, Any] = {"file": source.name, "digest": files.digest(source)}
    if vavae.recognises(next(iter(sets.values()))):
        return convert_vae(sets, ignored, origin, options)
    converted = {
        name: layouts.convert_network(
            weights,
            options.source,
            num_heads=options.num_heads,
            noise_at=None if options.noise_at is None else int(options.noise_at),
            internal_block=options.internal_block,
        )
        for name, weights in sets.items()
    }
    first = next(iter(converted.values()))
    space = latent_space(first.spec, options)
    ignored += first.ignored
    checkpoint.write(
        options.out,
        spec=first.spec,
        space=space,
        step=step_of(archive, source),
        network=converted["model"].weights if "model" in converted else {},
        ema=converted["ema"].weights,
        source={**origin, "layout": first.layout, "ignored": ignored, "has_null": first.has_null},
        ours=ours,
        **velocity_head(converted),
    )
    print(f"{source.name}: {layouts.describe(first)}")
    return _done(options.out, ignored)


def velocity_head(converted: Mapping[str, Converted]) -> dict[str, Any]:
    """A second final layer as arguments of `checkpoint.write`: its description, its average, and its raw weights."""
    first = next(iter(converted.values()))
    if first.velocity_head is None:
        return {}
    raw = converted["model"].head if "model" in converted else {}
    return {
        "velocity_heads": {"internal": dataclasses.asdict(first.velocity_head)},
        "averages": {"internal-head-ema": first.head},
        "heads": {f"internal.head.{name}": value for name, value in raw.items()},
    }


def _done(out: str, ignored: list[str]) -> Path:
    print(f"ignored: {', '.join(ignored) or 'nothing'}")
    print(f"written: {quoted(out)}")
    return Path(out)


def weight_sets(archive: Any, source: Path) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The state dicts in an archive ("ema", and "model" if both were saved), and the names of everything else in it.

    A single state dict is assumed to be the averaged weights, which are what authors publish.
    """
    from models.archives import tensors_of

    if flat := tensors_of(archive):
        return {"ema": _unwrapped(flat)}, []
    require(isinstance(archive, Mapping), f"{source} holds a {type(archive).__name__}, not weights by name")
    state_dicts = {
        name: _unwrapped(tensors)
        for name in ("ema", "model", "state_dict")
        if (tensors := tensors_of(archive.get(name)))
    }
    require(
        bool(state_dicts),
        f"{source} holds no weights: expected tensors by name, or ema, model or state_dict; its entries are "
        f"{', '.join(map(str, list(archive)[:5])) or 'none'}",
    )
    # without an average, the first set takes its place; raw weights are written only beside an average
    first = next(iter(state_dicts))
    used = {first, "model"} if first == "ema" else {first}
    sets = {"ema" if name == first else name: weights for name, weights in state_dicts.items() if name in used}
    return sets, [str(name) for name in archive if name not in used]


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without the prefixes that DDP and torch.compile add to names."""
    return {re.sub(r"\b(module|_orig_mod)\.", "", name): value for name, value in weights.items()}


def step_of(archive: Any, source: Path) -> int:
    """The optimiser step: the saved one, else a file name that is a number, else 0."""
    if isinstance(archive, Mapping) and isinstance(archive.get("steps"), int):
        return archive["steps"]
    return int(source.stem) if source.stem.isdigit() else 0


def latent_space(spec: ModelSpec, options: Options) -> LatentSpace:
    """The space in which a network was trained: from --vae or --statistics, else SD-VAE for a SiT of four channels.

    Raises:
        UserError: the space is unknown, or has other channels than the network.
    """
    from models.vae import open_codec, read_statistics

    if options.vae == PIXELS:
        require(
            options.statistics is None,
            "--statistics scales the latents of an autoencoder; --vae pixels has none: leave it out",
        )
        space = pixels(spec.in_channels)
    elif options.vae is not None:
        space = open_codec(options.vae, statistics=options.statistics).space
    elif options.statistics is not None:
        shift, scale = read_statistics(options.statistics)
        space = LatentSpace(name="va-vae", channels=len(shift), stride=16, shift=shift, scale=scale)
    # every published SiT of four channels was trained on SD-VAE latents
    elif spec.architecture == "sit" and spec.in_channels == SD_VAE.channels:
        space = SD_VAE
    else:
        raise UserError(
            f"{options.source} works on latents of {spec.in_channels} channels, whose VAE and statistics are "
            "not in the weights: add --vae (the converted VA-VAE, pixels, ...) or --statistics latents_stats.pt"
        )
    require(
        space.channels == spec.in_channels,
        f"the network works on {spec.in_channels} channels, {options.vae or options.statistics} has {space.channels}",
    )
    return space


def convert_vae(
    sets: dict[str, dict[str, Tensor]], ignored: list[str], origin: dict[str, Any], options: Options
) -> Path:
    """VA-VAE's LDM layout -> a diffusers folder, with the latents' statistics in its config if they are given."""
    from models import vavae
    from models.vae import read_statistics

    inapplicable = (options.num_heads, options.noise_at, options.internal_block, options.vae)
    require(
        all(value is None for value in inapplicable),
        f"{options.source} is a VAE: of the options, only --out and --statistics apply to it",
    )
    statistics = read_statistics(options.statistics) if options.statistics else None
    model, left_out = vavae.build(sets["ema"], options.source, statistics)
    # without --overwrite, only an empty folder or one that this command wrote is replaced
    with files.replacing(
        options.out, functools.partial(checkpoint.is_converted, any_origin=options.overwrite)
    ) as folder:
        model.save_pretrained(folder)
        files.write_json(folder / "source.json", {**origin, "ignored": ignored + left_out})
    # every level of the encoder but the last halves the image
    stride = 2 ** (len(model.config["block_out_channels"]) - 1)
    print(
        f"{Path(options.source).name}: VA-VAE, {model.config['latent_channels']} channels, stride {stride}, "
        f"{'with' if statistics else 'without'} latent statistics"
    )
    return _done(options.out, ignored + left_out)


if __name__ == "__main__":
    errors.run(main)
