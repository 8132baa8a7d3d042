"""Pictures of samples with names on them: one row a class, or one row a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime import files

TILE = 64  # pixels that a sample has at least
FONT = 13


def write(path: Path, rows: Sequence[np.ndarray], names: Sequence[str] = (), heads: Sequence[str] = ()) -> None:
    """Write rows of uint8 images, each (n, H, W, C), as a PNG; `names` stand left of the rows, `heads` above the columns."""
    side = rows[0].shape[1]
    scale, gap = max(1, -(-TILE // side)), max(2, side // 16)
    tile = side * scale
    font = ImageFont.load_default(FONT)
    left = gap + max((int(font.getlength(name)) + 2 * gap for name in names), default=0)
    top = gap + (FONT + gap if heads else 0)
    columns = max(map(len, rows))
    picture = Image.new("RGB", (left + columns * (tile + gap), top + len(rows) * (tile + gap)), "white")
    draw = ImageDraw.Draw(picture)
    for number, row in enumerate(rows):
        y = top + number * (tile + gap)
        if names:
            draw.text((gap, y + tile // 2), names[number], "black", font, anchor="lm")
        for column, image in enumerate(row):
            pixels = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).resize(
                (tile, tile), Image.Resampling.NEAREST
            )
            picture.paste(pixels, (left + column * (tile + gap), y))
    for column, head in enumerate(heads):
        while head and font.getlength(head) > tile:  # what does not fit is cut
            head = head[:-1]
        draw.text((left + column * (tile + gap), gap // 2), head, "black", font)
    with files.replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def by_class(labels: np.ndarray, rows: int = 8, columns: int = 8) -> list[tuple[int, np.ndarray]]:
    """Up to `rows` of the classes among `labels`, spread over them and in their order, with the places of up to `columns` samples."""
    present = np.unique(labels)
    chosen = present[np.linspace(0, len(present) - 1, min(rows, len(present))).round().astype(int)]
    return [(int(label), np.flatnonzero(labels == label)[:columns]) for label in chosen]
