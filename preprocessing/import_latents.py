"""Latents that others encoded -> a latent set, without encoding again.

    python -m preprocessing.import_latents DIR --out data/imagenet

The layout of DIR is recognised by what is in it:

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
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import dataset
from models.latents import LatentSpace
from models.vae import open_codec, read_statistics
from preprocessing import shards
from preprocessing.images import LABELS, LARGEST_LABEL, match_labels
from preprocessing.job import begin
from runtime import errors, files, progress
from runtime.errors import UserError, require
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
    shard_size: int = option(4096, help="items per file (REPA; LightningDiT's files stay as they are)")
    num_classes: int | None = option(None, help="number of classes (default: the largest label + 1)")

    def __post_init__(self) -> None:
        require(self.shard_size > 0, f"--shard-size {self.shard_size} must be at least 1")
        require(
            self.num_classes is None or 0 < self.num_classes <= LARGEST_LABEL,
            f"--num-classes {self.num_classes} must be at least 1 and at most {LARGEST_LABEL}",
        )


class Layout(Protocol):
    """One kind of folder: what it holds, and its shards one by one."""

    space: LatentSpace
    shape: tuple[int, ...]  # (views, parts, C, H, W)
    labels: np.ndarray  # (n,) int64
    bounds: list[int]  # shard s holds items bounds[s] .. bounds[s + 1] - 1
    fingerprint: str

    def shard(self, number: int) -> dict[str, Any]:
        """Latents (n, views, parts, C, H, W), and where known names and images, of one shard."""
        ...


@dataclass(frozen=True)
class Import:
    """An import as a job (`preprocessing.job`)."""

    options: Options
    layout: Layout

    @property
    def folder(self) -> Path:
        return Path(self.options.out)

    @property
    def shard_numbers(self) -> range:
        return range(len(self.layout.bounds) - 1)

    def bytes_needed(self, kept: Sequence[int]) -> int:
        items = sum(self.layout.bounds[s + 1] - self.layout.bounds[s] for s in self.shard_numbers if s not in kept)
        picture = self.layout.shape[-1] ** 2 * self.layout.space.stride**2 * 2 if self.options.keep_images else 0
        return items * (int(np.prod(self.layout.shape)) * np.dtype(self.options.dtype).itemsize + picture + 64)

    def settings(self) -> dict[str, Any]:
        return {
            "format": dataset.FORMAT,
            "import": self.layout.fingerprint,
            "space": self.layout.space.to_json(),
            "dtype": self.options.dtype,
            "keep_images": self.options.keep_images,
            "bounds": self.layout.bounds,
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Import a folder."""
    options = read(
        Options,
        sys.argv[1:] if argv is None else argv,
        prog="python -m preprocessing.import_latents",
        description=__doc__,
        first="source",
    )
    layout = recognised(options)
    print(f"{options.source}: {type(layout).__name__} latents, {len(layout.labels):,} items of {layout.shape}")
    classes = int(layout.labels.max()) + 1 if options.num_classes is None else options.num_classes
    require(
        layout.labels.max() < classes,
        f"--num-classes {classes}: {options.source} has the label {layout.labels.max()}, give at least one more",
    )
    run(Import(options, layout), classes)


def recognised(options: Options) -> Layout:
    """The layout of `options.source`. Raises UserError where it is neither."""
    source = Path(options.source)
    repa = source / "vae-sd" if (source / "vae-sd").is_dir() else source
    if repa != source or (source / LABELS).exists():
        require(
            options.statistics is None,
            f"--statistics scales LightningDiT's latents, {source} holds REPA's: leave it out",
        )
        return REPA(repa, options)
    if any(source.glob("*.safetensors")):
        require(not options.keep_images, "--keep-images: LightningDiT's folders hold no images")
        return LightningDiT(source, options)
    raise UserError(
        f"{source} is not a folder of REPA's (vae-sd with {LABELS}) or LightningDiT's (*.safetensors) latents; "
        f"give one of them"
    )


def run(job: Import, classes: int) -> None:
    """Write the shards that are missing, then the manifest."""
    layout, options = job.layout, job.options
    views, parts, _, side, _ = layout.shape
    with ExitStack() as held:
        kept = begin(job, held)
        if kept is None:
            return
        entries = []
        with progress.bar(total=len(layout.labels), desc="importing", unit="item") as bar:
            for number in job.shard_numbers:
                labels = layout.labels[layout.bounds[number] : layout.bounds[number + 1]]
                if number in kept:
                    entries.append(shards.entry(job.folder, number, kept[number]))
                else:
                    columns = layout.shard(number)
                    with np.errstate(over="ignore"):  # an overflow is named by write_shard
                        latents = columns.pop("latents").astype(options.dtype)
                    entries.append(shards.write_shard(job.folder, number, latents, labels, **columns))
                bar.update(len(labels))
        shards.write_manifest(
            job.folder,
            space=layout.space,
            resolution=side * layout.space.stride,
            latent_size=side,
            views=views,
            parts=parts,
            dtype=options.dtype,
            crop="adm",
            class_names=[str(label) for label in range(classes)],
            images=options.keep_images,
            shards=entries,
            source=f"{type(layout).__name__} latents of {Path(options.source).resolve().name}",
        )
    print(f"{job.folder}: {len(dataset.LatentSet(job.folder)):,} items in {len(entries)} shards")


