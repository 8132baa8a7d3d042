"""External encoders as teachers: what `repa` and `haste` share."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignment.base import AlignOptions, BuildContext, Context, Frozen, not_none
from models.encoders import DINOV2, Encoded, open_encoder
from models.heads import HIDDEN
from runtime import progress
from runtime.errors import require
from runtime.options import option

LIMIT = 8 * 2**30  # bytes of device memory that a cache may take


@dataclass(frozen=True, kw_only=True)
class ExternalOptions(AlignOptions):
    """Options of an alignment with an external encoder."""

    depth: int | None = option(None, help="student's block whose output is aligned")
    hidden: int | None = option(None, within="[1, inf)", help=HIDDEN)
    encoder: str = option(
        DINOV2,
        help="encoder: a vision transformer or convolutional network of timm, by its name or REPA's, or its folder",
    )
    encoder_weights: str | None = option(
        None, help="file of its weights: timm's or torchvision's (default: timm's, from the hub)"
    )
    encoder_stage: int | None = option(
        None,
        help="stage of a convolutional encoder whose map is aligned, from 1 or from -1 backwards (default: its last)",
    )
    cache: bool = option(False, help="encode the whole set once and keep the patch tokens in memory (small sets)")


class External:
    """A frozen encoder and, with `--align-cache`, its output for every row of the data set.

    It is not an nn.Module, so DDP, optimiser and checkpoint do not see either.

    Args:
        attention: blocks of the encoder whose queries and keys are returned; negative numbers count from the last.
    """

    def __init__(self, options: ExternalOptions, build_context: BuildContext, attention: Collection[int] = ()) -> None:
        self.encoder = open_encoder(
            options.encoder,
            grid=math.isqrt(build_context.student.tokens),
            weights=options.encoder_weights,
            pretrained=not build_context.dry,
            stage=options.encoder_stage,
        )
        self.digest = None if build_context.dry else self.encoder.digest()
        depth = self.encoder.depth
        require(
            depth > 0 or not attention,
            f"encoder {options.encoder} is convolutional and has no attention maps for HASTE: give --haste-attention "
            f"0, or a vision transformer",
        )
        self.attention = tuple(number if number > 0 else depth + 1 + number for number in attention)
        for number in self.attention:
            require(
                1 <= number <= depth,
                f"block {number} does not exist: encoder {options.encoder} has blocks 1 to {depth}",
            )
        self._frozen = Frozen(self.encoder, build_context.device, build_context.dtype)
        self.columns = ("row",) if options.cache and not build_context.dry else ("image",)
        self._cache = self._encode_all(build_context) if self.columns == ("row",) else None

    def __call__(self, context: Context) -> Encoded:
        """The encoder's view of the clean images of the context."""
        if self._cache is None:
            return self._frozen(context.columns["image"], self.attention)
        row = context.columns["row"]
        return Encoded(self._cache.tokens[row], {number: value[row] for number, value in self._cache.attention.items()})

    def describe(self) -> dict[str, Any]:
        return {"encoder": self.encoder.name, "encoder_digest": self.digest, "encoder_pixels": self.encoder.side}

    def _encode_all(self, build_context: BuildContext, batch: int = 64) -> Encoded:
        """Every row of the data set, encoded in order; a row is item x views + view."""
        data, device, dtype = not_none(build_context.data), build_context.device, build_context.dtype
        mixed = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
        rows = np.arange(len(data) * data.views)
        parts: list[tuple[Tensor, ...]] = []
        bar = progress.bar(
            total=len(rows), initial=0, desc=f"encoding with {self.encoder.name}", unit="image", main=True
        )
        for start in range(0, len(rows), batch):
            item, view = np.divmod(rows[start : start + batch], data.views)
            with mixed:
                encoded = self._frozen(torch.from_numpy(data.images(item, view)).to(device), self.attention)
            parts.append(
                tuple(value.to(dtype or torch.float32) for value in (encoded.tokens, *encoded.attention.values()))
            )
            if start == 0:
                # The first batch shows the size of a row: refuse a cache that would not fit before encoding the rest.
                needed = sum(value.nbytes for value in parts[0]) / len(item) * len(rows)
                require(
                    needed <= LIMIT,
                    f"the encoder's tokens of all {len(rows)} rows take {needed / 2**30:.0f} GiB; the cache "
                    f"is for sets of up to {LIMIT / 2**30:.0f} GiB: leave out --align-cache",
                )
            bar.update(len(item))
        bar.close()
        tokens, *attention = (torch.cat(values) for values in zip(*parts, strict=True))
        return Encoded(tokens, dict(zip(self.attention, attention, strict=True)))
