"""Checkpoint to samples: the same N images for any batch size and number of processes.

    python generate.py --ckpt exps/stage2 --num-fid-samples 50000 --cfg-scale 1.9 --guidance-high 0.65
    accelerate launch --num_processes 8 generate.py ...

Writes `samples.npz` (`arr_0` uint8 NHWC as ADM's evaluator reads it, `labels`), `samples.json` with every setting, and
`grid.png`. A killed run continues where it was: finished samples are kept in `partial/`. With `--score REFERENCE` the
samples are scored as they are drawn, and `metrics.json` is all that is written.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import errors
import files
import progress
from config import GenerateConfig, as_dict, build, parse

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from models import Backbone
    from models.latents import Codec
    from sampling import Sampler
    from training.checkpoint import Checkpoint

SETTINGS_ONLY = ("out", "batch_size", "compile", "vae", "ckpt", "list_presets", "score", "features", "inception_weights",
                 "feature_weights")
"""Options that change no sample (the checkpoint and the VAE are recorded by digest instead)."""


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Run the command; returns the folder of the samples, None where it only lists presets."""
    from recipes import sampling as presets

    given = parse(GenerateConfig, sys.argv[1:] if argv is None else argv, prog="generate.py", description=__doc__)
    if given.get("list_presets"):
        print(presets.table())
        return None
    fixed = presets.settings(given["preset"], given) if given.get("preset") else {}
    config = build(GenerateConfig, fixed, given)
    return score(config) if config.score else generate(config)


@dataclass(frozen=True)
class Source:
    """A checkpoint, ready to be sampled from on this process."""

    accelerator: Accelerator
    checkpoint: Checkpoint
    network: Backbone
    codec: Codec
    dtype: torch.dtype | None

    @classmethod
    def open(cls, config: GenerateConfig) -> Source:
        """Load what `config` names. Raises UserError for a checkpoint or VAE that is missing or damaged."""
        from models.latents import open_codec
        from training import launch
        from training.checkpoint import Checkpoint

        accelerator = launch.accelerator()
        device = accelerator.device
        checkpoint = Checkpoint.open(config.ckpt)
        network = checkpoint.network(config.weights).to(device)
        if launch.compiles(config.compile, device)[0]:
            launch.compile_blocks(network)
        codec = open_codec(config.vae or checkpoint.space.vae, space=checkpoint.space, device=device)
        return cls(accelerator, checkpoint, network, codec, launch.precision(config.mixed_precision, device))

    def sampler(self, config: GenerateConfig) -> Sampler:
        """A sampler of `config.num_fid_samples` images."""
        from sampling import Sampler

        return Sampler(self.network, self.codec, config, config.num_fid_samples, self.dtype)

    def settings(self, config: GenerateConfig) -> dict[str, Any]:
        """All that the samples depend on, as JSON values."""
        settings = {name: value for name, value in as_dict(config).items() if name not in SETTINGS_ONLY}
        return settings | {
            "evaluations": self.sampler(config).evaluations, "precision": "bf16" if self.dtype else "fp32",
            "model": self.checkpoint.spec.name, "checkpoint": self.checkpoint.digest, "step": self.checkpoint.step,
            "space": self.checkpoint.space.to_json(),
            "decoder": config.vae or self.checkpoint.space.vae or self.checkpoint.space.name}


def score(config: GenerateConfig) -> Path:
    """Draw `num_fid_samples` images, score them, and write `metrics.json` alone; returns its folder."""
    from evaluations.evaluate import open_pair, report
    from evaluations.score import Scorer, add_drawn

    source = Source.open(config)
    accelerator = source.accelerator
    reference, extractor = open_pair(config.score, config.features, accelerator, config.batch_size,
                                     inception_weights=config.inception_weights, feature_weights=config.feature_weights)
    scorer = Scorer(reference, extractor, accelerator=accelerator)
    add_drawn(scorer, source.sampler(config), config.num_fid_samples, config.batch_size)
    out = Path(config.out) if config.out else default_folder(source.checkpoint.path, config)
    samples = {"name": out.name, "sha256": None, "settings": source.settings(config)}
    result = scorer.result() | {"samples": samples}
    if accelerator.is_main_process:
        report(result, out / "metrics.json")
    accelerator.wait_for_everyone()
    return out


