"""From tokens to rows of numbers: reads batches of images, accumulates sums and pooled means, and applies every probe.

z of a token is (f_u, f_c - f_u). Every f_g is a linear map of z, so one pass serves all omegas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import interpolant
from evaluations import representation
from evaluations.config import Kind
from evaluations.representation import Kernel, Linear, TokenSums, class_accuracy, neighbour_accuracy
from evaluations.taps import Items, Probed, encoded
from models.encoders import Encoder
from runtime.slices import slices

ALIGNED = 1000  # CKNNA compares this many images, the first that were drawn (`Items.first`)
Row = dict[str, Any]  # one block and feature: its names (features, omega, block) and its numbers


class Kernels(NamedTuple):
    """Of the same features: standardised, as all probes see them, and as they are, for the code of CKNNA's authors."""

    standardised: Kernel
    plain: Kernel


def kernels(x: Tensor, standard: bool = True) -> Kernels:
    """Of features x (N, D); both as they are if not `standard`."""
    plain = representation.kernel(x)
    return Kernels(representation.kernel(representation.standardise(x, x)) if standard else plain, plain)


@dataclass(frozen=True)
class Reading:
    """Tokens from one source, and the linear maps of them that are the features to measure."""

    read: Callable[[np.ndarray], dict[int | None, Tensor]]  # indices of n images -> block -> tokens (n, T, A) float64
    maps: Callable[[int], dict[Kind, Tensor]]  # A -> feature -> its map (A, D)


def of_blocks(probed: Probed, items: Items, t: float, kinds: Sequence[Kind]) -> Reading:
    """Reads z = (f_u, f_c - f_u) of each token, of which every feature in `kinds` is a linear map."""
    # u, c and every guided feature are linear in (u, c - u), so one pass serves all omegas
    both = any(kind != "c" for kind, _ in kinds)

    def tokens(places: np.ndarray) -> dict[int | None, Tensor]:
        pairs = probed.pairs(items, places, t, unconditional=both)
        return {block: torch.cat([u, c - u], -1) if both else c for block, (u, c) in pairs.items()}

    def maps(size: int) -> dict[Kind, Tensor]:
        identity = torch.eye(size, dtype=torch.float64, device=probed.device)
        if not both:
            return {("c", None): identity}
        # tokens are row vectors z = (u, c - u): u is z's first half, c the sum of its halves
        u, c = identity[:, : size // 2], identity[:, : size // 2] + identity[:, size // 2 :]
        plain = {"u": u, "c": c}
        return {
            (kind, omega): plain[kind] if omega is None else interpolant.guide(u, c, omega) for kind, omega in kinds
        }

    return Reading(tokens, maps)


def unmapped(kind: str, tokens: Callable[[np.ndarray], Tensor]) -> Reading:
    """Reads one feature that belongs to no block."""
    return Reading(lambda places: {None: tokens(places)}, lambda size: {(kind, None): torch.eye(size).double()})


class MaskProbes:
    """The mask probes of one block: sums over the first two parts, then predictions on the held-out part."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._sums: dict[int, TokenSums] = {}
        self._joint: Linear | None = None
        self.counts: list[Tensor] = []  # of each feature, as `representation.confusion` counts

    def add(self, part: int, z: Tensor, y: Tensor) -> None:
        """Take in tokens z (M, A) and patches y (M, P) of a part (0, 1, 2); the held-out part 2 comes last."""
        if part < 2:
            sums = TokenSums.of(z, y)
            self._sums[part] = self._sums[part] + sums if part in self._sums else sums
            return
        if self._joint is None:
            self._joint = self._fitted()
        predictions = self._joint(z).split(y.shape[1], dim=1)
        counts = [representation.confusion(prediction > 0.5, y > 0.5) for prediction in predictions]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)] if self.counts else counts

    def _fitted(self) -> Linear:
        """The probes of all features side by side, as one linear map of z."""
        fit, validate = self._sums[0], self._sums[1]
        maps = list(self._reading.maps(len(fit.z)).values())
        probes = [representation.mask_probe(fit.mapped(by), validate.mapped(by)) for by in maps]
        weights = [by @ probe.weight for by, probe in zip(maps, probes, strict=True)]
        return Linear(torch.cat(weights, 1), torch.cat([probe.bias for probe in probes]))


def measure(
    reading: Reading, items: Items, side: int, references: dict[str, Kernels], batch: int, bar: Any
) -> list[Row]:
    """One row for each block and feature.

    Only the tokens of one batch are in memory; pooled means and `TokenSums` remain. Every image goes through the
    network once, the held-out images last, so that the mask probes are fitted when they are needed.
    """
    pooled: dict[int | None, list[Tensor]] = defaultdict(list)
    masks: dict[int | None, MaskProbes] = defaultdict(lambda: MaskProbes(reading))
    for part, places in enumerate(items.parts):
        for chunk in slices(places, batch):
            patches = None if items.masks is None else items.patches(chunk, side).flatten(0, 1)
            for block, tokens in reading.read(chunk).items():
                pooled[block].append(tokens.mean(1).cpu())
                if patches is not None:
                    masks[block].add(part, tokens.flatten(0, 1), patches.to(tokens.device))
            bar.update(len(chunk))
    # the parts were read one after the other: back to the order of the items
    order = torch.from_numpy(np.argsort(np.concatenate(items.parts)))
    return [
        row
        for block, means in pooled.items()
        for row in _rows(block, torch.cat(means)[order], reading, items, references, masks[block].counts)
    ]


def _rows(
    block: int | None,
    pooled: Tensor,
    reading: Reading,
    items: Items,
    references: dict[str, Kernels],
    counts: Sequence[Tensor],
) -> list[Row]:
    """The rows of one block from its pooled tokens (N, A) and the pixel counts of each of its features."""
    rows = []
    parts, aligned = [torch.from_numpy(part) for part in items.parts], torch.from_numpy(items.first(ALIGNED))
    for number, ((kind, omega), by) in enumerate(reading.maps(pooled.shape[1]).items()):
        # pooling is linear too: the mapped mean is the mean of the mapped tokens
        x = pooled @ by.cpu()
        row: Row = {
            "features": kind,
            "omega": omega,
            "block": block,
            "accuracy": class_accuracy(x, items.labels, parts),
            "knn": neighbour_accuracy(x, items.labels, parts),
        }
        if counts:
            row["miou"] = representation.iou(counts[number])
        # `references` holds kernels of the same images; a kernel of all N would have N^2 entries
        own = kernels(x[aligned])
        for name, other in references.items():
            row[f"cknna {name}"] = representation.cknna(own.standardised, other.standardised)
            row[f"cknna-hsic {name}"] = representation.cknna_hsic(own.plain, other.plain)
        rows.append(row)
    return rows


def compared(items: Items, encoder: Encoder | None, batch: int, device: torch.device) -> dict[str, Kernels]:
    """The kernels that CKNNA compares features with: classes (one-hot), flattened clean latents, and the encoder."""
    places = items.first(ALIGNED)
    features = {
        "class": torch.nn.functional.one_hot(items.labels[places], items.data.num_classes).double(),
        "latents": items.clean(places).flatten(1).double(),
    }
    if encoder is not None:
        features["encoder"] = torch.cat(
            [encoded(encoder, items, chunk, device).mean(1).cpu() for chunk in slices(places, batch)]
        )
    return {name: kernels(x, standard=name != "class") for name, x in features.items()}
