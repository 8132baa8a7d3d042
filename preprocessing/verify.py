"""Check a latent set for damage.

    python -m preprocessing.verify DIR [--vae ID|DIR] [--images DIR|ZIP]

Checks, in this order: the checksum of every shard; counts, types and label range; that every class has items; that
every latent is finite and no standard deviation is negative; the scale of the latents as a network sees them. Names the
first file or item that is wrong. If the autoencoder is on this machine, decodes a few items into a picture, beside the
kept images (or those of the source, --images) with their PSNR. Warns of faults that sound files can have: an
autoencoder that does not reconstruct, a scale that is far from 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.manifest import read_manifest, require_intact
from models.pixels import is_pixels
from preprocessing import quality
from preprocessing.images import ImageFiles, png
from runtime import errors, files, progress
from runtime.errors import UserError, require
from runtime.options import option, read

if TYPE_CHECKING:
    import torch

    from dataset import LatentSet

_STEP = 1024  # items in memory at a time
_SCALE = (0.1, 3.0)  # scaled latents have a standard deviation of about 1; SD-VAE's unscaled latents have 4 to 5


@dataclass(frozen=True, kw_only=True)
class Options:
    data_dir: str = option(help="the latent set; may be given first, without the flag", heading="latent set")
    vae: str | None = option(None, help="autoencoder to decode with (default: the set's own, if it is on this machine)")
    images: str | None = option(None, help="the images from which the set was made, if they were not kept")
    picture: str | None = option(
        None, help="file of the reconstructions (default: verify.png in the set)", heading="reconstructions"
    )
    num_images: int = option(8, within="[0, inf)", help="items to reconstruct; 0 reconstructs nothing")


def main(argv: Sequence[str] | None = None) -> None:
    """Verify a latent set."""
    options = read(
        Options,
        argv,
        prog="python -m preprocessing.verify",
        description=__doc__,
        first="data_dir",
    )
    from dataset import LatentSet

    check_digests(Path(options.data_dir))
    latents = LatentSet(options.data_dir)
    _line("items", f"{len(latents):,} in {len(latents.manifest['shards'])} shards, checksums agree")
    check_classes(latents)
    std = check_values(latents)
    warnings = [] if is_pixels(latents.space) else quality.of_scale(std)
    check_images(latents)
    if options.num_images:
        warnings += quality.of_reconstruction(reconstruct(latents, options))
    for warning in warnings:
        _line("warning", warning)
    _line(
        "result", f"the files are whole, but see the warning{'s' * (len(warnings) > 1)} above" if warnings else "sound"
    )


def _line(what: str, result: str) -> None:
    print(f"{what:<15} {result}", flush=True)


def check_digests(folder: Path) -> None:
    """Raise UserError at the first shard whose checksum is not the manifest's."""
    for entry in progress.bar(read_manifest(folder)["shards"], desc="checksums", unit="shard"):
        require_intact(folder, entry)


def check_classes(latents: LatentSet) -> None:
    """Raise UserError at the first class without items."""
    counts = np.bincount(latents.labels, minlength=latents.num_classes)
    fewest = int(np.argmin(counts))
    require(
        bool(counts.all()),
        f"class {fewest} ({latents.manifest['class_names'][fewest]}) of {latents.path} has no item; encode the set "
        f"again",
    )
    _line("classes", f"{latents.num_classes:,}, of {counts.min():,} to {counts.max():,} items")


