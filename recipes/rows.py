"""Every experiment, as rows by table.

The functions below list every row of Tables 1 to 5 that can be trained here, every curve of Figs. 4 and 8, the times of
section 4.5, RARE's matched table, the paper's claims and all methods on photographs, and all methods on the digits.
Epochs are the paper's: 5,000 steps of 256 latents for SiT, 1,250 of 1,024 for LightningDiT. Blocks are those of the
paper's network. A scale translates both.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from recipes.photographs import photographs
from recipes.row import CLIP, FIVE, TUNING, Row, Teacher, ablation, new
from runtime.errors import UserError, nearest, require


def table1() -> Iterator[Row]:
    """ImageNet 256 without guidance. The paper does not state the sampler, so each row is sampled both ways.

    What counts is the ODE where others' numbers show it (36.14 and 21.41 are ODE numbers: REPA has 33.0 and 18.8 for
    the same networks under the SDE, LayerSync 36.19 and 21.41 under the ODE), else the SDE of the authors' script.
    """
    sit = {
        "SiT-B/2": "none-120 none-80 repa-80 dispersive-80 layersync-80 latent-80 guided-80",
        "SiT-L/2": "none-80 repa-80 dispersive-80 layersync-80 latent-80 guided-80",
        "SiT-XL/2": "none-800 none-120 none-80 repa-80 dispersive-200 layersync-200 latent-80 guided-80",
    }
    for model, keys in sit.items():
        for method, epochs in (key.split("-") for key in keys.split()):
            row = new("table1", model, method, int(epochs))
            by_ode = row.published is not None and row.published.sampler.startswith("ODE")
            yield replace(row, presets=row.presets[::-1]) if by_ode else row
    lightningdit = {"LightningDiT-B/1": "none latent guided", "LightningDiT-XL/1": "none repa latent guided"}
    for model, methods in lightningdit.items():
        for method in methods.split():
            yield new("table1", model, method, 64, presets=("lightningdit-64ep-nocfg",))


def table2() -> Iterator[Row]:
    """ImageNet 256 with guidance, those rows that can be trained here."""
    for model, recipe, method, epochs, preset in (
        ("SiT-XL/2", "sit", "none", 1400, "sit-cfg-sde"),
        ("LightningDiT-XL/1", "lightningdit-800ep", "none", 800, "lightningdit-800ep"),
        ("SiT-XL/2", "sit", "repa", 800, "repa-cfg"),
        ("SiT-XL/2", "sit", "dispersive", 1200, "dispersive-cfg"),
        ("SiT-XL/2", "sit", "sra", 800, "repa-cfg"),
        ("SiT-XL/2", "sit", "layersync", 800, "sit-cfg-sde"),
        ("SiT-XL/2", "sit", "guided", 400, "self-transcendence-cfg"),
        ("LightningDiT-XL/1", "lightningdit", "guided", 400, "lightningdit-800ep"),
    ):
        yield new("table2", model, method, epochs, recipe=recipe, presets=(preset,))


def table3() -> Iterator[Row]:
    """ImageNet 512 with guidance. That of REPA's and of the paper's numbers is not known: they get that of 256."""
    ours = "self-transcendence-cfg-512"
    for method, epochs, preset in (
        ("none", 600, "sit-cfg-sde"),
        ("repa", 200, "repa-cfg"),
        ("guided", 100, ours),
        ("guided", 200, ours),
    ):
        yield new("table3", "SiT-XL/2", method, epochs, resolution=512, presets=(preset,))


def table4() -> Iterator[Row]:
    """Ablation of the two stages."""
    yield ablation("table4", "plain", "none", variant="table 4")
    yield ablation("table4", "stage1", "latent", variant="table 4")
    plain = Teacher(method="none")
    yield ablation("table4", "plain-teacher", "guided", variant="table 4: plain teacher", teacher=plain)
    yield ablation("table4", "full", "guided", variant="table 4: full")


def table5() -> Iterator[Row]:
    """Ablation of stage 2."""

    def guided(key: str, words: str = "", **teacher: Any) -> Row:
        name, variant = key.replace(" ", "-"), f"table 5: {key}"
        return ablation("table5", name, "guided", words, variant=variant, teacher=Teacher(**teacher))

    yield guided("default")
    for guiding, student in ((8, 4), (8, 8), (6, 6), (10, 6)):
        yield guided(f"blocks {guiding} to {student}", f"--guiding-depth {guiding} --guided-depth {student}")
    yield from (guided(f"omega {omega}", f"--guide-scale {omega}") for omega in (1, 15, 45, 60))
    yield from (guided(f"teacher {epochs * 5}K", epochs=epochs) for epochs in (10, 20, 60))
    yield guided("plain teacher", method="none")
    yield guided("REPA teacher", method="repa")
    yield from (guided(f"lambda {weight}", f"--align-weight {weight}") for weight in (0.1, 0.3, 0.7, "1.0"))


def figure4() -> Iterator[Row]:
    """FID of 10,000 samples along training: plain, stage 1, stage 2."""
    for method in ("none", "latent", "guided"):
        yield ablation("figure4", method, method, at=tuple(range(10, 81, 10)))


def figure8() -> Iterator[Row]:
    """With and without an early stop: the loss is dropped at a step, and training goes on for 20 epochs."""
    for method in ("repa", "guided"):
        key, at = f"{method}-no-stop", tuple(range(30, 81, 10))
        trunk = new("figure8", "SiT-XL/2", method, 80, key, presets=("fid10k",), stop=0, at=at)
        yield trunk
        for stop in (10, 20, 40, 60):
            name = f"figure8/SiT-XL-2/{method}-stop-{stop * 5}K"
            yield replace(trunk, name=name, epochs=stop + 20, stop=stop, trunk=stop, at=())


def section45() -> Iterator[Row]:
    """The times of section 4.5, on eight A800: 1,000,000 steps, the first 50,000 of stage 2 guided."""
    for method, stop in (("none", None), ("repa", None), ("guided", 10)):
        yield new("section4.5", "SiT-B/2", method, 200, variant="section 4.5", presets=("table1-sde",), stop=stop)


# RARE on iREPA: measured release, 250,000 steps at most, and token weights. Its authors choose the encoder's block by a
# probe; here it is the last one.
RARE = "--preset irepa --align-schedule plateau --align-stop-steps 250000 --align-token-weights residual"


def peers() -> Iterator[Row]:
    """Methods under the protocols of other authors, those that can be trained here.

    RARE's matched table of SiT-B/2, one seed each, without guidance and with it; the paper's method is not in it. Then
    Self-Flow and SRA-DTS-AS, whose authors do not state a sampler.
    """
    for key, method, words in (
        ("none", "none", ""),
        ("repa", "repa", ""),
        ("irepa", "repa", "--preset irepa"),
        ("rare", "repa", RARE),
        ("haste", "haste", ""),
        ("sra", "sra", ""),
        ("guided", "guided", ""),
    ):
        variant = {"irepa": "RARE: iREPA", "rare": "RARE: RARE"}.get(key, "RARE")
        more = {"variant": variant, "presets": ("table1-sde",), "seeds": (0,)}
        row = new("peers", "SiT-B/2", method, 80, f"{key}-80", words, **more)
        yield row
        cfg = f"{variant} cfg" if ": " in variant else f"{variant}: cfg"
        yield replace(row, name=f"{row.name}-cfg", variant=cfg, presets=("rare-cfg",))
    half = "--preset dts-as --self-flow-share 0.5 --self-flow-full-share 0.25"
    for key, epochs, words, variant in (
        ("dts-as", 80, "--preset dts-as", "dts-as"),
        ("dts-as", 160, "--preset dts-as", "dts-as"),
        ("dts-as-half", 160, half, "dts-as: half of the tokens"),
    ):
        yield ablation("peers", f"{key}-{epochs}", "self-flow", words, epochs, variant=variant)
    yield new("peers", "SiT-XL/2", "self-flow", 800, presets=("table1-sde",))


def digits() -> Iterator[Row]:
    """Every method at `--scale digits`, for equal steps of one optimiser, beside plain training.

    Settings are the published ones. HASTE and stage 2 end after a quarter of the steps; the teacher has half of them.
    Stage 1 aligns block n/2, since n/6 would be the first block of six.
    """
    stage1, velocity = "--align-depth 6", "--latent-target velocity"
    teacher = Teacher(words=tuple(stage1.split()))
    scales = ("", *(f"--internal-scale {scale}" for scale in (1.2, 1.4, 1.8)))
    more: dict[str, Any]
    for key, method, words, more in (
        ("plain", "none", "", {"epochs": 140, "at": (80, 140)}),  # as long as 80 epochs of Muon take
        ("muon", "none", "--optimizer muon --learning-rate 3e-3", {}),
        ("stage1", "latent", stage1, {}),
        ("guided", "guided", "", {"teacher": teacher}),
        (
            "guided-plateau",
            "guided",
            "--align-schedule plateau --align-plateau-steps 100",
            {"teacher": teacher, "stop": 80},
        ),
        ("guided-omega-3", "guided", "--guide-scale 3", {"teacher": teacher}),
        ("repa", "repa", "", {}),
        ("haste", "haste", "", {"stop": 20}),
        ("dispersive", "dispersive", CLIP, {}),
        # the settings of the authors' PyTorch code
        ("dispersive-pytorch", "dispersive", f"--align-weight 0.25 --align-temperature 1 --align-depth 12 {CLIP}", {}),
        ("dispersive-weak", "dispersive", f"--align-weight 0.05 {CLIP}", {}),
        ("layersync", "layersync", CLIP, {}),
        ("layersync-weak", "layersync", f"--align-weight 0.02 {CLIP}", {}),
        ("sra", "sra", "", {}),
        ("sra-cosine", "sra", "--preset token-cosine", {}),
        ("self-flow", "self-flow", "", {}),
        ("dts-as", "self-flow", "--preset dts-as", {}),
        ("route", "none", "--route 2 4 0.5", {}),
        ("contrastive", "contrastive", "", {}),
        ("internal", "internal", "", {"sampling": scales}),
        ("stage1-velocity", "latent", velocity, {"sampling": scales}),
        (
            "guided-internal",
            "guided",
            "--align internal",
            {"sampling": scales, "teacher": Teacher(words=tuple(velocity.split()))},
        ),
    ):
        yield ablation("digits", key, method, words, seeds=FIVE, **more)


TABLES = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "figure4": figure4,
    "figure8": figure8,
    "section4.5": section45,
    "peers": peers,
    "photographs": photographs,
    "digits": digits,
}


# Tables whose rows are meant for the paper's scale too.
PAPER = tuple(name for name in TABLES if name != "photographs")


@functools.cache
def rows() -> dict[str, Row]:
    """Every row by its name."""
    return {row.name: row for make in TABLES.values() for row in make()}


def tuning_faults(rows: Sequence[Row]) -> list[str]:
    """What is wrong with the trials among `rows`, in words: their seeds, their row, unequal numbers of them.

    In a table each row that is tuned gets the same number of trials.
    """
    faults, counts = [], Counter((row.table, row.tunes) for row in rows if row.tunes)
    names = {row.name for row in rows}
    for row in rows:
        if bool(row.tunes) != bool({*TUNING} & {*row.seeds}) or (row.tunes and row.seeds != TUNING):
            faults.append(f"{row.name} has seeds {row.seeds}: trials, and they alone, have {TUNING}")
        if row.tunes and row.tunes not in names:
            faults.append(f"{row.name} tunes {row.tunes}, which is no row")
    for table in {table for table, _ in counts}:
        of_table = {tuned: count for (of, tuned), count in counts.items() if of == table}
        if len({*of_table.values()}) > 1:
            faults.append(f"the rows of {table} have unequal numbers of trials: {of_table}")
    return faults


def find(name: str) -> Row:
    """The row called `name`. Raises UserError with the nearest name."""
    if name not in rows():
        raise UserError(f"no row is called {name}{nearest(name, rows())}; choose one that python -m recipes list shows")
    return rows()[name]


def of_table(name: str) -> list[Row]:
    """The rows of `table1` ... `digits`. Raises UserError with the nearest name."""
    require(name in TABLES, f"there is no {name}{nearest(name, TABLES)}; there are {', '.join(TABLES)}")
    return [row for row in rows().values() if row.table == name]
