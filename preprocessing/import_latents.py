"""Latents that others encoded -> a latent set, without encoding again.

    python -m preprocessing.import_latents DIR --out data/imagenet

The content of DIR decides which layout it has:

    REPA          vae-sd/ (or that folder itself): dataset.json and one .npy per image, (2C, H, W), posterior mean and
                  standard deviation. With --keep-images also the PNGs of images/ beside it, paired by their number.
    LightningDiT  *.safetensors with latents (n, C, H, W), latents_flip and labels, fixed samples of both views, and
                  latents_stats.pt, the mean and standard deviation of each channel.

Started again after an interruption, it continues.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.latents import LatentSpace
from models.manifest import FORMAT
from preprocessing import shards
from preprocessing.images import LABELS, LARGEST_LABEL, match_labels
from preprocessing.job import Job, begin
from runtime import errors, files, npy, progress
from runtime.errors import UserError, require
from runtime.mapped import map_shard
from runtime.options import option, read

STATISTICS = "latents_stats.pt"


@dataclass(frozen=True, kw_only=True)
class Options:
    source: str = option(help="the folder to import; may be given first, without the flag")
    out: str = option(help="folder of the latent set to write")
    vae: str | None = option(None, help="the autoencoder that made the latents, to record its weights (optional)")
    statistics: str | None = option(None, help=f"LightningDiT's {STATISTICS} (default: the one in the folder)")
    keep_images: bool = option(False, help="import REPA's images too")
    dtype: str = option("float16", help="type of the stored latents", choices=("float16", "float32"))
    shard_size: int = option(
        4096, within="[1, inf)", help="items per file (REPA; LightningDiT's files stay as they are)"
    )
    num_classes: int | None = option(
        None, within=f"[1, {LARGEST_LABEL}]", help="number of classes (default: the largest label + 1)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Import a folder."""
    options = read(
        Options,
        argv,
        prog="python -m preprocessing.import_latents",
        description=__doc__,
        first="source",
    )
    layout = recognised(options)
    channels = layout.shape[2]
    require(
        layout.space.channels == channels,
        f"{options.source} holds latents of {channels} channels, those of {layout.space.name} have "
        f"{layout.space.channels}; give their own --vae or --statistics",
    )
    print(f"{options.source}: {layout.peer} latents, {len(layout.labels):,} items of {layout.shape}")
    classes = int(layout.labels.max()) + 1 if options.num_classes is None else options.num_classes
    require(
        layout.labels.max() < classes,
        f"--num-classes {classes}: {options.source} has the label {layout.labels.max()}, give at least one more",
    )
    run(layout, options, classes)


def recognised(options: Options) -> RepaFolder | LightningDitFolder:
    """The layout of `options.source`. Raises UserError if it is not one of the two."""
    source = Path(options.source)
    repa = source / "vae-sd" if (source / "vae-sd").is_dir() else source
    if repa != source or (source / LABELS).exists():
        require(
            options.statistics is None,
            f"--statistics scales LightningDiT's latents, {source} holds REPA's: leave it out",
        )
        return RepaFolder(repa, options)
    require(
        any(source.glob("*.safetensors")),
        f"{source} is not a folder of REPA's (vae-sd with {LABELS}) or LightningDiT's (*.safetensors) latents; "
        f"give one of them",
    )
    require(not options.keep_images, "--keep-images: LightningDiT's folders hold no images")
    return LightningDitFolder(source, options)


def run(layout: RepaFolder | LightningDitFolder, options: Options, classes: int) -> None:
    """Write the shards that are missing, then the manifest."""
    job = Job(
        folder=Path(options.out),
        space=layout.space,
        shape=layout.shape,
        dtype=options.dtype,
        bounds=layout.bounds,
        image_channels=3 if options.keep_images else 0,
        settings={
            "format": FORMAT,
            "import": layout.fingerprint,
            "space": layout.space.to_json(),
            "dtype": options.dtype,
            "keep_images": options.keep_images,
            "bounds": layout.bounds,
        },
    )
    with ExitStack() as held:
        entries = begin(job, held)
        if entries is None:
            return
        with progress.bar(total=len(layout.labels), desc="importing", unit="item") as bar:
            for number in job.shard_numbers:
                items = job.items(number)
                if number not in entries:
                    columns = layout.shard(number)
                    # `write_shard` names a latent that overflows.
                    with np.errstate(over="ignore"):
                        latents = columns.pop("latents").astype(options.dtype)
                    labels = layout.labels[items.start : items.stop]
                    entries[number] = shards.write_shard(job.folder, number, latents, labels, **columns)
                bar.update(len(items))
        source = f"{layout.peer} latents of {Path(options.source).resolve().name}"
        job.conclude(entries, [str(label) for label in range(classes)], source)


