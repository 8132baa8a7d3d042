"""Reference images: the training crop of every image, or of a random choice, in ADM's form."""

from __future__ import annotations

import numpy as np
import pytest

import preprocessing.encode
from evaluations import reference
from preprocessing import digits
from preprocessing.images import ImageFiles, cropped
from runtime.errors import UserError
from tests.helpers import class_folders, encoding, photograph, tiny_vae, zipped


def written(out, *arguments: str) -> tuple[np.ndarray, np.ndarray]:
    reference.main([*map(str, arguments), "--features", "none", "--out", str(out)])
    with np.load(out) as archive:
        return archive["arr_0"], archive["labels"]


def test_folder_zip_and_latent_set_give_the_training_crops(tmp_path):
    folder = class_folders(tmp_path / "set")
    source = ImageFiles(folder)
    expected = np.stack([cropped(source, index, 16) for index in range(15)])
    vae = tiny_vae(tmp_path / "vae")
    preprocessing.encode.main(encoding(folder, vae, tmp_path / "latents", "--keep-images"))
    for images in (folder, zipped(folder, tmp_path / "set.zip")):
        pictures, labels = written(tmp_path / "r.npz", "--images", images, "--resolution", 16, "--workers", 0)
        np.testing.assert_array_equal(pictures, expected)
        assert labels.tolist() == source.labels.tolist()
    np.testing.assert_array_equal(written(tmp_path / "r.npz", "--images", tmp_path / "latents")[0], expected)
    grey, _ = written(tmp_path / "r.npz", "--images", folder, "--resolution", 16, "--grey", "--workers", 2)
    np.testing.assert_array_equal(grey, np.stack([cropped(source, index, 16, grey=True) for index in range(15)]))


def test_the_digits_and_a_random_choice_of_them(tmp_path):
    digits.main(["--out", str(tmp_path / "digits")])
    pictures, labels = written(tmp_path / "all.npz", "--images", tmp_path / "digits")
    images, expected = digits.load()
    np.testing.assert_array_equal(pictures, images)
    np.testing.assert_array_equal(labels, expected)
    some, _ = written(tmp_path / "some.npz", "--images", tmp_path / "digits", "--num-images", 100)
    other, _ = written(tmp_path / "other.npz", "--images", tmp_path / "digits", "--num-images", 100, "--seed", 1)
    known = {image.tobytes() for image in images}
    assert len(some) == 100 and all(image.tobytes() in known for image in some) and not np.array_equal(some, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --resolution"),
        (["--resolution", "16", "--num-images", "16"], "holds 15 images"),
        (["--resolution", "16", "--num-images", "0"], "--num-images 0"),
    ],
)
def test_wrong_requests_are_one_clear_line(tmp_path, arguments, message):
    folder = class_folders(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        written(tmp_path / "r.npz", "--images", folder, *arguments)


def test_what_a_latent_set_cannot_give_is_one_clear_line(tmp_path):
    folder = class_folders(tmp_path / "set")
    preprocessing.encode.main(encoding(folder, tiny_vae(tmp_path / "vae"), tmp_path / "latents"))
    for arguments, message in (([], "--keep-images"), (["--resolution", "32"], "--keep-images")):
        with pytest.raises(UserError, match=message):
            written(tmp_path / "r.npz", "--images", tmp_path / "latents", *arguments)


def test_images_that_are_not_files_are_as_they_are(tmp_path):
    digits.main(["--out", str(tmp_path / "digits")])
    np.savez(tmp_path / "colour.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    for images, arguments, message in (
        ("digits", ["--resolution", "32"], "is of 8 x 8"),
        ("colour.npz", ["--grey"], "--grey is for"),
    ):
        with pytest.raises(UserError, match=message):
            written(tmp_path / "r.npz", "--images", tmp_path / images, *arguments)
    assert written(tmp_path / "r.npz", "--images", tmp_path / "digits", "--grey")[0].shape[-1] == 1  # they are grey
    with pytest.raises(UserError, match="--num-images goes with"):
        reference.main(
            ["--images", str(tmp_path / "digits"), "--num-images", "5", "--features", "pixels", "--out", "r.npz"]
        )


def test_colour_images_stay_coloured_though_the_first_is_grey(tmp_path):
    folder = class_folders(tmp_path / "set")
    photograph(0, 20, 60).convert("L").save(folder / "n00" / "0.png")
    images, _ = written(tmp_path / "r.npz", "--images", folder, "--resolution", "16", "--workers", "0")
    assert images.shape == (15, 16, 16, 3)
    np.testing.assert_array_equal(images[7], cropped(ImageFiles(folder), 7, 16))


def test_a_bad_image_is_named_and_leaves_no_file(tmp_path):
    folder = class_folders(tmp_path / "set")
    (folder / "n01" / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match="n01/2.png is empty"):
        written(tmp_path / "r.npz", "--images", folder, "--resolution", "16", "--workers", "0")
    assert not (tmp_path / "r.npz").exists()
