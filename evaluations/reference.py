"""References, which samples are compared with: statistics of the real images, and features of some of them.

A reference is one of
- ADM's .npz: `arr_0` (the images for precision and recall) and optionally `mu`, `sigma`, `mu_s`, `sigma_s` (Inception
  statistics of the whole training set), which replace the images' own; `labels` (N,) for class accuracy;
- statistics alone (`mu`, `sigma`): Frechet distances only;
- a compact reference, which this command writes: statistics of all images and features of up to 10,000 of them, so
  that a large set goes through the extractor once;
- any images: a folder, a latent set.

    python -m evaluations.reference --images VIRTUAL_imagenet256_labeled.npz --out imagenet256.npz
    python -m evaluations.reference --images data/imagenet/train --resolution 256 --out train256.npz

With `--features none` the command writes the images themselves, cropped as for training, in ADM's convention.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import NotRequired, TypedDict

from config import FeatureOptions
from evaluations import classifier as classifiers
from evaluations.images import Images, NpzImages, open_images, write_npz
from runtime import errors, files, progress, schema
from runtime.errors import UserError, require
from runtime.npy import NpzArchive
from runtime.options import group, option, read
from runtime.streams import Stream
from runtime.text import quoted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from evaluations.features import Extractor
    from evaluations.metrics import Statistics


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images, as features. `pool` and `labels` belong to the images behind precision and recall."""

    name: str
    digest: str
    features: str  # the extractor's name
    weights: str | None  # and its weights' SHA-256, where known
    shape: tuple[int, ...] | None  # H, W, C of the images, where known
    statistics: Statistics
    spatial: Statistics | None
    origin: str  # of the statistics
    pool: Tensor | None  # (M, D)
    labels: Tensor | None  # (M,)
    classifier: classifiers.Classifier | None = None  # of samples, fitted to training images

    @classmethod
    def open(
        cls,
        path: Path | str,
        extractor: Extractor,
        *,
        accelerator: Accelerator | None = None,
        batch_size: int = 64,
        keep: int | None = None,
        resolution: int | None = None,
        grey: bool = False,
        workers: int | None = None,
    ) -> Reference:
        """Read a reference; extract features if it holds images. Every process must call it.

        keep, resolution, grey, workers: see `of_images` and `images.open_images`.

        Raises UserError if the file is damaged, holds neither images nor statistics, or belongs to other features.
        """
        if Path(path).suffix != ".npz":
            images = open_images(path, resolution, grey, workers)
            return cls.of_images(images, extractor, accelerator, batch_size, keep)
        archive = NpzArchive(path)
        if "about" in archive.names:
            return read_compact(path)
        # Bare statistics do not name their extractor; by custom they are Inception's.
        stored = archive if "mu" in archive.names and extractor.name == "inception" else None
        if "arr_0" in archive.names:
            return cls.of_images(NpzImages(path), extractor, accelerator, batch_size, keep, stored)
        if not stored:
            raise UserError(
                f"{path} holds neither arr_0 (images) nor statistics (mu, sigma) of {extractor.name} features"
            )
        first, second = _stored(stored)
        return cls(
            name=archive.path.name,
            digest=files.digest(path),
            features=extractor.name,
            weights=None,
            shape=None,
            statistics=first,
            spatial=second,
            origin="stored",
            pool=None,
            labels=None,
        )

    @classmethod
    def of_images(
        cls,
        images: Images,
        extractor: Extractor,
        accelerator: Accelerator | None,
        batch_size: int,
        keep: int | None,
        stored: NpzArchive | None = None,
    ) -> Reference:
        """Features of real images, at most `keep` random ones; statistics of all images, unless `stored`."""
        from evaluations.collect import collect

        chosen = None
        if keep is not None and keep < len(images):
            chosen = np.sort(Stream(0, "reference").permutation(len(images))[:keep])
        real = collect(
            images, extractor, accelerator=accelerator, batch_size=batch_size, title="reference", keep=chosen
        )
        first, second = _stored(stored) if stored else (real.statistics, real.spatial)
        return cls(
            name=images.name,
            digest=images.digest(),
            features=extractor.name,
            weights=extractor.weights,
            shape=tuple(images.shape),
            statistics=first,
            spatial=second,
            pool=real.pool,
            labels=real.labels,
            origin="stored" if stored else f"computed from {len(images)} images",
        )

    def save(self, path: Path | str) -> None:
        """Write a compact reference, atomically."""
        about: dict[str, Any] = {
            "name": self.name,
            "sha256": self.digest,
            "features": self.features,
            "weights_sha256": self.weights,
            "shape": self.shape,
            "statistics": self.origin,
        }
        if self.classifier is not None:
            about["classifier"] = self.classifier.about
        tensors = {"mu": self.statistics.mean, "sigma": self.statistics.covariance}
        if self.spatial is not None:
            tensors |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        tensors |= {name: x for name, x in (("pool", self.pool), ("labels", self.labels)) if x is not None}
        if self.classifier is not None:
            tensors |= {"classifier_weight": self.classifier.weight, "classifier_bias": self.classifier.bias}
        arrays = {"about": np.array(json.dumps(about))} | {name: x.numpy() for name, x in tensors.items()}
        # A file object, because NumPy appends .npz to a name.
        with files.replacing(path) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]  # the stub applies ** to allow_pickle too

    def require(self, extractor: Extractor) -> None:
        """Raise UserError unless the features are those of `extractor`."""
        if self.features != extractor.name:
            raise UserError(
                f"{self.name} holds {self.features} features, not {extractor.name}; give --features {self.features}"
            )
        if self.weights and extractor.weights and self.weights != extractor.weights:
            raise UserError(
                f"{self.name} was made with other {self.features} weights ({self.weights[:8]}, not "
                f"{extractor.weights[:8]}); build it again with these"
            )

    def require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UserError unless images of (H, W, C) `shape` have the reference's size."""
        if self.shape is not None and shape != self.shape:
            remedy = (
                "one channel against three: image files are read as RGB, with --grey (of evaluations.evaluate and "
                "evaluations.reference) as grey"
                if shape[:2] == self.shape[:2]
                else "give a reference of that size"
            )
            raise UserError(
                f"{name}: images are {_size(shape)}, those of {self.name} are {_size(self.shape)}; {remedy}"
            )

    def describe(self) -> dict[str, Any]:
        """Its part of metrics.json."""
        return {
            "name": self.name,
            "sha256": self.digest,
            "statistics": self.origin,
            "num_images": 0 if self.pool is None else len(self.pool),
            **({"classifier": self.classifier.about} if self.classifier is not None else {}),
        }


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _stored(archive: NpzArchive) -> tuple[Statistics, Statistics | None]:
    """`mu`, `sigma` and, if present, `mu_s`, `sigma_s`, as float64."""
    import torch

    from evaluations.metrics import Statistics

    pairs = []
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        # a pair is complete or absent; only sFID needs the second
        present = {mean, covariance} & archive.names
        if len(present) == 1:
            raise UserError(f"{archive.path} holds {present.pop()} but not its partner of {mean} and {covariance}")
        if not present:
            continue
        headers = [archive.header(name) for name in (mean, covariance)]
        first, second = (head.shape for head in headers)
        if len(first) != 1 or second != first * 2 or any(head.dtype.kind not in "fiu" for head in headers):
            raise UserError(
                f"{archive.path}: {mean} {first} and {covariance} {second} are not a mean (D,) and covariance (D, D); "
                f"get the file again"
            )
        pair = Statistics(*(torch.from_numpy(archive.read(name).astype(np.float64)) for name in (mean, covariance)))
        # `metrics.frechet` refuses such values too, but cannot name the file
        if not (pair.mean.isfinite().all() and pair.covariance.isfinite().all()):
            raise UserError(f"{archive.path}: {mean} or {covariance} holds NaN or infinite values; get the file again")
        pairs.append(pair)
    if "mu" not in archive.names:
        raise UserError(f"{archive.path} holds mu_s and sigma_s without mu and sigma")
    return pairs[0], pairs[1] if len(pairs) > 1 else None


