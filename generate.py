"""Checkpoint to samples: the same N images for any batch size and number of processes (except with the adaptive solver
dopri5, which chooses its steps for a whole batch).

    python generate.py --ckpt exps/stage2 --preset self-transcendence-cfg
    accelerate launch --num_processes 8 generate.py ...

Writes `samples.npz` (`arr_0` uint8 NHWC as ADM's evaluator reads it, `labels`), `samples.json` with every setting, and
the picture `grid.png`. A killed run continues where it was: finished samples are kept in `partial/`. With `--reference`
it scores the samples as it draws them, and writes `metrics.json` and `metrics.safetensors` alone.

    python generate.py --ckpt exps/stage2 --classes "golden retriever" otter 974 --per-class 6
    python generate.py --ckpt exps/plain --compare exps/stage1 exps/stage2 --classes 207 88 --per-class 4 --out figure

`--classes` draws chosen classes, which `grid.png` shows in their order, all of them (then `grid-2.png`, ...); with
`--compare` further checkpoints have a row each in one picture, `compare.png`, in which a column has one class and one
noise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import FeatureOptions, require_samples
from models.peers import SAMPLING
from runtime import errors, files, progress
from runtime.errors import require
from runtime.options import group, option, peek, read
from runtime.slices import slices
from runtime.text import quoted
from sampling import presets
from sampling.config import SamplingConfig, SourceOptions

if TYPE_CHECKING:
    from sampling.sampler import Sampler
    from sampling.source import Source
    from sampling.store import Store

PER_CLASS = 8


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of `generate.py`."""

    source: SourceOptions = group(SourceOptions)
    preset: str | None = option(None, help="settings of a published number, see --list-presets", heading="samples")
    list_presets: bool = option(False, help="print the presets with their published FIDs, and exit")
    num_fid_samples: int = option(50_000, help="how many samples")
    classes: tuple[str, ...] = option(
        (), help="draw these classes, names or numbers, in this order, instead of --num-fid-samples"
    )
    per_class: int | None = option(
        None, within="[1, inf)", help=f"with --classes: samples of each (default {PER_CLASS})"
    )
    compare: tuple[str, ...] = option(
        (),
        help="with --classes: further checkpoints, a row each below that of --ckpt in one picture; a column "
        "has one class and one noise",
    )
    out: str | None = option(
        None, help="folder of the samples (default: samples/ beside the checkpoint, named by settings)"
    )
    overwrite: bool = option(False, help="replace samples of other settings, or damaged ones, that lie in --out")
    sampling: SamplingConfig = group(SamplingConfig)
    reference: str | None = option(
        None, help="score the samples against this reference while drawing, and write no samples", heading="scores"
    )
    scores: FeatureOptions = group(FeatureOptions)

    def __post_init__(self) -> None:
        require(
            self.reference is not None or self.scores == FeatureOptions(),
            "--features, --feature-weights and --mind say how to score: add --reference REFERENCE",
        )
        # Metrics need four samples.
        require_samples(self.num_fid_samples, 1 if self.reference is None else 4)
        require(
            bool(self.classes) or (self.per_class is None and not self.compare),
            "--per-class and --compare say how to draw chosen classes: add --classes NAME ...",
        )
        require(
            not self.classes
            or (self.reference is None and self.num_fid_samples == 50_000 and self.sampling.labels == "random"),
            "--classes chooses the labels and the number of samples: leave out --num-fid-samples, --labels and "
            "--reference",
        )


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Run the command; returns the folder that it wrote, None if it only lists presets."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--list-presets" in words:
        print(presets.table())
        return None
    config = resolve(words)
    if config.compare:
        return compare(config)
    return score(config, config.reference) if config.reference else generate(config)


def resolve(argv: Sequence[str] | None) -> GenerateConfig:
    """The options of the command. Raises UserError for TF32 on a device without it."""
    words = sys.argv[1:] if argv is None else list(argv)
    # before `read`, which merges the preset: a preset's TF32 may fall back to float32, --tf32 may not
    if peek(GenerateConfig, "tf32", words):
        from runtime import launch

        launch.require_tf32()
    return read(
        GenerateConfig,
        words,
        prog="generate.py",
        description=__doc__,
        between=presets.settings,
        hints=SAMPLING,
        epilog=f"presets: {', '.join(presets.PRESETS)}",
    )


def score(config: GenerateConfig, against: str) -> Path:
    """Draw `num_fid_samples` images, score them against a reference, write `metrics.json`; returns its folder."""
    from evaluations.evaluate import report
    from evaluations.reference import open_pair
    from evaluations.score import Scorer, add_drawn
    from sampling.source import Source

    count, batch_size = config.num_fid_samples, config.source.batch_size
    source = Source.open(config.source, config.sampling, config.preset)
    accelerator, sampler = source.accelerator, source.sampler(config.sampling, count)
    out = Path(config.out) if config.out else default_folder(source, config)
    accelerator.project_configuration.set_directories(str(out))
    reference, extractor = open_pair(against, config.scores, accelerator, batch_size)
    # fails before the first sample is drawn, not with the first batch
    reference.require_shape("the samples", sampler.image_shape)
    scorer = Scorer(reference, extractor, accelerator=accelerator, mind=config.scores.mind)
    accelerator.print(source.introduction(config.sampling, count))
    add_drawn(scorer, sampler, count, batch_size)
    settings = {**source.settings(config.sampling, count), "preset": config.preset}
    # the samples are not written: there is no file to digest
    result = scorer.result() | {"samples": {"name": out.name, "sha256": None, "settings": settings}}
    if accelerator.is_main_process:
        report(result, out / "metrics.json", [scorer.projected])
    accelerator.wait_for_everyone()
    return out


