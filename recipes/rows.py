"""The experiments of the paper, as rows: what is trained, from which teacher, how it is sampled, and which published number it is.

Every row of Tables 1 to 5 that can be trained here, and every curve of Figs. 4 and 8, is listed by the functions below,
not scripted one by one. Epochs are the paper's: 5,000 steps of 256 latents for SiT, 1,250 of 1,024 for LightningDiT.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from models import published
from models.published import Published
from runtime.errors import UserError, nearest

ENCODED = ("repa", "haste")
"""Methods with an external encoder."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The guiding model of a stage-2 row: how it was trained, and for how long."""

    method: str = "latent"
    epochs: float = 40


@dataclass(frozen=True, kw_only=True)
class Row:
    """One experiment."""

    name: str
    """What is typed, e.g. table1/SiT-B-2/guided."""
    table: str
    method: str
    """none, guided (stage 2), or a name of --align."""
    model: str
    epochs: float
    resolution: int = 256
    teacher: Teacher | None = None
    words: tuple[str, ...] = ()
    """Further options of its training command."""
    stop: float | None = None
    """Epochs after which its alignment ends, where a figure says so; None is the method's own rule."""
    trunk: float | None = None
    """Epochs up to which it is the run without that stop, from which it branches."""
    presets: tuple[str, ...] = ("table1-sde", "table1-ode")
    """Sampling presets; each gives one number, in a column of its own."""
    at: tuple[float, ...] = ()
    """Epochs at which a curve is scored; empty for the end alone."""
    variant: str = ""
    """Which of the published rows of this method it is (`models.published`)."""

    @property
    def family(self) -> str:
        """sit or lightningdit."""
        return "lightningdit" if self.model.startswith("LightningDiT") else "sit"

    @property
    def encoded(self) -> bool:
        """Whether it, or its teacher, is trained with an external encoder."""
        return bool({self.method, self.teacher.method if self.teacher else ""} & set(ENCODED))

    def of_teacher(self) -> Row:
        """The training of its guiding model: the same run whatever row asks for it, as far as this one needs it."""
        assert self.teacher is not None
        return replace(
            self,
            method=self.teacher.method,
            epochs=self.teacher.epochs,
            words=(),
            teacher=None,
            stop=None,
            trunk=None,
            at=(),
        )

    @property
    def published(self) -> Published | None:
        """The paper's own row, None where it prints none."""
        number = self.table.removeprefix("table")
        printed = [
            row
            for row in published.find(
                method=self.method,
                model=self.model,
                epochs=int(self.epochs),
                resolution=self.resolution,
                variant=self.variant,
                status="published",
            )
            if f"Table {number}" in row.source
        ]
        return printed[0] if printed and self.table.startswith("table") else None


def _row(table: str, model: str, method: str, epochs: float, key: str = "", **more) -> Row:
    name = "/".join([table, model.replace("/", "-"), key or f"{method}-{epochs:g}"])
    return Row(
        name=name,
        table=table,
        method=method,
        model=model,
        epochs=epochs,
        **{"teacher": Teacher() if method == "guided" else None, **more},
    )


def table1() -> Iterator[Row]:
    """ImageNet 256 without guidance; the sampler is not stated, so each row is sampled both ways."""
    for model, methods in {
        "SiT-B/2": (
            ("none", 120),
            ("none", 80),
            ("repa", 80),
            ("dispersive", 80),
            ("layersync", 80),
            ("latent", 80),
            ("guided", 80),
        ),
        "SiT-L/2": (("none", 80), ("repa", 80), ("dispersive", 80), ("layersync", 80), ("latent", 80), ("guided", 80)),
        "SiT-XL/2": (
            ("none", 800),
            ("none", 120),
            ("none", 80),
            ("repa", 80),
            ("dispersive", 200),
            ("layersync", 200),
            ("latent", 80),
            ("guided", 80),
        ),
    }.items():
        yield from (_row("table1", model, method, epochs) for method, epochs in methods)
    for model, methods in {
        "LightningDiT-B/1": ("none", "latent", "guided"),
        "LightningDiT-XL/1": ("none", "repa", "latent", "guided"),
    }.items():
        yield from (_row("table1", model, method, 64, presets=("lightningdit-64ep-nocfg",)) for method in methods)


def table2() -> Iterator[Row]:
    """ImageNet 256 with guidance, those rows that can be trained here."""
    yield _row("table2", "SiT-XL/2", "none", 1400, presets=("sit-cfg-sde",))
    yield _row("table2", "LightningDiT-XL/1", "none", 800, presets=("lightningdit-800ep",))
    yield _row("table2", "SiT-XL/2", "repa", 800, presets=("repa-cfg",))
    yield _row("table2", "SiT-XL/2", "dispersive", 1200, presets=("dispersive-cfg",))
    yield _row("table2", "SiT-XL/2", "sra", 800, presets=("repa-cfg",))
    yield _row("table2", "SiT-XL/2", "layersync", 800, presets=("sit-cfg-sde",))
    yield _row("table2", "SiT-XL/2", "guided", 400, presets=("self-transcendence-cfg",))
    yield _row("table2", "LightningDiT-XL/1", "guided", 400, presets=("lightningdit-800ep",))