class About(TypedDict):
    """`about` of a compact reference."""

    name: str
    sha256: str
    features: str
    weights_sha256: str | None
    shape: list[int] | None
    statistics: str
    classifier: NotRequired[classifiers.AboutClassifier]


def with_classifier(reference: Reference, path: Path | str) -> Reference:
    """The reference with a classifier fitted to the features in `path`, a compact reference of training images.

    Raises UserError if that file holds other features, or no labels.
    """
    train, pool, labels = read_compact(path), reference.pool, reference.labels
    require(
        pool is not None and labels is not None,
        "--classifier measures itself on the reference: give --images in class folders",
    )
    assert pool is not None and labels is not None
    require(
        (train.features, train.weights) == (reference.features, reference.weights),
        f"--classifier {path} holds {train.features} features, or those of other weights: make it as this reference",
    )
    require(train.digest != reference.digest, f"--classifier {path} is of the same images: give training images")
    weight, bias, penalty = classifiers.fit(path, train.pool, train.labels)
    about: classifiers.AboutClassifier = {
        "kind": f"logistic regression on {train.features} features",
        "trained_on": train.name,
        "sha256": train.digest,
        "num_images": 0 if train.pool is None else len(train.pool),
        "penalty": penalty,
        "accuracy": classifiers.accuracy(weight, bias, pool, labels),
    }
    return dataclasses.replace(reference, classifier=classifiers.Classifier(weight, bias, about))


