"""Checkpoint to samples: the same N images for any batch size and number of processes.

    python generate.py --ckpt exps/stage2 --num-fid-samples 50000 --cfg-scale 1.9 --guidance-high 0.65
    accelerate launch --num_processes 8 generate.py ...

Writes `samples.npz` (`arr_0` uint8 NHWC as ADM's evaluator reads it, `labels`), `samples.json` with every setting, and
`grid.png`. A killed run continues where it was: finished samples are kept in `partial/`. With `--score REFERENCE` the
samples are scored as they are drawn, and `metrics.json` is all that is written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import errors
import progress
from config import GenerateConfig, as_dict, build, parse, require
from samples import Store, finished

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
        require(checkpoint.has_null or config.cfg_scale == 1,
                f"{checkpoint.path} was trained without label dropout (--cfg-prob 0), so it has no null class to guide with: "
                f"use --cfg-scale 1")
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
    reference.require_shape("the samples", source.sampler(config).image_shape)
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
    if finished(out, settings):
        accelerator.print(f"{out} already holds these samples")
        return out
    store = Store(out, settings, config.num_fid_samples, sampler.image_shape, accelerator.is_main_process,
                  accelerator.wait_for_everyone)
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


if __name__ == "__main__":
    errors.run(main)
