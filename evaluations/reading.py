"""From tokens to rows of numbers: reads batches of images, keeps sums and pooled means, and asks every probe.

z of a token is f_u and f_c - f_u side by side: every f_g is a linear map of it, so that one pass serves all omegas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import interpolant
from evaluations import representation
from evaluations.representation import CLASS_PROBES, Moments
from evaluations.taps import Items, Probed, chunks, encoded
from models.encoders import Encoder

ALIGNED = 1000
"""Images that CKNNA compares with each other, the first that were drawn (`Items.first`)."""
Row = dict[str, Any]
"""One block and feature: what it is (features, omega, block) and its numbers by name."""


@dataclass(frozen=True)
class Reading:
    """Tokens from one place: a function of images, and which linear maps of them are the features to be measured."""

    read: Callable[[np.ndarray], dict[int | None, Tensor]]
    """Places of n images -> block (None: no block) -> tokens (n, T, A) float64."""
    maps: Callable[[int], dict[tuple[str, float | None], Tensor]]
    """A -> feature -> its map (A, D)."""


def of_blocks(probed: Probed, items: Items, t: float, kinds: Sequence[tuple[str, float | None]]) -> Reading:
    """f_u and f_c - f_u of each token side by side, of which every f_g is a linear map."""
    both = any(kind != "c" for kind, _ in kinds)

    def tokens(places: np.ndarray) -> dict[int | None, Tensor]:
        pairs = probed.pairs(items, places, t, unconditional=both)
        return {block: torch.cat([u, c - u], -1) if both else c for block, (u, c) in pairs.items()}

    def maps(size: int) -> dict[tuple[str, float | None], Tensor]:
        one = torch.eye(size, dtype=torch.float64, device=probed.device)
        if not both:
            return {("c", None): one}
        u, c = one[:, : size // 2], one[:, : size // 2] + one[:, size // 2 :]
        known = {"u": u, "c": c}
        return {
            (kind, omega): known[kind] if omega is None else interpolant.guide(u, c, omega) for kind, omega in kinds
        }

    return Reading(tokens, maps)


def as_they_are(kind: str, tokens: Callable[[np.ndarray], Tensor]) -> Reading:
    """A reading of one feature that has no block."""

    def maps(size: int) -> dict[tuple[str, float | None], Tensor]:
        return {(kind, None): torch.eye(size, dtype=torch.float64)}

    return Reading(lambda places: {None: tokens(places)}, maps)


def measure(
    reading: Reading, items: Items, side: int, references: dict[str, tuple[Tensor, Tensor]], batch: int, bar: Any
) -> list[Row]:
    """One row a block and feature. Tokens of one batch are held at a time: what stays is their pooled means and `Moments`.

    Every image goes through the network once, those held out last, when the mask probes are there to be asked.
    """
    pooled: dict[int | None, list[Tensor]] = {}
    moments: dict[int | None, list[Moments | None]] = {}
    probes: dict[int | None, Tensor] = {}
    biases: dict[int | None, Tensor] = {}
    counts: dict[tuple[int | None, int], Tensor] = {}
    for part, places in enumerate(items.parts):
        if part == 2 and items.masks is not None:
            for block, (fit, validate) in moments.items():
                found = [
                    (by, representation.mask_probe(fit.mapped(by), validate.mapped(by)))
                    for by in reading.maps(len(fit.z)).values()
                ]
                probes[block] = torch.cat([by @ probe.weight for by, probe in found], 1)  # all features in one product
                biases[block] = torch.cat([probe.bias for _, probe in found])
        for chunk in chunks(places, batch):
            patches = None if items.masks is None else items.patches(chunk, side)
            for block, tokens in reading.read(chunk).items():
                pooled.setdefault(block, []).append(tokens.mean(1).cpu())
                if patches is None:
                    continue
                z, y = tokens.flatten(0, 1), patches.flatten(0, 1).to(tokens.device)
                if part < 2:
                    sums = moments.setdefault(block, [None, None])
                    sums[part] = Moments.of(z, y) if sums[part] is None else sums[part] + Moments.of(z, y)
                else:
                    answers = (z @ probes[block] + biases[block]).chunk(probes[block].shape[1] // y.shape[1], dim=1)
                    for number, answer in enumerate(answers):
                        seen = representation.confusion(answer > 0.5, y > 0.5)
                        counts[block, number] = counts.get((block, number), 0) + seen
            bar.update(len(chunk))
    order = torch.from_numpy(np.argsort(np.concatenate(items.parts)))
    return [
        row
        for block, means in pooled.items()
        for row in _rows(
            block,
            torch.cat(means)[order],
            reading,
            items,
            references,
            [counts[block, n] for n in range(len(counts) // len(pooled))],
        )
    ]


def _rows(
    block: int | None,
    pooled: Tensor,
    reading: Reading,
    items: Items,
    references: dict[str, tuple[Tensor, Tensor]],
    counts: Sequence[Tensor],
) -> list[Row]:
    """The rows of one block from its pooled tokens (N, A) and the pixel counts of each of its features."""
    rows = []
    parts, near = [torch.from_numpy(part) for part in items.parts], torch.from_numpy(items.first(ALIGNED))
    for number, ((kind, omega), by) in enumerate(reading.maps(pooled.shape[1]).items()):
        x = pooled @ by.cpu()
        row: Row = {"features": kind, "omega": omega, "block": block}
        row |= {name: probe(x, items.labels, parts, items.data.num_classes) for name, probe in CLASS_PROBES.items()}
        if counts:
            row["miou"] = representation.iou(counts[number])
        own = representation.kernel(representation.standardise(x[near], x[near]))
        rows.append(row | {f"cknna {name}": representation.cknna(own, other) for name, other in references.items()})
    return rows


def compared(
    items: Items, encoder: Encoder | None, batch: int, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """What CKNNA is taken against: kernels of the classes (one-hot), of the clean latents (all their elements) and of the encoder."""
    places = items.first(ALIGNED)
    features = {"class": torch.nn.functional.one_hot(items.labels[places], items.data.num_classes).double()}
    features["latents"] = items.clean(places).flatten(1).double()
    if encoder is not None:
        features["encoder"] = torch.cat(
            [encoded(encoder, items, chunk, device).mean(1).cpu() for chunk in chunks(places, batch)]
        )
    return {
        name: representation.kernel(x if name == "class" else representation.standardise(x, x))
        for name, x in features.items()
    }
