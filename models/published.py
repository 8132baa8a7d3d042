"""Numbers that others have printed, with where they stand and under which protocol: `published.csv`, read as rows.

`status` is `published` for the rows of the paper's own tables, in the paper's own words, and `reported` for what the
authors of other methods report of them. Nothing here was measured with this code.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published result on ImageNet."""

    method: str
    """Name of the alignment (`none` is plain training, `guided` the paper's method), or of another model family."""
    variant: str
    model: str
    epochs: int | None
    resolution: int
    guidance: str
    """`none`, or what is said of classifier-free guidance."""
    sampler: str
    samples: int
    flips: bool | None
    """Whether the authors trained with random flips (a latent set of two views)."""
    metrics: dict[str, float]
    """fid, sfid, is, precision, recall: those that were printed."""
    source: str
    status: str

    def protocol(self) -> str:
        """How the number was made, in a few words."""
        flips = "" if self.flips is None else f"; trained with{'' if self.flips else 'out'} flips"
        guidance = "no guidance" if self.guidance == "none" else self.guidance
        return f"{self.sampler}{flips}; ImageNet {self.resolution}, {guidance}"


METRICS = ("fid", "sfid", "is", "precision", "recall")


@functools.cache
def rows() -> tuple[Published, ...]:
    """Every row of the file, in its order."""
    with open(Path(__file__).with_name("published.csv"), encoding="utf-8", newline="") as handle:
        return tuple(
            Published(
                method=row["method"],
                variant=row["variant"],
                model=row["model"],
                epochs=int(row["epochs"]) if row["epochs"] else None,
                resolution=int(row["resolution"]),
                guidance=row["guidance"],
                sampler=row["sampler"],
                samples=int(row["samples"]),
                flips={"yes": True, "no": False, "": None}[row["flips"]],
                metrics={name: float(row[name]) for name in METRICS if row[name]},
                source=row["source"],
                status=row["status"],
            )
            for row in csv.DictReader(handle)
        )


def find(**wanted: Any) -> list[Published]:
    """The rows whose fields have the `wanted` values."""
    return [row for row in rows() if all(getattr(row, name) == value for name, value in wanted.items())]


def first(**wanted: Any) -> Published | None:
    """The first such row that its own authors report, else that the paper prints; None where there is none.

    Other methods' own numbers come with a protocol, which the paper's tables leave out.
    """
    chosen = find(**wanted)
    return next((row for row in chosen if row.status == "reported"), chosen[0] if chosen else None)
