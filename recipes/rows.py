"""The experiments as rows: what is trained, from which teacher, how it is sampled, and which published number it has.

The functions below list every row of Tables 1 to 5 that can be trained here, every curve of Figs. 4 and 8, the times of
section 4.5, RARE's matched table, the study of the paper's claims on scenes, the paper's claims and all methods on
photographs, and all methods on the digits. Epochs are the paper's: 5,000 steps of 256 latents for SiT, 1,250 of 1,024
for LightningDiT. Blocks are those of the paper's network. A scale translates both.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from models import published
from models.published import Published
from runtime.errors import UserError, nearest, require

# Methods with an external encoder.
ENCODED = ("repa", "haste")
# Methods that run under --preset paper, which sets the precision.
PRESET = ("dispersive", "layersync")
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


def _row(table: str, model: str, method: str, epochs: float, key: str = "", words: str = "", **more: Any) -> Row:
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
            row = _row("table1", model, method, int(epochs))
            by_ode = row.published is not None and row.published.sampler.startswith("ODE")
            yield replace(row, presets=row.presets[::-1]) if by_ode else row
    lightningdit = {"LightningDiT-B/1": "none latent guided", "LightningDiT-XL/1": "none repa latent guided"}
    for model, methods in lightningdit.items():
        for method in methods.split():
            yield _row("table1", model, method, 64, presets=("lightningdit-64ep-nocfg",))


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
        yield _row("table2", model, method, epochs, recipe=recipe, presets=(preset,))


def table3() -> Iterator[Row]:
    """ImageNet 512 with guidance. That of REPA's and of the paper's numbers is not known: they get that of 256."""
    ours = "self-transcendence-cfg-512"
    for method, epochs, preset in (
        ("none", 600, "sit-cfg-sde"),
        ("repa", 200, "repa-cfg"),
        ("guided", 100, ours),
        ("guided", 200, ours),
    ):
        yield _row("table3", "SiT-XL/2", method, epochs, resolution=512, presets=(preset,))


def _ablation(table: str, key: str, method: str, words: str = "", epochs: float = 80, **more: Any) -> Row:
    """A row of SiT-B/2 whose FID is of 10,000 samples."""
    return _row(table, "SiT-B/2", method, epochs, key, words, presets=("fid10k",), **more)


def table4() -> Iterator[Row]:
    """Ablation of the two stages."""
    yield _ablation("table4", "plain", "none", variant="table 4")
    yield _ablation("table4", "stage1", "latent", variant="table 4")
    plain = Teacher(method="none")
    yield _ablation("table4", "plain-teacher", "guided", variant="table 4: plain teacher", teacher=plain)
    yield _ablation("table4", "full", "guided", variant="table 4: full")


def table5() -> Iterator[Row]:
    """Ablation of stage 2."""

    def guided(key: str, words: str = "", **teacher: Any) -> Row:
        name, variant = key.replace(" ", "-"), f"table 5: {key}"
        return _ablation("table5", name, "guided", words, variant=variant, teacher=Teacher(**teacher))

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
        yield _ablation("figure4", method, method, at=tuple(range(10, 81, 10)))


def figure8() -> Iterator[Row]:
    """With and without an early stop: the loss is dropped at a step, and training goes on for 20 epochs."""
    for method in ("repa", "guided"):
        key, at = f"{method}-no-stop", tuple(range(30, 81, 10))
        trunk = _row("figure8", "SiT-XL/2", method, 80, key, presets=("fid10k",), stop=0, at=at)
        yield trunk
        for stop in (10, 20, 40, 60):
            name = f"figure8/SiT-XL-2/{method}-stop-{stop * 5}K"
            yield replace(trunk, name=name, epochs=stop + 20, stop=stop, trunk=stop, at=())


def section45() -> Iterator[Row]:
    """The times of section 4.5, on eight A800: 1,000,000 steps, the first 50,000 of stage 2 guided."""
    for method, stop in (("none", None), ("repa", None), ("guided", 10)):
        yield _row("section4.5", "SiT-B/2", method, 200, variant="section 4.5", presets=("table1-sde",), stop=stop)


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
        row = _row("peers", "SiT-B/2", method, 80, f"{key}-80", words, **more)
        yield row
        cfg = f"{variant} cfg" if ": " in variant else f"{variant}: cfg"
        yield replace(row, name=f"{row.name}-cfg", variant=cfg, presets=("rare-cfg",))
    half = "--preset dts-as --self-flow-share 0.5 --self-flow-full-share 0.25"
    for key, epochs, words, variant in (
        ("dts-as", 80, "--preset dts-as", "dts-as"),
        ("dts-as", 160, "--preset dts-as", "dts-as"),
        ("dts-as-half", 160, half, "dts-as: half of the tokens"),
    ):
        yield _ablation("peers", f"{key}-{epochs}", "self-flow", words, epochs, variant=variant)
    yield _row("peers", "SiT-XL/2", "self-flow", 800, presets=("table1-sde",))


# Epochs of the study's plain training and of its stage 1 that cost as much as 80 epochs of stage 2. That cost includes
# the teacher's 40 epochs and its passes up to the stop: a head is large beside six blocks of width 128. Stage 1 has 5 %
# more, to end at a multiple of ten epochs.
PLAIN_TOTAL, STAGE1_TOTAL = 146, 120


# Seeds of the rows that fit a CPU.
FIVE, TEN = tuple(range(5)), tuple(range(10))
# Epochs of plain training at `--scale photographs` that cost as much as 80 epochs of stage 2, its teacher's 40 and its
# passes included.
PLAIN_EPOCHS = 146


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A row of `photographs` before its table: method, fixed options, and the two values of the one that was tuned."""

    method: str
    words: str = ""
    # Both were trained on the seeds of TUNING; the first is the better one, and the row's.
    tried: tuple[str, ...] = ()
    # Whether what was tuned is an option of sampling.
    sampled: bool = False
    # Further fields of the row.
    more: dict[str, Any] = field(default_factory=dict)


