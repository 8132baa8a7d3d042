"""The evaluate command and `Scorer`, on files, with the pixels themselves as features."""

from __future__ import annotations

import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evaluations import collect, evaluate, metrics, reference
from evaluations.features import Pixels
from evaluations.images import LatentSetImages
from evaluations.reference import Reference
from evaluations.score import Scorer
from runtime import files
from runtime.errors import UserError


def digits(seed, count, channels=1, size=6):
    """Images of four classes: one brighter quarter each."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(4, size=count)
    images = rng.randint(0, 120, (count, size, size, channels))
    half = size // 2
    for image, label in zip(images, labels):
        image[half * (label // 2) :, half * (label % 2) :][:half, :half] += 130
    return images.astype(np.uint8), labels


def score(samples, labels, path):
    """The result for samples in memory against the reference at `path`, added in two batches."""
    scorer = Scorer(Reference.open(path, Pixels()), Pixels())
    for part in np.split(np.arange(len(samples)), [60]):
        scorer.add(samples[part], None if labels is None else labels[part], part)
    return scorer.result()


@pytest.fixture
def pair(tmp_path):
    samples, labels = digits(0, 150)
    real, real_labels = digits(1, 200)
    np.savez(tmp_path / "samples.npz", arr_0=samples, labels=labels)
    np.savez_compressed(tmp_path / "reference.npz", arr_0=real, labels=real_labels)
    return tmp_path, samples, labels


def run(folder, *extra, samples="samples.npz", reference="reference.npz"):
    evaluate.main(
        [
            "--samples",
            str(folder / samples),
            "--reference",
            str(folder / reference),
            "--features",
            "pixels",
            "--out",
            str(folder / "metrics.json"),
            *extra,
        ]
    )
    return json.loads((folder / "metrics.json").read_text())


def test_the_command_writes_and_prints_what_a_scorer_returns(pair, capsys):
    folder, samples, labels = pair
    settings = {"num_steps": 50, "samples": files.digest(folder / "samples.npz")}
    files.write_sealed(folder / "samples.json", settings)
    result = run(folder)
    files.require_sealed(folder / "metrics.json", result)
    assert result["metrics"] == pytest.approx(score(samples, labels, folder / "reference.npz")["metrics"], rel=1e-9)
    assert list(result["metrics"]) == ["fd", "precision", "recall", "class_accuracy"]
    assert result["metrics"]["class_accuracy"] == 1
    assert result["samples"]["settings"] == settings and len(result["samples"]["sha256"]) == 64
    assert (result["num_samples"], result["reference"]["num_images"]) == (150, 200)
    assert result["precision_recall"]["mode"] == "fp32" and result["versions"]["torch"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[0]) == len(lines[1]) and f"{result['metrics']['fd']:.4f}" in lines[1]


def test_settings_of_other_samples_stand_beside_no_score(pair, monkeypatch):
    """Refused before features are extracted, which takes minutes."""
    folder, samples, _ = pair
    files.write_sealed(folder / "samples.json", {"num_steps": 50, "samples": files.digest(folder / "samples.npz")})
    np.savez(folder / "samples.npz", arr_0=samples[::-1])
    monkeypatch.setattr(collect, "collect", None)
    with pytest.raises(UserError, match="samples.json describes other samples than .*samples.npz"):
        run(folder)


def test_pixels_frechet_distance_by_its_definition(pair):
    folder, samples, _ = pair
    x = samples.reshape(len(samples), -1) / 127.5 - 1
    with np.load(folder / "reference.npz") as arrays:
        r = arrays["arr_0"].reshape(200, -1) / 127.5 - 1
    a, b = np.cov(x, rowvar=False), np.cov(r, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    expected = ((x.mean(0) - r.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert run(folder)["metrics"]["fd"] == pytest.approx(expected, rel=1e-6)


def test_batch_size_and_precision_recall_mode_act(pair, monkeypatch):
    folder, *_ = pair
    plain = run(folder)
    sizes, called = [], []
    extract = Pixels.__call__
    monkeypatch.setattr(Pixels, "__call__", lambda self, images: sizes.append(len(images)) or extract(self, images))
    assert run(folder, "--batch-size", "7")["metrics"] == pytest.approx(plain["metrics"], rel=1e-9)
    assert max(sizes) == 7 and sum(sizes) == 350
    monkeypatch.setattr(metrics, "precision_recall", lambda x, r, mode: called.append(mode) or (0, 0))
    assert run(folder, "--precision-recall-mode", "adm_fp16")["precision_recall"]["mode"] == "adm_fp16"
    assert called == ["adm_fp16"]


def test_three_channels_and_no_labels(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=digits(0, 80, 3)[0])
    np.savez(tmp_path / "reference.npz", arr_0=digits(1, 90, 3)[0])
    assert list(run(tmp_path)["metrics"]) == ["fd", "precision", "recall"]


def bad(name, **arrays):
    return pytest.param(lambda path: np.savez(path, **arrays), id=name)


UINT8 = np.zeros((9, 6, 6, 1), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": UINT8}, "no arr_0.*images"),
        ({"arr_0": UINT8 / 255}, "float64, not uint8"),
        ({"arr_0": UINT8.transpose(0, 3, 1, 2)}, "looks like .N, C, H, W."),
        ({"arr_0": UINT8[0]}, "give .N, H, W, C."),
        ({"arr_0": UINT8[:0]}, "holds no images"),
        ({"arr_0": UINT8[:3]}, "at least 4 samples, got 3"),
        ({"arr_0": UINT8[:, :4, :4]}, "images are 4 x 4 x 1, those of reference.npz are 6 x 6 x 1"),
        ({"arr_0": UINT8, "labels": np.zeros(8, int)}, "one for each image"),
        ({"arr_0": UINT8, "labels": np.zeros(9)}, "not integers"),
        ({"arr_0": UINT8, "mu": np.zeros(3), "sigma": np.eye(3)}, "stored statistics"),
        ({"arr_0": np.array([{}])}, "object, not uint8"),
    ],
)
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
    with pytest.raises(UserError, match=f"{which} is truncated, damaged or not an .npz"):
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


def test_several_seeds_give_mean_and_standard_deviation(pair, capsys):
    folder, *_ = pair
    paths = []
    for seed in (5, 6, 7):
        images, labels = digits(seed, 150)
        np.savez(folder / f"seed{seed}.npz", arr_0=images, labels=labels)
        paths.append(str(folder / f"seed{seed}.npz"))
    result = run(folder, "--samples", *paths)
    single = [run(folder, samples=f"seed{seed}.npz")["metrics"]["fd"] for seed in (5, 6, 7)]
    assert [record["metrics"]["fd"] for record in result["runs"]] == pytest.approx(single)
    assert result["metrics"]["fd"] == pytest.approx(np.mean(single))
    assert result["std"]["fd"] == pytest.approx(np.std(single, ddof=1)) and result["std"]["fd"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["samples", "seed5.npz", "seed6.npz", "seed7.npz", "mean", "std"]
    assert len({len(line) for line in lines[:6]}) == 1
    np.savez(folder / "few.npz", arr_0=digits(1, 20)[0])
    with pytest.raises(UserError, match="few.npz holds 20 samples.*cannot be compared"):
        run(folder, "--samples", paths[0], str(folder / "few.npz"))


def test_few_samples_are_warned_of(pair, capsys):
    folder, *_ = pair
    result = run(folder)
    assert "150 samples" in result["warnings"][0] and "biased" in capsys.readouterr().err
    many = np.zeros((10_000, 2, 2, 1), np.uint8)
    np.savez(folder / "zeros.npz", arr_0=many[:50])
    assert score(many, None, folder / "zeros.npz")["warnings"] == []


def write_folder(folder, images, labels, suffix=".png"):
    for index, (image, label) in enumerate(zip(images, labels)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / str(label) / f"{index:04d}{suffix}")


def test_a_folder_of_png_files_scores_like_the_same_npz(pair):
    folder, samples, labels = pair
    write_folder(folder / "png", samples, labels)
    assert run(folder, "--grey", samples="png")["metrics"] == pytest.approx(run(folder)["metrics"], rel=1e-9)


def test_lossy_samples_and_samples_of_two_sizes_are_refused(pair):
    folder, samples, labels = pair
    write_folder(folder / "jpg", samples[:9], labels[:9], ".jpg")
    with pytest.raises(UserError, match="0/.*jpg, whose loss changes every metric.*PNG"):
        run(folder, samples="jpg")
    write_folder(folder / "sizes", samples[:9], [0] * 9)
    Image.fromarray(samples[0, :4, :5, 0]).save(folder / "sizes" / "0" / "0003.png")
    with pytest.raises(UserError, match="0003.png in sizes is 5 x 4 pixels, the first image 6 x 6"):
        run(folder, "--grey", samples="sizes")


def build_reference(folder, images, *extra):
    reference.main(["--images", str(folder / images), "--features", "pixels", "--out", str(folder / "ref.npz"), *extra])


def test_a_compact_reference_gives_the_same_numbers(pair, capsys):
    folder, *_ = pair
    expected = run(folder)
    build_reference(folder, "reference.npz")
    assert "features of 200 images" in capsys.readouterr().out
    result = run(folder, reference="ref.npz")
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-9)
    assert result["reference"] == expected["reference"]  # the digest is that of the images
    build_reference(folder, "ref.npz", "--out", str(folder / "again.npz"))  # a reference is images too
    assert run(folder, reference="again.npz")["metrics"] == result["metrics"]


def test_a_compact_reference_keeps_a_part_and_counts_all(pair):
    folder, *_ = pair
    build_reference(folder, "reference.npz", "--keep", "40", "--batch-size", "16")
    with np.load(folder / "ref.npz") as small, np.load(folder / "reference.npz") as images:
        assert small["pool"].shape == (40, 36) and small["labels"].shape == (40,)
        flat = images["arr_0"].reshape(200, 36) / np.float32(127.5) - 1
        np.testing.assert_allclose(small["sigma"], np.cov(flat.astype(float), rowvar=False), rtol=1e-6, atol=1e-9)
        where = [np.flatnonzero((flat == row).all(1))[0] for row in small["pool"]]
        assert (images["labels"][where] == small["labels"]).all() and sorted(where) == where
        assert not np.array_equal(where, range(40))
    whole = run(folder)["metrics"]
    part = run(folder, reference="ref.npz")
    assert part["metrics"]["fd"] == pytest.approx(whole["fd"], rel=1e-9)
    assert part["metrics"]["precision"] != whole["precision"] and part["reference"]["num_images"] == 40


def test_a_reference_from_photographs_is_cropped(pair):
    folder, *_ = pair
    pictures = [np.full((20, 30, 3), value, np.uint8) for value in (10, 90, 200, 250, 30)]
    write_folder(folder / "photos", pictures, [0, 0, 1, 1, 1], ".jpg")
    with pytest.raises(UserError, match="need --resolution"):
        build_reference(folder, "photos")
    build_reference(folder, "photos", "--resolution", "4")
    with np.load(folder / "ref.npz") as made:
        assert made["pool"].shape == (5, 48) and made["labels"].tolist() == [0, 0, 1, 1, 1]
        np.testing.assert_allclose(
            made["pool"].mean(1),
            [10 / 127.5 - 1, 90 / 127.5 - 1, 200 / 127.5 - 1, 250 / 127.5 - 1, 30 / 127.5 - 1],
            atol=0.03,
        )


def test_a_latent_set_of_pixels_is_a_reference(tmp_path):
    from preprocessing import digits as embedded

    embedded.main(["--out", str(tmp_path / "digits")])
    images = LatentSetImages(tmp_path / "digits")
    assert images.shape == (8, 8, 1) and len(images) == 1797
    first = next(images.batches(range(3), 3))
    assert first.dtype == np.uint8 and first.max() > 200
    np.savez(tmp_path / "samples.npz", arr_0=next(images.batches(range(1797), 1797)), labels=images.labels)
    result = run(tmp_path, reference="digits")
    assert abs(result["metrics"]["fd"]) < 1e-9
    assert (result["metrics"]["precision"], result["metrics"]["recall"], result["metrics"]["class_accuracy"]) == (
        1,
        1,
        1,
    )


def test_references_that_do_not_fit_are_refused(pair):
    folder, *_ = pair
    build_reference(folder, "reference.npz")
    with np.load(folder / "ref.npz") as made:
        arrays = dict(made)
    np.savez(folder / "ref.npz", **arrays | {"sigma": arrays["sigma"] * np.nan})
    with pytest.raises(UserError, match="mu or sigma holds NaN"):
        run(folder, reference="ref.npz")
    np.savez(folder / "ref.npz", **arrays | {"about": np.array("{}")})
    with pytest.raises(UserError, match="about is damaged"):
        run(folder, reference="ref.npz")
    other = arrays["about"].item().replace('"pixels"', '"inception"')
    np.savez(folder / "ref.npz", **arrays | {"about": np.array(other)})
    with pytest.raises(UserError, match="holds inception features, not pixels"):
        run(folder, reference="ref.npz")
    np.savez(folder / "ref.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    with pytest.raises(UserError, match="neither arr_0.*of pixels features"):
        run(folder, reference="ref.npz")
    with pytest.raises(UserError, match="reference, not samples"):
        run(folder, samples="ref.npz")


def test_large_images_need_a_network(tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((4, 64, 65, 1), np.uint8))
    with pytest.raises(UserError, match="at most 4096 values"):
        Reference.open(tmp_path / "large.npz", Pixels())


def test_unknown_features_name_the_nearest(pair):
    folder, *_ = pair
    with pytest.raises(UserError, match="did you mean pixels"):
        run(folder, "--features", "pixel")


def test_a_folder_of_generate_is_its_samples_and_never_its_grid(pair):
    folder, samples, labels = pair
    drawn = folder / "drawn"
    drawn.mkdir()
    np.savez(drawn / "samples.npz", arr_0=samples, labels=labels)
    settings = {"seed": 3, "samples": files.digest(drawn / "samples.npz")}
    files.write_sealed(drawn / "samples.json", settings)
    Image.fromarray(np.zeros((99, 99), np.uint8)).save(drawn / "grid.png")
    by_file, by_folder = run(folder, samples="drawn/samples.npz"), run(folder, samples="drawn")
    assert by_file == by_folder and by_folder["samples"]["settings"] == settings
    (drawn / "partial").mkdir()
    files.write_json(drawn / "partial" / "settings.json", {"seed": 3})
    with pytest.raises(UserError, match="unfinished"):
        run(folder, samples="drawn")


def test_image_files_are_rgb_unless_grey(pair):
    folder, samples, labels = pair
    write_folder(folder / "png", samples, labels)
    write_folder(folder / "real", *digits(1, 200))
    with pytest.raises(
        UserError, match="6 x 6 x 3, those of reference.npz are 6 x 6 x 1; one channel against three.*--grey"
    ):
        run(folder, samples="png")
    by_file = run(folder)["metrics"]["fd"]
    assert run(folder, "--grey", samples="png", reference="real")["metrics"]["fd"] == pytest.approx(by_file)
    assert run(folder, samples="png", reference="real")["metrics"]["fd"] == pytest.approx(
        3 * by_file
    )  # three equal channels


def test_nothing_is_written_over_what_is_read(pair):
    folder, *_ = pair
    before = {name: (folder / name).read_bytes() for name in ("samples.npz", "reference.npz")}
    for out in before:
        with pytest.raises(UserError, match=f"--out .*{out} is read by this command: give another name"):
            evaluate.main(
                [
                    "--samples",
                    str(folder / "samples.npz"),
                    "--reference",
                    str(folder / "reference.npz"),
                    "--features",
                    "pixels",
                    "--out",
                    str(folder / ".." / folder.name / out),
                ]
            )
    with pytest.raises(UserError, match="is read by this command"):
        reference.main(
            ["--images", str(folder / "reference.npz"), "--features", "pixels", "--out", str(folder / "reference.npz")]
        )
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_scores_beside_each_other_exchange_their_features_apart(tmp_path):
    processes = SimpleNamespace(project_dir=str(tmp_path / "scores"))
    with collect._shared_folder(processes) as first, collect._shared_folder(processes) as second:
        assert first != second and first.is_dir() and second.is_dir()
    assert not any((tmp_path / "scores").iterdir())
