"""The draws of a step as a function of (seed, step): data order, views, times, dropped labels, noise.

Every process draws the whole global batch and takes its slice, so the numbers do not depend on how many processes or
micro-batches share the work. Host draws are a few hundred numbers; counts and shares are therefore known without asking
the device. A thread reads the rows of the next two steps while the device is busy.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import dataset
from alignment import Alignment
from alignment.interval import Selection
from config import TrainConfig
from dataset import LatentSet
from loss import Batch
from models.routing import Route, Segments
from runtime.streams import Stream
from runtime.transfer import to_device
from training.setup import spec_of

# Steps that are read beyond the current one, so that a slow read of images does not hold up the device.
AHEAD = 2


@dataclass(frozen=True)
class Plan:
    """Host draws of one optimiser step for the global batch of B samples."""

    # (B,) items of the data set.
    index: np.ndarray
    # (B,) 0 for the image, 1 for its stored mirror.
    view: np.ndarray
    # (B,) float32 times.
    t: np.ndarray
    # (B,) bool, True where the label becomes the null label.
    dropped: np.ndarray


def plan(config: TrainConfig, data: LatentSet, step: int) -> Plan:
    """Host draws of optimiser step `step`, counted from 0."""
    batch, seed = config.batch_size, config.seed
    return Plan(
        dataset.order(seed, step, batch, len(data)),
        dataset.flips(seed, step, batch, data.views),
        times(config, step, len(data)),
        Stream(seed, "labels", step).uniform(batch) < config.cfg_prob,
    )


def times(config: TrainConfig, step: int, count: int, name: str = "time") -> np.ndarray:
    """(B,) float32 times of step `step`: uniform, or logit-normal(0, 1) until `uniform_from_epoch`.

    `count` items are in the data set; `name` is that of the stream.
    """
    stream = Stream(config.seed, name, step)
    until = config.uniform_from_epoch
    if config.time_sampling == "uniform" or (
        until is not None and step >= until * dataset.steps_per_epoch(count, config.batch_size)
    ):
        return stream.uniform(config.batch_size)
    return (1 / (1 + np.exp(-stream.host.standard_normal(config.batch_size)))).astype(np.float32)


def arranged(batch: Batch, alignments: Mapping[str, Alignment], route: Route | None, uniform: Tensor | None) -> Batch:
    """`batch` with the segments of the alignment that has them, and the route, whose order is that of `uniform` (N, T).

    On a route the segments have random orders already.
    """
    segments, times = None, None
    for name, alignment in alignments.items():
        if alignment.segmented:
            segments, times = alignment.segments(batch.t, batch.columns["time"], batch.draws[name])
    if segments is None and uniform is not None:
        segments = Segments.shuffled(uniform, (uniform.shape[1],))
    return dataclasses.replace(batch, segments=segments, times=times, route=route)


class Batches:
    """Micro-batches of this process, step by step.

    Args:
        rank, world: this process and their number. Process r holds samples [r B / world, (r + 1) B / world), cut into
            `gradient_accumulation_steps` contiguous micro-batches.
    """

    def __init__(self, config: TrainConfig, data: LatentSet, device: torch.device, rank: int, world: int) -> None:
        self.config, self.data, self.device = config, data, device
        self.route = Route.of(config.route)
        self.tokens = spec_of(config, data).tokens if self.route else 0
        share = config.batch_size // world
        self.share = slice(rank * share, (rank + 1) * share)
        self.micro = share // config.gradient_accumulation_steps
        if config.verify:
            data.check_digests(rank, world)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def steps(self, start: int, stop: int, alignments: dict[str, Alignment]) -> Iterator[list[Batch]]:
        """The micro-batches of optimiser steps start .. stop-1."""
        columns = {column for alignment in alignments.values() for column in alignment.columns}
        ahead: deque[Future[tuple[Plan, dict[str, Tensor]]]] = deque()
        for step in range(start, stop):
            while len(ahead) <= AHEAD and step + len(ahead) < stop:
                ahead.append(self._reader.submit(self._read, step + len(ahead), columns))
            drawn, rows = ahead.popleft().result()
            yield self._batches(step, drawn, rows, alignments)

    def _read(self, step: int, columns: set[str]) -> tuple[Plan, dict[str, Tensor]]:
        """Host draws of the step, and this process's rows in (pinned) host memory or where the data set keeps them."""
        self.data.require_intact()
        drawn = plan(self.config, self.data, step)
        index, view = drawn.index[self.share], drawn.view[self.share]
        latents, labels = self.data.rows(index, view)
        rows = {
            "latents": latents,
            "labels": labels,
            "t": torch.from_numpy(drawn.t[self.share]),
            "dropped": torch.from_numpy(drawn.dropped[self.share]),
        }
        if "image" in columns:
            rows["image"] = torch.from_numpy(self.data.images(index, view))
        if "row" in columns:
            rows["row"] = torch.from_numpy(index * self.data.views + view)
        if "time" in columns:
            rows["time"] = torch.from_numpy(times(self.config, step, len(self.data), "time/second")[self.share])
        # pinned memory is copied to the device while it computes
        if self.device.type == "cuda":
            rows = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in rows.items()}
        return drawn, rows

    def _batches(
        self, step: int, drawn: Plan, rows: dict[str, Tensor], alignments: dict[str, Alignment]
    ) -> list[Batch]:
        """The micro-batches of `step` on the device."""
        rows = {name: tensor.to(self.device, non_blocking=True) for name, tensor in rows.items()}
        x0, eps = self.noise(step, rows.pop("latents").float())
        labels = rows["labels"]
        y = torch.where(rows["dropped"], self.data.num_classes, labels)
        draws, order = self._draws(step, alignments), self._order(step)
        batches = []
        for start in range(0, len(labels), self.micro):
            part = slice(start, start + self.micro)
            columns: dict[str, Tensor] = {name: rows[name][part] for name in ("image", "row", "time") if name in rows}
            micro_draws: dict[str, dict[str, Tensor]] = {name: {} for name in alignments}
            for name, key in draws:
                micro_draws[name][key] = draws[name, key][part]
            selections = self._selections(drawn, self.share.start + start, alignments)
            batch = Batch(x0[part], eps[part], rows["t"][part], y[part], labels[part], columns, micro_draws, selections)
            batches.append(arranged(batch, alignments, self.route, None if order is None else order[part]))
        return batches

    def _order(self, step: int) -> Tensor | None:
        """(n, T) numbers in [0, 1) that order the tokens of this process's share, if there is a route."""
        if self.route is None:
            return None
        drawn = Stream(self.config.seed, "route", step).uniform(self.config.batch_size * self.tokens)
        return to_device(torch.from_numpy(drawn.reshape(-1, self.tokens)[self.share]), self.device)

    def _draws(self, step: int, alignments: dict[str, Alignment]) -> dict[tuple[str, str], Tensor]:
        """Random numbers of the alignments, by alignment and name, for this process's share of the global batch."""
        draws = {}
        for name, alignment in alignments.items():
            stream = Stream(self.config.seed, f"alignment/{name}", step)
            for key, value in alignment.draw(stream, self.config.batch_size).items():
                draws[name, key] = to_device(torch.from_numpy(value[self.share]), self.device)
        return draws

    def _selections(self, drawn: Plan, start: int, alignments: dict[str, Alignment]) -> dict[str, Selection]:
        """The samples that alignments see, where not all, of the micro-batch at `start` in the global batch."""
        selections = {}
        for name, alignment in alignments.items():
            options = alignment.options
            if options.interval is not None or alignment.labelled_only or options.time_weights != "none":
                # compiled code should meet few sizes on a GPU; a coupled loss must not see the samples that fill up
                few_sizes = self.device.type == "cuda" and not alignment.coupled
                part = slice(start, start + self.micro)
                labelled = ~drawn.dropped if alignment.labelled_only else None
                selections[name] = Selection.of(
                    options.interval,
                    options.mask,
                    drawn.t,
                    part,
                    self.device,
                    few_sizes,
                    labelled,
                    options.time_weights,
                )
        return selections

    def noise(self, step: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(clean normalised latents, noise) of this process's rows; latents (n, parts, C, H, W) as stored.

        With two parts (mean and standard deviation) the posterior is sampled anew at every step.
        """
        shape = (self.config.batch_size, *latents.shape[2:])
        raw = latents[:, 0]
        if latents.shape[1] == 2:
            draw = Stream(self.config.seed, "posterior", step).normal(shape, self.device)[self.share]
            raw = raw + latents[:, 1] * draw
        return self.data.space.normalise(raw), Stream(self.config.seed, "noise", step).normal(shape, self.device)[
            self.share
        ]
