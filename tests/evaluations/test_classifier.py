"""The classifier in a reference: logistic regression on training features, and the class accuracy that it gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluations import evaluate, reference
from evaluations.classifier import accuracy, fit
from evaluations.images import write_npz
from evaluations.representation import PENALTIES
from preprocessing import digits
from runtime.errors import UserError


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits 0 .. 999 as training images, the rest as the reference, and the rest with every third label wrong."""
    folder = tmp_path_factory.mktemp("sets")
    images, labels = digits.load()
    wrong = labels.copy()
    wrong[::3] = (wrong[::3] + 1) % 10
    for name, part, given in (
        ("train", slice(1000), labels),
        ("test", slice(1000, None), labels),
        ("wrong", slice(1000, None), wrong),
    ):
        write_npz(folder / f"{name}.npz", [images[part]], given[part], images.shape[1:])
    make(folder, "train", folder / "train-features.npz")
    return folder


def make(folder: Path, name: str, out: Path, *more: object) -> None:
    given = ["--images", str(folder / f"{name}.npz"), "--features", "pixels", "--out", str(out)]
    reference.main([*given, *map(str, more)])


def test_it_is_scikit_learns_fit_on_standardised_features(sets: Path) -> None:
    train = reference.read_compact(sets / "train-features.npz")
    weight, bias, penalty = fit("x", train.pool, train.labels)
    assert penalty in PENALTIES and weight.shape == (64, 10)
    x = train.pool.double().numpy()
    deviation = x.std(0)
    z = np.where(deviation > 0, (x - x.mean(0)) / np.where(deviation > 0, deviation, 1), 0)
    model = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-6, max_iter=5000).fit(z, train.labels.numpy())
    logits = (train.pool @ weight + bias).double()
    expected = torch.from_numpy(model.decision_function(z))
    torch.testing.assert_close(logits.softmax(1), expected.softmax(1), rtol=0, atol=5e-3)


def test_two_classes_are_told_apart_too() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator)
    labels = (x[:, 0] + 0.1 * torch.randn(200, generator=generator) > 0).long()
    weight, bias, _ = fit("x", x, labels)
    assert weight.shape == (5, 2) and accuracy(weight, bias, x, labels) > 0.9


def test_a_reference_carries_it_and_every_score_uses_it(sets: Path, tmp_path: Path, capsys) -> None:
    make(sets, "test", tmp_path / "test.npz", "--classifier", sets / "train-features.npz")
    about = reference.read_compact(tmp_path / "test.npz").classifier.about
    assert about["num_images"] == 1000 and about["kind"] == "logistic regression on pixels features"
    # the accuracy on digits that it did not see, and on samples whose labels are wrong in a third
    assert about["accuracy"] > 0.85 and f"{100 * about['accuracy']:.1f} % of these images" in capsys.readouterr().out
    results = {}
    for name in ("test", "wrong"):
        words = ["--samples", str(sets / f"{name}.npz"), "--reference", str(tmp_path / "test.npz")]
        evaluate.main([*words, "--features", "pixels", "--out", str(tmp_path / f"{name}.json")])
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["test"]["metrics"]["classifier_accuracy"] == pytest.approx(about["accuracy"])
    assert results["test"]["reference"]["classifier"] == about
    assert results["wrong"]["metrics"]["classifier_accuracy"] < 0.7
    make(sets, "test", tmp_path / "without.npz")
    assert reference.read_compact(tmp_path / "without.npz").classifier is None


def test_mistakes_are_one_clear_line(sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    with pytest.raises(UserError, match="is of the same images"):
        make(sets, "train", out, "--classifier", sets / "train-features.npz")
    with pytest.raises(UserError, match="was not written by evaluations.reference"):
        make(sets, "test", out, "--classifier", sets / "train.npz")
    with pytest.raises(UserError, match="--classifier needs features"):
        make(sets, "test", out, "--features", "none", "--classifier", sets / "train-features.npz")
    whole = reference.read_compact(sets / "train-features.npz")
    with pytest.raises(UserError, match="holds no features with labels"):
        fit("x", whole.pool, None)
    with pytest.raises(UserError, match="at least two classes"):
        fit("x", whole.pool, torch.zeros(1000, dtype=torch.int64))
    # a file whose arrays do not fit each other
    make(sets, "test", tmp_path / "test.npz", "--classifier", sets / "train-features.npz")
    with np.load(tmp_path / "test.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(tmp_path / "cut.npz", **{**arrays, "classifier_weight": arrays["classifier_weight"][:5]})
    with pytest.raises(UserError, match="its classifier must be float32"):
        reference.read_compact(tmp_path / "cut.npz")