def generate(config: GenerateConfig) -> Path:
    """Draw `num_fid_samples` images into `config.out`; returns that folder."""
    source = Source.open(config)
    accelerator, sampler, settings = source.accelerator, source.sampler(config), source.settings(config)
    out = Path(config.out) if config.out else default_folder(source.checkpoint.path, config)
    store = Store(out, settings, config.num_fid_samples, accelerator.is_main_process, accelerator.wait_for_everyone)
    todo = store.missing(accelerator.process_index, accelerator.num_processes)
    with progress.bar(total=len(todo), desc=f"sampling {config.num_fid_samples} on {accelerator.num_processes} process(es)",
                      unit="image", main=accelerator.is_main_process) as bar:
        for indices in batches(todo, config.batch_size):
            store.put(indices, sampler.images(indices), sampler.labels(indices))
            bar.update(len(indices))
    store.flush()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        store.finish()
        print(f"wrote {out}/samples.npz, samples.json and grid.png", flush=True)
    accelerator.wait_for_everyone()
    return out


def default_folder(checkpoint: Path, config: GenerateConfig) -> Path:
    """Where samples go without --out: beside the checkpoints, named by what a reader wants to tell apart."""
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    solver = config.mode if config.mode == "sde" else config.solver
    return run / "samples" / (f"{checkpoint.name}-{config.weights}-{solver}{config.num_steps}-cfg{config.cfg_scale:g}"
                              f"-{config.num_fid_samples}-seed{config.seed}")


def batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive pieces of at most `size`."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


class Store:
    """The growing set of samples on disk: memory-mapped images, labels and a flag for each sample.

    All processes write their own rows of one file; a restart under the same settings keeps the finished ones.
    """

    def __init__(self, out: Path, settings: dict[str, Any], count: int, main: bool, barrier: Any) -> None:
        self.out, self.settings, self.count, self.barrier, self.main = out, settings, count, barrier, main
        self.partial = out / "partial"
        if main:
            self._prepare()
        barrier()
        self._arrays: dict[str, np.ndarray] = {}

    def _prepare(self) -> None:
        """Keep an earlier attempt under the same settings, drop any other."""
        mark = self.partial / "settings.json"
        if mark.is_file() and files.read_json(mark) == self.settings:
            return
        with files.writing(self.out):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            _allocate(self.partial / "done.npy", np.uint8, (self.count,))
            _allocate(self.partial / "labels.npy", np.int64, (self.count,))
        files.write_json(mark, self.settings)

    def _open(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = np.lib.format.open_memmap(self.partial / f"{name}.npy", "r+")
        return self._arrays[name]

    def missing(self, rank: int, world: int) -> list[int]:
        """This process's share of the samples that are not there yet."""
        left = np.flatnonzero(self._open("done") == 0)
        self.barrier()
        return left[rank * len(left) // world : (rank + 1) * len(left) // world].tolist()

    def put(self, indices: Sequence[int], images: np.ndarray, labels: np.ndarray) -> None:
        """Keep images (n, H, W, C) uint8 and labels (n,) of the samples at `indices`."""
        with files.writing(self.partial):
            self._images(images.shape[1:])[indices] = images
            self._open("labels")[indices] = labels
            self._open("done")[indices] = 1

    def _images(self, shape: tuple[int, ...]) -> np.ndarray:
        """The image file, made by whoever comes first: its bytes are the same whoever makes it."""
        file = self.partial / "images.npy"
        if "images" not in self._arrays and not file.exists():
            with files.replacing(file) as temporary:
                _allocate(temporary, np.uint8, (self.count, *shape))
        return self._open("images")

    def flush(self) -> None:
        """Push this process's rows to disk."""
        for array in self._arrays.values():
            array.flush()

    def finish(self) -> None:
        """Write the npz, the JSON and the grid, and drop the partial files."""
        from PIL import Image

        from sampling import grid_picture

        images, labels = self._open("images"), self._open("labels")
        with files.replacing(self.out / "samples.npz") as temporary:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                for name, array in (("arr_0", images), ("labels", labels)):
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:  # streamed: no copy in memory
                        np.lib.format.write_array(member, np.asanyarray(array))
        shown = np.asarray(images[: min(64, self.count)])
        with files.replacing(self.out / "grid.png") as temporary:
            Image.fromarray(grid_picture(shown, 8, scale=max(1, 64 // shown.shape[1]))).save(temporary, format="PNG")
        files.write_json(self.out / "samples.json", {**self.settings, "samples": files.digest(self.out / "samples.npz")})
        shutil.rmtree(self.partial)


def _allocate(file: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """A file of zeros whose space is taken at once: a full disk is an error here, not a crash while it is written."""
    np.lib.format.open_memmap(file, "w+", dtype, shape).flush()
    with open(file, "r+b") as handle:
        os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)


if __name__ == "__main__":
    errors.run(main)
