"""The order in which tokens go through the blocks: segments with a time each, and routes around blocks.

A sample's tokens are put into an order once, after positions are added, and back once at the end:

    place      0 ........ n_1-1 | n_1 ........ n_1+n_2-1 | ...
    tokens     of segment 1     | of segment 2           |

Segments may have times of their own (Self-Flow, arXiv 2603.06507; SRA-DTS-AS, arXiv 2607.02508): modulation then has a
row for each segment, never for each token. With `separate`, attention stays inside a segment. A route (TREAD, arXiv
2501.04765) sends the first tokens of each segment through blocks a to b; the rest stay as they are before block a.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.layers import Lengths, Rotation
from runtime.errors import require


@dataclass(frozen=True)
class Route:
    """Blocks `first` to `last`, counted from 1, see all tokens but floor(share x length) of each segment."""

    first: int
    last: int
    share: float

    @classmethod
    def of(cls, words: tuple[float, float, float] | None) -> Route | None:
        """The route of `--route A B SHARE`, if it is given. Raises UserError for a block that is no whole number."""
        if words is None:
            return None
        first, last, share = words
        require(
            first == int(first) and last == int(last),
            f"--route {first:g} {last:g} {share:g}: blocks are whole numbers; correct them",
        )
        return cls(int(first), int(last), share)

    def check(self, depth: int) -> None:
        """Raise UserError unless a network of `depth` blocks has the route's blocks and some of its tokens stay."""
        words = f"--route {self.first} {self.last} {self.share:g}"
        require(
            1 <= self.first <= self.last <= depth, f"{words}: give blocks from 1 to {depth}, the first before the last"
        )
        require(0 <= self.share < 1, f"{words}: the share of tokens that leave must lie in [0, 1)")

    def passes(self, block: int) -> bool:
        """Whether the tokens that leave do not see `block`."""
        return self.first <= block <= self.last

    def inside(self, lengths: Lengths) -> Lengths:
        """Tokens of each segment that take the route."""
        return tuple(length - int(length * self.share) for length in lengths)


@dataclass(frozen=True)
class Segments:
    """The order of the tokens of N samples, T each, and where it is cut.

    Without `separate`, a token attends to all others. With it, only to those of its segment, but in the samples where
    `joined` is true.
    """

    order: Tensor  # (N, T) int64: the token that stands at each place
    lengths: Lengths  # tokens of each segment, T in all
    separate: bool = False
    joined: Tensor | None = None  # (N,) bool

    @classmethod
    def shuffled(
        cls, uniform: Tensor, lengths: Lengths, separate: bool = False, joined: Tensor | None = None
    ) -> Segments:
        """A random order of each sample's tokens, from numbers (N, T) in [0, 1): their ranks."""
        # float32 numbers repeat now and then: a stable order is the same on every device
        return cls(uniform.argsort(dim=1, stable=True), lengths, separate, joined)

    def per_token(self, rows: Tensor) -> Tensor:
        """Values of segments (N, S, ...) -> of tokens (N, T, ...), in the order of the image."""
        return rows[torch.arange(len(rows), device=rows.device)[:, None], self._segment]

    def on_route(self, route: Route) -> Tensor:
        """(N, T) 1 for the tokens that take the route, 0 for the others, over its mean; in the image's order."""
        inside = route.inside(self.lengths)
        of_place = torch.zeros(self.order.shape, device=self.order.device)
        for part, count in zip(of_place.split(self.lengths, 1), inside, strict=True):
            part[:, :count] = self.order.shape[1] / sum(inside)
        return torch.empty_like(of_place).scatter_(1, self.order, of_place)

    def on_grid(self, rows: Tensor, side: int) -> Tensor:
        """Values (N, S) of segments -> (N, 1, side, side), constant on each token's patch of the latent."""
        grid = math.isqrt(self.order.shape[1])
        values = self.per_token(rows).view(-1, 1, grid, grid)
        return values.repeat_interleave(side // grid, 2).repeat_interleave(side // grid, 3)

    @functools.cached_property
    def _segment(self) -> Tensor:
        """(N, T) int64: the segment of each token, in the order of the image."""
        numbers = _numbers(self.lengths, self.order.device)
        return torch.empty_like(self.order).scatter_(1, self.order, numbers.expand_as(self.order))

    def take(self, index: Tensor | slice) -> Segments:
        """The segments of the samples at `index`."""
        joined = None if self.joined is None else self.joined[index]
        return dataclasses.replace(self, order=self.order[index], joined=joined)


def split(tokens: int, shares: tuple[float, ...]) -> Lengths:
    """`tokens` in parts of these shares, which sum to 1: rounded down, then by the largest remainders."""
    exact = [tokens * share for share in shares]
    lengths = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: lengths[part] - exact[part])
    for part in by_remainder[: tokens - sum(lengths)]:
        lengths[part] += 1
    return tuple(lengths)


