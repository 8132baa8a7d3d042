"""Checkpoint to samples: the same N images for any batch size and number of processes (but for the adaptive solver dopri5,
whose steps are chosen for a whole batch).

    python generate.py --ckpt exps/stage2 --preset self-transcendence-cfg
    accelerate launch --num_processes 8 generate.py ...

Writes `samples.npz` (`arr_0` uint8 NHWC as ADM's evaluator reads it, `labels`), `samples.json` with every setting, and
`grid.png`. A killed run continues where it was: finished samples are kept in `partial/`. With `--reference` the samples
are scored as they are drawn, and `metrics.json` is all that is written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from config import PEERS, GenerateConfig
from runtime import errors, progress
from runtime.options import Given, peek, read
from sampling import presets

if TYPE_CHECKING:
    from sampling.sampler import Sampler
    from sampling.source import Source
    from sampling.store import Store


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Run the command; returns the folder of the samples, None where it only lists presets."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--list-presets" in words:
        print(presets.table())
        return None
    if peek(GenerateConfig, "tf32", words):
        from runtime import launch

        launch.require_tf32()
    config = read(GenerateConfig, words, prog="generate.py", description=__doc__, between=_preset, hints=PEERS,
                  epilog=f"presets: {', '.join(presets.PRESETS)}")
    return score(config) if config.reference else generate(config)


def _preset(given: Given) -> Given:
    return presets.settings(given["preset"], given) if given.get("preset") else {}


def score(config: GenerateConfig) -> Path:
    """Draw `num_fid_samples` images, score them, and write `metrics.json` alone; returns its folder."""
    from evaluations.evaluate import report
    from evaluations.reference import open_pair
    from evaluations.score import Scorer, add_drawn
    from sampling.source import Source

    count, batch_size = config.num_fid_samples, config.source.batch_size
    source = Source.open(config.source, config.sampling, config.preset)
    accelerator, sampler = source.accelerator, source.sampler(config.sampling, count)
    reference, extractor = open_pair(config.reference, config.scores, accelerator, batch_size)
    reference.require_shape("the samples", sampler.image_shape)
    scorer = Scorer(reference, extractor, accelerator=accelerator)
    add_drawn(scorer, sampler, count, batch_size)
    out = Path(config.out) if config.out else default_folder(source.checkpoint.path, config)
    settings = {**source.settings(config.sampling, count), "preset": config.preset}
    result = scorer.result() | {"samples": {"name": out.name, "sha256": None, "settings": settings}}
    if accelerator.is_main_process:
        report(result, out / "metrics.json")
    accelerator.wait_for_everyone()
    return out


def generate(config: GenerateConfig) -> Path:
    """Draw `num_fid_samples` images into `config.out`; returns that folder."""
    from runtime.launch import on_main
    from runtime.locks import locked
    from sampling.source import Source
    from sampling.store import Store, finished

    count = config.num_fid_samples
    source = Source.open(config.source, config.sampling, config.preset)
    accelerator, sampler = source.accelerator, source.sampler(config.sampling, count)
    settings = {**source.settings(config.sampling, count), "preset": config.preset}
    out = Path(config.out) if config.out else default_folder(source.checkpoint.path, config)
    with ExitStack() as held:
        on_main(accelerator, lambda: held.enter_context(locked(out, "wait for it, or choose another --out")))
        if on_main(accelerator, lambda: finished(out, settings, config.overwrite)):
            accelerator.print(f"{out} already holds these samples")
            return out
        draw(source, sampler, Store(out, settings, count, sampler.image_shape, accelerator, config.overwrite), config)
    return out


def draw(source: Source, sampler: Sampler, store: Store, config: GenerateConfig) -> None:
    """Draw the samples that `store` lacks, in all processes together, and finish it."""
    accelerator, count, out = source.accelerator, config.num_fid_samples, store.out
    todo = store.missing(accelerator.process_index, accelerator.num_processes)
    with progress.bar(total=len(todo), desc=f"sampling {count} on {accelerator.num_processes} process(es)",
                      unit="image", main=accelerator.is_main_process) as bar:
        for indices, images in sampler.stream(batches(todo, config.source.batch_size)):
            store.put(indices, images, sampler.labels(indices))
            bar.update(len(indices))
    store.flush()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        store.finish()
        print(f"wrote {out}/samples.npz, samples.json and grid.png", flush=True)
    accelerator.wait_for_everyone()


def default_folder(checkpoint: Path, config: GenerateConfig) -> Path:
    """Where samples go without --out: beside the checkpoints, named by what a reader wants to tell apart."""
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    sampling = config.sampling
    solver = sampling.mode if sampling.mode == "sde" else sampling.solver
    return run / "samples" / (f"{checkpoint.name}-{sampling.weights}-{solver}{sampling.num_steps}-cfg{sampling.cfg_scale:g}"
                              f"-{config.num_fid_samples}-seed{sampling.seed}")


def batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive pieces of at most `size`."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


if __name__ == "__main__":
    errors.run(main)
