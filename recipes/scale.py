"""At which size a row is run: as the paper has it, or tiny, the same chain on the embedded digits in minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes.rows import Row
from runtime.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Steps, networks, data and samples of one size. Paths are relative to the folder of all work."""

    name: str
    epoch_steps: dict[str, float]
    """Optimiser steps of one of the paper's epochs, by family."""
    batch_size: dict[str, int]
    processes: int
    """Of the launcher; 1 is plain python."""
    samples: int | None
    """Per score, in place of the preset's own count; None keeps that."""

    def steps(self, row: Row, epochs: float) -> int:
        """Optimiser steps of so many epochs; at least 1."""
        return max(1, round(epochs * self.epoch_steps[row.family]))

    def model(self, row: Row) -> str:
        """The network that is trained."""
        return row.model if self.name == "paper" else {"sit": "SiT-Tiny/2", "lightningdit": "LightningDiT-Tiny/1"}[row.family]

    def data(self, row: Row) -> str:
        """The latent set, by name."""
        if self.name == "tiny":
            return "digits"
        images = "-images" if row.method in ("repa", "haste") or (row.teacher and row.teacher.method == "repa") else ""
        flips = "-flips" if row.method in ("dispersive", "layersync") else ""
        return "vavae256" + images if row.family == "lightningdit" else f"imagenet{row.resolution}{images}{flips}"

    def data_words(self, data: str, folder: Path) -> tuple[str, ...]:
        """The command that makes the latent set `data`, without the interpreter."""
        if data == "digits":
            return ("-m", "preprocessing.digits", "--out", str(folder))
        resolution = "512" if "512" in data else "256"
        kept = ("--keep-images",) if "images" in data else ()
        if data.startswith("vavae"):
            how = ("--vae", "vae/vavae", "--no-moments", "--flip")
        else:
            how = ("--vae", "stabilityai/sd-vae-ft-mse", *(("--flip",) if "flips" in data else ()))
        return ("-m", "preprocessing.encode", "--images", "imagenet/train", *how, "--resolution", resolution, *kept, "--out", str(folder))

    def train_words(self, row: Row) -> tuple[str, ...]:
        """Options that the size brings to a training command."""
        if self.name == "paper":
            return ("--recipe", row.family, "--model", row.model)
        small = ("--align-hidden", "32") if row.method in ("latent", "guided", "repa", "haste") else ()
        return ("--recipe", "digits", "--model", self.model(row), "--batch-size", "16", "--log-steps", "1", *small,
                *(("--velocity-loss", "mse+cosine", "--time-sampling", "logit-normal") if row.family == "lightningdit" else ()))

    def encoder_words(self, method: str, encoder: Path) -> tuple[str, ...]:
        """Options of a method with an external encoder."""
        return ("--align-encoder", str(encoder)) if self.name == "tiny" and method in ("repa", "haste") else ()

    def score_words(self, row: Row, work: Path) -> tuple[str, ...]:
        """What the samples are compared with."""
        if self.name == "tiny":
            return ("--reference", str(work / "data" / "digits"), "--features", "pixels")
        return ("--reference", f"VIRTUAL_imagenet{row.resolution}{'_labeled' if row.resolution == 256 else ''}.npz",
                "--features", "inception")


SCALES = {
    "paper": Scale(name="paper", epoch_steps={"sit": 5000, "lightningdit": 1250}, batch_size={"sit": 256, "lightningdit": 1024},
                   processes=8, samples=None),
    "tiny": Scale(name="tiny", epoch_steps={"sit": 0.05, "lightningdit": 0.05}, batch_size={"sit": 16, "lightningdit": 16},
                  processes=1, samples=4),
}


def find(name: str) -> Scale:
    """The scale called `name`. Raises UserError with the nearest name."""
    if name not in SCALES:
        raise UserError(f"there is no scale {name}{nearest(name, SCALES)}; there are {', '.join(SCALES)}")
    return SCALES[name]
