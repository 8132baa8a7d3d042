"""What the study's networks know inside: `evaluations.probe` on the same four checkpoints of every seed.

The teacher of stage 2, plain SiT of its age, and plain SiT and stage 2 at the end; scenes have masks, so that both of the
paper's criteria are numbers: the class from pooled tokens, the ink from single ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import TypedDict

from recipes import chain, rows
from recipes.scale import Scale
from runtime import files, schema
from runtime.errors import require
from runtime.schema import Number
from runtime.text import spread

LOOKED_AT = {
    "plain, 40 epochs": ("plain", 40),
    "stage 1, 40 epochs (the teacher)": ("stage1", 40),
    "plain, 80 epochs": ("plain", 80),
    "stage 2, 80 epochs": ("full", 80),
}
"""What it is called -> row of the study and epochs."""
WORDS = ("--t", "0.3", "0.7", "--omega", "3", "10", "30", "--items", "1500")


def probe(scale: Scale, seed: int, work: Path, results: Path) -> Path:
    """Probe the four checkpoints of one seed, unless that is done; returns the file.

    Raises:
        UserError: a checkpoint that is not there yet.
    """
    from evaluations import probe

    target = results / "probes" / f"{scale.name}-s{seed}.json"
    if target.is_file():
        return target
    names = {}
    for said, (key, epochs) in LOOKED_AT.items():
        row = rows.find(f"study/SiT-B-2/{key}")
        run = chain.build(row, scale, seed, work).run
        at = run / "checkpoints" / f"{scale.steps(row, epochs):07d}"
        require(at.is_dir(), f"{at} is missing: python -m recipes run {row.name} --scale {scale.name} --seeds {seed}")
        names[f"{run}@{scale.steps(row, epochs)}"] = said
    data, encoder = work / "data" / scale.data(rows.find("study/SiT-B-2/plain")), scale.encoder_words(work)[1:2]
    probe.main(
        [
            "--ckpt",
            *names,
            "--data-dir",
            str(data),
            "--masks",
            str(data / "masks.npz"),
            *(("--encoder", *encoder) if encoder else ()),
            *WORDS,
            "--seed",
            str(seed),
            "--out",
            str(work / "probes" / f"seed{seed}"),
        ]
    )
    found = files.read_json(work / "probes" / f"seed{seed}" / "probe.json")
    named = {name.split("/")[-1]: said for name, said in names.items()}
    files.write_json(
        target,
        {
            **found,
            "rows": [{**row, "checkpoint": named.get(row["checkpoint"])} for row in found["rows"]],
            "checkpoints": {named[name]: about for name, about in found["checkpoints"].items()},
        },
    )
    return target


class Probe(TypedDict):
    """What is read of a row."""

    checkpoint: str | None
    features: str
    omega: float | None
    block: int | None
    accuracy: Number
    knn: Number
    miou: Number


class Probes(TypedDict):
    """What is read of a seed's file."""

    rows: list[Probe]


def load(results: Path, scale: str = "study") -> list[Probes]:
    """The probes of every seed. Raises UserError where a file is none."""
    return [schema.read(Probes, file) for file in sorted((results / "probes").glob(f"{scale}-s*.json"))]


def summary(probes: Sequence[Probes], block: int = 4) -> list[list[str]]:
    """Lines of cells: each network's features at one block, mean over seeds and times, with the standard deviation over seeds."""

    def of(metric: str, network: str | None, features: str, omega: float | None) -> str:
        seeds = []
        for one in probes:
            values = [
                row[metric]
                for row in one["rows"]
                if (row["checkpoint"], row["features"], row["omega"]) == (network, features, omega)
                and row["block"] in (None, block)
            ]
            if values:
                seeds.append(statistics.mean(values))
        return spread(seeds, 3)

    seen = {(row["checkpoint"], row["features"], row["omega"]): None for one in probes for row in one["rows"]}
    lines = [["features", "class, linear probe", "class, nearest neighbours", "mask, mIoU"]]
    for network, features, omega in seen:
        said = (
            features
            if network is None
            else f"{network}: f_{features}" + (f", omega {omega:g}" if omega is not None else "")
        )
        lines.append([said, *(of(metric, network, features, omega) for metric in ("accuracy", "knn", "miou"))])
    return lines
