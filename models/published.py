"""Published numbers with their source and protocol: the rows of `published.csv`.

`status` is `published` for the rows of the paper's tables, in the paper's words, and `reported` for numbers that the
authors of other methods report of their own method. None of them was measured with this code.
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

    method: str  # an alignment (`none`: plain training, `guided`: the paper's method), or another model family
    variant: str
    model: str
    epochs: int | None
    resolution: int
    guidance: str  # `none`, a description of classifier-free guidance, or `cfg not known`
    sampler: str
    samples: int
    flips: bool | None  # whether the authors trained with random flips (a latent set of two views)
    metrics: dict[str, float]  # those of METRICS that were printed
    source: str
    status: str
    device_hours: float | None  # of training, stage 1 left out

    @property
    def system(self) -> str:
        """Network and method in a few words."""
        method = "" if self.model.startswith(self.method) else f" + {self.method}"
        return f"{self.model}{method}{self.variant and f' ({self.variant})'}"

    @property
    def parameters(self) -> int | None:
        """Millions of parameters, as Table 1 prints them."""
        return PARAMETERS.get(self.model)

    def __str__(self) -> str:
        """Its numbers, how they were made, and where they are printed."""
        numbers = ", ".join(f"{name} {value:g}" for name, value in self.metrics.items())
        numbers = numbers or f"{self.device_hours:g} device hours"
        return f"{numbers} ({self.protocol()}; {self.source})"

    @property
    def comparable(self) -> bool:
        """Whether its guidance is known, without which samples of ours cannot be compared with it."""
        return self.guidance != "cfg not known"

    def protocol(self) -> str:
        """How the number was made, in a few words."""
        flips = "" if self.flips is None else f"; trained with{'' if self.flips else 'out'} flips"
        guidance = "no guidance" if self.guidance == "none" else self.guidance
        count = "" if self.samples in (0, 50_000) else f"; {self.samples:,} samples"
        return f"{self.sampler}{flips}; ImageNet {self.resolution}, {guidance}{count}"


METRICS = ("fid", "sfid", "is", "precision", "recall")
PARAMETERS = {"SiT-B/2": 130, "SiT-L/2": 458, "SiT-XL/2": 675, "LightningDiT-B/1": 130, "LightningDiT-XL/1": 675}


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
                device_hours=float(row["device_hours"]) if row["device_hours"] else None,
            )
            for row in csv.DictReader(handle)
        )


def find(**fields: Any) -> list[Published]:
    """The rows whose fields have these values."""
    return [row for row in rows() if all(getattr(row, name) == value for name, value in fields.items())]


def first(**fields: Any) -> Published | None:
    """The first row with these values, or None. Rows that a method's own authors report come first.

    Those have a protocol, which the paper's tables leave out.
    """
    return min(find(**fields), key=lambda row: row.status != "reported", default=None)
