"""FDr: the mean ratio against distances computed apart, the unit of validation images, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from config import FeatureOptions
from evaluations import fdr, reference
from evaluations.extractors import open_extractor
from runtime.errors import UserError


def images(seed: int, bright: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 180 + bright, (90, 8, 8, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> tuple[Path, list[str]]:
    """Samples, and references of training and validation images for two extractors: pixels and a small vision transformer."""
    folder, names = tmp_path_factory.mktemp("fdr"), ["pixels", f"timm:{encoder}"]
    for number, (kind, bright) in enumerate((("samples", 60), ("train", 0), ("val", 20))):
        np.savez(folder / f"{kind}.npz", arr_0=images(number, bright))
        (folder / kind).mkdir()
        for index, name in enumerate(names):
            if kind != "samples":
                reference.main(["--images", str(folder / f"{kind}.npz"), "--features", name, "--out", str(folder / kind / f"{index}.npz")])
    return folder, names


def distance(a: np.ndarray, b: np.ndarray, name: str) -> float:
    """By the matrix square root, from features extracted apart."""
    extractor = open_extractor(FeatureOptions(features=name))
    x, y = (extractor(torch.from_numpy(part)).pool.double().numpy() for part in (a, b))
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root))


def run(folder: Path, samples: str = "samples.npz", *more: str) -> dict:
    return fdr.main(["--samples", str(folder / samples), "--train", str(folder / "train"), "--out", str(folder / "fdr.json"), *more])


def test_the_mean_of_ratios(place: tuple[Path, list[str]], capsys: pytest.CaptureFixture) -> None:
    folder, names = place
    result = run(folder, "samples.npz", "--val", str(folder / "val"))
    sets = {kind: images(number, bright) for number, (kind, bright) in enumerate((("samples", 60), ("train", 0), ("val", 20)))}
    expected = [distance(sets["samples"], sets["train"], name) / distance(sets["val"], sets["train"], name) for name in names]
    assert [row["ratio"] for row in result["extractors"]] == pytest.approx(expected, rel=1e-4)
    assert result["metrics"] == {"fdr2": pytest.approx(np.mean(expected), rel=1e-4)} and not result["six"]
    assert json.loads((folder / "fdr.json").read_text())["metrics"] == result["metrics"]
    said = capsys.readouterr().out
    assert all(f"{row['normaliser']:.4f}" in said and row["features"] in said for row in result["extractors"]) and "not the six" in said


def test_validation_images_are_the_unit_and_training_images_nothing(place: tuple[Path, list[str]]) -> None:
    folder, _ = place
    more = ("--val", str(folder / "val"))
    assert run(folder, "val.npz", *more)["metrics"]["fdr2"] == pytest.approx(1, abs=1e-4)
    assert run(folder, "train.npz", *more)["metrics"]["fdr2"] == pytest.approx(0, abs=1e-4)


def test_published_normalisers_belong_to_the_six_alone(place: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = place
    with pytest.raises(UserError, match="no published normaliser for pixels features: give --val"):
        run(folder)
    train = {name: None for name in fdr.SIX}
    assert {name: unit for name, (unit, _) in fdr.normalisers(train, None).items()} == fdr.SIX and len(fdr.SIX) == 6
    with pytest.raises(UserError, match="holds no reference"):
        run(folder, "samples.npz", "--val", str(tmp_path))
    (tmp_path / "a.npz").write_bytes((folder / "val" / "0.npz").read_bytes())
    with pytest.raises(UserError, match="--val lacks a reference of timm:"):
        run(folder, "samples.npz", "--val", str(tmp_path))
    (tmp_path / "b.npz").write_bytes((folder / "val" / "0.npz").read_bytes())
    with pytest.raises(UserError, match="two references of pixels"):
        run(folder, "samples.npz", "--val", str(tmp_path))
    with pytest.raises(UserError, match="do not differ"):
        run(folder, "samples.npz", "--val", str(folder / "train"))
    np.savez(tmp_path / "b.npz", arr_0=images(0, 0))
    with pytest.raises(UserError, match="b.npz was not written by evaluations.reference"):
        run(folder, "samples.npz", "--val", str(tmp_path))
