"""Pictures of samples with names on them: one row a class, or one row a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime import files

TILE = 64  # a sample is enlarged to at least so many pixels
FONT = 13


def write(path: Path, rows: Sequence[np.ndarray], names: Sequence[str] = (), column_titles: Sequence[str] = ()) -> None:
    """Write a PNG of rows of uint8 images, each (n, H, W, C), on white: `names` left of them, titles above columns."""
    side = rows[0].shape[1]
    scale, gap = max(1, -(-TILE // side)), max(2, side // 16)
    tile = side * scale
    font = ImageFont.load_default(FONT)
    left = gap + max((int(font.getlength(name)) + 2 * gap for name in names), default=0)
    top = gap + (FONT + gap if column_titles else 0)
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
    for column, title in enumerate(column_titles):
        # A title wider than its column is cut.
        while title and font.getlength(title) > tile:
            title = title[:-1]
        draw.text((left + column * (tile + gap), gap // 2), title, "black", font)
    with files.replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def by_class(labels: np.ndarray, rows: int = 8, columns: int = 8) -> list[tuple[int, np.ndarray]]:
    """Up to `rows` of the classes among `labels`, evenly spread and in order, with up to `columns` places of each."""
    present = np.unique(labels)
    chosen = present[np.linspace(0, len(present) - 1, min(rows, len(present))).round().astype(int)]
    return [(int(label), np.flatnonzero(labels == label)[:columns]) for label in chosen]
