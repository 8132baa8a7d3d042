"""Chosen classes, several checkpoints in one picture, and the names on it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate
import models
from models.checkpoint import Checkpoint
from models.pixels import PixelCodec, pixels
from runtime.errors import UserError
from sampling import picture, preview
from sampling.classes import imagenet, labels_of, names_of
from sampling.sampler import Sampler
from tests.helpers import perturbed


def test_imagenets_classes_in_the_order_of_their_labels() -> None:
    synsets, names = list(imagenet()), list(imagenet().values())
    assert len(names) == 1000 and synsets == sorted(synsets)
    known = {
        207: "golden retriever",
        360: "otter",
        387: "lesser panda",
        974: "geyser",
        88: "macaw",
        979: "valley",
        417: "balloon",
        279: "Arctic fox",
        0: "tench",
        999: "toilet tissue",
    }
    assert {label: names[label] for label in known} == known
    assert labels_of(["Golden Retriever", "88"], names) == [207, 88]
    for word, message in (
        ("crane", "classes 134 and 517"),
        ("goldn retriever", "did you mean golden retriever"),
        ("1000", "0 to 999"),
    ):
        with pytest.raises(UserError, match=message):
            labels_of([word], names)


def test_names_come_from_the_data_and_synsets_are_translated(teacher: Path) -> None:
    checkpoint = Checkpoint.open(teacher)
    assert names_of(checkpoint) == [str(digit) for digit in range(10)]
    checkpoint.config["data"]["class_names"] = ["n02099601", "poodle"]
    assert names_of(checkpoint) == ["golden retriever", "poodle"]
    checkpoint.config["data"] = None
    assert names_of(checkpoint) == [str(digit) for digit in range(10)]


def test_chosen_classes_come_in_order(guided: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sample = ["--ckpt", str(guided), "--num-steps", "2"]
    out = generate.main([*sample, "--classes", "7", "2", "--per-class", "3", "--out", str(tmp_path / "a")])
    with np.load(out / "samples.npz") as drawn:
        assert drawn["labels"].tolist() == [7, 7, 7, 2, 2, 2] and drawn["arr_0"].shape == (6, 8, 8, 1)
        first = drawn["arr_0"]
    record = json.loads((out / "samples.json").read_text())
    assert record["classes"] == [7, 7, 7, 2, 2, 2] and record["labels"] == "chosen"
    printed = capsys.readouterr().out
    introduction = (
        "6 samples of stage2@4 (SiT-Tiny/2, ema weights): SDE, 2 steps, 2 network evaluations each, no guidance"
    )
    assert introduction in printed
    # one noise a place, whatever the class
    other = generate.main([*sample, "--classes", "2", "2", "--per-class", "3", "--out", str(tmp_path / "b")])
    with np.load(other / "samples.npz") as drawn:
        assert np.array_equal(drawn["arr_0"][3:], first[3:]) and not np.array_equal(drawn["arr_0"][:3], first[:3])
    assert "7-2x3" in generate.main([*sample, "--classes", "7", "2", "--per-class", "3"]).name
    # a name that would be too long is cut to a count and a digest
    assert "40classes-" in generate.main([*sample, "--classes", *"0123456789" * 4, "--per-class", "1"]).name


def test_checkpoints_are_compared_in_one_picture(guided: Path, teacher: Path, tmp_path: Path) -> None:
    words = ["--classes", "1", "3", "--per-class", "2", "--num-steps", "2"]
    out = generate.main(["--ckpt", str(teacher), "--compare", str(guided), *words, "--out", str(tmp_path / "both")])
    rows = json.loads((out / "compare.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["stage1@4", "stage2@4"] and rows[1]["checkpoint"] == Checkpoint.open(
        guided
    ).digest
    shown = np.asarray(Image.open(out / "compare.png"))
    # the rows are the samples that each checkpoint draws alone: same noise, same classes
    for row, ckpt in enumerate((teacher, guided)):
        alone = generate.main(["--ckpt", str(ckpt), *words, "--out", str(tmp_path / str(row))])
        with np.load(alone / "samples.npz") as drawn:
            for column, image in enumerate(drawn["arr_0"]):
                left, top = shown.shape[1] - (4 - column) * 66, shown.shape[0] - (2 - row) * 66
                assert np.array_equal(shown[top : top + 64 : 8, left : left + 64 : 8, :1], image)
    for wrong in (
        ["--compare", str(guided)],
        ["--per-class", "2"],
        ["--classes", "1", "--num-fid-samples", "4"],
        ["--classes", "1", "--labels", "balanced"],
        ["--classes", "1", "--per-class", "0"],
    ):
        with pytest.raises(UserError, match="--classes|--per-class"):
            generate.main(["--ckpt", str(teacher), *wrong])


@pytest.mark.parametrize(("classes", "shown"), [(3, [0, 1, 2]), (20, [0, 2, 5, 7, 10, 12, 15, 17])])
def test_a_preview_names_its_rows(tmp_path: Path, classes: int, shown: list[int]) -> None:
    """Every tile is the sample of its noise and class, and left of each row stands the name of its class alone."""
    network = perturbed(
        models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=classes), seed=0
    ).requires_grad_(False)
    codec, names = PixelCodec(pixels(1)), ["class" + label * "m" for label in range(classes)]
    preview.write(tmp_path / "a.png", network, codec, names, None, preview.REHEARSAL)
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    labels, side = np.repeat(shown, 8), 66
    images = Sampler(network, codec, preview.REHEARSAL, len(labels), None).images(range(len(labels)), labels)
    top, left = 2, drawn.shape[1] - 8 * side
    assert drawn.shape[0] == top + len(shown) * side
    for number, image in enumerate(images):
        y, x = top + number // 8 * side, left + number % 8 * side
        assert np.array_equal(drawn[y : y + 64 : 8, x : x + 64 : 8, :1], image)
    widths = [(drawn[top + row * side :][:side, :left] < 128).any((0, 2)).nonzero()[0] for row in range(len(shown))]
    wanted = [picture.font().getlength(names[label]) for label in shown]
    assert [np.ptp(ink) for ink in widths] == pytest.approx(wanted, abs=4) and all(np.diff(wanted) > 3)


def test_the_grid_has_a_row_a_class_in_order(tmp_path: Path) -> None:
    labels = np.array([5, 1, 5, 9, 1, 5])
    assert [(label, places.tolist()) for label, places in picture.by_class(labels)] == [
        (1, [1, 4]),
        (5, [0, 2, 5]),
        (9, [3]),
    ]
    assert [label for label, _ in picture.by_class(np.arange(100), rows=4)] == [0, 33, 66, 99]
    images = np.full((6, 8, 8, 3), (200, 30, 30), np.uint8)
    for names, titles in (
        ((), ()),
        (["one", "a longer name", "x"], ()),
        (["a", "b", "c"], [("first", 1), ("a heading too long to fit", 2)]),
    ):
        picture.write(tmp_path / "p.png", [images[:2], images[:3], images[:1]], names, titles)
        shown = np.asarray(Image.open(tmp_path / "p.png"))
        assert (
            shown.shape[0] == 2 + 3 * 66 + (15 if titles else 0)
            and (shown == (200, 30, 30)).all(-1).sum() == 6 * 64 * 64
        )
        ink = shown[..., 0] < 100
        assert ink.any() == bool(names)


def words_on(picture_: np.ndarray, top: int, bottom: int) -> list[tuple[int, int]]:
    """The first and last column of each stretch of ink between two rows, gaps of up to 8 pixels left in."""
    dark = np.flatnonzero((picture_[top:bottom] < 128).any((0, 2)))
    cuts = np.flatnonzero(np.diff(dark) > 8)
    return list(zip(dark[[0, *(cuts + 1)]].tolist(), dark[[*cuts, -1]].tolist(), strict=True)) if len(dark) else []


def test_the_grid_holds_all_that_was_asked_in_its_order_under_one_heading_a_group(guided: Path, tmp_path: Path) -> None:
    """Twelve classes of ten samples: pages of 16 rows, the last class on the second page, and no page is left over."""
    asked = ["7", "2", *"0134568979"]
    words = ["--ckpt", str(guided), "--num-steps", "2", "--out", str(tmp_path / "a b")]
    out = generate.main([*words, "--classes", *asked, "--per-class", "10"])
    assert sorted(p.name for p in out.glob("*.png")) == ["grid-2.png", "grid.png"]
    with np.load(out / "samples.npz") as drawn:
        images = drawn["arr_0"].reshape(12, 10, 8, 8, 1)
    pages = [np.asarray(Image.open(out / name)) for name in ("grid.png", "grid-2.png")]
    heading, tile = picture.FONT + 2, 66
    for group in range(12):
        page, y = pages[group // 8], 2 + group % 8 * (heading + 2 * tile)
        assert len(words_on(page, y, y + picture.FONT)) == 1
        for place, image in enumerate(images[group]):
            top, left = y + heading + place // 8 * tile, 2 + place % 8 * tile
            assert np.array_equal(page[top : top + 64 : 8, left : left + 64 : 8, :1], image), (group, place)
    generate.main([*words, "--classes", "3", "--per-class", "2", "--overwrite"])
    assert [p.name for p in out.glob("*.png")] == ["grid.png"]


def test_a_group_that_goes_on_is_named_again_on_the_next_page(tmp_path: Path) -> None:
    groups = [
        ("a", np.zeros((picture.COLUMNS * (picture.PAGE + 1), 64, 64, 1), np.uint8)),
        ("b", np.zeros((1, 64, 64, 1), np.uint8)),
    ]
    lines = list(picture._pages(groups))
    assert [[(name, len(row)) for name, row in page] for page in lines] == [
        [("a", 8), *[("", 8)] * 15],
        [("a", 8), ("b", 1)],
    ]
    assert picture.runs([7, 7, 2, 7]) == [(7, slice(0, 2)), (2, slice(2, 3)), (7, slice(3, 4))] and not picture.runs([])


def test_columns_of_one_class_have_one_heading_on_each_page(tmp_path: Path) -> None:
    labels, rows = [3] * 2 + [1] * 18, [np.full((20, 64, 64, 3), 255, np.uint8)] * 2
    written = picture.write_rows(tmp_path / "c.png", rows, ["x", "y"], labels, ["zero", "one", "two", "three"])
    assert [path.name for path in written] == ["c.png", "c-2.png"]
    first, second = (np.asarray(Image.open(path)) for path in written)
    assert first.shape[1] - second.shape[1] == 12 * 68
    assert len(words_on(first, 0, 4 + picture.FONT)) == 2 and len(words_on(second, 0, 4 + picture.FONT)) == 1


def test_umlauts_are_letters_and_long_names_end_in_an_ellipsis() -> None:
    letters = [np.asarray(picture.font().getmask(letter)) for letter in ("ä", "ö", "ü", "ß", "é", "Ω", "\u0378")]
    assert len({letter.tobytes() for letter in letters}) == 7, "a letter that the font lacks is a box"
    short = picture.shortened("a name that is too long", 80)
    assert short.endswith("…") and short[:-1] == "a name that is too long"[: len(short) - 1]
    assert picture.font().getlength(short) <= 80 and picture.shortened("kurz", 80) == "kurz"


def test_printed_paths_can_be_pasted(guided: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "my photos' samples"
    generate.main(["--ckpt", str(guided), "--num-steps", "2", "--classes", "3", "--per-class", "1", "--out", str(out)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(last) == ["wrote", *(str(out / name) for name in ("samples.npz", "samples.json", "grid.png"))]
