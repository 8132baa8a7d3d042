"""The real images that samples are compared with, cropped as for training.

    python -m preprocessing.reference --images DIR|ZIP|LATENTSET --resolution 256 --out reference.npz

Writes `arr_0` (N, R, R, C) uint8 and `labels` (N,) int64, image by image, so that memory stays flat. A latent set gives
its kept images, or its pixels where those are its latents. Features and statistics are the scorer's business.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import config
import errors
import files
import progress
from config import require
from dataset import MANIFEST, LatentSet
from models.latents import to_uint8
from preprocessing.images import ImageFiles
from preprocessing.loading import batches
from training.streams import Stream

_STEP = 64  # images in memory at a time


@dataclass(frozen=True, kw_only=True)
class Options:
    images: str = config.option(help="folder or ZIP file of images, or a latent set with images")
    out: str = config.option(help="the .npz file to write")
    resolution: int | None = config.option(None, help="side of the square images; a latent set has its own")
    grey: bool = config.option(False, help="one channel instead of RGB")
    num_images: int | None = config.option(None, help="a random choice of this many images (default: all, in order)")
    workers: int | None = config.option(None, help="decoding processes (default: the CPU cores)")
    seed: int = config.option(0, help="seed of the random choice")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the reference images."""
    options = config.build(Options, config.parse(Options, sys.argv[1:] if argv is None else argv,
                                                 prog="python -m preprocessing.reference", description=__doc__))
    labels, shape, pictures = (_of_latents if (Path(options.images) / MANIFEST).exists() else _of_files)(options)
    _write(Path(options.out), labels, shape, pictures)
    print(f"{options.out}: {len(labels):,} images of {' x '.join(map(str, shape))}")


def _chosen(count: int, options: Options) -> np.ndarray:
    if options.num_images is None:
        return np.arange(count)
    require(0 < options.num_images <= count, f"--num-images {options.num_images}: {options.images} holds {count} images")
    return np.sort(Stream(options.seed, "reference").permutation(count)[:options.num_images])


def _of_files(options: Options) -> tuple[np.ndarray, tuple[int, ...], Iterator[np.ndarray]]:
    require(options.resolution is not None and options.resolution > 0, "--resolution is needed: the side of the square images")
    source = ImageFiles(options.images)
    print(source.summary)
    chosen = _chosen(len(source.names), options)
    plan = [part.tolist() for part in np.array_split(chosen, -(-len(chosen) // _STEP))]

    def pictures() -> Iterator[np.ndarray]:
        for batch in batches(source, plan, resolution=options.resolution, grey=options.grey, workers=options.workers):
            require(not batch.bad, "; ".join(batch.bad[:1]))
            yield batch.images.numpy()

    return source.labels[chosen], (options.resolution, options.resolution, 1 if options.grey else 3), pictures()


def _of_latents(options: Options) -> tuple[np.ndarray, tuple[int, ...], Iterator[np.ndarray]]:
    latents = LatentSet(options.images)
    side = latents.manifest["resolution"]
    require(options.resolution in (None, side), f"--resolution {options.resolution}: {options.images} is of {side}")
    require(not options.grey, f"--grey is for image files: {options.images} is as it is")
    chosen = _chosen(len(latents), options)

    def read(indices: np.ndarray) -> np.ndarray:
        if latents.space.name == "pixels":
            return to_uint8(torch.from_numpy(latents.read(indices)[0][:, 0])).numpy()
        return latents.images(indices)

    pictures = (read(chosen[at:at + _STEP]) for at in range(0, len(chosen), _STEP))
    return latents.labels[chosen], read(chosen[:1]).shape[1:], pictures


def _write(file: Path, labels: np.ndarray, shape: Sequence[int], pictures: Iterator[np.ndarray]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *map(int, shape))}
    with files.replacing(file) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream, progress.bar(total=len(labels), unit="img") as bar:
            np.lib.format.write_array_header_1_0(stream, header)
            for some in pictures:
                stream.write(np.ascontiguousarray(some).tobytes())
                bar.update(len(some))
        with archive.open("labels.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, labels.astype(np.int64), allow_pickle=False)


if __name__ == "__main__":
    errors.run(main)