# The authors of these methods do not clip; here only the alignment may differ.
CLIP = "--max-grad-norm 1"
# The better value comes first, the other was tried as well. Weights: the published one, and the one at which the
# alignment's gradient is about as large as that of denoising (200 steps of seed 100).
RATES = ("--learning-rate 4e-3", "--learning-rate 2e-3")
STAGE1, STAGE2 = ("--align-weight 1.5", "--align-weight 0.5"), ("--align-weight 0.02", "--align-weight 0.5")
SCALES = ("--cfg-scale 1.5", "--cfg-scale 2")
_TEACHER = Teacher(words=(*RATES[0].split(), *STAGE1[0].split()))
_PLAIN = {"epochs": PLAIN_EPOCHS, "at": (80, PLAIN_EPOCHS), "seeds": TEN}
_GUIDED = {"teacher": _TEACHER}


def _weights(*tried: float) -> tuple[str, ...]:
    return tuple(f"--align-weight {weight:g}" for weight in tried)


PHOTOGRAPHS = {
    "plain": Setting(method="none", tried=RATES, more=_PLAIN),
    "stage1": Setting(method="latent", tried=STAGE1, more={"seeds": TEN}),
    "guided": Setting(method="guided", tried=STAGE2, more={**_GUIDED, "seeds": TEN}),
    # the weight grows as the square of f_g shrinks: the same as a target of the same size
    "omega-1": Setting(method="guided", words="--guide-scale 1 --align-weight 2", more={**_GUIDED, "seeds": TEN}),
    "label-code": Setting(method="label-code", words=f"{STAGE2[0]} --align-size 10", more={"stop": 20, "seeds": TEN}),
    "plain-teacher": Setting(
        method="guided", words=STAGE2[0], more={"teacher": Teacher(method="none", words=tuple(RATES[0].split()))}
    ),
    "late-stop": Setting(method="guided", words=STAGE2[0], more={**_GUIDED, "stop": 40}),
    "plain-cfg": Setting(method="none", tried=SCALES, sampled=True),
    "guided-cfg": Setting(method="guided", words=STAGE2[0], tried=SCALES, sampled=True, more=_GUIDED),
    "guided-plateau": Setting(
        method="guided",
        words=f"{STAGE2[0]} --align-schedule plateau --align-plateau-steps 100",
        more={**_GUIDED, "stop": 80},
    ),
    "sra": Setting(method="sra", tried=_weights(0.2, 2.0)),
    "sra2": Setting(method="latent", words="--preset sra2", tried=_weights(1, 1.6)),
    "layersync": Setting(method="layersync", words=CLIP, tried=_weights(0.2, 4)),
    "dispersive": Setting(method="dispersive", words=CLIP, tried=_weights(0.5, 250)),
    "contrastive": Setting(method="contrastive", tried=_weights(0.05, 0.4)),
    "internal": Setting(method="internal", tried=_weights(0.5, 1)),
    "self-flow": Setting(method="self-flow", tried=_weights(0.8, 7)),
    "repa": Setting(method="repa", tried=_weights(0.5, 3)),
    "haste": Setting(method="haste", words="--haste-attention 0", tried=_weights(0.5, 4), more={"stop": 20}),
}


