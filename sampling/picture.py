"""Pictures of samples with names on them: one row a class, one row a checkpoint, or the classes that were asked for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime import files

TILE = 64  # a sample is enlarged to at least so many pixels
FONT = 13
LEFT = 320  # pixels for a name left of its row
COLUMNS = 8
PAGE = 16  # rows of a page of groups, or columns of a page of checkpoints


@functools.cache
def font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: Pillow's own font draws a box for every letter beyond ASCII."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT)


def shortened(text: str, width: float) -> str:
    """`text`, cut to `width` pixels with an ellipsis at its end."""
    if font().getlength(text) <= width:
        return text
    while text and font().getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def write(
    path: Path, rows: Sequence[np.ndarray], names: Sequence[str] = (), headings: Sequence[tuple[str, int]] = ()
) -> None:
    """Write a PNG of rows of uint8 images, each (n, H, W, C), on white, with `names` left of them.

    Headings stand above the columns: a text and the number of columns that it spans.
    """
    page = Page(rows[0].shape[1], max(map(len, rows)), [shortened(name, LEFT) for name in names])
    if headings:
        page.line(headings)
    for number, row in enumerate(rows):
        page.row(row, page.names[number] if names else "")
    page.save(path)


def write_groups(path: Path, groups: Sequence[tuple[str, np.ndarray]]) -> list[Path]:
    """Write PNGs of groups of uint8 images (n, H, W, C), each below one heading, in order; returns their paths.

    The first page is `path`, the next STEM-2.png, and so on.
    """
    written = []
    for number, lines in enumerate(_pages(groups), start=1):
        page = Page(groups[0][1].shape[1], max(len(row) for _, row in lines))
        for heading, row in lines:
            if heading:
                page.line([(heading, len(row))])
            page.row(row)
        written.append(page_path(path, number))
        page.save(written[-1])
    return written


def write_rows(
    path: Path, rows: Sequence[np.ndarray], names: Sequence[str], labels: Sequence[int], classes: Sequence[str]
) -> list[Path]:
    """Write PNGs of rows of uint8 images (n, H, W, C) with `names`, PAGE columns each; returns their paths.

    `labels` are those of the n columns, of which equal ones that stand together have one heading, from `classes`.
    """
    written = []
    for number, start in enumerate(range(0, len(labels), PAGE), start=1):
        part = slice(start, start + PAGE)
        headings = [(classes[label], places.stop - places.start) for label, places in runs(labels[part])]
        written.append(page_path(path, number))
        write(written[-1], [row[part] for row in rows], names, headings)
    return written


def page_path(path: Path, number: int) -> Path:
    """The file of page `number`, from 1, of the picture `path`."""
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _pages(groups: Sequence[tuple[str, np.ndarray]]) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Rows of up to COLUMNS images, PAGE on a page; a heading stands at the first row of a group on each page."""
    page: list[tuple[str, np.ndarray]] = []
    for name, images in groups:
        for start in range(0, len(images), COLUMNS):
            if len(page) == PAGE:
                yield page
                page = []
            page.append((name if start == 0 or not page else "", images[start : start + COLUMNS]))
    if page:
        yield page


class Page:
    """A picture that grows downwards, line by line.

    Args:
        side: height and width of an image.
        columns: images in a row.
        names: texts that stand left of rows; they decide the room that is left for them.
    """

    def __init__(self, side: int, columns: int, names: Sequence[str] = ()) -> None:
        self.names = names
        self.gap = max(2, side // 16)
        self.tile = side * max(1, -(-TILE // side))
        self.left = self.gap + max((int(font().getlength(name)) + 2 * self.gap for name in names), default=0)
        self.width = self.left + columns * (self.tile + self.gap)
        self.height = self.gap
        self.parts: list[tuple[int, int, Image.Image | str, str]] = []

    def line(self, headings: Sequence[tuple[str, int]]) -> None:
        """Headings, each above so many columns, one beside the other."""
        column = 0
        for text, span in headings:
            room = span * (self.tile + self.gap) - self.gap
            x = self.left + column * (self.tile + self.gap)
            self.parts.append((x, self.height + FONT // 2, shortened(text, room), "lm"))
            column += span
        self.height += FONT + self.gap

    def row(self, images: np.ndarray, name: str = "") -> None:
        """A row of uint8 images (n, H, W, C)."""
        if name:
            self.parts.append((self.gap, self.height + self.tile // 2, name, "lm"))
        for column, image in enumerate(images):
            tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).resize(
                (self.tile, self.tile), Image.Resampling.NEAREST
            )
            self.parts.append((self.left + column * (self.tile + self.gap), self.height, tile, ""))
        self.height += self.tile + self.gap

    def save(self, path: Path) -> None:
        """Write it as a PNG."""
        picture = Image.new("RGB", (self.width, self.height), "white")
        draw = ImageDraw.Draw(picture)
        for x, y, part, anchor in self.parts:
            if isinstance(part, str):
                draw.text((x, y), part, "black", font(), anchor=anchor)
            else:
                picture.paste(part, (x, y))
        with files.replacing(path) as temporary:
            picture.save(temporary, format="PNG")


def runs(labels: Sequence[int]) -> list[tuple[int, slice]]:
    """The runs of equal labels, in order: the label and its places."""
    starts = [0, *(place for place in range(1, len(labels)) if labels[place] != labels[place - 1]), len(labels)]
    return [(labels[a], slice(a, b)) for a, b in itertools.pairwise(starts) if a < b]


def by_class(labels: np.ndarray, rows: int = 8, columns: int = 8) -> list[tuple[int, np.ndarray]]:
    """Up to `rows` of the classes among `labels`, evenly spread and in order, with up to `columns` places of each."""
    present = np.unique(labels)
    chosen = present[np.linspace(0, len(present) - 1, min(rows, len(present))).round().astype(int)]
    return [(int(label), np.flatnonzero(labels == label)[:columns]) for label in chosen]
