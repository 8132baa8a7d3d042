"""A small world for what goes wrong: one sound artefact of every kind, and each command with words that work.

`benchmarks.bad_inputs` damages copies of it, row by row; `benchmarks.torture` kills processes in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import generate
import train
import train_guide
from evaluations import evaluate, fdr, figures, probe, reference, sweep
from models import convert, export, hub
from models.checkpoint import Checkpoint
from models.vae import WEIGHTS
from preprocessing import digits, encode, import_latents, scenes, verify
from recipes import __main__ as recipes
from runtime import files, seal
from runtime.streams import Stream


def _second(main: Callable[[Sequence[str]], object], kind: str, argv: Sequence[str]) -> object:
    return main([kind, *argv])


MAINS: dict[str, Callable[[Sequence[str]], object]] = {
    "train.py": train.main,
    "train_guide.py": train_guide.main,
    "generate.py": generate.main,
    "encode": encode.main,
    "digits": digits.main,
    "import_latents": import_latents.main,
    "verify": verify.main,
    "convert": convert.main,
    "evaluate": evaluate.main,
    "reference": reference.main,
    "sweep": sweep.main,
    "seal": seal.main,
    "scenes": scenes.main,
    "probe": probe.main,
    "fdr": fdr.main,
    "hub": hub.main,
    "export": export.main,
    **{kind: partial(_second, figures.main, kind) for kind in ("pca", "tsne", "steps", "seeds", "time")},
    **{f"recipes {kind}": partial(_second, recipes.main, kind) for kind in ("list", "run", "table", "check")},
}
"""Every command. Of the recipes those that take no time where nothing is wrong."""
MODULES = {
    "encode": "preprocessing.encode",
    "digits": "preprocessing.digits",
    "import_latents": "preprocessing.import_latents",
    "verify": "preprocessing.verify",
    "convert": "models.convert",
    "evaluate": "evaluations.evaluate",
    "reference": "evaluations.reference",
    "sweep": "evaluations.sweep",
    "seal": "runtime.seal",
    "scenes": "preprocessing.scenes",
    "probe": "evaluations.probe",
    "fdr": "evaluations.fdr",
    "hub": "models.hub",
    "export": "models.export",
    **{kind: f"evaluations.figures {kind}" for kind in ("pca", "tsne", "steps", "seeds", "time")},
}


@dataclass(frozen=True)
class World:
    """Paths of the sound artefacts below `root`; what a command writes goes below `out`, which does not exist."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def path(self, name: str) -> Path:
        """The artefact `name`: data, exps/stage1, images, vae, repa, lightning, weights.pt, samples/samples.npz, ..."""
        return self.root / name

    def words(self, command: str) -> list[str]:
        """Words under which `command` works."""
        p, out = self.path, self.out
        run = [
            "--recipe",
            "digits",
            "--data-dir",
            p("data"),
            "--output-dir",
            out,
            "--exp-name",
            "x",
            "--batch-size",
            16,
            "--max-train-steps",
            1,
        ]
        drawn = ["--ckpt", p("exps/stage1"), "--num-fid-samples", 4, "--num-steps", 2, "--mode", "ode"]
        looked = ["--ckpt", p("exps/stage1"), "--data-dir", p("data"), "--items", 8, "--t", 0.5, "--blocks", 1]
        scores = ["--features", "pixels", "--reference", p("reference.npz")]
        words = {
            "train.py": run,
            "train_guide.py": [*run, "--guiding-ckpt", p("exps/stage1"), "--align-hidden", 8],
            "generate.py": [*drawn, "--out", out],
            "encode": ["--images", p("images"), "--vae", p("vae"), "--resolution", 16, "--out", out, "--workers", 0],
            "digits": ["--out", out],
            "import_latents": [p("repa"), "--out", out],
            "verify": [p("data"), "--num-images", 0],
            "convert": [p("weights.pt"), "--out", out, "--num-heads", 4, "--vae", "pixels"],
            "evaluate": ["--samples", p("samples/samples.npz"), *scores, "--out", out / "metrics.json"],
            "reference": ["--images", p("data"), "--features", "pixels", "--out", out / "r.npz"],
            "sweep": [*drawn[:-2], "--cfg-scale", 1.5, *scores, "--out", out],
            "seal": [p("data/manifest.json")],
            "scenes": ["--out", out, "--count", 10],
            "probe": [*looked, "--out", out],
            "pca": [*looked, "--out", out / "pca"],
            "tsne": [*looked, "--out", out / "tsne"],
            "steps": ["--scores", f"x={p('scores/metrics.json')}", "--out", out / "steps"],
            "seeds": [*drawn[:2], *drawn[4:], "--out", out / "seeds"],
            "time": ["--runs", p("exps/stage1"), "--out", out / "time.json"],
            "fdr": [
                "--samples",
                p("samples/samples.npz"),
                "--train",
                p("train"),
                "--val",
                p("val"),
                "--out",
                out / "fdr.json",
            ],
            "hub": [p("exps/stage1"), "--to", out],
            "export": [p("exps/stage1"), "--layout", "repa", "--out", out / "e.pt"],
            "recipes list": ["--results", out],
            "recipes run": ["table4/SiT-B-2/plain", "--slurm", "--work", out, "--results", out],
            "recipes table": ["4", "--results", out],
            "recipes check": ["--results", out],
        }
        return [str(word) for word in words[command]]

    def process(self, command: str) -> list[str]:
        """The words that start `command` as a process of its own."""
        return [command] if command.endswith(".py") else ["-m", *MODULES.get(command, command).split()]