def photographs() -> Iterator[Row]:
    """The paper's claims and every method at `--scale photographs`: 80 epochs are 1,000 steps of 64.

    One setting of each method was tuned, by two trials of half the length (`TUNING`): the learning rate on plain
    training, which all rows share, and the weight of each method. Controls and variants of stage 2 have its weight.
    """
    for key, setting in PHOTOGRAPHS.items():
        row = functools.partial(_ablation, "photographs", method=setting.method)

        def options(tried: str, samples: str = "", setting: Setting = setting) -> dict[str, Any]:
            trained, drawn = ("", tried) if setting.sampled else (tried, "")
            rate = "" if "--learning-rate" in trained else RATES[0]
            return {"words": f"{rate} {setting.words} {trained}", "sampling": (f"{drawn} {samples}".strip(),)}

        tuned = row(key, **{"seeds": FIVE, **options(setting.tried[0] if setting.tried else ""), **setting.more})
        yield tuned
        for tried in setting.tried:
            trial = {**setting.more, "epochs": 40, "at": (), "seeds": TUNING, "tunes": tuned.name}
            yield row(f"{key}-trial-{tried.split()[-1]}", **{**options(tried, "--num-fid-samples 2000"), **trial})


def study() -> Iterator[Row]:
    """The paper's claims at `--scale study`: Table 4 at equal steps and equal compute, and one setting at a time."""
    row = functools.partial(_ablation, "study", seeds=FIVE)
    yield row("plain", "none", epochs=PLAIN_TOTAL, at=(40, 80, PLAIN_TOTAL))
    yield row("stage1", "latent", epochs=130, at=(40, 80, STAGE1_TOTAL, 130))
    yield row("plain-teacher", "guided", teacher=Teacher(method="none"))
    yield row("full", "guided", at=(40, 80))
    yield from (row(f"omega-{omega}", "guided", f"--guide-scale {omega}") for omega in (1, 10))
    yield row("young-teacher", "guided", teacher=Teacher(epochs=20))
    yield row("late-stop", "guided", stop=40)
    for share in (3, 2):  # the default is n/6; SiT-B has twelve blocks
        yield row(f"stage1-block-n-{share}", "latent", f"--align-depth {12 // share}")


def digits() -> Iterator[Row]:
    """Every method at `--scale digits`, for equal steps of one optimiser, beside plain training.

    Settings are the published ones. HASTE and stage 2 end after a quarter of the steps; the teacher has half of them.
    Stage 1 aligns block n/2, since n/6 would be the first block of six.
    """
    clip = "--max-grad-norm 1"  # the authors of these methods do not clip; here only the alignment may differ
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
        ("dispersive", "dispersive", clip, {}),
        # the settings of the authors' PyTorch code
        ("dispersive-pytorch", "dispersive", f"--align-weight 0.25 --align-temperature 1 --align-depth 12 {clip}", {}),
        ("dispersive-weak", "dispersive", f"--align-weight 0.05 {clip}", {}),
        ("layersync", "layersync", clip, {}),
        ("layersync-weak", "layersync", f"--align-weight 0.02 {clip}", {}),
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
        yield _ablation("digits", key, method, words, seeds=FIVE, **more)


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
    "study": study,
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