def check_values(latents: LatentSet) -> float:
    """The standard deviation of the latents as a network sees them.

    Raises UserError at the first latent that is not finite or has a negative deviation, and if the scale is wrong.
    """
    import torch

    total = torch.zeros(latents.channels, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for begin, view, raw in _chunks(latents):
        wrong = ~torch.isfinite(raw).flatten(1).all(1)
        if latents.parts == 2:
            wrong |= (raw[:, 1] < 0).flatten(1).any(1)
        require(
            not wrong.any(),
            f"{latents.name(begin + int(wrong.int().argmax()))} of {latents.path}, view {view}, has latents "
            "that are not finite or a negative standard deviation; encode the set again",
        )
        # Samples of a posterior vary by its deviation beside its mean: E x^2 = mean^2 + deviation^2.
        scaled = latents.space.normalise(raw[:, 0]).double()
        spread = (
            (latents.space.normalise(raw[:, 0] + raw[:, 1]).double() - scaled) if latents.parts == 2 else 0 * scaled
        )
        total += scaled.sum((0, 2, 3))
        squares += (scaled**2 + spread**2).sum((0, 2, 3))
    count = len(latents) * latents.views * latents.latent_size**2
    mean, std = total / count, (squares / count - (total / count) ** 2).clamp(min=0).sqrt()
    overall = math.sqrt(max(float(squares.mean() / count - (total.mean() / count) ** 2), 0.0))
    _line(
        "scaled latents",
        f"mean {float(mean.mean()):+.3f}, std {overall:.3f}; by channel std {std.min():.3f} to {std.max():.3f}",
    )
    require(
        _SCALE[0] <= overall <= _SCALE[1],
        f"{latents.path}: latents have a standard deviation of {overall:.3g} after shift {latents.space.shift} and "
        f"scale {latents.space.scale}, which should bring it near 1; the scale is not this VAE's",
    )
    return overall


def _chunks(latents: LatentSet) -> Iterator[tuple[int, int, torch.Tensor]]:
    """All raw latents in float32, a chunk at a time: its first item, its view, (n, parts, C, H, W)."""
    import torch

    with progress.bar(total=len(latents) * latents.views, desc="values", unit="item") as bar:
        for begin in range(0, len(latents), _STEP):
            indices = np.arange(begin, min(begin + _STEP, len(latents)))
            for view in range(latents.views):
                yield begin, view, torch.from_numpy(latents.read(indices, np.full_like(indices, view))[0])
                bar.update(len(indices))


def check_images(latents: LatentSet) -> None:
    """Decode kept images spread over the set; raise UserError at the first of another size."""
    if not latents.manifest["images"]:
        return
    side, chosen = latents.manifest["resolution"], quality.spread(len(latents), 64)
    for index in chosen:
        shape = latents.images([index])[0].shape
        require(
            shape[:2] == (side, side),
            f"the image of {latents.name(index)} of {latents.path} is {shape[1]} x {shape[0]}, not {side}; encode the "
            "set again",
        )
    _line("images", f"{len(chosen)} decoded, {side} x {side}")


def reconstruct(latents: LatentSet, options: Options) -> float | None:
    """Decode a few items, draw them under their images, and print the PSNR; returns its mean.

    None if there are no images to compare with, or the autoencoder is not on this machine.
    """
    from models.vae import open_codec

    try:
        codec = open_codec(options.vae, space=latents.space)
    except UserError as error:
        if options.vae is not None:
            raise
        _line("reconstruction", f"left out: {error}")
        return None
    # the same items every time, evenly over the set
    chosen = quality.spread(len(latents), options.num_images)
    rows = [quality.decoded(latents, chosen, codec)]
    originals = _originals(latents, options, chosen, codec.image_channels == 1)
    psnr = None
    if originals is not None:
        psnr = quality.psnr(rows[0], originals)
        worst = int(psnr.argmin())
        _line(
            "reconstruction",
            f"PSNR {psnr.mean():.2f} dB over {len(chosen)} items, worst {psnr[worst]:.2f} dB at "
            f"{latents.name(chosen[worst])}",
        )
        rows.insert(0, originals)
    # one row of images above one of reconstructions
    picture = Path(options.picture or latents.path / "verify.png")
    with files.replacing(picture) as temporary:
        temporary.write_bytes(png(np.concatenate([np.concatenate(list(row), 1) for row in rows])))
    _line("picture", f"{picture} ({'images above, ' if originals is not None else ''}reconstructions)")
    return None if psnr is None else float(psnr.mean())


def _originals(latents: LatentSet, options: Options, chosen: np.ndarray, grey: bool) -> np.ndarray | None:
    """The images (n, R, R, channels) uint8 of the items `chosen`: kept ones, else those of --images."""
    if latents.manifest["images"]:
        return latents.images(chosen)
    return None if options.images is None else quality.originals_in(ImageFiles(options.images), latents, chosen, grey)


if __name__ == "__main__":
    errors.run(main)