class Way:
    """The order of one batch's tokens at each block.

    Args:
        count: tokens that go through the blocks: others first, then `tokens` patches. The others belong to the first
            segment and stay on the route.
        rotation: tables for tokens in the order of the image.
    """

    def __init__(
        self, segments: Segments | None, route: Route | None, count: int, tokens: int, rotation: Rotation | None
    ) -> None:
        self.route, self.rotation = route, rotation
        self.lengths: Lengths = ()
        self.separate = False
        # (N, 1, count, count) where segments are separate in some samples only
        self.mask: Tensor | None = None
        self._extra = count - tokens
        # the tokens as they were before the route, while inside it
        self._whole: Tensor | None = None
        # (N, count): the token at each place, and (N, tokens): the place of each patch; None for the image's order
        self._places: Tensor | None = None
        self._back: Tensor | None = None
        if segments is not None:
            self._cut(segments)

    def _cut(self, segments: Segments) -> None:
        """Order and segments with the tokens that are no patches in front."""
        extra, order = self._extra, segments.order
        first = torch.arange(extra, device=order.device).expand(len(order), extra)
        self._places = torch.cat([first, order + extra], dim=1)
        places = torch.arange(self._places.shape[1], device=order.device).expand_as(self._places)
        self._back = torch.empty_like(self._places).scatter_(1, self._places, places)[:, extra:]
        self.lengths = (segments.lengths[0] + extra, *segments.lengths[1:])
        self.separate = segments.separate
        if self.rotation is not None:
            cos, sin = (table[self._places][:, None] for table in self.rotation)
            self.rotation = cos, sin
        if segments.separate and segments.joined is not None:
            of_place = _numbers(self.lengths, order.device)
            self.mask = ((of_place[:, None] == of_place) | segments.joined[:, None, None])[:, None]

    def begin(self, tokens: Tensor) -> Tensor:
        """Tokens (N, count, D) of the image's order -> of the blocks' order."""
        return tokens if self._places is None else _gather(tokens, self._places, 1)

    def before(self, number: int, tokens: Tensor) -> Tensor:
        """The tokens that block `number` sees."""
        if self.route is not None and number == self.route.first:
            self._whole, self._outside = tokens, (self.lengths, self.rotation, self.mask)
            # those that are no patches stay on the route
            first, *others = self.lengths
            inside = self.route.inside((first - self._extra, *others))
            inside = (inside[0] + self._extra, *inside[1:])
            tokens = _heads(tokens, self.lengths, inside, 1)
            if self.rotation is not None:
                cos, sin = (_heads(table, self.lengths, inside, 2) for table in self.rotation)
                self.rotation = cos, sin
            if self.mask is not None:
                self.mask = _heads(_heads(self.mask, self.lengths, inside, 2), self.lengths, inside, 3)
            self.lengths = inside
        return tokens

    def after(self, number: int, tokens: Tensor) -> Tensor:
        """The tokens that go on after block `number`, those that come back from outside the route among them."""
        if self._whole is not None and self.route is not None and number == self.route.last:
            tokens = self._joined(tokens, self._whole)
            self._whole, (self.lengths, self.rotation, self.mask) = None, self._outside
        return tokens

    def restored(self, x: Tensor, dim: int = 1) -> Tensor:
        """Values of the blocks' order along `dim` -> of the patches (N, ..., T, ...), in the image's order."""
        if self._whole is not None:
            x = self._joined(x, self._whole)
        if self._back is not None:
            return _gather(x, self._back, dim)
        return x.narrow(dim, self._extra, x.shape[dim] - self._extra) if self._extra else x

    def _joined(self, tokens: Tensor, whole: Tensor) -> Tensor:
        """The tokens on the route, and those outside as they were, segment by segment."""
        pairs = zip(tokens.split(self.lengths, 1), whole.split(self._outside[0], 1), strict=True)
        return torch.cat([part for on, every in pairs for part in (on, every[:, on.shape[1] :])], dim=1)


def _numbers(lengths: Lengths, device: torch.device) -> Tensor:
    """(T,) int64: the segment of each place, from 0."""
    return torch.cat([torch.full((length,), number, device=device) for number, length in enumerate(lengths)])


def _gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """x (N, ...) with the entries `index` (N, K) of each sample along `dim`."""
    shape = [len(index), *[1] * (x.ndim - 1)]
    shape[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))


def _heads(x: Tensor, lengths: Lengths, inside: Lengths, dim: int) -> Tensor:
    """The first `inside` entries of each segment of x along `dim`."""
    parts = zip(x.split(lengths, dim), inside, strict=True)
    return torch.cat([part.narrow(dim, 0, count) for part, count in parts], dim=dim)
