"""At which size a row is run: as the paper has it, or on embedded data on a CPU.

A scale says what the paper's networks, epochs, data and samples become. The chain of commands is the same at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import models
from recipes.row import ENCODED, Row
from runtime.errors import nearest, require
from runtime.options import option

FAMILIES = ("sit", "lightningdit")
# Options that number a block.
BLOCKS = ("--guiding-depth", "--guided-depth", "--align-depth")
# The VAE that encodes, by family, unless another place is given.
VAES = {"sit": "stabilityai/sd-vae-ft-mse", "lightningdit": "vae/vavae"}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where that lies which the paper's scale reads."""

    images: str = option("imagenet/train", help="image folder or ZIP file", heading="at the paper's scale")
    vae: str | None = option(
        None,
        help=f"VAE that encodes, hub id or folder (default: {VAES['sit']}, for LightningDiT {VAES['lightningdit']})",
    )
    decoder: str | None = option(None, help="VAE that decodes, hub id or folder (default: the sampling preset's)")
    reference: str | None = option(None, help="reference of the scores (default: ADM's file of the row's resolution)")
    feature_weights: str | None = option(None, help="file of Inception's weights (default: downloaded once)")

    def words(self) -> list[str]:
        """Those that are given, as options."""
        given = {opt.name: getattr(self, opt.name) for opt in fields(self) if getattr(self, opt.name) != opt.default}
        return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale:
    """The words that a size brings to each command of a chain, most of them by family.

    `Scale.fill` replaces {work}, {data} (the folder of the latent set), {model}, {recipe}, {resolution}, {preset}, and
    {images}, {vae} and {reference} of `places`.
    """

    name: str
    # Optimiser steps of one of the paper's epochs.
    epoch_steps: dict[str, float]
    # A divisor of every step at which something branches or is scored.
    checkpointing_steps: dict[str, int]
    # Of the launcher; 1 is plain python.
    processes: int = 1
    # What is trained in place of the paper's network.
    models: dict[str, str] = field(default_factory=dict)
    # Commands before all others: a name, the words without --out, the value of --out and the file that is there at the
    # end, both in the work folder.
    first: tuple[tuple[str, str, str, str], ...] = ()
    # The latent set, by name.
    latents: dict[str, str]
    # The command that makes it.
    encode: dict[str, str]
    # Options of that command by what a row needs beside the latents (`Row.extras`); empty if the set always has it.
    extras: dict[str, str] = field(default_factory=dict)
    # Options of the training commands.
    train: dict[str, str]
    # Further ones by method.
    methods: dict[str, str] = field(default_factory=dict)
    # Options of a method with an external encoder.
    encoder: str = ""
    # The command that makes this encoder, without --out; empty if it exists.
    encoder_command: str = ""
    # Epochs after which stage 2's alignment ends; None is its own rule, which counts epochs of the data set.
    guided_epochs: float | None = None
    # The name of the one way in which every row is sampled; empty if each row has its sampling presets.
    preset: str = ""
    # The program that draws samples and scores them.
    sampler: str = "generate.py"
    # Options of the sampling command by preset; "" is every other preset.
    sample: dict[str, str]
    # What samples are compared with.
    score: str
    # Where the paper's scale finds what it reads.
    places: Places = field(default_factory=Places)

    @property
    def outside(self) -> bool:
        """Whether it reads images and a VAE from outside of this project."""
        return "{images}" in self.encode["sit"]

    def at(self, places: Places, rows: Sequence[Row]) -> Scale:
        """This scale at other places. Raises UserError if it reads nothing there, or not the same for all `rows`."""
        flag = next(iter(places.words()), "")
        require(
            not flag or self.outside,
            f"{flag} belongs to --scale paper: --scale {self.name} makes its own data; leave it out",
        )
        vaes, references = {row.family for row in rows}, {row.resolution for row in rows}
        require(
            len(vaes) < 2 or places.vae is None,
            f"--vae: rows of {' and '.join(sorted(vaes))} need a VAE each; run them apart",
        )
        require(
            len(references) < 2 or places.reference is None,
            "--reference: rows of 256 and 512 pixels need a reference each; run them apart",
        )
        return replace(self, places=places)

    def steps(self, row: Row, epochs: float) -> int:
        """Optimiser steps of so many epochs; at least 1."""
        return max(1, round(epochs * self.epoch_steps[row.family]))

    def model(self, row: Row) -> str:
        """The network that is trained."""
        return self.models.get(row.family, row.model)

    def data(self, row: Row) -> str:
        """The latent set of a row, by name."""
        name = self.latents[row.family].format(resolution=row.resolution)
        return "-".join([name, *(extra for extra in row.extras if extra in self.extras)])

    def row_words(self, row: Row) -> list[str]:
        """The options that the row itself brings. Blocks keep their share of the depth."""
        paper, ours = (models.ARCHITECTURES[row.family].sizes[name][0] for name in (row.model, self.model(row)))
        before = ("", *row.words)
        return [
            str(int(word) * ours // paper) if flag in BLOCKS else word
            for flag, word in zip(before, row.words, strict=False)
        ]

    def extra_words(self) -> list[str]:
        """Options of the sampling command for places that are given."""
        given = {"--vae": self.places.decoder, "--feature-weights": self.places.feature_weights}
        return [word for flag, place in given.items() if place for word in (flag, place)]

    def fill(self, text: str, row: Row, work: Path, preset: str = "") -> list[str]:
        """The words of `text` with their fields filled in afterwards, so that a folder may have spaces in its name."""
        values = {
            "work": work,
            "data": work / "data" / self.data(row),
            "model": self.model(row),
            "recipe": row.recipe,
            "resolution": row.resolution,
            "preset": preset,
            "images": self.places.images,
            "vae": self.places.vae or VAES[row.family],
            "reference": self.places.reference
            or f"VIRTUAL_imagenet{row.resolution}{'_labeled' if row.resolution == 256 else ''}.npz",
        }
        return [word.format(**values) for word in text.split()]


_ENCODE = "-m preprocessing.encode --images {images} --vae {vae}"
_LOSS = " --velocity-loss mse+cosine --time-sampling logit-normal"
# the first line of a log is over the steps that `recipes.replay` trains again
_LOG = "--log-steps 20"
_TINY = "--recipe digits --model {model} --batch-size 16"

_WEIGHTS = "{work}/mobilenet_v2-b0353104.pth"
_MOBILENET = f"--features timm:mobilenetv2_100@96 --feature-weights {_WEIGHTS}"
_REFERENCE = f"-m evaluations.reference --grey {_MOBILENET}"

SCALES = {
    "paper": Scale(
        name="paper",
        epoch_steps={"sit": 5000, "lightningdit": 1250},
        checkpointing_steps={"sit": 50_000, "lightningdit": 10_000},
        processes=8,
        latents={"sit": "imagenet{resolution}", "lightningdit": "vavae256"},
        encode={
            "sit": f"{_ENCODE} --resolution {{resolution}}",
            "lightningdit": f"{_ENCODE} --no-moments --flip --resolution 256",
        },
        extras={"images": "--keep-images", "flips": "--flip"},
        train=dict.fromkeys(FAMILIES, "--recipe {recipe} --model {model}"),
        sample={"": "--preset {preset}"},
        score="--reference {reference} --features inception",
    ),
    # photographs of clothes, 32 x 32, 16 tokens of 4 x 8 x 8 latents: docs/photographs.md
    "photographs": Scale(
        name="photographs",
        epoch_steps={"sit": 12.5, "lightningdit": 12.5},
        checkpointing_steps={"sit": 250, "lightningdit": 250},
        models={"sit": "SiT-Tiny/2", "lightningdit": "LightningDiT-Tiny/1"},
        first=(
            ("images", "-m preprocessing.fashion", "fashion", "fashion/fashion.json"),
            (
                "images of the classifier",
                "-m preprocessing.fashion --count 10000 --test-count 10",
                "fashion-10k",
                "fashion-10k/fashion.json",
            ),
            (
                "features of the classifier",
                f"{_REFERENCE} --images {{work}}/fashion-10k/train",
                "references/train-10k.npz",
                "references/train-10k.npz",
            ),
            (
                "reference",
                f"{_REFERENCE} --images {{work}}/fashion/test --classifier {{work}}/references/train-10k.npz",
                "references/test.npz",
                "references/test.npz",
            ),
        ),
        latents=dict.fromkeys(FAMILIES, "photographs"),
        encode=dict.fromkeys(
            FAMILIES,
            "-m preprocessing.encode --images {work}/fashion/train --vae pretrained/vae-fashion --grey --resolution 32 "
            "--keep-images",
        ),
        train={
            "sit": f"--recipe digits --model {{model}} {_LOG}",
            "lightningdit": f"--recipe digits --model {{model}}{_LOSS} {_LOG}",
        },
        encoder=f"--align-encoder mobilenetv2_100 --align-encoder-weights {_WEIGHTS} --align-encoder-stage -2 "
        "--align-cache",
        guided_epochs=20,
        preset="photographs",
        sample={
            "": "--mode ode --solver heun --num-steps 8 --labels balanced --num-fid-samples 5000 --batch-size 250 "
            "--vae pretrained/vae-fashion"
        },
        score=f"--reference {{work}}/references/test.npz {_MOBILENET}",
    ),
    # 8 x 8 pixels, 800 steps: every method beside plain training, in a minute or two each
    "digits": Scale(
        name="digits",
        epoch_steps={"sit": 10, "lightningdit": 10},
        checkpointing_steps={"sit": 100, "lightningdit": 100},
        models={"sit": "SiT-Tiny/2", "lightningdit": "LightningDiT-Tiny/1"},
        latents=dict.fromkeys(FAMILIES, "digits"),
        encode=dict.fromkeys(FAMILIES, "-m preprocessing.digits"),
        train={
            "sit": f"--recipe digits --model {{model}} {_LOG}",
            "lightningdit": f"--recipe digits --model {{model}}{_LOSS} {_LOG}",
        },
        encoder="--align-encoder {work}/encoder --align-cache",
        encoder_command="-m recipes.encoder",
        guided_epochs=20,
        preset="digits",
        sample={
            "": "--mode ode --solver heun --num-steps 12 --labels balanced --num-fid-samples 1000 --batch-size 250"
        },
        score="--reference {data} --features pixels",
    ),
    # some steps: whether the chain of a row runs, not what it gives
    "tiny": Scale(
        name="tiny",
        epoch_steps={"sit": 0.05, "lightningdit": 0.0125},
        checkpointing_steps={"sit": 1, "lightningdit": 1},
        models={"sit": "SiT-Tiny/2", "lightningdit": "LightningDiT-Tiny/1"},
        latents=dict.fromkeys(FAMILIES, "digits"),
        encode=dict.fromkeys(FAMILIES, "-m preprocessing.digits"),
        train={"sit": f"{_TINY} --log-steps 1", "lightningdit": f"{_TINY}{_LOSS} --log-steps 1"},
        methods=dict.fromkeys(("latent", "guided", *ENCODED), "--align-hidden 32"),
        encoder="--align-encoder {work}/encoder",
        encoder_command="-m recipes.encoder --epochs 1",
        guided_epochs=20,
        sample={
            "": "--preset {preset} --num-fid-samples 4",
            "fid10k": "--preset table1-sde --num-fid-samples 4",  # the same settings without the count
        },
        score="--reference {data} --features pixels",
    ),
}


def find(name: str) -> Scale:
    """The scale called `name`. Raises UserError with the nearest name."""
    require(name in SCALES, f"there is no scale {name}{nearest(name, SCALES)}; there are {', '.join(SCALES)}")
    return SCALES[name]
