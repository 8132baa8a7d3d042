"""The features f_u and f_c of a checkpoint's blocks on noisy latents of a set, and the split that all probes share.

x_t of item i at time t is alpha(t) x0 + sigma(t) eps_i. eps_i comes from the item's own stream: it is the same at every
t and for every checkpoint, so that checkpoints are compared on the same inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import interpolant
import models
from dataset import LatentSet
from evaluations.config import TapOptions
from models import Backbone
from models.checkpoint import Checkpoint
from models.encoders import Encoder, open_encoder
from runtime.arithmetic import exact_arithmetic
from runtime.errors import require
from runtime.npy import NpzArchive
from runtime.streams import Stream

HELD_OUT = 5  # one in so many images is held out, and one in so many of the rest chooses the penalties


class Parts(NamedTuple):
    """Indices of images: for fitting, for choosing a penalty, and held out from both."""

    fit: np.ndarray
    validate: np.ndarray
    test: np.ndarray


class Items:
    """Images of a latent set: at most `count` of them, drawn by `seed`, with labels, masks, noise and their split.

    Args:
        masks: an .npz file as `preprocessing` writes it: `masks` (N, H, W) uint8, 0 or 1, one for each item in the
            order of the set, and optionally `groups` (N,) int64. A split keeps a group (items made from one source
            image) on one side.
        shuffled: condition the network on the labels of other images (a permutation). Probes predict the true labels.
        classes: only images of these labels; empty for all.

    Raises:
        UserError: the set is missing or damaged, or the mask file does not fit it.
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
        self.conditions = (
            self.labels[torch.from_numpy(Stream(seed, "probe/labels").permutation(len(self.index)))]
            if shuffled
            else self.labels
        )
        self.masks: np.ndarray | None = None
        self._groups: np.ndarray | None = None
        if masks is not None:
            self.masks, self._groups = read_masks(masks, len(self.data))

    def __len__(self) -> int:
        return len(self.index)

    @functools.cached_property
    def parts(self) -> Parts:
        """The split that all probes share. Raises UserError if there are too few images."""
        return split((np.arange(len(self.data)) if self._groups is None else self._groups)[self.index], self.seed)

    def first(self, count: int) -> np.ndarray:
        """Indices of the first `count` items drawn. The first on disk would not do: sets are often stored by class."""
        return np.searchsorted(self.index, np.sort(self._drawn[:count]))

    def clean(self, places: np.ndarray) -> Tensor:
        """(n, C, H, W) float32 normalised latents at `places`; the posterior mean if the set stores moments."""
        raw, _ = self.data.read(self.index[places])
        wrong = ~np.isfinite(raw).all((1, 2, 3, 4))
        require(
            not wrong.any(),
            f"{self.data.path}: the latent of item {self.index[places][wrong.argmax()]} is not finite; encode the set "
            "again",
        )
        return self.data.space.normalise(torch.from_numpy(raw[:, 0]))

    def noise(self, places: np.ndarray) -> Tensor:
        """(n, C, H, W) float32; the noise of an image does not depend on which others are drawn."""
        shape = (self.data.channels, self.data.latent_size, self.data.latent_size)
        return torch.stack([Stream(self.seed, "probe/noise", int(item)).normal(shape) for item in self.index[places]])

    def patches(self, places: np.ndarray, side: int) -> Tensor:
        """(n, T, P) float64: the masks at `places`, cut into the pixels of each of side x side tokens."""
        assert self.masks is not None
        masks = torch.from_numpy(self.masks[self.index[places]])[:, None]
        return models.patchify(masks, masks.shape[-1] // side).double()


def read_masks(file: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(count, H, W) uint8 masks and (count,) int64 groups, None if the file has no groups.

    Raises UserError if the masks or groups do not fit.
    """
    archive = NpzArchive(file)
    heads = {name: archive.header(name) for name in {"masks", "groups"} & archive.names}
    shape, dtype = heads["masks"][:2] if "masks" in heads else ((), None)
    wanted = f"--masks {file} needs an array masks of shape (N, H, H), uint8, with 0 and 1 in it"
    require(len(shape) == 3 and dtype in (np.uint8, np.bool_) and shape[1] == shape[2] > 0, wanted)
    groups = heads.get("groups")
    require(
        shape[0] == count and (groups is None or (groups.shape == (count,) and groups.dtype.kind in "iu")),
        f"--masks {file} holds {shape[0]} masks, the data set {count} items: give one mask (and one group) for each "
        f"item, in the order of the set",
    )
    masks = archive.read("masks")
    require(masks.max(initial=0) <= 1, wanted)
    return masks.astype(np.uint8), None if groups is None else archive.read("groups")


def split(groups: np.ndarray, seed: int) -> Parts:
    """Split indices 0 .. N-1 by their groups (N,): a fifth is held out, a fifth of the rest chooses penalties.

    Raises UserError for fewer than five groups, which would leave a part empty.
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


@dataclass(frozen=True)
class Probed:
    """A checkpoint whose block outputs are read, on a device."""

    checkpoint: Checkpoint
    network: Backbone
    blocks: tuple[int, ...]
    device: torch.device

    @classmethod
    def open(cls, name: str, items: Items, weights: str, blocks: Sequence[int] | None) -> Probed:
        """Open checkpoint `name` and load its blocks up to the last of `blocks` (None: all).

        Raises UserError if it does not exist, lacks a block, or was trained on other latents than those of `items`.
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
            f"{name} was trained on {spec.input_size}x{spec.input_size} latents of {checkpoint.space.name} with "
            f"{spec.num_classes} classes, {data.path} holds {data.latent_size}x{data.latent_size} of {data.space.name} "
            f"with {data.num_classes}{f' ({difference})' if difference else ''}: they must agree",
        )
        require(
            items.masks is None or items.masks.shape[-1] % spec.side == 0,
            f"--masks: {0 if items.masks is None else items.masks.shape[-1]} pixels a side cannot be cut into the "
            f"{spec.side} tokens a side of {name}: give masks of the images' size",
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(checkpoint, checkpoint.network(weights, depth=max(wanted)).to(device), wanted, device)

    @property
    def name(self) -> str:
        return self.checkpoint.name

    def require_null(self) -> None:
        """Raise UserError if the null label was never trained, so that f_u and f_g do not exist."""
        require(
            self.checkpoint.has_null,
            f"{self.name} was trained without label dropout (--cfg-prob 0), so it has no f_u and f_g: use --features c",
        )

    @exact_arithmetic()
    def pairs(
        self, items: Items, places: np.ndarray, t: float, unconditional: bool = True
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Block -> f_u and f_c of the images at `places`, both (n, T, D) float64, from one doubled pass.

        Without `unconditional`, f_u is 0 and is not computed.
        """
        x0, noise, labels = (
            value.to(self.device) for value in (items.clean(places), items.noise(places), items.conditions[places])
        )
        times = torch.full((len(x0),), t, device=self.device)
        xt = interpolant.corrupt(x0, noise, times)
        # one doubled batch, the unconditional half first, as in the sampler
        if unconditional:
            xt, times = torch.cat([xt, xt]), torch.cat([times, times])
            labels = torch.cat([torch.full_like(labels, self.network.spec.num_classes), labels])
        # `open` loaded the blocks up to the last tap and no final layer: the pass ends there
        features = self.network(xt, times, labels, taps=self.blocks, exit_early=True).features
        tokens = {block: features[block].double() for block in self.blocks}
        if not unconditional:
            return {block: (torch.zeros_like(c), c) for block, c in tokens.items()}
        return {block: (both[: len(x0)], both[len(x0) :]) for block, both in tokens.items()}


@exact_arithmetic()
def open_external(options: TapOptions, side: int, device: torch.device) -> Encoder | None:
    """The external encoder of `options` on `device`, for side x side tokens; None without such an encoder."""
    if options.encoder is None:
        return None
    return open_encoder(options.encoder, grid=side, weights=options.encoder_weights).to(device)


def encoded(encoder: Encoder, items: Items, places: np.ndarray, device: torch.device) -> Tensor:
    """(n, T, D) float64 patch tokens of an external encoder for the clean images at `places`."""
    images = torch.from_numpy(items.data.images(items.index[places])).to(device)
    return encoder(images).tokens.double()


def unblocked(
    options: TapOptions, items: Items, side: int, encoder: Encoder | None, device: torch.device
) -> Iterator[tuple[str, Callable[[np.ndarray], Tensor]]]:
    """The features that no checkpoint has: name, and places -> tokens (n, T, D) float64 of the clean images there.

    Clean latents are cut into the patches of a network with side x side tokens.
    """
    if "latents" in options.features:
        patch = items.data.latent_size // side
        yield "latents", lambda places: models.patchify(items.clean(places), patch).double()
    if encoder is not None:
        yield "encoder", lambda places: encoded(encoder, items, places, device).cpu()