class REPA:
    """One .npy per image: posterior mean and standard deviation of SD-VAE, unscaled."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.keep = folder, options.keep_images
        self.names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npy"))
        require(bool(self.names), f"{folder} holds no .npy file")
        files.require_plain(folder / LABELS)
        try:
            text = (folder / LABELS).read_bytes()
        except OSError as error:
            raise UserError(f"{folder / LABELS} is missing: it holds the labels; copy it there") from error
        self.labels = match_labels(self.names, text, folder / LABELS)
        self.bounds = [*range(0, len(self.names), options.shard_size), len(self.names)]
        self.fingerprint = hashlib.sha256(text).hexdigest()
        first = self._moments(self.names[0], self._read(self.names[0]))
        self.space = (
            open_codec(options.vae).space
            if options.vae
            else LatentSpace(
                name="sd-vae",
                channels=len(first) // 2,
                stride=8,
                shift=(0.0,),
                scale=(0.18215,),
                vae="stabilityai/sd-vae-ft-mse",
            )
        )
        _require_channels(self.space, len(first) // 2, folder)
        self.shape = (1, 2, len(first) // 2, *first.shape[1:])

    def shard(self, number: int) -> dict[str, Any]:
        names = self.names[self.bounds[number] : self.bounds[number + 1]]
        loaded = np.empty((len(names), *self.shape), np.float32)
        with ThreadPoolExecutor() as readers:
            for place, content in enumerate(readers.map(self._read, names)):
                moments = self._moments(names[place], content)
                if moments.size != loaded[place].size or moments.shape[1:] != self.shape[-2:]:
                    raise UserError(
                        f"{self.folder / names[place]} has shape {moments.shape}, not that of {self.names[0]}"
                    )
                loaded[place] = moments.reshape(self.shape)
                if (loaded[place, 0, 1] < 0).any():
                    raise UserError(
                        f"{self.folder / names[place]} has a negative standard deviation; it is not mean and std"
                    )
        return {
            "latents": loaded,
            "names": names,
            "images": [self._image(name) for name in names] if self.keep else None,
        }

    def _read(self, name: str) -> bytes:
        files.require_plain(self.folder / name)
        try:
            return (self.folder / name).read_bytes()
        except (OSError, MemoryError) as error:
            raise UserError(f"{self.folder / name} cannot be read ({error}); copy or encode it again") from error

    def _moments(self, name: str, content: bytes) -> np.ndarray:
        """The array of a file; not for several threads: two that parse a header at once break CPython 3.11.7 (its gh-106905)."""
        try:
            moments = np.load(io.BytesIO(content))
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise UserError(f"{self.folder / name} cannot be read ({error}); copy or encode it again") from error
        if moments.ndim != 3 or len(moments) % 2 or moments.dtype.kind != "f":
            raise UserError(f"{self.folder / name} is {moments.dtype} {moments.shape}, not (2C, H, W) of mean and std")
        return moments

    def _image(self, name: str) -> bytes:
        number = re.search(r"(\d+)\.npy$", name)
        file = self.folder.parent / "images" / Path(name).parent / f"img{number[1] if number else '?'}.png"
        try:
            return file.read_bytes()
        except OSError as error:
            raise UserError(
                f"{file}, the image of {name}, cannot be read ({error.strerror}); leave out --keep-images, or add it"
            ) from error


class LightningDiT:
    """Safetensors files of fixed samples, of the image and its mirror image, with statistics to scale them."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        statistics = Path(options.statistics) if options.statistics else folder / STATISTICS
        require(statistics.exists(), f"{statistics} is missing: it scales the latents; name it with --statistics")
        opened = [dataset.map_shard(file) for file in self.files]
        self.keys = ["latents", "latents_flip"] if "latents_flip" in opened[0] else ["latents"]
        shape = opened[0]["latents"].shape[1:] if "latents" in opened[0] else ()
        for file, arrays in zip(self.files, opened):
            if absent := {*self.keys, "labels"} - arrays.keys():
                raise UserError(f"{file} lacks {min(absent)}; it is not one of LightningDiT's latent files")
            for key in self.keys:
                if arrays[key].shape != (len(arrays["labels"]), *shape) or len(shape) != 3:
                    raise UserError(
                        f"{file}: {key} {arrays[key].shape} "
                        f"does not fit {len(arrays['labels'])} labels and {shape}; copy it again"
                    )
            require(
                arrays["labels"].ndim == 1 and arrays["labels"].dtype.kind in "iu",
                f"{file}: labels are {arrays['labels'].dtype} {arrays['labels'].shape}, not whole numbers (n,); write them anew",
            )
        self.labels = np.concatenate([arrays["labels"] for arrays in opened]).astype(np.int64)
        require(len(self.labels) > 0, f"{folder} holds no latents")
        require(
            int(self.labels.min()) >= 0 and int(self.labels.max()) < LARGEST_LABEL,
            f"{folder} has labels from {self.labels.min()} to {self.labels.max()}; they count from 0 and end below {LARGEST_LABEL}",
        )
        self.bounds = np.cumsum([0] + [len(arrays["labels"]) for arrays in opened]).tolist()
        stat = [[file.name, os.path.getsize(file)] for file in self.files]
        self.fingerprint = hashlib.sha256(json.dumps(stat).encode() + self.labels.tobytes()).hexdigest()
        if options.vae:
            self.space = open_codec(options.vae, statistics=statistics).space
        else:
            shift, scale = read_statistics(statistics)
            self.space = LatentSpace(name="va-vae", channels=shape[0], stride=16, shift=shift, scale=scale)
        _require_channels(self.space, shape[0], folder)
        self.shape = (len(self.keys), 1, *shape)

    def shard(self, number: int) -> dict[str, Any]:
        arrays = dataset.map_shard(self.files[number])
        return {"latents": np.stack([arrays[key] for key in self.keys], 1)[:, :, None]}


def _require_channels(space: LatentSpace, channels: int, folder: Path) -> None:
    require(
        space.channels == channels,
        f"{folder} holds latents of {channels} channels, those of {space.name} have {space.channels}",
    )


if __name__ == "__main__":
    errors.run(main)
