"""Fashion-MNIST from tiny IDX files: folders in the published classes, masks, subsets, mistakes in one line."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluations.taps import read_masks
from preprocessing import fashion
from preprocessing.images import ImageFiles
from runtime.errors import UserError


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four files of 40 and 20 images; each image is a ring of its label's brightness, with a hole."""
    folder = tmp_path / "raw"
    folder.mkdir()
    digests = {}
    for kind, count in (("train", 40), ("t10k", 20)):
        labels = np.random.default_rng(count).permutation(np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 4:20, 6:22] = 20 * labels[:, None, None] + 9
        images[:, 8:12, 10:14] = 0
        images[np.arange(count), 27, 27] = np.arange(count)
        for name, array in ((f"{kind}-images-idx3-ubyte", images), (f"{kind}-labels-idx1-ubyte", labels)):
            digests[name] = hashlib.sha256(idx(array)).hexdigest()
            # packed and unpacked files are both read
            if kind == "train":
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    monkeypatch.setattr(fashion, "DIGESTS", digests)
    return folder


def make(source: Path, out: Path, *more: str) -> Path:
    fashion.main(["--source", str(source), "--out", str(out), *more])
    return out


def test_folders_hold_the_padded_images_under_their_published_classes(source: Path, tmp_path: Path) -> None:
    out = make(source, tmp_path / "out")
    for split, kind, count in (("train", "train", 40), ("test", "t10k", 20)):
        images, labels = (fashion.read_idx(source, f"{kind}-{part}-ubyte") for part in ("images-idx3", "labels-idx1"))
        opened = ImageFiles(out / split)
        assert opened.class_names == list(fashion.CLASSES) and len(opened.names) == count
        for index, name in enumerate(opened.names):
            place = int(Path(name).stem)
            picture = np.asarray(opened.load(index))
            assert picture.shape == (32, 32) and opened.labels[index] == labels[place]
            assert np.array_equal(picture[2:-2, 2:-2], images[place])
            assert picture.sum() == images[place].astype(int).sum()  # the margin is black


def test_masks_are_filled_silhouettes_in_the_order_of_the_folder(source: Path, tmp_path: Path) -> None:
    out = make(source, tmp_path / "out")
    opened = ImageFiles(out / "train")
    masks, groups = read_masks(str(out / "train-masks.npz"), 40)
    assert groups is None and masks.shape == (40, 32, 32)
    for index, mask in enumerate(masks):
        picture = np.asarray(opened.load(index))
        expected = picture > 0
        expected[10:14, 12:16] = True  # the hole
        assert np.array_equal(mask, expected)


def test_a_subset_is_the_first_of_each_class(source: Path, tmp_path: Path) -> None:
    out = make(source, tmp_path / "out", "--count", "20")
    labels = fashion.read_idx(source, "train-labels-idx1-ubyte")
    taken = {int(path.stem) for path in (out / "train").rglob("*.png")}
    assert taken == {int(place) for label in range(10) for place in np.flatnonzero(labels == label)[:2]}
    assert len(list((out / "test").rglob("*.png"))) == 20
    with pytest.raises(UserError, match="another choice of images"):
        make(source, tmp_path / "out", "--count", "30")
    with pytest.raises(UserError, match="are 5 of each class, which has 4; ask for at most 40"):
        make(source, tmp_path / "more", "--count", "50")
    with pytest.raises(UserError, match="--count 15 must be a positive multiple of 10"):
        make(source, tmp_path / "odd", "--count", "15")


def test_the_embedded_images_are_eight_thousand_of_ten_classes(tmp_path: Path) -> None:
    for split, each in (("train", 700), ("test", 100)):
        images, labels, places = fashion.load(fashion.EMBEDDED, split)
        assert images.shape == (10 * each, 32, 32) and np.bincount(labels).tolist() == [each] * 10
        assert 50 < images.mean() < 60 and not images[:, :2].any()  # real pictures on black, with their margin
        assert (np.diff(places)[np.diff(labels) == 0] > 0).all()
    # no test image is a training image
    train, test = (fashion.load(fashion.EMBEDDED, split)[0] for split in ("train", "test"))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    with pytest.raises(UserError, match="--source and --embedded are two places"):
        fashion.main(["--embedded", "--source", "raw", "--out", str(tmp_path / "out")])


def test_a_killed_command_finishes_and_a_finished_one_does_nothing(source: Path, tmp_path: Path, capsys) -> None:
    out = make(source, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    (out / fashion.RECORD).unlink()
    (out / "test-masks.npz").unlink()
    make(source, out)
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == before and (out / "test-masks.npz").exists()
    make(source, out)
    assert "finished already" in capsys.readouterr().out


def test_mistakes_are_one_clear_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"lacks train-images-idx3-ubyte\(.gz\)"):
        make(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds something else already"):
        make(source, tmp_path / "busy")
    labels = source / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x09")
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is damaged or of another data set"):
        make(source, tmp_path / "out")
    packed = source / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz is damaged") as error:
        make(source, tmp_path / "other")
    assert "\n" not in str(error.value)
    # without the files and without a network
    monkeypatch.setattr(fashion, "PLACES", (tmp_path / "a", tmp_path / "b" / "FashionMNIST" / "raw"))

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Error downloading\nmore lines")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", refuse)
    with pytest.raises(UserError, match=r"cannot download it \(Error downloading\); install Debian's") as error:
        fashion.main(["--out", str(tmp_path / "third")])
    assert "\n" not in str(error.value)


def test_the_usual_places_are_looked_at(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "root" / "FashionMNIST" / "raw"
    place.parent.mkdir(parents=True)
    source.rename(place)
    monkeypatch.setattr(fashion, "PLACES", (tmp_path / "a", place))
    assert fashion.find_source(None) == place and fashion.find_source(str(tmp_path / "root")) == place
    fashion.main(["--out", str(tmp_path / "out")])
    with Image.open(next((tmp_path / "out" / "test").rglob("*.png"))) as picture:
        assert picture.mode == "L"