def table3() -> Iterator[Row]:
    """ImageNet 512 with guidance."""
    for method, epochs in (("none", 600), ("repa", 200), ("guided", 100), ("guided", 200)):
        yield _row("table3", "SiT-XL/2", method, epochs, resolution=512, presets=("self-transcendence-cfg-512",))


_B = {"model": "SiT-B/2", "epochs": 80, "presets": ("fid10k",)}


def table4() -> Iterator[Row]:
    """Ablation of the two stages, FID of 10,000 samples."""
    yield _row("table4", method="none", key="plain", variant="table 4", **_B)
    yield _row("table4", method="latent", key="stage1", variant="table 4", **_B)
    yield _row(
        "table4",
        method="guided",
        key="plain-teacher",
        variant="table 4: plain teacher",
        teacher=Teacher(method="none"),
        **_B,
    )
    yield _row("table4", method="guided", key="full", variant="table 4: full", **_B)


def table5() -> Iterator[Row]:
    """Ablation of stage 2 on SiT-B/2, FID of 10,000 samples."""

    def guided(key: str, *words: object, **teacher: object) -> Row:
        return _row(
            "table5",
            method="guided",
            key=key.replace(" ", "-"),
            variant=f"table 5: {key}",
            words=tuple(map(str, words)),
            teacher=Teacher(**teacher),
            **_B,
        )

    yield guided("default")
    for guiding, student in ((8, 4), (8, 8), (6, 6), (10, 6)):
        yield guided(f"blocks {guiding} to {student}", "--guiding-depth", guiding, "--guided-depth", student)
    yield from (guided(f"omega {omega}", "--guide-scale", omega) for omega in (1, 15, 45, 60))
    yield from (guided(f"teacher {epochs * 5}K", epochs=epochs) for epochs in (10, 20, 60))
    yield guided("plain teacher", method="none")
    yield guided("REPA teacher", method="repa")
    yield from (guided(f"lambda {weight}", "--align-weight", weight) for weight in (0.1, 0.3, 0.7, "1.0"))


def figure4() -> Iterator[Row]:
    """FID of 10,000 samples along training: plain, stage 1, stage 2."""
    at = tuple(range(10, 81, 10))
    for method in ("none", "latent", "guided"):
        yield _row("figure4", method=method, key=method, at=at, **_B)


def figure8() -> Iterator[Row]:
    """With and without an early stop: the loss is dropped at a step, and training goes on for 20 epochs."""
    for method in ("repa", "guided"):
        trunk = _row(
            "figure8",
            "SiT-XL/2",
            method,
            80,
            key=f"{method}-no-stop",
            presets=("fid10k",),
            stop=0,
            at=tuple(range(30, 81, 10)),
        )
        yield trunk
        for stop in (10, 20, 40, 60):
            yield replace(
                trunk,
                name=f"figure8/SiT-XL-2/{method}-stop-{stop * 5}K",
                epochs=stop + 20,
                stop=stop,
                trunk=stop,
                at=(),
            )


PLAIN_TOTAL, STAGE1_TOTAL = 146, 120
"""Epochs of the study's plain training and of its stage 1 that cost what 80 epochs of stage 2 do, the teacher's 40 and its passes up
to the stop counted: a head is large beside six blocks of width 128. (Stage 1 has 5 % more: a multiple of ten epochs.)"""


def study() -> Iterator[Row]:
    """What `--scale study` has records of: Table 4 at equal steps and equal compute, and one dial of the method at a time."""

    def row(key: str, method: str, *words: object, epochs: float = 80, **more: object) -> Row:
        return _row("study", "SiT-B/2", method, epochs, key, words=tuple(map(str, words)), presets=("fid10k",), **more)

    yield row("plain", "none", epochs=PLAIN_TOTAL, at=(40, 80, PLAIN_TOTAL))
    yield row("stage1", "latent", epochs=130, at=(40, 80, STAGE1_TOTAL, 130))
    yield row("plain-teacher", "guided", teacher=Teacher(method="none"))
    yield row("full", "guided", at=(40, 80))
    yield from (row(f"omega-{omega}", "guided", "--guide-scale", omega) for omega in (1, 10))
    yield row("young-teacher", "guided", teacher=Teacher(epochs=20))
    yield row("late-stop", "guided", stop=40)
    for share in (3, 2):  # the default is n/6; SiT-B has twelve blocks
        yield row(f"stage1-block-n-{share}", "latent", "--align-depth", 12 // share)


TABLES = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "figure4": figure4,
    "figure8": figure8,
    "study": study,
}


@functools.cache
def rows() -> dict[str, Row]:
    """Every row by its name."""
    return {row.name: row for make in TABLES.values() for row in make()}


def find(name: str) -> Row:
    """The row called `name`. Raises UserError with the nearest name."""
    if name not in rows():
        raise UserError(f"no row is called {name}{nearest(name, rows())}; choose one that python -m recipes list shows")
    return rows()[name]


def of_table(name: str) -> list[Row]:
    """The rows of `table1` ... `figure8`. Raises UserError with the nearest name."""
    if name not in TABLES:
        raise UserError(f"there is no {name}{nearest(name, TABLES)}; there are {', '.join(TABLES)}")
    return [row for row in rows().values() if row.table == name]
