"""One experiment as a row: what is trained, from which teacher, how it is sampled, which published number it has."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from models import published
from models.published import Published

# Methods with an external encoder.
ENCODED = ("repa", "haste")
# Methods that run under --preset paper, which sets the precision.
PRESET = ("dispersive", "layersync")
# For methods whose authors do not clip, where only the alignment may differ.
CLIP = "--max-grad-norm 1"
# Seeds of the rows that fit a CPU.
FIVE, TEN = tuple(range(5)), tuple(range(10))
# Seeds on which settings are tuned, and no others; no claim may use them.
TUNING = (100, 101)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The guiding model of a stage-2 row: how it is trained, and for how long."""

    method: str = "latent"
    epochs: float = 40
    # Further options of its training command.
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One experiment."""

    # What the user types, e.g. table1/SiT-B-2/guided-80.
    name: str
    table: str
    # none, guided (stage 2), or a name of --align.
    method: str
    model: str
    # Of `config.RECIPES`, as its authors trained.
    recipe: str
    epochs: float
    resolution: int = 256
    teacher: Teacher | None = None
    # Further options of its training command.
    words: tuple[str, ...] = ()
    # Epochs after which its alignment ends; 0 is never, None the method's own rule.
    stop: float | None = None
    # If set, it branches after these epochs from the same run without that stop.
    trunk: float | None = None
    # Sampling presets; each gives one number under a protocol of its own. The first counts: it alone gets a verdict.
    presets: tuple[str, ...] = ("table1-sde", "table1-ode")
    # Further options of sampling, where the scale has no preset; each entry gives one number.
    sampling: tuple[str, ...] = ("",)
    # Epochs at which it is scored; empty for the end alone.
    at: tuple[float, ...] = ()
    # Which of the published rows of this method it is (`models.published`).
    variant: str = ""
    # The seeds that a number of it is over. Those without a record are missing in tables, and others are not counted.
    seeds: tuple[int, ...] = (0, 1, 2)
    # The row whose setting it tries, on the seeds of TUNING; empty if it is no trial.
    tunes: str = ""

    @property
    def key(self) -> str:
        """What it is called within its table and model."""
        return self.name.split("/")[-1]

    @property
    def family(self) -> str:
        """sit or lightningdit."""
        return "lightningdit" if self.model.startswith("LightningDiT") else "sit"

    @property
    def encoded(self) -> bool:
        """Whether it, or its teacher, is trained with an external encoder."""
        return bool({self.method, self.teacher.method if self.teacher else ""} & set(ENCODED))

    @property
    def extras(self) -> list[str]:
        """What its latent set holds beside the latents: images for an external encoder, flipped views if published."""
        # LightningDiT's sets hold them always
        flips = self.family == "sit" and self.published is not None and bool(self.published.flips)
        return ["images"] * self.encoded + ["flips"] * flips

    def of_teacher(self) -> Row:
        """The training of its guiding model. Rows with equal teachers get equal runs."""
        assert self.teacher is not None
        return replace(
            self,
            method=self.teacher.method,
            epochs=self.teacher.epochs,
            words=self.teacher.words,
            teacher=None,
            stop=None,
            trunk=None,
            at=(),
        )

    @property
    def published(self) -> Published | None:
        """Its row of `published.csv` from where its table is printed; None if no number is printed there."""
        ours = (self.method, self.model, self.epochs, self.resolution, self.variant)
        return next(
            (
                row
                for row in printed(self.table)
                if (row.method, row.model, row.epochs, row.resolution, row.variant) == ours
            ),
            None,
        )


# Where the numbers of a table are printed, by a part of `Published.source`.
PLACES = {
    **{f"table{number}": (f"2601.07773, Table {number}",) for number in range(1, 6)},
    "section4.5": ("2601.07773, section 4.5",),
    "peers": ("2609.34732", "2609.35292", "2607.02508", "2603.06507"),
}


@functools.cache
def printed(table: str) -> tuple[Published, ...]:
    """The published numbers of a table, those of rows and those of systems that cannot be trained here."""
    return tuple(row for row in published.rows() if any(place in row.source for place in PLACES.get(table, ())))


def new(table: str, model: str, method: str, epochs: float, key: str = "", words: str = "", **more: Any) -> Row:
    """A row of `table`, called after `key` (default: method and epochs), with its family's recipe and teacher."""
    return Row(
        name="/".join([table, model.replace("/", "-"), key or f"{method}-{epochs:g}"]),
        table=table,
        method=method,
        model=model,
        epochs=epochs,
        words=tuple(words.split()),
        **{
            "recipe": "lightningdit" if model.startswith("LightningDiT") else "sit",
            "teacher": Teacher() if method == "guided" else None,
            **more,
        },
    )


def ablation(table: str, key: str, method: str, words: str = "", epochs: float = 80, **more: Any) -> Row:
    """A row of SiT-B/2 whose FID is of 10,000 samples."""
    return new(table, "SiT-B/2", method, epochs, key, words, presets=("fid10k",), **more)
