"""The encoding of an image set into a latent set, shard by shard, in all processes of a launch.

Worker processes decode and crop while the encoder runs. A shard is encoded whole by one process, in batches that depend
on the settings alone. So a command that was killed and is started again, with any number of processes, finishes with
the same bytes as one that ran through (on one kind of device).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import dataset
from dataset import LatentSet
from models.latents import Codec, LatentSpace
from models.manifest import Shard
from models.pixels import PIXELS, is_pixels, pixels, to_signed
from models.vae import open_codec
from preprocessing import quality, shards
from preprocessing.images import ImageSet
from preprocessing.job import STOPPED, Job, Options, begin
from preprocessing.loading import Batch, batches
from runtime import progress
from runtime.errors import UserError, require
from runtime.streams import Stream

if TYPE_CHECKING:
    from accelerate import Accelerator


# The options that the bytes of a set depend on.
SETTINGS = (
    "resolution",
    "flip",
    "keep_images",
    "moments",
    "grey",
    "dtype",
    "mixed_precision",
    "batch_size",
    "shard_size",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Encoding(Job):
    """The encoding of an image set."""

    source: ImageSet
    options: Options

    @classmethod
    def of(cls, source: ImageSet, options: Options, space: LatentSpace) -> Encoding:
        """The job that encodes `source` into `space`."""
        parts = 2 if options.moments and not is_pixels(space) else 1
        side, count = options.resolution // space.stride, len(source.names)
        return cls(
            folder=Path(options.out),
            space=space,
            shape=(2 if options.flip else 1, parts, space.channels, side, side),
            dtype=options.dtype,
            bounds=[*range(0, count, options.shard_size), count],
            image_channels=(1 if options.grey else 3) if options.keep_images else 0,
            settings={
                "format": dataset.FORMAT,
                "images": source.fingerprint,
                "space": space.to_json(),
                **{name: getattr(options, name) for name in SETTINGS},
            },
            source=source,
            options=options,
        )


def encode(source: ImageSet, options: Options) -> None:
    """Encode `source` into the latent set `options.out`, in all processes of the launch together.

    Raises:
        UserError: an unusable image, more than `skip_bad` of them, settings that contradict each other or the
            unfinished work in the folder, another writer, too little disk.
    """
    from accelerate.utils import gather_object

    from runtime.launch import accelerator, on_main

    processes = accelerator()
    codec = _codec(options, processes.device)
    job = Encoding.of(source, options, codec.space)
    rank, world = processes.process_index, processes.num_processes
    with ExitStack() as held:
        if processes.is_main_process:
            print(source.summary, f"encoding with {world} process(es) on {processes.device.type}", sep="\n")
        written = on_main(processes, lambda: begin(job, held))
        if written is None:
            return
        pending = [shard for shard in job.shard_numbers if shard not in written]
        entries: list[tuple[int, Shard]] = []
        message = None
        # An error is gathered before it is raised: a process that left early would let the others wait for it.
        try:
            entries += _encode_shards(job, codec, pending[rank::world], processes)
        except UserError as error:
            message = str(error)
            with suppress(OSError):
                (job.folder / STOPPED).touch()
        messages = [other for other in gather_object([message]) if other]
        if messages:
            raise UserError(messages[0])
        everywhere = {**written, **dict(gather_object(entries))}
        on_main(processes, lambda: _conclude(job, everywhere, codec))


def _conclude(job: Encoding, entries: Mapping[int, Shard], codec: Codec) -> None:
    """Write the manifest, and print figures of quality.

    Raises:
        UserError: more images were left out, over all starts and processes, than `skip_bad` allows.
    """
    skipped: list[str] = []
    for shard, entry in entries.items():
        if entry["count"] < len(job.items(shard)):
            stored = set(shards.names(job.folder / entry["file"]))
            skipped += {job.source.names[index] for index in job.items(shard)} - stored
    skipped.sort()
    require(
        len(skipped) <= job.options.skip_bad,
        f"{len(skipped)} images cannot be used and --skip-bad allows {job.options.skip_bad}; the first: "
        f"{''.join(skipped[:1])}",
    )
    skipped += job.source.photographs
    job.conclude(entries, job.source.class_names, job.source.description, skipped)
    print(*quality.report(LatentSet(job.folder), job.source, codec), sep="\n")


def _codec(options: Options, device: torch.device) -> Codec:
    """The codec that the options ask for. Raises UserError for options that contradict each other."""
    plain = options.vae == PIXELS
    dtype = torch.bfloat16 if options.mixed_precision == "bf16" and not plain else torch.float32
    require(
        not (plain and options.statistics),
        "--statistics scales the latents of an autoencoder; --vae pixels has none: leave it out",
    )
    codec = open_codec(
        options.vae,
        space=pixels(1 if options.grey else 3) if plain else None,
        statistics=options.statistics,
        device=device,
        dtype=dtype,
        otherwise="; or --vae pixels: small images (up to about 64 pixels) train without an autoencoder",
    )
    require(
        (codec.image_channels == 1) == options.grey,
        f"--vae {options.vae} takes {'grey images: give' if codec.image_channels == 1 else 'RGB: leave out'} --grey",
    )
    require(
        options.resolution % codec.space.stride == 0,
        f"--resolution {options.resolution} is not a multiple of {codec.space.stride}, the stride of {options.vae}; "
        f"choose another",
    )
    return codec


def _encode_shards(
    job: Encoding, codec: Codec, numbers: Sequence[int], processes: Accelerator
) -> list[tuple[int, Shard]]:
    """Encode the shards `numbers`; a thread writes one while the next is encoded. Returns numbers and entries."""
    bad: list[str] = []
    written: list[tuple[int, Future]] = []
    parts: list[tuple[Batch, np.ndarray]] = []
    with _fixed_sums(processes.device), ThreadPoolExecutor(1) as writer:
        for shard, last, batch in _decoded(job, numbers, processes):
            if (job.folder / STOPPED).exists():
                break
            bad += batch.bad
            if len(bad) > (limit := job.options.skip_bad):
                counts = f"{len(bad)} images are bad, --skip-bad allows {limit}"
                raise UserError(
                    f"{bad[-1]}; repair or remove it ({counts if limit else 'or leave out a few with --skip-bad N'})"
                )
            parts.append((batch, _encode_batch(job, codec, batch, processes.device)))
            if last:
                # At most one shard waits in memory; a failed write ends the work here.
                if written:
                    written[-1][1].result()
                written.append((shard, writer.submit(_write, job, shard, parts)))
                parts = []
        return [(shard, future.result()) for shard, future in written]


@contextmanager
def _fixed_sums(device: torch.device) -> Iterator[None]:
    """One thread on a CPU, where the order of a sum depends on their number; more processes give speed."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _decoded(job: Encoding, numbers: Sequence[int], processes: Accelerator) -> Iterator[tuple[int, bool, Batch]]:
    """The batches of the shards `numbers`: shard, whether it is the shard's last, crops. Shows progress."""
    options = job.options
    plan = [
        (shard, items[at : at + options.batch_size])
        for shard in numbers
        for items in [job.items(shard)]
        for at in range(0, len(items), options.batch_size)
    ]
    loader = batches(
        job.source,
        [list(items) for _, items in plan],
        resolution=options.resolution,
        grey=options.grey,
        keep=options.keep_images,
        workers=options.workers,
        processes=processes.num_processes,
        pin=processes.device.type == "cuda",
    )
    total = sum(len(items) for _, items in plan)
    with progress.bar(total=total, desc="encoding", unit="img", main=processes.is_main_process) as bar:
        for (shard, items), batch in zip(plan, loader):
            yield shard, items.stop == job.items(shard).stop, batch
            bar.update(len(items))


