"""A small world to break: one sound artefact of every kind, and every command with arguments under which it works.

`bad_options` and `bad_files` hand damaged copies and wrong options to the commands; `processes` kills processes in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import generate
import train
import train_guide
from config import TrainConfig
from evaluations import evaluate, fdr, figures, probe, reference, sweep
from generate import GenerateConfig
from models import convert, export, hub
from models.checkpoint import Checkpoint
from preprocessing import digits, encode, import_latents, job, verify
from recipes import __main__ as recipes
from runtime import files, seal
from runtime.streams import Stream
from tests.helpers import ROOT, class_folders, tiny_vae

RUN = "--recipe digits --data-dir {root}/data --output-dir {out} --exp-name x --batch-size 16 --max-train-steps 1"
CHECKPOINT = "--ckpt {root}/exps/stage1"
SAMPLES = f"{CHECKPOINT} --num-fid-samples 4 --num-steps 2"
REFERENCE = "--features pixels --reference {root}/reference.npz"
TOKENS = f"{CHECKPOINT} --data-dir {{root}}/data --items 8 --t 0.5 --blocks 1"


@dataclass(frozen=True)
class Command:
    """A command of the project."""

    main: Callable[[Sequence[str]], object]
    process: str
    """What follows `python` to start it as a process of its own."""
    words: str
    """Arguments under which it works; {root} is the world's folder, {out} does not exist."""
    schema: type | None = None
    """Its options. None for a command with few of them, whose rows are all written by hand."""


def _figure(kind: str, words: str) -> Command:
    main = partial(_with_kind, figures.main, kind)
    return Command(main, f"-m evaluations.figures {kind}", f"{words} --out {{out}}/{kind}", figures.KINDS[kind][0])


def _recipe(kind: str, words: str, schema: type | None = None) -> Command:
    return Command(partial(_with_kind, recipes.main, kind), f"-m recipes {kind}", f"{words} --results {{out}}", schema)


def _with_kind(main: Callable[[Sequence[str]], object], kind: str, argv: Sequence[str]) -> object:
    return main([kind, *argv])


COMMANDS: dict[str, Command] = {
    "train.py": Command(train.main, "train.py", RUN, TrainConfig),
    "train_guide.py": Command(
        train_guide.main, "train_guide.py", f"{RUN} --guiding-ckpt {{root}}/exps/stage1 --guided-hidden 8"
    ),
    "generate.py": Command(generate.main, "generate.py", f"{SAMPLES} --mode ode --out {{out}}", GenerateConfig),
    "encode": Command(
        encode.main,
        "-m preprocessing.encode",
        "--images {root}/images --vae {root}/vae --resolution 16 --out {out} --workers 0",
        job.Options,
    ),
    "digits": Command(digits.main, "-m preprocessing.digits", "--out {out}"),
    "import_latents": Command(
        import_latents.main, "-m preprocessing.import_latents", "{root}/repa --out {out}", import_latents.Options
    ),
    "verify": Command(verify.main, "-m preprocessing.verify", "{root}/data --num-images 0", verify.Options),
    "convert": Command(
        convert.main, "-m models.convert", "{root}/weights.pt --out {out} --num-heads 4 --vae pixels", convert.Options
    ),
    "hub": Command(hub.main, "-m models.hub", "{root}/exps/stage1 --to {out}", hub.Options),
    "export": Command(
        export.main, "-m models.export", "{root}/exps/stage1 --layout repa --out {out}/e.pt", export.Options
    ),
    "evaluate": Command(
        evaluate.main,
        "-m evaluations.evaluate",
        f"--samples {{root}}/samples/samples.npz {REFERENCE} --out {{out}}/metrics.json",
        evaluate.Options,
    ),
    "reference": Command(
        reference.main,
        "-m evaluations.reference",
        "--images {root}/data --features pixels --out {out}/r.npz",
        reference.Options,
    ),
    "sweep": Command(
        sweep.main, "-m evaluations.sweep", f"{SAMPLES} --cfg-scale 1.5 {REFERENCE} --out {{out}}", sweep.SweepConfig
    ),
    "fdr": Command(
        fdr.main,
        "-m evaluations.fdr",
        "--samples {root}/samples/samples.npz --train {root}/train --val {root}/val --out {out}/fdr.json",
        fdr.Options,
    ),
    "probe": Command(probe.main, "-m evaluations.probe", f"{TOKENS} --out {{out}}", probe.ProbeConfig),
    "pca": _figure("pca", TOKENS),
    "tsne": _figure("tsne", TOKENS),
    "steps": _figure("steps", "--scores x={root}/scores/metrics.json"),
    "seeds": _figure("seeds", f"{CHECKPOINT} --num-steps 2 --mode ode"),
    "time": _figure("time", "--runs {root}/exps/stage1"),
    "seal": Command(seal.main, "-m runtime.seal", "{root}/data/manifest.json"),
    # the subcommands that start no training
    "recipes list": _recipe("list", ""),
    "recipes run": _recipe(
        "run", "table4/SiT-B-2/plain --slurm {out}/jobs --work {out}", recipes.COMMANDS["run"].options
    ),
    "recipes table": _recipe("table", "4"),
    "recipes check": _recipe("check", ""),
}


