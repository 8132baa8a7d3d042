"""Check a latent set for damage.

    python -m preprocessing.verify DIR [--vae ID|DIR] [--images DIR|ZIP]

Checks, in this order: the checksum of every shard; counts, types and label range; that every class has items; that every
latent is finite and no standard deviation negative; the scale of the latents as a network sees them. The first offending
file or item is named. Where the autoencoder is at hand, a few items are decoded into a picture, beside the kept images
(or those of the source, --images) with their PSNR. What a sound file cannot rule out is warned of: an autoencoder that
does not reconstruct, a scale that is far from 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import dataset
from dataset import LatentSet
from models.pixels import is_pixels
from models.vae import open_codec
from preprocessing import quality
from preprocessing.images import ImageFiles, cropped
from runtime import errors, files, progress
from runtime.errors import UserError, require
from runtime.options import option, read

_STEP = 1024  # items in memory at a time
_SCALE = (0.1, 3.0)  # a latent space has a standard deviation of about 1; SD-VAE's unscaled latents have 4 to 5


@dataclass(frozen=True, kw_only=True)
class Options:
    data_dir: str = option(help="the latent set; may be given first, without the flag", heading="latent set")
    vae: str | None = option(None, help="autoencoder to decode with (default: the set's own, if it is on this machine)")
    images: str | None = option(None, help="the images that the set was made from, if they were not kept")
    picture: str | None = option(
        None, help="where to draw the reconstructions (default: verify.png in the set)", heading="reconstructions"
    )
    num_images: int = option(8, help="items to reconstruct; 0: none")

    def __post_init__(self) -> None:
        require(self.num_images >= 0, f"--num-images {self.num_images} must not be negative")


def main(argv: Sequence[str] | None = None) -> None:
    """Verify a latent set."""
    options = read(
        Options,
        sys.argv[1:] if argv is None else argv,
        prog="python -m preprocessing.verify",
        description=__doc__,
        first="data_dir",
    )
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
    """Raise UserError at the first shard whose bytes are not those that the manifest promises."""
    for entry in progress.bar(dataset.read_manifest(folder)["shards"], desc="checksums", unit="shard"):
        dataset.require_intact(folder, entry)


def check_classes(latents: LatentSet) -> None:
    """Raise UserError at the first class without items."""
    counts = np.bincount(latents.labels, minlength=latents.num_classes)
    if not counts.all():
        empty = int(np.argmin(counts))
        raise UserError(f"class {empty} ({latents.manifest['class_names'][empty]}) of {latents.path} has no item")
    _line("classes", f"{latents.num_classes:,}, of {counts.min():,} to {counts.max():,} items")


def check_values(latents: LatentSet) -> float:
    """The standard deviation of the latents as a network sees them.

    Raises UserError at the first latent that is not finite or has a negative deviation, and where the scale is off.
    """
    total = torch.zeros(latents.channels, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for begin, view, raw in _chunks(latents):
        wrong = ~torch.isfinite(raw).flatten(1).all(1)
        if latents.parts == 2:
            wrong |= (raw[:, 1] < 0).flatten(1).any(1)
        if wrong.any():
            raise UserError(
                f"{latents.name(begin + int(wrong.int().argmax()))} of {latents.path}, view {view}, has latents "
                "that are not finite or a negative standard deviation; encode the set again"
            )
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
    if not _SCALE[0] <= overall <= _SCALE[1]:
        raise UserError(
            f"{latents.path}: latents have a standard deviation of {overall:.3g} after shift {latents.space.shift} "
            f"and scale {latents.space.scale}, which should bring it near 1; the scale is not this VAE's"
        )
    return overall


def _chunks(latents: LatentSet) -> Iterator[tuple[int, int, torch.Tensor]]:
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
        if shape[:2] != (side, side):
            raise UserError(
                f"the image of {latents.name(index)} of {latents.path} is {shape[1]} x {shape[0]}, not {side}"
            )
    _line("images", f"{len(chosen)} decoded, {side} x {side}")


def reconstruct(latents: LatentSet, options: Options) -> float | None:
    """Decode a few items, draw them under their images where there are any, and print the PSNR; returns its mean.

    None where there is nothing to compare, or the autoencoder is not at hand.
    """
    try:
        codec = open_codec(options.vae, space=latents.space)
    except UserError as error:
        if options.vae is not None:
            raise
        _line("reconstruction", f"left out: {error}")
        return None
    chosen = quality.spread(len(latents), options.num_images)
    rows = [quality.decoded(latents, chosen, codec)]
    originals = _originals(latents, options, chosen)
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
    picture = Path(options.picture or latents.path / "verify.png")
    _draw(picture, rows)
    _line("picture", f"{picture} ({'images above, ' if originals is not None else ''}reconstructions)")
    return None if psnr is None else float(psnr.mean())


def _originals(latents: LatentSet, options: Options, chosen: np.ndarray) -> np.ndarray | None:
    if latents.manifest["images"]:
        return latents.images(chosen)
    if options.images is None:
        return None
    source = ImageFiles(options.images)
    place = {name: index for index, name in enumerate(source.names)}
    places = [place.get(latents.source_name(index)) for index in chosen]
    if None in places:
        raise UserError(
            f"{options.images} does not hold {latents.name(chosen[places.index(None)])}; give the source of the set"
        )
    grey = latents.channels == 1
    return np.stack([cropped(source, index, latents.manifest["resolution"], grey) for index in places])


def _draw(file: Path, rows: Sequence[np.ndarray]) -> None:
    from PIL import Image

    grid = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    with files.replacing(file) as temporary:
        Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(temporary, "PNG")


if __name__ == "__main__":
    errors.run(main)