def _encode_batch(job: Encoding, codec: Codec, batch: Batch, device: torch.device) -> np.ndarray:
    """The raw latents of a batch, (n, views, parts, C, H, W) in the stored type."""
    if not batch.indices:
        return np.empty((0, *job.shape), job.options.dtype)
    images = to_signed(batch.images.to(device, non_blocking=True))
    views = [images, images.flip(-1)][: job.shape[0]]
    with torch.no_grad():
        encoded = [_parts(job, codec, batch.indices, images, view) for view, images in enumerate(views)]
    return torch.stack(encoded, 1).to(getattr(torch, job.options.dtype)).cpu().numpy()


def _parts(job: Encoding, codec: Codec, indices: Sequence[int], images: Tensor, view: int) -> Tensor:
    """The stored parts of one view, (n, parts, C, H, W) float32. A fixed sample depends on (seed, item, view) alone."""
    mean, std = (moment.float() for moment in codec.encode(images))
    if job.shape[1] == 2:
        return torch.stack([mean, std], 1)
    if is_pixels(job.space):
        return mean[:, None]
    noise = torch.stack(
        [Stream(job.options.seed, "encode", 2 * index + view).normal(mean.shape[1:]) for index in indices]
    )
    return (mean + std * noise.to(mean.device))[:, None]


def _write(job: Encoding, shard: int, parts: Sequence[tuple[Batch, np.ndarray]]) -> Shard:
    indices = [index for batch, _ in parts for index in batch.indices]
    images = [image for batch, _ in parts for image in batch.pngs] if job.options.keep_images else None
    return shards.write_shard(
        job.folder,
        shard,
        np.concatenate([latents for _, latents in parts]),
        job.source.labels[indices],
        [job.source.names[index] for index in indices],
        images,
    )
