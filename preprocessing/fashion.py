"""Fashion-MNIST: 70,000 real grey photographs of clothes in ten classes, as image folders of 32 x 32 pixels.

    python -m preprocessing.fashion --out data/fashion
    python -m preprocessing.fashion --embedded --out data/fashion-8000      (7,000 + 1,000 that this repository holds)
    python -m preprocessing.encode --images data/fashion/train --vae pretrained/vae-fashion --grey --resolution 32 ...

Source: Xiao, Rasul and Vollgraf (arXiv 1708.07747), MIT licence. The four IDX files are read from --source, from
Debian's package `dataset-fashion-mnist` or from where torchvision puts them, or torchvision downloads them; their
content must have the published SHA-256. Two pixels of the black background are added on each side.

Writes `train/CLASS/NUMBER.png` and `test/CLASS/NUMBER.png`, NUMBER being the image's place in its file, so that the
classes keep their published numbers, and `train-masks.npz` and `test-masks.npz` for `evaluations.probe`: `masks` uint8
(N, 32, 32) in the order of the folder, 1 on the silhouette (pixels above 0, and the holes among them).
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import errors, files, locks, progress
from runtime.errors import UserError, require
from runtime.options import as_dict, option, read

CLASSES = (
    "0-t-shirt",
    "1-trouser",
    "2-pullover",
    "3-dress",
    "4-coat",
    "5-sandal",
    "6-shirt",
    "7-sneaker",
    "8-bag",
    "9-ankle-boot",
)
# SHA-256 of what the files hold, unpacked: packages compress them in their own ways.
DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SPLITS = {"train": "train", "test": "t10k"}
# The first 700 of each class of the training file and 100 of the test file, in the same form.
EMBEDDED = Path(__file__).with_name("fashion_8000")
EMBEDDED_DIGESTS = {
    "train-images-idx3-ubyte": "70dc4ec56b109894b9cf4c5e744277df4b87454ec5cf1a5ff7145875f8b5fd11",
    "train-labels-idx1-ubyte": "e3b6f2df163328aabf3a4bebfb84aca9be946c9c83fcb420087dc4abb9115d0f",
    "t10k-images-idx3-ubyte": "7cee33c3c6414b1b86c25e665a6c4f41584269de3b7cc9768b1d351922845eef",
    "t10k-labels-idx1-ubyte": "3128d790775889812b73c4f13923559c8b9e281d112c6ea7862acf60a206a909",
}
# Debian's package puts the files in the first place, torchvision in the second, below its own `root`.
PLACES = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))
MARGIN = 2  # pixels of background on each side: 28 -> 32
RECORD = "fashion.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    out: str = option("data/fashion", help="folder to write", heading="images")
    source: str | None = option(
        None, help="folder of the four IDX files, packed or not (default: looked for, else downloaded by torchvision)"
    )
    embedded: bool = option(False, help="the 7,000 and 1,000 images that this repository holds")
    count: int | None = option(None, help="training images: the first of each class, as many of each (default: all)")
    test_count: int | None = option(None, help="test images, likewise")

    def __post_init__(self) -> None:
        require(not (self.embedded and self.source), "--source and --embedded are two places of the images; give one")
        for flag, count in (("--count", self.count), ("--test-count", self.test_count)):
            require(
                count is None or (count > 0 and count % len(CLASSES) == 0),
                f"{flag} {count} must be a positive multiple of {len(CLASSES)}: as many images of each class",
            )


def find_source(given: str | None) -> Path:
    """The folder of the IDX files: `given`, or a usual place, or torchvision's after it has downloaded them there.

    Raises UserError if `given` lacks a file, or nothing can be downloaded.
    """
    if given is not None:
        for folder in (Path(given), Path(given, "FashionMNIST", "raw"), Path(given, "raw")):
            if all(_file(folder, name) for name in DIGESTS):
                return folder
        lacking = next(name for name in DIGESTS if not _file(Path(given), name))
        raise UserError(
            f"--source {given} lacks {lacking}(.gz); give the folder of the four IDX files of Fashion-MNIST"
        )
    for folder in PLACES:
        if all(_file(folder, name) for name in DIGESTS):
            return folder
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(PLACES[1].parents[1]), download=True)
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"Fashion-MNIST is neither in {PLACES[0]} nor in {PLACES[1]}, and torchvision cannot download it "
            f"({reason}); install Debian's dataset-fashion-mnist, or give the folder of its files with --source"
        ) from error
    return PLACES[1]


def _file(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder`, unpacked or packed; None if it has neither."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The uint8 array in an IDX file. Raises UserError unless its content has the published digest."""
    path, published = _file(folder, name), (EMBEDDED_DIGESTS if folder == EMBEDDED else DIGESTS)[name]
    require(path is not None, f"{folder} lacks {name}; get the four IDX files of Fashion-MNIST again")
    assert path is not None
    with files.reading(path):
        data = path.read_bytes()
    try:
        content = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); get it again") from error
    digest = hashlib.sha256(content).hexdigest()
    require(
        digest == published,
        f"{path} is damaged or of another data set: its content has SHA-256 {digest[:8]}..., not "
        f"{published[:8]}...; get it again",
    )
    dimensions = content[3]
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load(folder: Path, split: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A split as grey images (N, 32, 32) uint8, labels (N,), and places in the file (N,), class by class.

    This is the order in which the folder is read. `count`: so many in all, the first of each class.

    Raises UserError if a file is damaged or a class has too few images.
    """
    images, labels = (read_idx(folder, f"{SPLITS[split]}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    places = np.argsort(labels, kind="stable")
    if count is not None:
        each, fewest = count // len(CLASSES), int(np.bincount(labels, minlength=len(CLASSES)).min())
        require(
            each <= fewest,
            f"{count} images of {split} are {each} of each class, which has {fewest}; ask for at most "
            f"{fewest * len(CLASSES)}",
        )
        places = np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(len(CLASSES))])
    return np.pad(images[places], ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))), labels[places], places


def silhouettes(images: np.ndarray) -> np.ndarray:
    """Masks (N, H, W) uint8 of grey images on black: 1 where a pixel is above 0 or enclosed by such pixels."""
    from scipy.ndimage import binary_fill_holes

    return np.stack([binary_fill_holes(image > 0) for image in images]).astype(np.uint8)


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds the classes and nothing else: what a command that was killed had finished."""
    return {path.name for path in folder.iterdir()} <= set(CLASSES)


def write_split(out: Path, split: str, images: np.ndarray, labels: np.ndarray, places: np.ndarray) -> None:
    """Write the images and masks of a split."""
    with files.replacing(out / split, _is_ours) as temporary:
        for name in CLASSES:
            (temporary / name).mkdir(parents=True)
        for image, label, place in zip(
            progress.bar(images, desc=split, unit="image"), labels.tolist(), places.tolist(), strict=True
        ):
            Image.fromarray(image).save(temporary / CLASSES[label] / f"{place:05d}.png", compress_level=1)
    with files.replacing(out / f"{split}-masks.npz") as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, masks=silhouettes(images))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folders, unless they are there already."""
    options = read(Options, argv, prog="python -m preprocessing.fashion", description=__doc__)
    out = Path(options.out)
    settings = {key: value for key, value in as_dict(options).items() if key in ("embedded", "count", "test_count")}
    with locks.locked(out, "wait for it, or choose another --out"):
        if (out / RECORD).exists():
            earlier = files.read_json(out / RECORD)
            require(
                earlier == settings,
                f"{out} holds another choice of images ({earlier}); choose another --out, or delete the folder",
            )
            print(f"{out} is finished already")
            return
        others = {path.name for path in out.iterdir()} - {
            locks.LOCK,
            *SPLITS,
            *(f"{split}-masks.npz" for split in SPLITS),
        }
        require(not others, f"{out} holds something else already ({min(others, default='')}); choose another --out")
        source = EMBEDDED if options.embedded else find_source(options.source)
        for split, count in (("train", options.count), ("test", options.test_count)):
            write_split(out, split, *load(source, split, count))
        # last, because it says that all is there
        files.write_json(out / RECORD, settings)
    print(f"{out}: train and test of Fashion-MNIST (from {source}), as class folders with their masks")


if __name__ == "__main__":
    errors.run(main)
