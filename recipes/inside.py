"""What networks know inside: `evaluations.probe` on the same four checkpoints of every seed.

They are the teacher of stage 2, plain SiT after as many epochs, and plain SiT and stage 2 at the end. Photographs
of clothes have silhouettes, which turns both of the paper's criteria into numbers: the class from pooled tokens, the
silhouette from single tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from recipes import chain, rows
from recipes.scale import Scale
from runtime import files, schema
from runtime.errors import require
from runtime.schema import Number
from runtime.text import spread

# Name in the tables -> row of `photographs` and epochs.
LOOKED_AT = {
    "plain, 40 epochs": ("plain", 40),
    "stage 1, 40 epochs (the teacher)": ("stage1", 40),
    "plain, 80 epochs": ("plain", 80),
    "stage 2, 80 epochs": ("guided", 80),
}
WORDS = ("--t", "0.3", "0.7", "--omega", "3", "10", "30", "--items", "1500")


def probe(scale: Scale, seed: int, work: Path, results: Path) -> Path:
    """Probe the four checkpoints of one seed, unless that is done; returns the file.

    Raises UserError if a checkpoint is missing.
    """
    from evaluations import probe

    target = results / "probes" / f"{scale.name}-s{seed}.json"
    if target.is_file():
        return target
    names = {}
    for name, (key, epochs) in LOOKED_AT.items():
        row = rows.find(f"photographs/SiT-B-2/{key}")
        run, step = chain.build(row, scale, seed, work).run, scale.steps(row, epochs)
        at = run / "checkpoints" / f"{step:07d}"
        require(at.is_dir(), f"{at} is missing: python -m recipes run {row.name} --scale {scale.name} --seeds {seed}")
        names[f"{run}@{step}"] = name
    plain = rows.find("photographs/SiT-B-2/plain")
    data, out = work / "data" / scale.data(plain), work / "probes" / f"seed{seed}"
    words = ["--ckpt", *names, "--data-dir", data, "--masks", work / "fashion" / "train-masks.npz"]
    probe.main([str(word) for word in (*words, *WORDS, "--seed", seed, "--out", out)])
    probed = files.read_json(out / "probe.json")
    # the probe calls a checkpoint by its folder; the tables call it by its method and age
    named = {checkpoint.split("/")[-1]: name for checkpoint, name in names.items()}
    probed["rows"] = [{**row, "checkpoint": named.get(row["checkpoint"])} for row in probed["rows"]]
    probed["checkpoints"] = {named[checkpoint]: facts for checkpoint, facts in probed["checkpoints"].items()}
    del probed["recommended"]  # names a folder of this machine
    files.write_json(target, probed)
    return target


# What is read of a seed's file.
class Probe(TypedDict):
    checkpoint: str | None
    features: str
    omega: float | None
    block: int | None
    accuracy: Number
    knn: Number
    miou: Number


class Probes(TypedDict):
    rows: list[Probe]


def load(results: Path, scale: str = "photographs") -> list[Probes]:
    """The probes of every seed. Raises UserError if a file has another form."""
    return [schema.read(Probes, file) for file in sorted((results / "probes").glob(f"{scale}-s*.json"))]


def summary(probes: Sequence[Probes], block: int = 4) -> list[list[str]]:
    """A line of cells for each network's features at one block: means over times, then mean ± deviation over seeds."""

    def cell(metric: Literal["accuracy", "knn", "miou"], *features: object) -> str:
        by_seed = [
            [
                row[metric]
                for row in probed["rows"]
                # features without blocks belong to every block
                if (row["checkpoint"], row["features"], row["omega"]) == features and row["block"] in (None, block)
            ]
            for probed in probes
        ]
        return spread([statistics.mean(values) for values in by_seed if values], 3)

    lines = [["features", "class, linear probe", "class, nearest neighbours", "mask, mIoU"]]
    every = [(row["checkpoint"], row["features"], row["omega"]) for probed in probes for row in probed["rows"]]
    for network, features, omega in dict.fromkeys(every):
        name = features if network is None else f"{network}: f_{features}"
        name += "" if omega is None or network is None else f", omega {omega:g}"
        key = (network, features, omega)
        lines.append([name, cell("accuracy", *key), cell("knn", *key), cell("miou", *key)])
    return lines
