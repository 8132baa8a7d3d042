"""The rows of `--scale photographs`: the paper's claims, their controls, and every method, with the trials of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from recipes.row import CLIP, FIVE, TEN, TUNING, Row, Teacher, ablation

# Epochs of plain training at `--scale photographs` that cost as much as 80 epochs of stage 2, its teacher's 40 and its
# passes included.
PLAIN_EPOCHS = 146


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A row of `photographs` before its table: method, fixed options, and the two values of the one that was tuned."""

    # Its words in tables and pictures.
    title: str
    method: str
    words: str = ""
    # Both were trained on the seeds of TUNING; the first is the better one, and the row's.
    tried: tuple[str, ...] = ()
    # Whether what was tuned is an option of sampling.
    sampled: bool = False
    # Further fields of the row.
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def tuned(self) -> str:
        """What was tuned, as an option."""
        return self.tried[0].split()[0]

    def row(self, key: str, tried: str = "", samples: str = "", **more: Any) -> Row:
        """The row called `key` with the value `tried` of what was tuned, and further options of sampling."""
        trained, drawn = ("", tried) if self.sampled else (tried, "")
        rate = "" if "--learning-rate" in trained else RATES[0]
        words, sampling = f"{rate} {self.words} {trained}", (f"{drawn} {samples}".strip(),)
        return ablation(
            "photographs", key, self.method, words, sampling=sampling, **{"seeds": FIVE, **self.more, **more}
        )


# The better value comes first, the other was tried as well. Weights: the published one, and the one at which the
# alignment's gradient is about as large as that of denoising (200 steps of seed 100).
RATES = ("--learning-rate 4e-3", "--learning-rate 2e-3")
STAGE1, STAGE2 = ("--align-weight 1.5", "--align-weight 0.5"), ("--align-weight 0.02", "--align-weight 0.5")
SCALES = ("--cfg-scale 2", "--cfg-scale 1.5")
_TEACHER = Teacher(words=(*RATES[0].split(), *STAGE1[0].split()))
_PLAIN = {"epochs": PLAIN_EPOCHS, "at": (80, PLAIN_EPOCHS), "seeds": TEN}
_GUIDED = {"teacher": _TEACHER}


def _weights(*tried: float) -> tuple[str, ...]:
    return tuple(f"--align-weight {weight:g}" for weight in tried)


SETTINGS = {
    "plain": Setting(title="plain SiT", method="none", tried=RATES, more=_PLAIN),
    "stage1": Setting(title="stage 1", method="latent", tried=STAGE1, more={"seeds": TEN}),
    "guided": Setting(title="stage 2", method="guided", tried=STAGE2, more={**_GUIDED, "seeds": TEN}),
    # the weight grows as the square of f_g shrinks: the same as a target of the same size
    "omega-1": Setting(
        title="stage 2, omega 1",
        method="guided",
        words="--guide-scale 1 --align-weight 2",
        more={**_GUIDED, "seeds": TEN},
    ),
    "label-code": Setting(
        title="a label code as target",
        method="label-code",
        words=f"{STAGE2[0]} --align-size 10",
        more={"stop": 20, "seeds": TEN},
    ),
    "plain-teacher": Setting(
        title="stage 2, plain teacher",
        method="guided",
        words=STAGE2[0],
        more={"teacher": Teacher(method="none", words=tuple(RATES[0].split()))},
    ),
    "late-stop": Setting(
        title="stage 2, guided for 40 epochs", method="guided", words=STAGE2[0], more={**_GUIDED, "stop": 40}
    ),
    "plain-cfg": Setting(title="plain SiT, CFG", method="none", tried=SCALES, sampled=True),
    "guided-cfg": Setting(
        title="stage 2, CFG", method="guided", words=STAGE2[0], tried=SCALES, sampled=True, more=_GUIDED
    ),
    "guided-plateau": Setting(
        title="stage 2, measured release",
        method="guided",
        words=f"{STAGE2[0]} --align-schedule plateau --align-plateau-steps 100",
        more={**_GUIDED, "stop": 80},
    ),
    "muon": Setting(
        title="plain SiT, Muon",
        method="none",
        words="--optimizer muon",
        tried=("--learning-rate 1e-2", "--learning-rate 4e-3"),
    ),
    "sra": Setting(title="SRA", method="sra", tried=_weights(2, 0.2)),
    "sra2": Setting(title="SRA 2", method="latent", words="--preset sra2", tried=_weights(1.6, 1)),
    "layersync": Setting(title="LayerSync", method="layersync", words=CLIP, tried=_weights(0.2, 4)),
    "dispersive": Setting(title="Dispersive Loss", method="dispersive", words=CLIP, tried=_weights(0.5, 250)),
    "contrastive": Setting(title="Contrastive Flow Matching", method="contrastive", tried=_weights(0.05, 0.4)),
    "internal": Setting(title="Internal Guidance (its training alone)", method="internal", tried=_weights(0.5, 1)),
    "self-flow": Setting(title="Self-Flow", method="self-flow", tried=_weights(0.8, 7)),
    "repa": Setting(title="REPA, MobileNetV2", method="repa", tried=_weights(3, 0.5)),
    "haste": Setting(
        title="HASTE, MobileNetV2 (features alone)",
        method="haste",
        words="--haste-attention 0",
        tried=_weights(0.5, 4),
        more={"stop": 20},
    ),
}


def photographs() -> Iterator[Row]:
    """The paper's claims and every method at `--scale photographs`: 80 epochs are 1,000 steps of 64.

    One setting of each method was tuned, by two trials of half the length (`TUNING`): the learning rate on plain
    training, which all rows share, and the weight of each method. Controls and variants of stage 2 have its weight.
    """
    for key, setting in SETTINGS.items():
        tuned = setting.row(key, *setting.tried[:1])
        yield tuned
        for tried in setting.tried:
            trial = {"epochs": 40, "at": (), "seeds": TUNING, "tunes": tuned.name}
            yield setting.row(f"{key}-trial-{tried.split()[-1]}", tried, "--num-fid-samples 2000", **trial)
