"""At which size a row is run: as the paper has it; as a study on scenes, an hour of a CPU for each seed; or tiny, in a minute.

A scale says what the paper's networks, epochs, data and samples become. The chain of commands is the same at each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import models
from recipes.rows import ENCODED, Row
from runtime.errors import UserError, nearest

OWN_PRECISION = ("dispersive", "layersync")
"""Methods whose preset says in which precision they run."""
BLOCKS = ("--guiding-depth", "--guided-depth", "--align-depth")
"""Options that number a block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale:
    """The paper's own size. Paths are relative to the folder of all work."""

    name: str
    epoch_steps: dict[str, float]
    """Optimiser steps of one of the paper's epochs, by family."""
    batch_size: dict[str, int]
    processes: int
    """Of the launcher; 1 is plain python."""
    encoder_command: tuple[str, ...] = ()
    """The command that makes the encoder of REPA and HASTE, to which --out is added; empty where there is one."""

    def steps(self, row: Row, epochs: float) -> int:
        """Optimiser steps of so many epochs; at least 1."""
        return max(1, round(epochs * self.epoch_steps[row.family]))

    def model(self, row: Row) -> str:
        """The network that is trained."""
        return row.model

    def checkpointing_steps(self, row: Row) -> int:
        """Steps between checkpoints: a divisor of every step at which something branches or is scored."""
        return 50_000 if row.family == "sit" else 10_000

    def presets(self, row: Row) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Sampling presets of a row, each with the words that say so and how many samples to draw."""
        return tuple((preset, ("--preset", preset)) for preset in row.presets)

    def data(self, row: Row) -> str:
        """The latent set, by name."""
        images = "-images" if row.encoded else ""
        flips = "-flips" if row.method in ("dispersive", "layersync") else ""
        return "vavae256" + images if row.family == "lightningdit" else f"imagenet{row.resolution}{images}{flips}"

    def data_words(self, data: str, folder: Path) -> tuple[str, ...]:
        """The command that makes the latent set `data`, without the interpreter."""
        resolution = "512" if "512" in data else "256"
        kept = ("--keep-images",) if "images" in data else ()
        if data.startswith("vavae"):
            how = ("--vae", "vae/vavae", "--no-moments", "--flip")
        else:
            how = ("--vae", "stabilityai/sd-vae-ft-mse", *(("--flip",) if "flips" in data else ()))
        return (
            "-m",
            "preprocessing.encode",
            "--images",
            "imagenet/train",
            *how,
            "--resolution",
            resolution,
            *kept,
            "--out",
            str(folder),
        )

    def train_words(self, row: Row) -> tuple[str, ...]:
        """Options that the size brings to a training command."""
        return ("--recipe", row.family, "--model", row.model)

    def row_words(self, row: Row) -> tuple[str, ...]:
        """The options that the row itself brings."""
        return row.words

    def encoder_words(self, work: Path) -> tuple[str, ...]:
        """Options of a method with an external encoder."""
        return ()

    def stop_words(self, row: Row) -> tuple[str, ...]:
        """When the alignment ends, where its own rule does not fit the size."""
        return ()

    def score_words(self, row: Row, work: Path) -> tuple[str, ...]:
        """What the samples are compared with."""
        return (
            "--reference",
            f"VIRTUAL_imagenet{row.resolution}{'_labeled' if row.resolution == 256 else ''}.npz",
            "--features",
            "inception",
        )


class _Small(Scale):
    """What the two sizes for a CPU share: a network of six blocks, embedded data in pixels."""

    def train_words(self, row: Row) -> tuple[str, ...]:
        loss = (
            ("--velocity-loss", "mse+cosine", "--time-sampling", "logit-normal") if row.family == "lightningdit" else ()
        )
        return (
            "--recipe",
            "digits",
            "--model",
            self.model(row),
            "--batch-size",
            str(self.batch_size[row.family]),
            *loss,
        )

    def row_words(self, row: Row) -> tuple[str, ...]:
        """Blocks are the same shares of the depth as in the paper's network."""
        paper, small = (models.ARCHITECTURES[row.family].sizes[name][0] for name in (row.model, self.model(row)))
        return tuple(
            str(int(word) * small // paper) if flag in BLOCKS else word
            for flag, word in zip(("", *row.words), row.words)
        )

    def stop_words(self, row: Row) -> tuple[str, ...]:
        return (
            ("--align-stop-steps", str(self.steps(row, 20))) if row.method == "guided" else ()
        )  # epochs of small sets are longer


class _Study(_Small):
    """Scenes of 16 x 16 pixels, 16 tokens: see docs/study.md."""

    def model(self, row: Row) -> str:
        return {"sit": "SiT-Tiny/4", "lightningdit": "LightningDiT-Tiny/1"}[row.family]

    def checkpointing_steps(self, row: Row) -> int:
        return self.steps(row, 10)

    def presets(self, row: Row) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return (("study", ("--preset", "study", "--batch-size", "250")),)

    def data(self, row: Row) -> str:
        return "scenes"

    def data_words(self, data: str, folder: Path) -> tuple[str, ...]:
        return ("-m", "preprocessing.scenes", "--out", str(folder))

    def train_words(self, row: Row) -> tuple[str, ...]:
        precision = () if row.method in OWN_PRECISION else ("--mixed-precision", "bf16")
        return (*super().train_words(row), *precision, "--learning-rate", "4e-3", "--log-steps", "50")

    def encoder_words(self, work: Path) -> tuple[str, ...]:
        return ("--align-encoder", "evaluations/scenes", "--align-cache")

    def score_words(self, row: Row, work: Path) -> tuple[str, ...]:
        return ("--reference", str(work / "data" / "scenes"), "--features", "scenes")


class _Tiny(_Small):
    """Some steps on the digits: whether the chain of a row runs, not what it gives."""

    def model(self, row: Row) -> str:
        return {"sit": "SiT-Tiny/2", "lightningdit": "LightningDiT-Tiny/1"}[row.family]

    def checkpointing_steps(self, row: Row) -> int:
        return 1

    def presets(self, row: Row) -> tuple[tuple[str, tuple[str, ...]], ...]:
        same = {"fid10k": "table1-sde"}  # the same settings; its count is not that of this scale
        return tuple(
            (preset, ("--preset", same.get(preset, preset), "--num-fid-samples", "4")) for preset in row.presets
        )

    def data(self, row: Row) -> str:
        return "digits"

    def data_words(self, data: str, folder: Path) -> tuple[str, ...]:
        return ("-m", "preprocessing.digits", "--out", str(folder))

    def train_words(self, row: Row) -> tuple[str, ...]:
        small = ("--align-hidden", "32") if row.method in ("latent", "guided", *ENCODED) else ()
        return (*super().train_words(row), "--log-steps", "1", *small)

    def encoder_words(self, work: Path) -> tuple[str, ...]:
        return ("--align-encoder", str(work / "encoder"))

    def score_words(self, row: Row, work: Path) -> tuple[str, ...]:
        return ("--reference", str(work / "data" / "digits"), "--features", "pixels")


SCALES = {
    "paper": Scale(
        name="paper",
        epoch_steps={"sit": 5000, "lightningdit": 1250},
        batch_size={"sit": 256, "lightningdit": 1024},
        processes=8,
    ),
    "study": _Study(
        name="study",
        epoch_steps={"sit": 12.5, "lightningdit": 12.5},
        batch_size={"sit": 32, "lightningdit": 32},
        processes=1,
    ),
    "tiny": _Tiny(
        name="tiny",
        epoch_steps={"sit": 0.05, "lightningdit": 0.0125},
        batch_size={"sit": 16, "lightningdit": 16},
        processes=1,
        encoder_command=("-m", "recipes.encoder", "--epochs", "1"),
    ),
}


def find(name: str) -> Scale:
    """The scale called `name`. Raises UserError with the nearest name."""
    if name not in SCALES:
        raise UserError(f"there is no scale {name}{nearest(name, SCALES)}; there are {', '.join(SCALES)}")
    return SCALES[name]