def read_compact(path: Path | str) -> Reference:
    """A reference that this command wrote, whatever its features. Raises UserError for any other file."""
    import torch

    archive = NpzArchive(path)
    require(
        "about" in archive.names,
        f"{path} was not written by evaluations.reference; make one with it for the wanted extractor",
    )
    heads = {name: archive.header(name) for name in archive.names}
    try:
        text = heads["about"].shape == () and heads["about"].dtype.kind == "U"
        content = json.loads(str(archive.read("about"))) if text else None
    except ValueError as error:
        raise UserError(f"{archive.path}: about is not JSON ({error}); make the reference again") from error
    about = schema.checked(About, content, f"{archive.path}: about", "make it again")
    first, second = _stored(archive)
    # the archive may come from anywhere: its arrays must fit each other before one is read
    width, pooled, labelled = len(first.mean), heads.get("pool"), heads.get("labels")
    finite = f"{archive.path}: pool must be finite features of {width} numbers an image; make it again"
    require(pooled is None or (pooled.shape[1:] == (width,) and pooled.dtype.kind == "f"), finite)
    require(
        labelled is None or (pooled is not None and labelled.shape == pooled.shape[:1] and labelled.dtype == np.int64),
        f"{archive.path}: labels must be whole numbers, one for each image of pool; make it again",
    )
    pool, labels = (torch.from_numpy(archive.read(name)) if name in heads else None for name in ("pool", "labels"))
    require(pool is None or bool(pool.isfinite().all()), finite)
    return Reference(
        statistics=first,
        spatial=second,
        pool=pool,
        labels=labels,
        name=about["name"],
        digest=about["sha256"],
        features=about["features"],
        weights=about["weights_sha256"],
        origin=about["statistics"],
        shape=None if about["shape"] is None else tuple(about["shape"]),
        classifier=classifiers.read(archive, about.get("classifier"), width),
    )


def open_pair(
    reference: str, options: FeatureOptions, accelerator: Accelerator, batch_size: int = 64, grey: bool = False
) -> tuple[Reference, Extractor]:
    """A reference and its extractor, on the accelerator's device. Every process must call it."""
    from evaluations.extractors import open_extractor

    with accelerator.main_process_first():  # which downloads the weights
        extractor = open_extractor(options, accelerator.device)
    return Reference.open(reference, extractor, accelerator=accelerator, batch_size=batch_size, grey=grey), extractor


