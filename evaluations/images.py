"""Where images come from: an .npz file, a folder, a latent set or arrays, all read as uint8 (n, H, W, C) batches.

No class loads the whole set: an .npz member is read through its zip stream.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from models.manifest import MANIFEST
from preprocessing.images import LARGEST_LABEL, ImageFiles
from runtime import files
from runtime.errors import UserError, require
from runtime.npy import NpzArchive
from runtime.slices import slices

LOSSLESS = (".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class NpzImages:
    """The `arr_0` (and `labels`) of an .npz file, ADM's convention for samples and references."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = self.path.name
        archive = NpzArchive(path)
        if "arr_0" not in archive.names:
            raise UserError(
                f"{path} holds no arr_0 (it holds {', '.join(sorted(archive.names)) or 'nothing'}); "
                "save the images as arr_0, uint8 (N, H, W, C)"
            )
        with archive.stream("arr_0") as (_, head):
            shape = head.shape
            check(str(path), shape, head.dtype)
        self._archive, self._count = archive, shape[0]
        self.shape = tuple(shape[1:])  # H, W, C
        self.labels: np.ndarray | None = None  # (N,) int64
        if "labels" in archive.names:
            head = archive.header("labels")
            if head.shape != (self._count,) or head.dtype.kind not in "iu":
                raise UserError(
                    f"{path}: labels are {head.dtype} {head.shape}, not integers ({self._count},): give one for "
                    f"each image"
                )
            labels = archive.read("labels")
            require(
                labels.min() >= 0 and labels.max() < LARGEST_LABEL,
                f"{path}: labels are {labels.min()} to {labels.max()}, not below {LARGEST_LABEL}; get the file again",
            )
            self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return self._count

    def digest(self) -> str:
        """SHA-256 over the whole set."""
        return files.digest(self.path)

    def batches(self, indices: Sequence[int], size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, C), n <= size: the images at `indices`, in ascending order."""
        stride, at = int(np.prod(self.shape)), 0
        with self._archive.stream("arr_0") as (stream, _):
            for part in slices(indices, size):
                data = bytearray()
                # a range is one run of bytes; other indices are read image by image
                for first, count in (
                    [(part.start, len(part))] if isinstance(part, range) else [(index, 1) for index in part]
                ):
                    # relative and forwards: to go back, a zip stream starts again at the member's first byte
                    stream.seek((first - at) * stride, 1)
                    data += (read := stream.read(count * stride))
                    if len(read) < count * stride:
                        raise UserError(f"{self.path} ends within image {first + len(read) // stride}; copy it again")
                    at = first + count
                yield np.frombuffer(data, np.uint8).reshape(len(part), *self.shape)


class FolderImages:
    """A folder (or ZIP) of image files; its sub-folders, or its dataset.json, are the labels.

    resolution: crop to the centre and scale, as preprocessing does. None takes the files as they are; they must then be
    of one size and of a lossless format, because JPEG at quality 75 more than doubles an FID of 2.5.

    grey: one channel instead of RGB. workers: decoding processes, with a resolution.
    """

    def __init__(
        self, path: Path | str, resolution: int | None = None, grey: bool = False, workers: int | None = None
    ) -> None:
        self._files, self.name, self._workers = ImageFiles(path), Path(path).name, workers
        lossy = next((name for name in self._files.names if Path(name).suffix.lower() not in LOSSLESS), None)
        if resolution is None and lossy:
            raise UserError(
                f"{path} holds {lossy}, whose loss changes every metric: save samples as PNG or .npz; "
                f"photographs for a reference need --resolution"
            )
        self._mode = "L" if grey else "RGB"
        self._resolution = resolution
        width, height = self._files.load(0).size if resolution is None else (resolution, resolution)
        self.shape: tuple[int, ...] = (height, width, 1 if self._mode == "L" else 3)
        self.labels: np.ndarray | None = self._files.labels if len(self._files.class_names) > 1 else None

    def __len__(self) -> int:
        return len(self._files.names)

    def digest(self) -> str:
        """SHA-256 over names, labels and file sizes: contents are not read twice."""
        return self._files.fingerprint

    def batches(self, indices: Sequence[int], size: int) -> Iterator[np.ndarray]:
        plan = [list(part) for part in slices(indices, size)]
        if self._resolution is None:
            yield from (np.stack([self._read(index) for index in part]) for part in plan)
        elif plan:
            from preprocessing import loading

            for batch in loading.batches(
                self._files, plan, resolution=self._resolution, grey=self._mode == "L", workers=self._workers
            ):
                require(not batch.bad, "; ".join(batch.bad[:1]))
                yield batch.images.numpy()

    def _read(self, index: int) -> np.ndarray:
        picture = np.atleast_3d(np.asarray(self._files.load(index).convert(self._mode)))
        if picture.shape != self.shape:
            raise UserError(
                f"{self._files.names[index]} in {self.name} is {picture.shape[1]} x {picture.shape[0]} pixels, "
                f"the first image {self.shape[1]} x {self.shape[0]}; give --resolution, or images of one size"
            )
        return picture


class LatentSetImages:
    """The images of a latent set: its image column, or the items themselves if its latents are pixels."""

    def __init__(self, path: Path | str) -> None:
        from dataset import LatentSet

        self._set, self.name = LatentSet(path), Path(path).name
        self._set.check_digests()
        require(
            self._set.has_images,
            f"{path} holds latents without their images; encode it with --keep-images, or give the images",
        )
        self.labels: np.ndarray | None = self._set.labels
        self.shape = self._set.images(np.arange(1)).shape[1:]

    def __len__(self) -> int:
        return len(self._set)

    def digest(self) -> str:
        return self._set.digest

    def batches(self, indices: Sequence[int], size: int) -> Iterator[np.ndarray]:
        for part in slices(indices, size):
            yield self._set.images(np.array(part))
        self._set.require_intact(wait=None)


# A set of images, of which any part can be read in order.
Images = NpzImages | FolderImages | LatentSetImages


def open_images(
    path: Path | str, resolution: int | None = None, grey: bool = False, workers: int | None = None
) -> Images:
    """The images at `path`: an .npz file, a latent set, or a folder or ZIP of image files (RGB unless `grey`).

    `resolution`, `grey` and `workers` apply to image files alone. Raises UserError if `path` holds anything else.
    """
    path = Path(path)
    if not (path.is_dir() and (path / MANIFEST).is_file()) and (path.is_dir() or path.suffix.lower() == ".zip"):
        return FolderImages(path, resolution, grey, workers)
    images: Images = LatentSetImages(path) if path.is_dir() else NpzImages(path)
    require(
        resolution is None or (resolution, resolution) == images.shape[:2],
        f"--resolution {resolution}: {path} is of {images.shape[0]} x {images.shape[1]}",
    )
    require(not grey or images.shape[2] == 1, f"--grey is for image files: {path} is in colour")
    return images


def write_npz(path: Path | str, images: Iterable[np.ndarray], labels: np.ndarray, shape: Sequence[int]) -> None:
    """Write ADM's convention, `arr_0` (N, H, W, C) uint8 and `labels` (N,) int64, one batch at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *map(int, shape))}
    with files.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for batch in images:
                stream.write(np.ascontiguousarray(batch).tobytes())
        with archive.open("labels.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, labels.astype(np.int64), allow_pickle=False)


def check(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise UserError unless an array is uint8 (N, H, W, C) with C 1 or 3."""
    if dtype != np.uint8:
        raise UserError(f"{name}: images are {dtype}, not uint8; write values 0..255 as uint8 (N, H, W, C)")
    if len(shape) != 4:
        raise UserError(f"{name}: images have shape {tuple(shape)}; give (N, H, W, C)")
    if shape[3] not in (1, 3):
        remedy = "; it looks like (N, C, H, W), transpose it" if shape[1] in (1, 3) else "; give grey or RGB"
        raise UserError(f"{name}: images have shape {tuple(shape)}, whose last axis is not 1 or 3 channels{remedy}")
    if shape[0] == 0:
        raise UserError(f"{name} holds no images; give some")
