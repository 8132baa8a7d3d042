"""The whole chain of a row in its first minutes: `python -m recipes run ROW --rehearse`.

What the chain reads from outside is opened. Then every link runs for two steps, at the row's own resolution, network
and number of processes, on some of its images, down to the record. Everything lies in one folder, which is removed.
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

import generate
from evaluations.images import open_images
from preprocessing.images import LABELS, ImageFiles
from recipes import chain, costs, runner
from recipes.row import Row
from recipes.scale import VAES, Scale
from runtime import errors, files
from runtime.npy import NpzArchive
from sampling import presets

STEPS = 2
# Images, or a batch if that is more.
ITEMS = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Rehearsal(Scale):
    """A scale at which every training takes two steps."""

    def steps(self, row: Row, epochs: float) -> int:
        """The end of a run; a branch has two steps of its own."""
        return 2 * STEPS if row.trunk is not None and epochs > row.trunk else STEPS


def scale_of(size: Scale, images: Path, batch_size: int | None, processes: int) -> Rehearsal:
    """The rehearsal of a scale, with the image set `images` and, if given, another global batch."""
    same = {entry.name: getattr(size, entry.name) for entry in fields(size)}
    batch = "" if batch_size is None else f" --batch-size {batch_size}"
    share = "" if batch_size is None else f" --batch-size {max(1, batch_size // processes)}"
    return Rehearsal(
        **{
            **same,
            "places": replace(size.places, images=str(images)) if size.outside else size.places,
            # the last of two equal flags holds
            "train": {family: words + batch for family, words in size.train.items()},
            "sample": {preset: words + share for preset, words in size.sample.items()},
            "sampler": "-m recipes.rehearsal",
        }
    )


def rehearse(row: Row, size: Scale, seed: int, work: Path, processes: int, nodes: int, batch_size: int | None) -> None:
    """Open what the chain of `row` reads, and run each of its links for two steps; nothing of it stays.

    Raises:
        UserError: the first thing that would have failed later.
    """
    began = time.monotonic()
    with files.writing(work):
        work.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="rehearsal-", dir=work)
    with folder:
        place = Path(folder.name)
        few = scale_of(size, place / "images", batch_size, processes * nodes)
        plan = chain.build(row, few, seed, place / "work")
        print(_disk(row, size, work), flush=True)
        if size.outside:
            _some_images(size.places.images, place / "images", max(ITEMS, *map(_batch, plan.links)))
            _open(plan, size.places.vae or VAES[row.family])
        runner.run(row, few, seed, place / "work", place / "results", processes, nodes)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        f"rehearsed {row.name}: {len(plan.links)} links in {(time.monotonic() - began) / 60:.1f} minutes, at most "
        f"{peak / 2**20:.1f} GiB of memory in a process; everything is removed again",
        flush=True,
    )


def _disk(row: Row, size: Scale, work: Path) -> str:
    """What the latents and checkpoints of the whole chain take, and what is free."""
    latents, checkpoints = costs.sketch(row, size).bytes, 0
    for training in (row, *([row.of_teacher()] if row.teacher else [])):
        steps, every = size.steps(training, training.epochs), size.checkpointing_steps[row.family]
        checkpoints += -(-steps // every) * costs.checkpoint_bytes(training, size)
    free, needed = shutil.disk_usage(work).free, latents + checkpoints
    return (
        f"{'disk' if needed < free else 'warning: disk'}: the chain takes about {needed / 2**30:.1f} GiB "
        f"({latents / 2**30:.1f} GiB are latents), {free / 2**30:.1f} GiB are free in {work}"
    )


def _batch(link: chain.Link) -> int:
    """The global batch of a training link, 0 of others."""
    if not link.words[0].startswith("train"):
        return 0
    from training import command

    always = ("guided",) if link.words[0] == "train_guide.py" else ()
    return command.resolve(link.words[1:], link.words[0], None, always)[0].batch_size


def _some_images(source: str, folder: Path, count: int) -> None:
    """Copy `count` images, spread evenly over `source`, with their classes numbered anew."""
    images = ImageFiles(source)
    print(images.summary, flush=True)
    chosen = np.unique(np.linspace(0, len(images.names) - 1, count).round().astype(int))
    names = [images.names[index] for index in chosen]
    _, labels = np.unique(images.labels[chosen], return_inverse=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(images.read(name))
    (folder / LABELS).write_text(json.dumps({"labels": list(zip(names, labels.tolist(), strict=True))}))


def _open(plan: chain.Chain, vae: str) -> None:
    """Open what the last links read, which would fail after hours: decoder, reference, features."""
    from evaluations.extractors import open_extractor
    from models.vae import open_codec

    space = open_codec(vae).space
    for score in plan.scores:
        config = generate.resolve(score.link.words[2:])  # after -m and the module
        reference = str(config.reference)
        holds = sorted(NpzArchive(reference).names) if reference.endswith(".npz") else [open_images(reference).name]
        if decoder := config.source.vae or presets.decoder(config.preset, space):
            open_codec(decoder, space=space)
        open_extractor(config.scores)
        print(
            f"score {score.preset}: decoder {decoder or vae}, features {config.scores.features}, reference {reference} "
            f"({', '.join(holds)})",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """`generate.py` with two steps of its solver, for a batch of samples in each process."""
    config = generate.resolve(argv)
    from runtime import launch

    sampling = config.sampling
    if not sampling.adaptive:
        sampling = replace(sampling, num_steps=STEPS + (sampling.grid == "points"))
    count = max(4, config.source.batch_size * launch.world_size())  # metrics need four
    generate.score(replace(config, num_fid_samples=count, sampling=sampling), str(config.reference))


if __name__ == "__main__":
    errors.run(main)
