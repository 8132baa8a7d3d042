"""Published weights -> a checkpoint that everything here reads.

    python -m models.convert 0400000.pt --out checkpoints/repa-xl
    python -m models.convert lightningdit-xl.pt --out checkpoints/lightningdit-xl --statistics latents_stats.pt
    python -m models.convert vavae-imagenet256-f16d32-dinov2.pt --out vaes/va-vae --statistics latents_stats.pt

The layout is recognised by its keys: SiT, REPA (legacy names too), SRA, Dispersive Loss, LayerSync, both stages of
Self-Transcendence's authors, LightningDiT, and VA-VAE, which becomes a diffusers folder. Nothing in the file is run.
What a sampler has no use for is left out and named; whatever else does not fit is refused. (DiT's own files carry SiT's
keys but predict noise at t in 0..999: nothing in them tells, so do not give them to this command.)

Networks come out in this project's convention: t = 1 is noise and the velocity is noise - data. Where a file runs the
other way, the reversal is folded into its weights (`reverse_time`), so that no flag has to remember it.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from models import ModelSpec, checkpoint, vavae
from models.archives import read_archive, tensors_of
from models.latents import LatentSpace
from models.layers import TimeEmbedder
from models.pixels import PIXELS, pixels
from models.vae import open_codec, read_statistics
from runtime import errors, files
from runtime.errors import UserError, require
from runtime.options import option, read


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `python -m models.convert SRC`."""

    source: str = option(help="published weight file: .pt, .pth, .ckpt or .safetensors (may be given as first word)", heading="files")
    out: str = option(help="checkpoint folder to write (a diffusers folder for a VAE)")
    overwrite: bool = option(False, help="replace any checkpoint or VAE at --out, not only what this command wrote there")
    num_heads: int | None = option(None, help="attention heads, where the size is not a published one", heading="network")
    noise_at: int | None = option(None, choices=(0, 1), help="time at which the file's network sees noise, where its "
                                         "family is not known by its keys (SiT, LightningDiT: 0; REPA and what derives from it: 1)")
    vae: str | None = option(None, help="VAE of its latents: hub id, folder or pixels (default for 4 channels: SD-VAE)",
                                   heading="latent space")
    statistics: str | None = option(None, help="file of per-channel latent statistics (LightningDiT's, REPA-E's)")

    def __post_init__(self) -> None:
        require(self.num_heads is None or self.num_heads > 0, f"--num-heads {self.num_heads} must be at least 1")


SD_VAE = LatentSpace(name="sd-vae", channels=4, stride=8, shift=(0.0,), scale=(0.18215,), vae="stabilityai/sd-vae-ft-ema")

# What every layout of these networks has, with its number of dimensions.
ESSENTIAL = {"x_embedder.proj.weight": 4, "pos_embed": 3, "blocks.0.attn.qkv.weight": 2,
             "y_embedder.embedding_table.weight": 2, "final_layer.linear.weight": 2, "final_layer.linear.bias": 1,
             "t_embedder.mlp.0.weight": 2}

