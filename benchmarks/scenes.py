"""What a setting of the scenes' dials is to a network: how well plain SiT learns them at the study's length, by learning rate.

    python -m benchmarks.scenes --work runs/dials --out benchmarks/results/scenes.json --colours 0.3 --jitter 0.5

For the dials given: a classifier of such scenes with its held-out accuracy; the floor of the Frechet distance on its features
(two halves of the data, and as many real scenes as there are samples against the rest); then plain SiT at each learning rate,
trained and sampled as rows of `recipes --scale study` are. The study wants a class accuracy between 0.6 and 0.9 and a
Frechet distance of at least five times the floor: room below and above. One line a learning rate; finished work is kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from preprocessing.scenes import Dials
from recipes import rows, scale
from recipes.encoder import train_encoder
from runtime import errors, files
from runtime.errors import require
from runtime.options import group, option, read
from runtime.streams import Stream
from runtime.text import aligned

PLAIN = rows.find("study/SiT-B-2/plain")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement."""

    work: str = option("runs/dials", help="folder of scenes, classifiers and runs")
    out: str | None = option(None, help="JSON file to which the rows are added")
    steps: int = option(scale.find("study").steps(PLAIN, 80), help="steps of plain SiT")
    learning_rates: tuple[float, ...] = option((1e-3, 2e-3, 4e-3), help="learning rates to try")
    count: int = option(8000, help="scenes")
    epochs: int = option(24, help="passes of the classifier")
    dials: Dials = group(Dials)

    def __post_init__(self) -> None:
        require(
            self.steps > 0 and self.epochs > 0 and min(self.learning_rates, default=0) > 0,
            "--steps, --epochs and --learning-rates must be positive",
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = read(Options, words, prog="python -m benchmarks.scenes", description=__doc__)
    told = dataclasses.asdict(options.dials)
    folder = Path(options.work) / hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
    accuracy, lowest = prepare(folder, options)
    found = []
    for rate in options.learning_rates:
        metrics = plain(folder, options, rate)
        found.append(
            {
                "dials": told,
                "steps": options.steps,
                "learning_rate": rate,
                "classifier_accuracy": accuracy,
                **lowest,
                "fd": metrics["fd"],
                "class_accuracy": metrics["class_accuracy"],
                "fd_over_floor": metrics["fd"] / lowest["floor"],
            }
        )
    lines = [["learning rate", "class accuracy", "Frechet", "floor", "of as many", "times the floor"]]
    lines += [
        [
            f"{row['learning_rate']:g}",
            f"{row['class_accuracy']:.3f}",
            f"{row['fd']:.2f}",
            f"{row['floor']:.3f}",
            f"{row['floor_of_samples']:.2f}",
            f"{row['fd_over_floor']:.1f}",
        ]
        for row in found
    ]
    print(f"\nclassifier: {accuracy:.3f} of unseen handwriting\n{aligned(lines)}")
    if options.out:
        path = Path(options.out)
        before = files.read_json(path)["rows"] if path.is_file() else []
        known = {(json.dumps(row["dials"]), row["steps"], row["learning_rate"]): row for row in [*before, *found]}
        command = shlex.join(["python", "-m", "benchmarks.scenes", *words])
        files.write_json(path, {**measure.environment(command), "rows": list(known.values())})


def prepare(folder: Path, options: Options) -> tuple[float, dict[str, float]]:
    """Scenes and classifier in `folder`; the classifier's accuracy, and the two floors of the Frechet distance."""
    import torch

    from evaluations.features import Timm
    from evaluations.metrics import frechet, statistics
    from preprocessing import scenes

    flags = [
        word
        for field in dataclasses.fields(Dials)
        for value in [getattr(options.dials, field.name)]
        for word in (f"--{field.name}", *(map(str, value) if isinstance(value, tuple) else [str(value)]))
    ]
    scenes.main(["--out", str(folder / "scenes"), "--count", str(options.count), *flags])
    accuracy = train_encoder(folder / "encoder", options.epochs, options.dials)
    drawn = scenes.Scenes(options.dials, options.count)
    extractor = Timm(f"timm:{folder / 'encoder'}")
    images = torch.from_numpy(np.stack([drawn.draw(index)[0] for index in range(options.count)]))
    with torch.no_grad():
        features = torch.cat([extractor(part).pool for part in images.split(500)])
    order = torch.from_numpy(Stream(0, "floor").permutation(options.count))

    def apart(at: int) -> float:
        return frechet(statistics(features[order[:at]]), statistics(features[order[at:]]))

    return accuracy, {"floor": apart(options.count // 2), "floor_of_samples": apart(1000)}


def plain(folder: Path, options: Options, rate: float) -> dict[str, Any]:
    """Plain SiT at one learning rate: trained, sampled and scored, or what an earlier call found."""
    import generate
    import train

    size = scale.find("study")
    run = folder / "exps" / f"lr-{rate:g}-{options.steps}"
    out = folder / "scores" / run.name
    if not (out / "metrics.json").is_file():
        words = list(size.train_words(PLAIN))
        words[words.index("--learning-rate") + 1] = str(rate)
        train.main(
            [
                *words,
                "--data-dir",
                str(folder / "scenes"),
                "--output-dir",
                str(run.parent),
                "--exp-name",
                run.name,
                "--max-train-steps",
                str(options.steps),
            ]
        )
        ((_, preset),) = size.presets(PLAIN)
        generate.main(
            [
                "--ckpt",
                f"{run}@{options.steps}",
                *preset,
                "--reference",
                str(folder / "scenes"),
                "--features",
                f"timm:{folder / 'encoder'}",
                "--out",
                str(out),
            ]
        )
    return files.read_json(out / "metrics.json")["metrics"]


if __name__ == "__main__":
    errors.run(main)