def generate(config: GenerateConfig) -> Path:
    """Draw `num_fid_samples` images into `config.out`; returns that folder."""
    from runtime.launch import on_main
    from runtime.locks import locked
    from sampling.classes import names_of
    from sampling.source import Source
    from sampling.store import Store, finished

    source = Source.open(config.source, config.sampling, config.preset)
    names = names_of(source.checkpoint)
    chosen = labels_chosen(config, names) if config.classes else None
    count = config.num_fid_samples if chosen is None else len(chosen)
    accelerator, sampler = source.accelerator, source.sampler(config.sampling, count, chosen)
    settings = {**source.settings(config.sampling, count), "preset": config.preset}
    if chosen is not None:
        settings |= {"labels": "chosen", "classes": chosen.tolist()}
    out = Path(config.out) if config.out else default_folder(source, config)
    with ExitStack() as held:
        on_main(accelerator, lambda: held.enter_context(locked(out, "wait for it, or choose another --out")))
        # one process looks, since another could write between two looks
        if on_main(accelerator, lambda: finished(out, settings, config.overwrite)):
            accelerator.print(f"{quoted(out)} already holds these samples")
            return out
        accelerator.print(source.introduction(config.sampling, count), f"into {quoted(out)}", sep="\n")
        store = Store(out, settings, count, sampler.image_shape, accelerator, config.overwrite)
        draw(source, sampler, store, config.source.batch_size, names)
    return out


def draw(source: Source, sampler: Sampler, store: Store, batch_size: int, names: Sequence[str]) -> None:
    """Draw the samples that `store` lacks, in all processes together, and finish it; `names` are the classes' names."""
    accelerator, count = source.accelerator, store.count
    todo = store.missing(accelerator.process_index, accelerator.num_processes)
    with progress.bar(
        total=len(todo),
        desc=f"sampling {count} on {accelerator.num_processes} process(es)",
        unit="image",
        main=accelerator.is_main_process,
    ) as bar:
        for indices, labels, images in sampler.stream(slices(todo, batch_size)):
            store.put(indices, images, labels)
            bar.update(len(indices))
    # all parts are on disk before the main process joins them
    store.flush()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print("wrote", *map(quoted, store.finish(names)), flush=True)
    accelerator.wait_for_everyone()


def labels_chosen(config: GenerateConfig, names: Sequence[str]) -> np.ndarray:
    """(count,) the labels that `--classes` asks for, sample by sample."""
    from sampling.classes import labels_of

    return np.repeat(labels_of(config.classes, names), config.per_class or PER_CLASS)


def compare(config: GenerateConfig) -> Path:
    """Draw the chosen classes from several checkpoints, with the same noise, into one picture; returns its folder."""
    from sampling import picture
    from sampling.classes import names_of
    from sampling.source import Source

    rows: list[np.ndarray] = []
    records: list[dict[str, Any]] = []
    for ckpt in (config.source.ckpt, *config.compare):
        source = Source.open(dataclasses.replace(config.source, ckpt=ckpt), config.sampling, config.preset)
        names = names_of(source.checkpoint)
        labels = labels_chosen(config, names)
        sampler = source.sampler(config.sampling, len(labels), labels)
        source.accelerator.print(source.introduction(config.sampling, len(labels)))
        # The first checkpoint decides the folder, the headings and the size of the images.
        if not records:
            out = Path(config.out) if config.out else default_folder(source, config)
            classes, shape = names, sampler.image_shape
        require(
            sampler.image_shape == shape,
            f"{ckpt} draws images of another size than {config.source.ckpt}: they do not fit into one picture",
        )
        if source.accelerator.is_main_process:
            rows.append(
                np.concatenate([sampler.images(part) for part in slices(range(len(labels)), config.source.batch_size)])
            )
        settings = source.settings(config.sampling, len(labels))
        records.append({"row": source.checkpoint.name, **settings, "labels": "chosen", "classes": labels.tolist()})
    if source.accelerator.is_main_process:
        titles = [record["row"] for record in records]
        written = picture.write_rows(out / "compare.png", rows, titles, records[0]["classes"], classes)
        files.write_json(out / "compare.json", {"preset": config.preset, "rows": records})
        print("wrote", *map(quoted, [*written, out / "compare.json"]), flush=True)
    source.accelerator.wait_for_everyone()
    return out


def default_folder(source: Source, config: GenerateConfig) -> Path:
    """Where samples go without --out: beside the checkpoints, named by the settings that readers compare."""
    sampling = config.sampling
    solver = sampling.mode if sampling.mode == "sde" else sampling.solver
    what = str(config.num_fid_samples)
    if config.classes:
        words = "-".join(config.classes).replace(" ", "_").replace("/", "_")
        # a long list becomes its count and a digest: file systems limit the length of a name
        many = f"{len(config.classes)}classes-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
        what = f"{words if len(words) < 60 else many}x{config.per_class or PER_CLASS}"
    internal = f"-internal{sampling.internal_scale:g}" if sampling.internal_scale != 1 else ""
    name = (
        f"{source.checkpoint.path.name}-{sampling.weights}-{solver}{sampling.num_steps}-cfg{sampling.cfg_scale:g}"
        f"{internal}-{what}-seed{sampling.seed}"
    )
    return source.folder / "samples" / name


if __name__ == "__main__":
    errors.run(main)