# Training heads that a network does not need, by prefix; the first key that is present names the family.
HEADS = {
    "projectors_final.": "Self-Transcendence, stage 1",
    "projectors.0.weight": "Self-Transcendence, stage 2",
    "projectors.": "REPA",
    "ap_head.": "SRA",
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; returns the folder written."""
    options = read(Options, sys.argv[1:] if argv is None else argv, prog="python -m models.convert", description=__doc__,
                   first="source")
    source = Path(options.source)
    ours = functools.partial(checkpoint.is_converted, insisted=options.overwrite)
    files.require_replaceable(options.out, ours, "choose another place, or add --overwrite to replace a checkpoint or VAE")
    archive = read_archive(source)
    sets, ignored = weight_sets(archive, source)
    for weights in sets.values():
        models.require_finite(weights, source)
    origin: dict[str, Any] = {"file": source.name, "digest": files.digest(source)}
    if vavae.recognises(next(iter(sets.values()))):
        return convert_vae(sets, ignored, origin, options)
    converted = {name: convert_network(weights, options) for name, weights in sets.items()}
    first = next(iter(converted.values()))
    space = latent_space(first.spec, options)
    ignored += first.ignored
    checkpoint.write(
        options.out, spec=first.spec, space=space, step=step_of(archive, source),
        network=converted["model"].weights if "model" in converted else {}, ema=converted["ema"].weights,
        source={**origin, "layout": first.layout, "ignored": ignored}, ours=ours)
    print(f"{source.name}: {describe(first)}")
    return _done(options.out, ignored)


def _done(out: str, ignored: list[str]) -> Path:
    print(f"ignored: {', '.join(ignored) or 'nothing'}")
    print(f"written: {out}")
    return Path(out)


def weight_sets(archive: Any, source: Path) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The state dicts in an archive ("ema", and "model" where both were saved), and the names of all else in it.

    A file that holds one state dict is taken for the averaged weights: that is what is published.
    """
    if flat := tensors_of(archive):
        return {"ema": _unwrapped(flat)}, []
    if not isinstance(archive, Mapping):
        raise UserError(f"{source} holds a {type(archive).__name__}, not weights by name")
    state_dicts = {name: _unwrapped(tensors) for name in ("ema", "model", "state_dict") if (tensors := tensors_of(archive.get(name)))}
    if not state_dicts:
        raise UserError(f"{source} holds no weights: expected tensors by name, or ema, model or state_dict; found "
                        f"{', '.join(map(str, list(archive)[:5])) or 'nothing'}")
    first = next(iter(state_dicts))
    used = {first, "model"} if first == "ema" else {first}
    sets = {"ema" if name == first else name: weights for name, weights in state_dicts.items() if name in used}
    return sets, [str(name) for name in archive if name not in used]


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP and torch.compile put into them."""
    return {re.sub(r"\b(module|_orig_mod)\.", "", name): value for name, value in weights.items()}


def step_of(archive: Any, source: Path) -> int:
    """The optimiser step: as saved, else the number that is the file's name, else 0."""
    if isinstance(archive, Mapping) and isinstance(archive.get("steps"), int):
        return archive["steps"]
    return int(source.stem) if source.stem.isdigit() else 0


@dataclass(frozen=True)
class Converted:
    """A network in this project's names and conventions."""

    spec: ModelSpec
    layout: str
    weights: dict[str, Tensor]
    ignored: list[str]


def convert_network(weights: Mapping[str, Tensor], options: Options) -> Converted:
    """Recognise a transformer's state dict and bring it into this project's form, strictly.

    Raises:
        UserError: an unknown layout, a number of heads that cannot be told, or tensors left over or missing.
    """
    weights = rename_legacy(weights)
    for name, dimensions in ESSENTIAL.items():
        if name not in weights or weights[name].ndim != dimensions:
            raise UserError(f"{options.source} is of no known layout (SiT, REPA and what derives from it, LightningDiT, VA-VAE): {name} "
                            f"with {dimensions} dimensions is not in it; its first keys are {', '.join(list(weights)[:3])}")
    spec = read_spec(weights, options)
    kept, left_out = {}, Counter()
    for name, value in weights.items():
        if head := next((prefix for prefix in HEADS if name.startswith(prefix)), None):
            left_out[head.split(".")[0]] += 1
        else:
            kept[name] = value.float()
    check_tables(kept, spec, options.source)
    channels = kept["final_layer.linear.weight"].shape[0] // spec.patch_size**2
    doubled = channels == 2 * spec.in_channels
    if doubled:  # DiT's unused second half: rows are (row, column, channel), channel fastest
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            kept[name] = kept[name][torch.arange(len(kept[name])) % channels < spec.in_channels]
    layout, noise_at = recognise(weights, spec, doubled)
    if options.noise_at is not None:
        noise_at = options.noise_at
    if noise_at == 0:
        reverse_time(kept)
    models.check_weights(models.outline(spec), kept)
    ignored = [f"{head}.* ({count} tensors)" for head, count in left_out.items()]
    return Converted(spec, f"{layout}, noise at t = {noise_at}", kept, ignored)


def rename_legacy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """REPA's first layout counts the blocks after the aligned one anew, as `decoder_blocks`."""
    before = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return {re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) + before}", name): value
            for name, value in weights.items()}


