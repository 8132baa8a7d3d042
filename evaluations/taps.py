"""What a checkpoint computes inside on noisy latents of a set: f_u and f_c of its blocks, and the split that probes share.

x_t of item i at time t is alpha(t) x0 + sigma(t) eps_i, eps_i from a stream of its own: the same noise at every t and for every
checkpoint, so that two of them are compared on the same inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import interpolant
import models
from dataset import LatentSet
from evaluations.images import NpzArchive
from models import Backbone
from models.checkpoint import Checkpoint
from models.encoders import Encoder
from runtime.arithmetic import exact_arithmetic
from runtime.errors import require
from runtime.streams import Stream
from sampling.source import name_of

HELD_OUT = 5
"""One in so many images is held out, and one in so many of the rest chooses the penalties."""


class Parts(NamedTuple):
    """Places of images: for fitting, for choosing a penalty, and held out from both."""

    fit: np.ndarray
    validate: np.ndarray
    test: np.ndarray


class Items:
    """Images of a latent set: at most `count` of them, drawn by `seed`, with labels, masks, noise and their split.

    Args:
        masks: file of `preprocessing`'s kind: `masks` (N, H, W) uint8, 0 or 1, one for each item of the set in its order, and
            perhaps `groups` (N,) int64: items of a group (made from one source image) are never on both sides of a split.
        shuffled: the network is told the labels of other images (a permutation); the probes ask for the images' own.
        classes: only images of these labels; empty for all.

    Raises:
        UserError: a set that is missing or damaged, a mask file that does not fit it.
    """

    def __init__(
        self,
        folder: str,
        count: int,
        seed: int,
        masks: str | None = None,
        shuffled: bool = False,
        classes: Collection[int] = (),
    ) -> None:
        self.data, self.seed = LatentSet(folder), seed
        drawn = Stream(seed, "probe/items").permutation(len(self.data))
        if classes:
            drawn = drawn[np.isin(self.data.labels[drawn], list(classes))]
        self._drawn = drawn[:count]
        self.index = np.sort(self._drawn)  # in the order of the disk
        self.labels = torch.from_numpy(self.data.labels[self.index])
        self.told = (
            self.labels[torch.from_numpy(Stream(seed, "probe/labels").permutation(len(self.index)))]
            if shuffled
            else self.labels
        )
        self.masks, self._groups = (None, None) if masks is None else read_masks(masks, len(self.data))

    def __len__(self) -> int:
        return len(self.index)

    @functools.cached_property
    def parts(self) -> Parts:
        """The split that every probe shares. Raises UserError where there are too few images for one."""
        return split((np.arange(len(self.data)) if self._groups is None else self._groups)[self.index], self.seed)

    def first(self, count: int) -> np.ndarray:
        """Places of the first `count` that were drawn, wherever they lie on disk: sets are often stored class after class."""
        return np.searchsorted(self.index, np.sort(self._drawn[:count]))

    def clean(self, places: np.ndarray) -> Tensor:
        """(n, C, H, W) float32 normalised latents of the images at `places`; of stored moments, the posterior mean."""
        raw, _ = self.data.read(self.index[places])
        return self.data.space.normalise(torch.from_numpy(raw[:, 0]))

    def noise(self, places: np.ndarray) -> Tensor:
        """(n, C, H, W) float32, each image's own."""
        shape = (self.data.channels, self.data.latent_size, self.data.latent_size)
        return torch.stack([Stream(self.seed, "probe/noise", int(item)).normal(shape) for item in self.index[places]])

    def patches(self, places: np.ndarray, side: int) -> Tensor:
        """(n, T, P) float64: the masks of the images at `places`, cut into the pixels of each of side x side tokens."""
        masks = torch.from_numpy(self.masks[self.index[places]])[:, None]
        return models.patchify(masks, masks.shape[-1] // side).double()


def read_masks(file: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(count, H, W) uint8 masks and, where the file has them, (count,) int64 groups. Raises UserError where they do not fit."""
    archive = NpzArchive(file)
    masks, groups = (archive.read(name) if name in archive.names else None for name in ("masks", "groups"))
    require(
        masks is not None
        and masks.ndim == 3
        and masks.dtype in (np.uint8, np.bool_)
        and masks.shape[1] == masks.shape[2] > 0
        and masks.max(initial=0) <= 1,
        f"--masks {file} needs an array masks of shape (N, H, H), uint8, with 0 and 1 in it",
    )
    require(
        len(masks) == count and (groups is None or (groups.shape == (count,) and groups.dtype.kind in "iu")),
        f"--masks {file} holds {len(masks)} masks, the data set {count} items: they must be in one order, one for each, groups too",
    )
    return masks.astype(np.uint8), groups


def split(groups: np.ndarray, seed: int) -> Parts:
    """Places 0 .. N-1 in three parts by their groups (N,): about a fifth held out, a fifth of the rest for choosing penalties.

    Raises UserError where fewer than five groups leave a part empty.
    """
    known, group = np.unique(groups, return_inverse=True)
    require(
        len(known) >= HELD_OUT,
        f"{len(known)} images (or groups of them) are too few to hold some out: give --items of at least "
        f"{HELD_OUT}, or a larger set",
    )
    order = np.empty(len(known), np.int64)
    order[Stream(seed, "probe/split").permutation(len(known))] = np.arange(len(known))
    test = max(1, len(known) // HELD_OUT)
    validate = max(1, (len(known) - test) // HELD_OUT)
    rank = order[group]
    return Parts(
        np.flatnonzero(rank >= test + validate),
        np.flatnonzero((test <= rank) & (rank < test + validate)),
        np.flatnonzero(rank < test),
    )


def chunks(places: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive pieces of at most `size`."""
    for start in range(0, len(places), size):
        yield places[start : start + size]


@dataclass(frozen=True)
class Probed:
    """A checkpoint whose blocks are looked at, on a device."""

    checkpoint: Checkpoint
    network: Backbone
    blocks: tuple[int, ...]
    device: torch.device

    @classmethod
    def open(cls, name: str, items: Items, weights: str, blocks: Sequence[int] | None) -> Probed:
        """Open checkpoint `name` and load its blocks up to the last of `blocks` (None: all).

        Raises UserError where it does not exist, lacks a block, or reads other latents than those of `items`.
        """
        checkpoint, data = Checkpoint.open(name), items.data
        spec = checkpoint.spec
        wanted = tuple(sorted(set(blocks))) if blocks else tuple(range(1, spec.depth + 1))
        require(
            all(1 <= block <= spec.depth for block in wanted),
            f"--blocks: {name} has blocks 1 to {spec.depth}: give some of them",
        )
        difference = checkpoint.space.difference(data.space)
        require(
            difference is None and spec.input_size == data.latent_size and spec.num_classes == data.num_classes,
            f"{name} was trained on {spec.input_size}x{spec.input_size} latents of {checkpoint.space.name} with {spec.num_classes} "
            f"classes, {data.path} holds {data.latent_size}x{data.latent_size} of {data.space.name} with {data.num_classes}"
            f"{f' ({difference})' if difference else ''}: they must agree",
        )
        require(
            items.masks is None or items.masks.shape[-1] % spec.side == 0,
            f"--masks: {0 if items.masks is None else items.masks.shape[-1]} pixels a side cannot be cut into the {spec.side} tokens "
            f"a side of {name}: give masks of the images' size",
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(checkpoint, checkpoint.network(weights, depth=max(wanted)).to(device), wanted, device)

    @property
    def name(self) -> str:
        return name_of(self.checkpoint)

    def require_null(self) -> None:
        """Raise UserError where the null label was never trained: f_u and f_g do not exist."""
        require(
            self.checkpoint.has_null,
            f"{self.name} was trained without label dropout (--cfg-prob 0), so it has no f_u and f_g: use --features c",
        )

    @exact_arithmetic()
    def pairs(
        self, items: Items, places: np.ndarray, t: float, unconditional: bool = True
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Block -> f_u and f_c, both (n, T, D) float64, at the images of `places`, of one doubled pass through the network.

        Without `unconditional` the first is 0 and costs nothing.
        """
        x0, noise, labels = (
            value.to(self.device) for value in (items.clean(places), items.noise(places), items.told[places])
        )
        times = torch.full((len(x0),), t, device=self.device)
        xt = interpolant.corrupt(x0, noise, times)
        if unconditional:
            xt, times = torch.cat([xt, xt]), torch.cat([times, times])
            labels = torch.cat([torch.full_like(labels, self.network.null_label), labels])
        found = self.network(xt, times, labels, taps=self.blocks, exit_early=True).features
        if unconditional:
            return {block: tuple(found[block].double().chunk(2)) for block in self.blocks}
        return {
            block: (torch.zeros_like(found[block], dtype=torch.float64), found[block].double()) for block in self.blocks
        }


@exact_arithmetic()
def encoded(encoder: Encoder, items: Items, places: np.ndarray, device: torch.device) -> Tensor:
    """(n, T, D) float64 patch tokens of an external encoder for the clean images at `places`, which the set must hold."""
    images = torch.from_numpy(items.data.images(items.index[places])).to(device)
    return encoder(images).tokens.double()