def build(root: Path) -> World:
    """Make every artefact below `root`, silently."""
    world = World(root)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _images(root / "images")
        digits.main(["--out", str(root / "data")])
        common = [*world.words("train.py"), "--output-dir", str(root / "exps"), "--exp-name"]
        train.main([*common, "stage1", "--align", "latent", "--align-hidden", "8"])
        train_guide.main([*common, "stage2", "--guiding-ckpt", str(root / "exps" / "stage1"), "--align-hidden", "8"])
        _vae(root / "vae")
        _peers(root)
        generate.main([*world.words("generate.py"), "--num-fid-samples", "8", "--out", str(root / "samples")])
        for name, images in {
            "reference.npz": "data",
            "train/pixels.npz": "data",
            "val/pixels.npz": "samples/samples.npz",
        }.items():
            reference.main(
                [*world.words("reference"), "--images", str(root / images), "--out", str(root / name), "--keep", "16"]
            )
        generate.main([*world.words("generate.py"), *world.words("evaluate")[2:6], "--out", str(root / "scores")])
    return world


def _images(folder: Path) -> None:
    for label in range(2):
        (folder / f"n{label}").mkdir(parents=True)
        for number in range(3):
            pixels = Stream(number, "picture", label).integers(256, 20 * 24 * 3).reshape(20, 24, 3).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"n{label}" / f"{number}.png")


def _vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.5,
            sample_size=16,
        ).save_pretrained(folder)
    assert (folder / WEIGHTS).is_file()


def _peers(root: Path) -> None:
    """Peers' files: a network's weights, REPA's and LightningDiT's latents."""
    checkpoint = Checkpoint.open(root / "exps" / "stage1")
    network = checkpoint.network("ema")
    weights = {**network.state_dict(), "pos_embed": network.pos_embed}
    torch.save({"ema": weights, "steps": 5}, root / "weights.pt")
    files.save_tensors(root / "weights.safetensors", weights)
    latents = root / "repa" / "vae-sd"
    latents.mkdir(parents=True)
    for item in range(4):
        np.save(
            latents / f"img{item:08d}.npy",
            np.abs(Stream(item, "latent").host.standard_normal((8, 4, 4), dtype=np.float32)),
        )
    (latents / "dataset.json").write_text(
        json.dumps({"labels": [[f"img{item:08d}.npy", item % 2] for item in range(4)]})
    )
    folder = root / "lightning"
    values = Stream(0, "latents").normal((4, 4, 4, 4))
    files.save_tensors(
        folder / "latents_rank00_shard000.safetensors",
        {"latents": values, "latents_flip": values.flip(-1), "labels": torch.tensor([0, 1, 0, 1])},
    )
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, folder / "latents_stats.pt")


def copied(world: World, name: str, into: Path) -> Path:
    """A copy of an artefact that may be damaged."""
    source = world.path(name)
    target = into / name
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))
