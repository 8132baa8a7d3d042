"""Images to a latent set.

    python -m preprocessing.encode --images DIR|ZIP --vae ID|DIR|pixels --resolution 256 --out data/imagenet
    accelerate launch --multi_gpu --num_processes 8 -m preprocessing.encode ...

Worker processes decode and crop while the encoder runs. A shard is encoded whole by one process, in batches that depend
on the settings alone; so a command that was killed and is started again, with as many processes as you like, finishes
with the same bytes as one that was not (on one kind of device).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataset import LatentSet
from models.latents import Codec
from models.pixels import PIXELS, is_pixels, pixels, to_signed
from models.vae import open_codec
from preprocessing import quality, shards
from preprocessing.images import ImageFiles, ImageSet
from preprocessing.job import STOPPED, Job, Options, begin, finish
from preprocessing.loading import Batch, batches
from runtime import errors, progress
from runtime.errors import UserError, require
from runtime.options import read
from runtime.streams import Stream

if TYPE_CHECKING:
    from accelerate import Accelerator


def main(argv: Sequence[str] | None = None) -> None:
    """Encode a folder or ZIP file of images."""
    options = read(
        Options, sys.argv[1:] if argv is None else argv, prog="python -m preprocessing.encode", description=__doc__
    )
    encode(ImageFiles(options.images), options)


def encode(source: ImageSet, options: Options) -> None:
    """Encode `source` into the latent set `options.out`, in all processes of the launch together.

    Raises:
        UserError: an unusable image, more than `skip_bad` of them, settings that contradict each other or the unfinished
            work in the folder, another writer, too little disk.
    """
    from accelerate.utils import gather_object

    from runtime.launch import accelerator, on_main

    processes = accelerator()
    codec = _codec(options, processes.device)
    job = Job(source=source, options=options, space=codec.space, shape=_shape(codec, options))
    rank, world = processes.process_index, processes.num_processes
    with ExitStack() as held:
        if processes.is_main_process:
            print(source.summary, f"encoding with {world} process(es) on {processes.device.type}", sep="\n")
        kept = on_main(processes, lambda: begin(job, held))
        if kept is None:
            return
        pending = [shard for shard in job.shard_numbers if shard not in kept]
        entries, message = [], None
        try:
            entries += _encode_shards(job, codec, pending[rank::world], processes)
            entries += [(shard, shards.entry(job.folder, shard, kept[shard])) for shard in list(kept)[rank::world]]
        except UserError as error:  # the others must hear of it before this process leaves them
            message = str(error)
            with suppress(OSError):
                (job.folder / STOPPED).touch()
        messages = [other for other in gather_object([message]) if other]
        if messages:
            raise UserError(messages[0])
        everywhere = dict(gather_object(entries))
        on_main(processes, lambda: _conclude(job, everywhere, codec))


def _conclude(job: Job, entries: dict[int, dict[str, Any]], codec: Codec) -> None:
    finish(job, entries)
    print(*quality.report(LatentSet(job.folder), job.source, codec), sep="\n")


def _codec(options: Options, device: torch.device) -> Codec:
    plain = options.vae == PIXELS
    require(plain or not options.grey, "--grey needs --vae pixels: an autoencoder takes RGB")
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
    )
    require(
        options.resolution % codec.space.stride == 0,
        f"--resolution {options.resolution} is not a multiple of {codec.space.stride}, the stride of {options.vae}; choose another",
    )
    return codec


def _shape(codec: Codec, options: Options) -> tuple[int, ...]:
    parts = 2 if options.moments and not is_pixels(codec.space) else 1
    side = options.resolution // codec.space.stride
    return (2 if options.flip else 1, parts, codec.space.channels, side, side)


def _encode_shards(
    job: Job, codec: Codec, numbers: Sequence[int], processes: Accelerator
) -> list[tuple[int, dict[str, Any]]]:
    """Encode the shards `numbers`, writing one while the next is encoded. Returns their numbers and manifest entries."""
    bad: list[str] = []
    written: list[tuple[int, Future]] = []
    parts: list[tuple[Batch, np.ndarray]] = []
    with _fixed_sums(processes.device), ThreadPoolExecutor(1) as writer:
        for shard, last, batch in _decoded(job, numbers, processes):
            if (job.folder / STOPPED).exists():
                break
            bad += batch.bad
            _tolerate(bad, job.options.skip_bad)
            parts.append((batch, _encode_batch(job, codec, batch, processes.device)))
            if last:
                if written:
                    written[-1][1].result()  # at most one shard waits in memory; a failed write ends the work here
                written.append((shard, writer.submit(_write, job, shard, parts)))
                parts = []
        return [(shard, future.result()) for shard, future in written]


@contextmanager
def _fixed_sums(device: torch.device) -> Iterator[None]:
    """On a CPU, the order of a sum depends on the number of threads: use one per process, and more processes for speed."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _decoded(job: Job, numbers: Sequence[int], processes: Accelerator) -> Iterator[tuple[int, bool, Batch]]:
    """The batches of the shards `numbers`: shard, whether it is the shard's last, crops. Shows progress and time left."""
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
    total, began = sum(len(items) for _, items in plan), time.monotonic()
    with progress.bar(total=total, desc="encoding", unit="img", main=processes.is_main_process) as bar:
        for number, ((shard, items), batch) in enumerate(zip(plan, loader)):
            yield shard, items.stop == job.items(shard).stop, batch
            bar.update(len(items))
            if number == 7 and processes.is_main_process:
                seconds = (time.monotonic() - began) * total / bar.n
                bar.write(
                    f"estimated time: {bar.format_interval(seconds)} at {total / seconds:,.0f} images/s and process"
                )


def _tolerate(bad: Sequence[str], limit: int) -> None:
    if len(bad) > limit:
        remedy = (
            f"{len(bad)} images are bad, --skip-bad allows {limit}" if limit else "or leave out a few with --skip-bad N"
        )
        raise UserError(f"{bad[-1]}; repair or remove it ({remedy})")


def _encode_batch(job: Job, codec: Codec, batch: Batch, device: torch.device) -> np.ndarray:
    """The raw latents of a batch, (n, views, parts, C, H, W) in the stored type."""
    if not batch.indices:
        return np.empty((0, *job.shape), job.options.dtype)
    images = to_signed(batch.images.to(device, non_blocking=True))
    views = [images, images.flip(-1)][: job.shape[0]]
    with torch.no_grad():
        encoded = [_parts(job, codec, batch.indices, images, view) for view, images in enumerate(views)]
    return torch.stack(encoded, 1).to(getattr(torch, job.options.dtype)).cpu().numpy()


def _parts(job: Job, codec: Codec, indices: Sequence[int], images: Tensor, view: int) -> Tensor:
    """What is stored of one view, (n, parts, C, H, W) float32. A fixed sample depends on (seed, item, view) alone."""
    mean, std = (moment.float() for moment in codec.encode(images))
    if job.shape[1] == 2:
        return torch.stack([mean, std], 1)
    if is_pixels(job.space):
        return mean[:, None]
    noise = torch.stack(
        [Stream(job.options.seed, "encode", 2 * index + view).normal(mean.shape[1:]) for index in indices]
    )
    return (mean + std * noise.to(mean.device))[:, None]


def _write(job: Job, shard: int, parts: Sequence[tuple[Batch, np.ndarray]]) -> dict[str, Any]:
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


if __name__ == "__main__":
    errors.run(main)
