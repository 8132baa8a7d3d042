"""Score samples against a reference: prints a table and writes metrics.json with all that the numbers depend on.

    python -m evaluations.evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m evaluations.evaluate --samples seed0.npz seed1.npz seed2.npz --reference imagenet256.npz
    accelerate launch -m evaluations.evaluate ...        # the same numbers, features extracted by all GPUs

Several files are several seeds of one setting: the table has a row for each, then mean and standard deviation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import PRECISION_MODES, FeatureOptions
from evaluations.images import Images, open_images
from runtime import errors, files
from runtime.errors import UserError, require
from runtime.npy import NpzArchive
from runtime.options import group, option, read
from runtime.text import aligned
from sampling import store

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Options:
    samples: tuple[str, ...] = option(
        help="samples: .npz (arr_0 uint8 (N, H, W, C), perhaps labels), a folder that "
        "generate.py wrote, or a folder of PNG files; several are several seeds",
        heading="images",
    )
    reference: str = option(help="reference: ADM's .npz, one made by evaluations.reference, or any images")
    grey: bool = option(False, help="read image files as one channel instead of RGB, samples and reference alike")
    scores: FeatureOptions = group(FeatureOptions)
    precision_recall_mode: str | None = option(
        None,
        choices=PRECISION_MODES,
        help="distances of precision and recall (default adm_fp16 for inception, as in published tables, else fp32)",
        heading="metrics",
    )
    shuffle: int | None = option(None, help="shuffle by this seed before the Inception Score (default: in file order)")
    batch_size: int = option(64, within="[1, inf)", help="images per pass through the extractor, on each process")
    out: str = option("metrics.json", help="where the result goes", heading="output")

    def __post_init__(self) -> None:
        require(
            not Path(self.out).is_dir() and Path(self.out).suffix != ".safetensors",
            f"--out {self.out} is a folder, or where the statistics go: name the file to write, such as metrics.json",
        )


def samples_file(path: str) -> str:
    """`path`, or its samples.npz if it is a folder that generate.py wrote, whose grid.png is not a sample.

    Raises UserError if such a folder is unfinished.
    """
    require(store.begun(Path(path)) is None, f"the samples in {path} are unfinished: run generate.py again")
    archive = Path(path) / "samples.npz"
    return str(archive) if archive.is_file() else path


def open_samples(path: str, grey: bool = False) -> Images:
    """Open samples: an .npz file or a folder. Raises UserError if `path` is a reference."""
    if Path(path).suffix == ".npz" and {"mu", "sigma", "about"} & NpzArchive(path).names:
        raise UserError(f"{path} holds stored statistics (mu, sigma); it is a reference, not samples")
    return open_images(path, grey=grey)


def open_all(paths: Sequence[str], grey: bool = False) -> list[Images]:
    """The sample sets of several seeds. Raises UserError if their counts differ: their metrics have no common mean."""
    samples = [open_samples(path, grey) for path in paths]
    for path, images in zip(paths, samples, strict=True):
        require(
            len(images) == len(samples[0]),
            f"{path} holds {len(images)} samples and {paths[0]} {len(samples[0])}: numbers of different counts cannot "
            f"be compared; score them one by one",
        )
    return samples


def about(path: str, samples: Images) -> dict[str, Any]:
    """A result's description of its samples: name, digest and the settings in the JSON beside them.

    Raises UserError if that JSON is damaged or of other samples: their settings would stand beside this score.
    """
    sidecar, digest = Path(path).with_suffix(".json"), samples.digest()
    settings = store.read_record(sidecar) if sidecar.is_file() else None
    require(
        settings is None or settings.get("samples") == digest,
        f"{sidecar} describes other samples than {path}: their digests differ; put the right file there, or remove it",
    )
    return {"name": samples.name, "sha256": digest, "settings": settings}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of metrics.json: one run, or the mean over several with their standard deviation (divisor n - 1)."""
    if len(runs) == 1:
        return runs[0]
    values = {name: [run["metrics"][name] for run in runs] for name in runs[0]["metrics"]}
    return {
        "metrics": {name: float(np.mean(all)) for name, all in values.items()},
        "std": {name: float(np.std(all, ddof=1)) for name, all in values.items()},
        "num_samples": runs[0]["num_samples"],
        "reference": runs[0]["reference"],
        "runs": list(runs),
    }


def table(result: dict[str, Any]) -> str:
    """A result as an aligned table: a line for each run, then mean and standard deviation."""
    runs = result.get("runs", [result])
    lines = [("samples", "N", *runs[0]["metrics"])]
    rows = [(run["samples"]["name"], run["num_samples"], run["metrics"]) for run in runs]
    if len(runs) > 1:
        rows += [("mean", result["num_samples"], result["metrics"]), ("std", "", result["std"])]
    lines += [(name, str(count), *(f"{value:.4f}" for value in values.values())) for name, count, values in rows]
    return aligned(lines, rule=False)


def report(result: dict[str, Any], path: Path | str, projected: Sequence[dict[str, Tensor]]) -> None:
    """Write metrics.json to `path` and print the result: table, reference and warnings.

    Beside it goes a .safetensors file with the projected statistics (`Scorer.projected`) of each run, as `RUN.NAME`.
    """
    statistics = Path(path).with_suffix(".safetensors")
    files.save_tensors(statistics, {f"{n}.{name}": x for n, part in enumerate(projected) for name, x in part.items()})
    files.write_sealed(path, {**result, "statistics": files.digest(statistics)})
    runs, reference = result.get("runs", [result]), result["reference"]
    print(table(result))
    print(
        f"reference {reference['name']}: statistics {reference['statistics']}, {reference['num_images']} images; "
        f"precision and recall in {runs[0]['precision_recall']['mode']}; written to {path}",
        flush=True,
    )
    for warning in dict.fromkeys(warning for run in runs for warning in run["warnings"]):
        print(f"warning: {warning}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = read(Options, argv, prog="python -m evaluations.evaluate", description=__doc__)
    from evaluations.collect import collect
    from evaluations.reference import open_pair
    from evaluations.score import Scorer
    from runtime import launch

    paths = [samples_file(path) for path in options.samples]
    files.require_not_read(options.out, [*paths, options.reference])
    samples = open_all(paths, options.grey)
    described = [about(path, images) for path, images in zip(paths, samples, strict=True)]
    accelerator = launch.accelerator(project_dir=str(Path(options.out).parent))
    reference, extractor = open_pair(options.reference, options.scores, accelerator, options.batch_size, options.grey)
    scorer = Scorer(
        reference,
        extractor,
        accelerator=accelerator,
        precision_recall_mode=options.precision_recall_mode,
        shuffle=options.shuffle,
        mind=options.scores.mind,
    )
    # all files are checked before the first is scored: an extractor runs for minutes
    for path, images in zip(paths, samples, strict=True):
        reference.require_shape(path, images.shape)
    runs, projected = [], []
    for images, description in zip(samples, described, strict=True):
        collected = collect(
            images, extractor, accelerator=accelerator, batch_size=options.batch_size, title=images.name
        )
        runs.append(scorer.compare(collected) | {"samples": description})
        projected.append(scorer.projected)
    if accelerator.is_main_process:
        report(summary(runs), options.out, projected)


if __name__ == "__main__":
    errors.run(main)