@dataclass(frozen=True)
class World:
    """The folder of the sound artefacts; what a command writes goes below `out`, which does not exist."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def path(self, name: str) -> Path:
        """The artefact `name`: data, exps/stage1, images, vae, repa, lightning, weights.pt, samples/samples.npz, ..."""
        return self.root / name

    def words(self, command: str) -> list[str]:
        """Arguments under which `command` works."""
        return [word.format(root=self.root, out=self.out) for word in COMMANDS[command].words.split()]

    def copy(self, name: str, into: Path) -> Path:
        """A copy of an artefact, to be damaged."""
        source, target = self.path(name), into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


def start(*words: object) -> subprocess.Popen[str]:
    """Start Python with `words` on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe
    )


def build(root: Path) -> World:
    """Make every artefact below `root`, silently."""
    world = World(root)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        class_folders(root / "images", classes=2, per_class=3)
        digits.main(["--out", str(root / "data")])
        common = [*world.words("train.py"), "--output-dir", str(root / "exps"), "--align-hidden", "8", "--exp-name"]
        train.main([*common, "stage1", "--align", "latent"])
        train_guide.main([*common, "stage2", "--guiding-ckpt", str(root / "exps/stage1")])
        tiny_vae(root / "vae")
        _peer_weights(root)
        _peer_latents(root)
        generate.main([*world.words("generate.py"), "--num-fid-samples", "8", "--out", str(root / "samples")])
        features = {"reference.npz": "data", "train/pixels.npz": "data", "val/pixels.npz": "samples/samples.npz"}
        for name, images in features.items():
            places = ["--images", str(root / images), "--out", str(root / name)]
            reference.main([*world.words("reference"), *places, "--keep", "16"])
        scoring = [word.format(root=root) for word in REFERENCE.split()]
        generate.main([*world.words("generate.py"), *scoring, "--out", str(root / "scores")])
    return world


def _peer_weights(root: Path) -> None:
    """The network's weights in SiT's layout."""
    network = Checkpoint.open(root / "exps/stage1").network("ema")
    weights = {**network.state_dict(), "pos_embed": network.pos_embed}
    torch.save({"ema": weights, "steps": 5}, root / "weights.pt")
    files.save_tensors(root / "weights.safetensors", weights)


def _peer_latents(root: Path) -> None:
    """Latents as REPA and as LightningDiT store them."""
    latents = root / "repa" / "vae-sd"
    latents.mkdir(parents=True)
    names = [f"img{item:08d}.npy" for item in range(4)]
    for item, name in enumerate(names):
        values = Stream(item, "latent").host.standard_normal((8, 4, 4), dtype=np.float32)
        np.save(latents / name, np.abs(values))
    labels = [[name, item % 2] for item, name in enumerate(names)]
    (latents / "dataset.json").write_text(json.dumps({"labels": labels}))
    folder = root / "lightning"
    values = Stream(0, "latents").normal((4, 4, 4, 4))
    files.save_tensors(
        folder / "latents_rank00_shard000.safetensors",
        {"latents": values, "latents_flip": values.flip(-1), "labels": torch.tensor([0, 1, 0, 1])},
    )
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, folder / "latents_stats.pt")