class RepaFolder:
    """One .npy per image: posterior mean and standard deviation of SD-VAE, unscaled.

    `shape` is (views, parts, C, H, W) of an item, `labels` (n,) int64; shard s holds the items bounds[s] to
    bounds[s + 1] - 1.
    """

    peer = "REPA"

    def __init__(self, folder: Path, options: Options) -> None:
        from models.vae import open_codec

        self.folder, self.keep = folder, options.keep_images
        self.names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npy"))
        require(bool(self.names), f"{folder} holds no .npy file")
        text = _content(folder / LABELS, "copy it there: it holds the labels")
        self.labels = match_labels(self.names, text, folder / LABELS)
        self.bounds = [*range(0, len(self.names), options.shard_size), len(self.names)]
        self.fingerprint = hashlib.sha256(text).hexdigest()
        # the first file shows the shape; the shards check that all others agree
        first = self._moments(self.names[0], self._read(self.names[0]))
        channels = len(first) // 2
        self.space = (
            open_codec(options.vae).space
            if options.vae
            else LatentSpace(
                name="sd-vae",
                channels=channels,
                stride=8,
                shift=(0.0,),
                scale=(0.18215,),
                vae="stabilityai/sd-vae-ft-mse",
            )
        )
        self.shape = (1, 2, channels, *first.shape[1:])

    def shard(self, number: int) -> dict[str, Any]:
        """Latents (n, views, parts, C, H, W) of one shard, with names and, if they are kept, images."""
        names = self.names[self.bounds[number] : self.bounds[number + 1]]
        loaded = np.empty((len(names), *self.shape), np.float32)
        # Threads read the files; one thread parses them, see `_moments`.
        with ThreadPoolExecutor() as readers:
            for place, content in enumerate(readers.map(self._read, names)):
                file, moments = self.folder / names[place], self._moments(names[place], content)
                require(
                    moments.size == loaded[place].size and moments.shape[1:] == self.shape[-2:],
                    f"{file} has shape {moments.shape}, not that of {self.names[0]}",
                )
                loaded[place] = moments.reshape(self.shape)
                require(
                    not (loaded[place, 0, 1] < 0).any(),
                    f"{file} has a negative standard deviation; it is not mean and std",
                )
        images = [self._image(name) for name in names] if self.keep else None
        return {"latents": loaded, "names": names, "images": images}

    def _read(self, name: str) -> bytes:
        return _content(self.folder / name, "copy or encode it again")

    def _moments(self, name: str, content: bytes) -> np.ndarray:
        """The array of a file. Call it from one thread: CPython 3.11.7 breaks if two parse headers (gh-106905)."""
        stream = io.BytesIO(content)
        try:
            head = npy.header(stream)
            require(
                len(head.shape) == 3 and head.shape[0] % 2 == 0 and head.dtype.kind == "f",
                f"{self.folder / name} is {head.dtype} {head.shape}, not (2C, H, W) of mean and std",
            )
            return npy.read(stream, head, len(content) - stream.tell())
        except (ValueError, EOFError) as error:
            raise UserError(f"{self.folder / name} cannot be read ({error}); copy or encode it again") from error

    def _image(self, name: str) -> bytes:
        number = re.search(r"(\d+)\.npy$", name)
        file = self.folder.parent / "images" / Path(name).parent / f"img{number[1] if number else '?'}.png"
        return _content(file, f"it is the image of {name}: add it, or leave out --keep-images")


class LightningDitFolder:
    """Safetensors files of fixed samples, of the image and its mirror image, with statistics to scale them.

    The fields are those of `RepaFolder`.
    """

    peer = "LightningDiT"

    def __init__(self, folder: Path, options: Options) -> None:
        from models.vae import open_codec, read_statistics

        self.files = sorted(folder.glob("*.safetensors"))
        statistics = Path(options.statistics) if options.statistics else folder / STATISTICS
        require(statistics.exists(), f"{statistics} is missing: it scales the latents; name it with --statistics")
        opened = [map_shard(file) for file in self.files]
        self.keys = ["latents", "latents_flip"] if "latents_flip" in opened[0] else ["latents"]
        shape = opened[0]["latents"].shape[1:] if "latents" in opened[0] else ()
        for file, arrays in zip(self.files, opened):
            _require_arrays(file, arrays, self.keys, shape)
        self.labels = np.concatenate([arrays["labels"] for arrays in opened]).astype(np.int64)
        require(len(self.labels) > 0, f"{folder} holds no latents")
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        require(
            lowest >= 0 and highest < LARGEST_LABEL,
            f"{folder} has labels from {lowest} to {highest}; they count from 0 and end below {LARGEST_LABEL}",
        )
        self.bounds = np.cumsum([0] + [len(arrays["labels"]) for arrays in opened]).tolist()
        # names, sizes and labels tell two folders apart without reading the latents
        sizes = [[file.name, os.path.getsize(file)] for file in self.files]
        self.fingerprint = hashlib.sha256(json.dumps(sizes).encode() + self.labels.tobytes()).hexdigest()
        if options.vae:
            self.space = open_codec(options.vae, statistics=statistics).space
        else:
            shift, scale = read_statistics(statistics)
            self.space = LatentSpace(name="va-vae", channels=shape[0], stride=16, shift=shift, scale=scale)
        self.shape = (len(self.keys), 1, *shape)

    def shard(self, number: int) -> dict[str, Any]:
        arrays = map_shard(self.files[number])
        return {"latents": np.stack([arrays[key] for key in self.keys], 1)[:, :, None]}


def _require_arrays(file: Path, arrays: Mapping[str, np.ndarray], keys: Sequence[str], shape: tuple[int, ...]) -> None:
    """Raise UserError unless `file` holds latents (n, *shape) under all `keys`, and n labels."""
    if absent := {*keys, "labels"} - arrays.keys():
        raise UserError(f"{file} lacks {min(absent)}; it is not one of LightningDiT's latent files")
    labels = arrays["labels"]
    for key in keys:
        require(
            arrays[key].shape == (len(labels), *shape) and len(shape) == 3,
            f"{file}: {key} {arrays[key].shape} does not fit {len(labels)} labels and {shape}; copy it again",
        )
    require(
        labels.ndim == 1 and labels.dtype.kind in "iu",
        f"{file}: labels are {labels.dtype} {labels.shape}, not whole numbers (n,); write them anew",
    )


def _content(file: Path, remedy: str) -> bytes:
    """The bytes of a file. Raises UserError with `remedy` if it cannot be read."""
    with files.reading(file, remedy):
        return file.read_bytes()


if __name__ == "__main__":
    errors.run(main)