def read_spec(weights: Mapping[str, Tensor], options: Options) -> ModelSpec:
    """All that the shapes tell; the number of heads from --num-heads, QK-norms, or the published sizes."""
    hidden, in_channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = 1 + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name)))
    architecture = "lightningdit" if "blocks.0.mlp.w12.weight" in weights else "sit"
    sizes = models.SIZES[architecture]
    head_norm = weights.get("blocks.0.attn.q_norm.weight")
    published = {size[:2]: size[2] for size in sizes.values()}.get((depth, hidden))
    heads = options.num_heads or (published if head_norm is None else hidden // len(head_norm))
    if heads is None:
        raise UserError(f"{options.source}: {depth} blocks of width {hidden} are not a published size, and the number of heads is "
                        "not in the weights: add --num-heads")
    return ModelSpec(
        name=next((name for name, size in sizes.items() if size == (depth, hidden, heads, patch)), "custom"),
        architecture=architecture, depth=depth, hidden_size=hidden, num_heads=heads, patch_size=patch,
        in_channels=in_channels, input_size=math.isqrt(weights["pos_embed"].shape[1]) * patch,
        num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1, qk_norm=head_norm is not None)


def recognise(weights: Mapping[str, Tensor], spec: ModelSpec, doubled: bool) -> tuple[str, int]:
    """The family that a state dict comes from, and the time at which it sees noise."""
    if spec.architecture == "lightningdit":
        return "LightningDiT", 0
    if doubled:
        return "SiT, Dispersive Loss or LayerSync (doubled head)", 0
    for prefix, family in HEADS.items():
        if any(name.startswith(prefix) for name in weights):
            return family, 1
    return "REPA without projectors", 1


def check_tables(kept: dict[str, Tensor], spec: ModelSpec, source: str) -> None:
    """Take the fixed tables out of `kept`: they are recomputed, and must be the ones that were stored."""
    network = models.outline(spec)
    tables = {"pos_embed": network.pos_embed}
    if spec.architecture == "lightningdit":
        tables |= {"feat_rope.freqs_cos": network.rotary_cos, "feat_rope.freqs_sin": network.rotary_sin}
    for name, table in tables.items():
        stored = kept.pop(name, None)
        if stored is None or stored.shape != table.shape or not torch.allclose(stored, table, rtol=0, atol=5e-3):
            raise UserError(f"{source}: its {name} is not the fixed table of the published networks, so that its positions "
                            "would be misread; check --num-heads, or train such a network here")


def reverse_time(weights: dict[str, Tensor]) -> None:
    """Turn f(x, t) into -f(x, 1 - t), in place and exactly.

    cos(w(1-t)) = cos w cos wt + sin w sin wt and sin(w(1-t)) = sin w cos wt - cos w sin wt: a rotation of each pair of
    columns of the first time layer. The sign goes into the last layer.
    """
    w = TimeEmbedder(1).frequencies.double()
    cosines, sines = weights["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)
    turned = torch.cat([cosines * w.cos() + sines * w.sin(), cosines * w.sin() - sines * w.cos()], dim=1)
    weights["t_embedder.mlp.0.weight"] = turned.float()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = -weights[name]


def latent_space(spec: ModelSpec, options: Options) -> LatentSpace:
    """The space a network was trained in: --vae, --statistics, or SD-VAE where four channels leave no doubt.

    Raises:
        UserError: it cannot be told, or has other channels than the network.
    """
    if options.vae == PIXELS:
        require(options.statistics is None, "--statistics scales the latents of an autoencoder; --vae pixels has none: leave it out")
        space = pixels(spec.in_channels)
    elif options.vae is not None:
        space = open_codec(options.vae, statistics=options.statistics).space
    elif options.statistics is not None:
        shift, scale = read_statistics(options.statistics)
        space = LatentSpace(name="va-vae", channels=len(shift), stride=16, shift=shift, scale=scale)
    elif spec.architecture == "sit" and spec.in_channels == SD_VAE.channels:
        space = SD_VAE
    else:
        raise UserError(f"{options.source} works on latents of {spec.in_channels} channels, whose VAE and statistics are "
                        "not in the weights: add --vae (the converted VA-VAE, pixels, ...) or --statistics latents_stats.pt")
    if space.channels != spec.in_channels:
        raise UserError(f"the network works on {spec.in_channels} channels, {options.vae or options.statistics} has "
                        f"{space.channels}")
    return space


def describe(network: Converted) -> str:
    """One line on a converted network."""
    s = network.spec
    norm = ", QK-norm" if s.qk_norm else ""
    return (f"{s.name} from {network.layout}: {s.depth} blocks, width {s.hidden_size}, {s.num_heads} heads{norm}, patch "
            f"{s.patch_size}, latents {s.in_channels}x{s.input_size}x{s.input_size}, {s.num_classes} classes")


def convert_vae(sets: dict[str, dict[str, Tensor]], ignored: list[str], origin: dict[str, Any], options: Options) -> Path:
    """VA-VAE's LDM layout -> a diffusers folder, with the latents' statistics in its config where they are given."""
    if options.num_heads is not None or options.noise_at is not None or options.vae is not None:
        raise UserError(f"{options.source} is a VAE: of the options, only --out and --statistics apply to it")
    statistics = read_statistics(options.statistics) if options.statistics else None
    model, left_out = vavae.build(sets["ema"], options.source, statistics)
    with files.replacing(options.out, functools.partial(checkpoint.is_converted, insisted=options.overwrite)) as folder:
        model.save_pretrained(folder)
        files.write_json(folder / "source.json", {**origin, "ignored": ignored + left_out})
    print(f"{Path(options.source).name}: VA-VAE, {model.config.latent_channels} channels, stride "
          f"{2 ** (len(model.config.block_out_channels) - 1)}, {'with' if statistics else 'without'} latent statistics")
    return _done(options.out, ignored + left_out)


if __name__ == "__main__":
    errors.run(main)
