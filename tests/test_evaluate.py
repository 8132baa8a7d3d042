"""The evaluate command and `score`, on files, with the pixels themselves as features."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from errors import UserError
from evaluations import evaluate, metrics
from evaluations.features import Pixels
from evaluations.images import ArrayImages
from evaluations.reference import Reference
from evaluations.score import score


def digits(seed, count, channels=1, size=6):
    """Images of four classes: one brighter quarter each."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(4, size=count)
    images = rng.randint(0, 120, (count, size, size, channels))
    half = size // 2
    for image, label in zip(images, labels):
        image[half * (label // 2) :, half * (label % 2) :][:half, :half] += 130
    return images.astype(np.uint8), labels


@pytest.fixture
def pair(tmp_path):
    samples, labels = digits(0, 150)
    reference, reference_labels = digits(1, 200)
    np.savez(tmp_path / "samples.npz", arr_0=samples, labels=labels)
    np.savez_compressed(tmp_path / "reference.npz", arr_0=reference, labels=reference_labels)
    return tmp_path, samples, labels


def run(folder, *extra, samples="samples.npz", reference="reference.npz"):
    evaluate.main(["--samples", str(folder / samples), "--reference", str(folder / reference), "--features", "pixels",
                   "--out", str(folder / "metrics.json"), *extra])
    return json.loads((folder / "metrics.json").read_text())


def test_the_command_writes_and_prints_what_score_returns(pair, capsys):
    folder, samples, labels = pair
    (folder / "samples.json").write_text('{"num_steps": 50}')
    result = run(folder)
    assert result["metrics"] == score(samples, labels, folder / "reference.npz")["metrics"]
    assert list(result["metrics"]) == ["fd", "precision", "recall", "class_accuracy"]
    assert result["metrics"]["class_accuracy"] == 1
    assert result["samples"]["settings"] == {"num_steps": 50} and len(result["samples"]["sha256"]) == 64
    assert (result["num_samples"], result["reference"]["num_images"]) == (150, 200)
    assert result["precision_recall"]["mode"] == "fp32" and result["versions"]["torch"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[0]) == len(lines[1]) and f"{result['metrics']['fd']:.4f}" in lines[1]


def test_pixels_frechet_distance_by_its_definition(pair):
    folder, samples, _ = pair
    x = samples.reshape(len(samples), -1) / 127.5 - 1
    with np.load(folder / "reference.npz") as arrays:
        r = arrays["arr_0"].reshape(200, -1) / 127.5 - 1
    a, b = np.cov(x, rowvar=False), np.cov(r, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    expected = ((x.mean(0) - r.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert run(folder)["metrics"]["fd"] == pytest.approx(expected, rel=1e-6)


def test_batch_size_and_precision_mode_act(pair, monkeypatch):
    folder, *_ = pair
    plain = run(folder)
    assert run(folder, "--batch-size", "7")["metrics"] == plain["metrics"]
    called = []
    monkeypatch.setattr(metrics, "precision_recall", lambda x, r, mode: called.append(mode) or (0, 0))
    assert run(folder, "--precision-mode", "adm_fp16")["precision_recall"]["mode"] == "adm_fp16"
    assert called == ["adm_fp16"]


def test_three_channels_and_no_labels(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=digits(0, 80, 3)[0])
    np.savez(tmp_path / "reference.npz", arr_0=digits(1, 90, 3)[0])
    assert list(run(tmp_path)["metrics"]) == ["fd", "precision", "recall"]


def bad(name, **arrays):
    return pytest.param(lambda path: np.savez(path, **arrays), id=name)


UINT8 = np.zeros((9, 6, 6, 1), np.uint8)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"images": UINT8}, "no arr_0.*images"),
    ({"arr_0": UINT8 / 255}, "float64, not uint8"),
    ({"arr_0": UINT8.transpose(0, 3, 1, 2)}, "looks like .N, C, H, W."),
    ({"arr_0": UINT8[0]}, "not .N, H, W, C."),
    ({"arr_0": UINT8[:0]}, "holds no images"),
    ({"arr_0": UINT8[:3]}, "at least 4 samples, got 3"),
    ({"arr_0": UINT8[:, :4, :4]}, "images are 4 x 4 x 1, those of reference.npz are 6 x 6 x 1"),
    ({"arr_0": UINT8, "labels": np.zeros(8, int)}, "one per image"),
    ({"arr_0": UINT8, "labels": np.zeros(9)}, "not integers"),
    ({"arr_0": UINT8, "mu": np.zeros(3), "sigma": np.eye(3)}, "stored statistics"),
    ({"arr_0": np.array([{}])}, "object, not uint8"),
])
def test_bad_samples_are_refused_in_one_line(pair, arrays, message):
    folder, *_ = pair
    np.savez(folder / "samples.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["samples.npz", "reference.npz"])
def test_damaged_files_are_refused(pair, which):
    folder, *_ = pair
    whole = (folder / which).read_bytes()
    (folder / which).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{which} is truncated, damaged or no .npz"):
        run(folder)
    flipped = bytearray(whole)
    flipped[700] ^= 255
    (folder / which).write_bytes(flipped)
    with pytest.raises(UserError, match=f"{which} is truncated, damaged"):
        run(folder)
    (folder / which).unlink()
    with pytest.raises(UserError, match="cannot read .*No such file"):
        run(folder)


def test_a_member_shorter_than_its_header_says_is_refused(pair):
    folder, samples, _ = pair
    with zipfile.ZipFile(folder / "samples.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (50, 6, 6, 1)})
        member.write(samples[:20].tobytes())
    with pytest.raises(UserError, match="ends within image 20"):
        run(folder)


def test_large_images_need_a_network():
    images = np.zeros((4, 64, 65, 1), np.uint8)
    with pytest.raises(UserError, match="at most 4096 values"):
        score(images, None, Reference.of_images(ArrayImages(images), Pixels()))


def test_unknown_features_name_the_nearest(pair):
    folder, *_ = pair
    with pytest.raises(UserError, match="did you mean pixels"):
        run(folder, "--features", "pixel")
