"""FDr: the Frechet distance of samples in units of that between real images, averaged over extractors.

    FDr = mean over extractors of FD(samples, train) / FD(val, train)          (FD-Loss, arXiv 2604.28190)

    python -m evaluations.reference --images imagenet/train --resolution 256 --features inception --out train/inc.npz
    python -m evaluations.reference --images imagenet/val --resolution 256 --features inception --out val/inc.npz
    python -m evaluations.fdr --samples samples/stage2 --train train --val val

`--train` and `--val` are folders with one reference for each extractor, as that command writes them. The samples go
through each extractor in turn. FDr6 is the mean over six extractors (`SIX`), each with the pooling and the side of its
authors' code: Inception, and five networks that `fdr:NAME@SIDE` names. Without `--val` their published normalisers
apply, which belong to the training and validation sets of ImageNet at 256 pixels. A ratio means little without its
normaliser, so each is printed and stored.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import FeatureOptions
from evaluations.evaluate import about, open_samples, samples_file
from evaluations.images import Images
from evaluations.reference import Reference, read_compact
from runtime import errors, files
from runtime.errors import require
from runtime.options import option, read
from runtime.text import aligned, quoted

if TYPE_CHECKING:
    from accelerate import Accelerator

# The extractors of FDr6 with their published FD(val, train) of ImageNet at 256 pixels, rounded as published (0.04 is
# anything from 0.035 to 0.045). The authors computed them in bfloat16, except for Inception, whose training statistics
# are ADM's. Features here are float32.
SIX = {
    "inception": 1.68,
    "fdr:convnextv2_base.fcmae_ft_in22k_in1k@224": 56.87,
    "fdr:vit_large_patch14_dinov2.lvd142m@256": 14.19,
    "fdr:vit_large_patch16_224.mae@224": 0.04,
    "fdr:vit_so400m_patch16_siglip_256.v2_webli@224": 0.60,
    "fdr:vit_large_patch14_clip_224.openai@256": 5.60,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `python -m evaluations.fdr`."""

    samples: str = option(
        help="samples: .npz, a folder that generate.py wrote, or a folder of PNG files", heading="images"
    )
    train: str = option(help="folder of references of the training images, one for each extractor")
    val: str | None = option(
        None, help="folder of references of the validation images (default: published normalisers)"
    )
    inception_weights: str | None = option(None, help="file of the Inception weights (default: downloaded once)")
    batch_size: int = option(64, within="[1, inf)", help="images per pass through an extractor, on each process")
    out: str = option("fdr.json", help="where the result goes", heading="output")

    def __post_init__(self) -> None:
        require(not Path(self.out).is_dir(), f"--out {self.out} is a folder: name the file to write, such as fdr.json")


def references(folder: str) -> dict[str, Reference]:
    """The references in `folder`, by extractor. Raises UserError if it holds no reference, or two of one extractor."""
    by_name: dict[str, Reference] = {}
    for file in sorted(Path(folder).glob("*.npz")):
        real = read_compact(file)
        require(real.features not in by_name, f"{folder} holds two references of {real.features} features; remove one")
        by_name[real.features] = real
    require(
        bool(by_name),
        f"{folder} holds no reference (.npz); make one for each extractor with python -m evaluations.reference",
    )
    return by_name


def normalisers(train: dict[str, Reference], val: dict[str, Reference] | None) -> dict[str, tuple[float, str]]:
    """FD(val, train) of each extractor, and its origin. Raises UserError if it is unknown or not positive."""
    from evaluations import metrics

    units = {}
    for name, real in train.items():
        if val is None:
            require(
                name in SIX,
                f"there is no published normaliser for {name} features, only for those of FDr6: give --val, a folder "
                f"of references of validation images",
            )
            units[name] = SIX[name], "published, ImageNet at 256 pixels"
            continue
        require(
            name in val,
            f"--val lacks a reference of {name} features, which --train has; make one with evaluations.reference",
        )
        # a distance between features of two networks would be no unit
        other = val[name]
        require(
            None in (real.weights, other.weights) or real.weights == other.weights,
            f"the references of {name} features in --train and --val were made with other weights; build one again",
        )
        distance = metrics.frechet(other.statistics, real.statistics)
        require(
            distance > 1e-9,
            f"the {name} features of --val and --train do not differ: their distance cannot be a unit; give other "
            f"images to one of them",
        )
        units[name] = distance, f"{other.name} against {real.name}"
    return units


def ratios(
    samples: Images,
    train: dict[str, Reference],
    units: dict[str, tuple[float, str]],
    options: Options,
    accelerator: Accelerator,
) -> list[dict[str, Any]]:
    """For each extractor: distance of the samples, normaliser and ratio. Every process must call it."""
    from evaluations import metrics
    from evaluations.collect import collect
    from evaluations.extractors import open_extractor

    rows = []
    for name, real in train.items():
        with accelerator.main_process_first():  # which downloads the weights
            chosen = FeatureOptions(
                features=name, feature_weights=options.inception_weights if name == "inception" else None
            )
            extractor = open_extractor(chosen, accelerator.device)
        real.require(extractor)
        real.require_shape(options.samples, tuple(samples.shape))
        collected = collect(samples, extractor, accelerator=accelerator, batch_size=options.batch_size, title=name)
        distance, (unit, origin) = metrics.frechet(collected.statistics, real.statistics), units[name]
        rows.append(
            {
                "features": name,
                "weights_sha256": extractor.weights,
                "fd": distance,
                "normaliser": unit,
                "normaliser_from": origin,
                "ratio": distance / unit,
                "reference": real.describe(),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command; returns what it wrote."""
    options = read(Options, argv, prog="python -m evaluations.fdr", description=__doc__)
    from runtime import launch

    train = references(options.train)
    require(
        options.inception_weights is None or "inception" in train,
        f"--inception-weights: {options.train} holds no reference of inception features; leave it out",
    )
    # computed before the samples are read: a missing normaliser fails before the first network runs
    units = normalisers(train, None if options.val is None else references(options.val))
    path = samples_file(options.samples)
    files.require_not_read(options.out, [path])
    samples, accelerator = open_samples(path), launch.accelerator(project_dir=str(Path(options.out).parent))
    rows = ratios(samples, train, units, options, accelerator)
    # the name has the number of extractors alone; `six` says whether they are those of the published FDr6
    name = f"fdr{len(rows)}"
    result: dict[str, Any] = {
        "metrics": {name: statistics.fmean(row["ratio"] for row in rows)},
        "six": set(train) == set(SIX),
        "extractors": rows,
        "num_samples": len(samples),
        "samples": about(path, samples),
    }
    if accelerator.is_main_process:
        files.write_json(options.out, result)
        lines = [("features", "FD", "normaliser", "ratio", "normaliser from")]
        lines += [
            (
                row["features"],
                f"{row['fd']:.4f}",
                f"{row['normaliser']:.4f}",
                f"{row['ratio']:.3f}",
                row["normaliser_from"],
            )
            for row in rows
        ]
        print(aligned([*lines, (name, "", "", f"{result['metrics'][name]:.3f}", "")], left=(0, 4), rule=False))
        if not result["six"]:
            print("note: these are not the six extractors of FDr6: the mean does not compare with published ones")
        print(f"{len(samples):,} samples; written to {quoted(options.out)}", flush=True)
    return result


if __name__ == "__main__":
    errors.run(main)