@dataclass(frozen=True, kw_only=True)
class Options:
    images: str = option(
        help="real images: .npz (arr_0, with or without statistics), folder, ZIP or latent set", heading="images"
    )
    out: str = option(help="the reference file to write (.npz)")
    resolution: int | None = option(
        None, within="[1, inf)", help="crop and scale image files to this size (default: as they are)"
    )
    grey: bool = option(False, help="one channel instead of RGB, of image files")
    workers: int | None = option(
        None, within="[0, inf)", help="decoding processes for --resolution (default: the CPU cores)"
    )
    num_images: int | None = option(
        None, within="[1, inf)", help="with --features none: a random choice of this many (default: all, in order)"
    )
    seed: int = option(0, help="seed of that choice")
    scores: FeatureOptions = group(FeatureOptions, without=("mind",))
    keep: int = option(
        10_000,
        within="[4, inf)",
        help="images whose features are kept, for precision and recall; statistics are of all",
    )
    batch_size: int = option(64, within="[1, inf)", help="images per pass through the extractor, on each process")
    classifier: str | None = option(
        None, help="fit a classifier of samples to the features in this file, a reference of training images"
    )

    def __post_init__(self) -> None:
        require(
            self.classifier is None or self.scores.features != IMAGES,
            f"--classifier needs features: choose --features, not {IMAGES}",
        )
        require(
            self.num_images is None or self.scores.features == IMAGES,
            f"--num-images goes with --features {IMAGES}: statistics are of all images; leave out one of them",
        )


IMAGES = "none"  # in place of features: the reference holds the images themselves


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = read(Options, argv, prog="python -m evaluations.reference", description=__doc__)
    files.require_not_read(options.out, [options.images, *filter(None, [options.classifier])])
    if options.scores.features == IMAGES:
        write_images(options)
        return
    from evaluations.extractors import open_extractor
    from runtime import launch

    accelerator = launch.accelerator(project_dir=str(Path(options.out).parent))
    with accelerator.main_process_first():  # which downloads the weights
        extractor = open_extractor(options.scores, accelerator.device)
    reference = Reference.open(
        options.images,
        extractor,
        accelerator=accelerator,
        batch_size=options.batch_size,
        keep=options.keep,
        resolution=options.resolution,
        grey=options.grey,
        workers=options.workers,
    )
    reference.require(extractor)  # --images may be a compact reference, which gets a classifier
    if accelerator.is_main_process:
        if options.classifier is not None:
            reference = with_classifier(reference, options.classifier)
        reference.save(options.out)
        count = reference.describe()["num_images"]
        about = f"{reference.features} statistics {reference.origin}, features of {count} images"
        print(f"wrote {quoted(options.out)}: {about}")
        if reference.classifier is not None:
            fit = reference.classifier.about
            print(f"classifier: {fit['kind']}, {100 * fit['accuracy']:.1f} % of these images")


def write_images(options: Options) -> None:
    """Write the images themselves, with their labels, in ADM's convention."""
    images = open_images(options.images, options.resolution, options.grey, options.workers)
    chosen: Sequence[int] = range(len(images))
    if options.num_images is not None:
        require(
            options.num_images <= len(images),
            f"--num-images {options.num_images}: {options.images} holds {len(images)} images",
        )
        # ascending, as `batches` needs it: the members of an .npz file are read forwards
        chosen = np.sort(Stream(options.seed, "reference").permutation(len(images))[: options.num_images]).tolist()
    # `write_npz` writes a label for each image: 0 if the images have no classes
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    batches = images.batches(chosen, options.batch_size)
    count = math.ceil(len(chosen) / options.batch_size)
    with progress.bar(batches, total=count, desc="reference", unit="batch") as bar:
        write_npz(options.out, bar, labels[list(chosen)], images.shape)
    print(f"wrote {quoted(options.out)}: {len(chosen):,} images of {' x '.join(map(str, images.shape))}")


if __name__ == "__main__":
    errors.run(main)
