"""Latent sets: what is written is what is read, in an order that depends on (seed, step) alone; damage is one line."""

from __future__ import annotations

import ctypes
import io
import json
import mmap
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dataset
from dataset import LatentSet
from models.latents import LatentSpace
from preprocessing import digits, shards
from runtime import files, mapped
from runtime.errors import UserError


def write_set(
    folder: Path,
    latents: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int = 10,
    per_shard: int = 7,
    images: list[bytes] | None = None,
) -> LatentSet:
    """A latent set of `latents` (n, views, parts, C, H, W), cut into shards of `per_shard`."""
    space = LatentSpace(name="test", channels=latents.shape[3], stride=8, shift=(0.0,), scale=(0.5,))
    entries = [
        shards.write_shard(
            folder,
            number,
            latents[at : at + per_shard],
            labels[at : at + per_shard],
            images=images[at : at + per_shard] if images else None,
        )
        for number, at in enumerate(range(0, len(latents), per_shard))
    ]
    shards.write_manifest(
        folder,
        space=space,
        resolution=32,
        latent_size=4,
        views=latents.shape[1],
        parts=latents.shape[2],
        dtype=str(latents.dtype),
        crop="adm",
        class_names=[str(c) for c in range(classes)],
        images=images is not None,
        shards=entries,
        source="test",
    )
    return LatentSet(folder)


def random_latents(count: int = 30, views: int = 2, parts: int = 2, dtype: type = np.float16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, views, parts, 3, 4, 4)).astype(dtype)


@pytest.mark.parametrize("resident", ["disk", "ram", "device"])
@pytest.mark.parametrize(("views", "parts", "dtype"), [(1, 1, np.float32), (2, 2, np.float16)])
def test_reads_what_was_written(tmp_path, resident, views, parts, dtype):
    latents, labels = random_latents(views=views, parts=parts, dtype=dtype), np.arange(30) % 10
    write_set(tmp_path, latents, labels)
    opened = LatentSet(tmp_path, resident=resident)
    indices, chosen = np.array([29, 0, 7, 6, 7, 13]), np.array([0, 1, 0, 1, 1, 0]) % views
    read, read_labels = opened.read(indices, chosen)
    assert read.dtype == np.float32 and read_labels.dtype == np.int64
    np.testing.assert_array_equal(read, latents[indices, chosen].astype(np.float32))
    np.testing.assert_array_equal(read_labels, labels[indices])
    np.testing.assert_array_equal(opened.read(indices)[0], latents[indices, 0].astype(np.float32))
    stored = opened.rows(indices, chosen)[0].numpy()
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, latents[indices, chosen])
    assert (len(opened), opened.num_classes, opened.channels, opened.latent_size) == (30, 10, 3, 4)


def test_an_index_that_does_not_exist_is_refused(tmp_path):
    opened = write_set(tmp_path, random_latents(), np.zeros(30, int))
    for indices, views in (([30], None), ([-1], None), ([0], [2]), ([0], [-1])):
        with pytest.raises(IndexError):
            opened.read(np.array(indices), None if views is None else np.array(views))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_kept_images_come_back(tmp_path, mode):
    shape = (30, 8, 8) if mode == "L" else (30, 8, 8, 3)
    pictures = np.random.default_rng(1).integers(256, size=shape, dtype=np.uint8)
    encoded = []
    for picture in pictures:
        Image.fromarray(picture).save(buffer := io.BytesIO(), "PNG")
        encoded.append(buffer.getvalue())
    opened = write_set(tmp_path, random_latents(), np.zeros(30, int), images=encoded)
    indices = np.array([29, 0, 7, 6])
    np.testing.assert_array_equal(opened.images(indices), pictures[indices].reshape(4, 8, 8, -1))


def test_images_are_decoded_side_by_side_and_come_back_in_order(tmp_path, monkeypatch):
    """Every thread of the pool waits for all the others: fewer threads, or decoding in turn, would never end."""
    monkeypatch.setattr(dataset.os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    pictures = np.arange(30 * 64, dtype=np.uint16).astype(np.uint8).reshape(30, 8, 8)
    encoded = []
    for picture in pictures:
        Image.fromarray(picture).save(buffer := io.BytesIO(), "PNG")
        encoded.append(buffer.getvalue())
    opened = write_set(tmp_path, random_latents(), np.zeros(30, int), images=encoded)
    together, decoded = threading.Barrier(3, timeout=20), opened._decoded
    monkeypatch.setattr(opened, "_decoded", lambda index: (together.wait(), decoded(index))[1])
    indices = np.array([3, 29, 0, 7, 6, 11])
    np.testing.assert_array_equal(opened.images(indices)[..., 0], pictures[indices])


def test_images_that_were_not_kept_are_refused(tmp_path):
    with pytest.raises(UserError, match="--keep-images"):
        write_set(tmp_path, random_latents(), np.zeros(30, int)).images(np.array([0]))


@given(seed=st.integers(0, 5), batch=st.integers(1, 9), count=st.integers(9, 40))
def test_an_epoch_visits_every_item_at_most_once_and_epochs_differ(seed, batch, count):
    steps = dataset.steps_per_epoch(count, batch)
    assert steps == count // batch
    epoch = np.concatenate([dataset.order(seed, step, batch, count) for step in range(steps)])
    assert len(set(epoch.tolist())) == len(epoch) == steps * batch
    assert set(epoch.tolist()) <= set(range(count))
    following = np.concatenate([dataset.order(seed, steps + step, batch, count) for step in range(steps)])
    other_seed = np.concatenate([dataset.order(seed + 1, step, batch, count) for step in range(steps)])
    if len(epoch) > 8:
        assert not np.array_equal(epoch, following) and not np.array_equal(epoch, other_seed)


def test_order_and_flips_are_functions_of_seed_and_step():
    backwards = [(dataset.order(3, s, 4, 11), dataset.flips(3, s, 4, 2)) for s in reversed(range(9))][::-1]
    for step, (indices, views) in enumerate(backwards):
        np.testing.assert_array_equal(indices, dataset.order(3, step, 4, 11))
        np.testing.assert_array_equal(views, dataset.flips(3, step, 4, 2))
    mean = np.mean([dataset.flips(0, step, 64, 2) for step in range(100)])
    assert abs(mean - 0.5) < 0.03
    assert not dataset.flips(0, 0, 64, 1).any()


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(UserError, match="--batch-size 12 is larger"):
        dataset.order(0, 0, 12, 11)


def damage(folder: Path, how: str) -> None:
    shard, manifest = folder / "shard-00002.safetensors", folder / "manifest.json"
    value = json.loads(manifest.read_text())
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif how == "header":
        shard.write_bytes((1 << 60).to_bytes(8, "little") + shard.read_bytes()[8:])
    elif how == "empty":
        shard.write_bytes(b"")
    elif how == "shard missing":
        shard.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        key, changed = {
            "count": ("count", 31),
            "label": ("num_classes", 9),
            "views": ("views", 1),
            "format": ("format", 9),
            "key": ("spare", 0),
            "images": ("images", True),
        }[how]
        value = {k: v for k, v in value.items() if k != "parts"} if how == "key" else value
        files.write_sealed(manifest, value | {key: changed})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "shard-00002.safetensors is truncated"),
        ("header", "shard-00002.safetensors is truncated or not"),
        ("empty", "shard-00002"),
        ("shard missing", "cannot read .*shard-00002"),
        ("no manifest", "is unfinished"),
        ("manifest", "manifest.json is not valid JSON"),
        ("count", "says 31 items but its shards hold 30"),
        ("label", "item 9 .* label 9, outside 0..8"),
        ("views", "shard-00000.safetensors holds latents"),
        ("format", "not of format 2"),
        ("key", "parts: field required"),
        ("images", "lacks image_"),
    ],
)
def test_damage_is_one_clear_line(tmp_path, how, message):
    write_set(tmp_path, random_latents(), np.arange(30) % 10)
    damage(tmp_path, how)
    with pytest.raises(UserError, match=message):
        LatentSet(tmp_path)


def test_a_folder_that_is_missing_or_empty_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="there is no latent set at"):
        LatentSet(tmp_path / "absent")
    with pytest.raises(UserError, match="is not a latent set"):
        LatentSet(tmp_path)


def test_an_unknown_residence_and_a_set_beyond_memory_are_refused(tmp_path, monkeypatch):
    write_set(tmp_path, random_latents(), np.zeros(30, int))
    with pytest.raises(UserError, match="not cloud"):
        LatentSet(tmp_path, resident="cloud")
    monkeypatch.setattr(dataset.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    with pytest.raises(UserError, match="leave it on disk"):
        LatentSet(tmp_path, resident="ram")


def test_a_latent_beyond_float16_is_refused(tmp_path):
    latents = random_latents().astype(np.float32)
    latents[3, 0, 0, 0, 0, 0] = 1e6
    with pytest.raises(UserError, match="item 3 .*--dtype float32"), np.errstate(over="ignore"):
        shards.write_shard(tmp_path, 0, latents.astype(np.float16), np.zeros(30, int))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"shape": [7, 1]}, {"dtype": "I64"}, {"data_offsets": None}, {"shape": "many"}])
def test_a_damaged_header_is_named(tmp_path, change):
    digits.main(["--out", str(tmp_path)])
    shard = next(tmp_path.glob("shard-*"))
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["latents"] |= change
    changed = json.dumps(header).encode()
    shard.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    with pytest.raises(UserError, match="shard-00000"):
        LatentSet(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    files.write_sealed(tmp_path / "manifest.json", {**manifest, "num_classes": "ten"})
    with pytest.raises(UserError, match="num_classes"):
        LatentSet(tmp_path)


def test_the_digits_are_a_latent_set_of_grey_pixels(tmp_path):
    digits.main(["--out", str(tmp_path / "digits")])
    opened = LatentSet(tmp_path / "digits")
    images, labels = digits.load()
    assert (len(opened), opened.num_classes, opened.channels, opened.latent_size) == (1797, 10, 1, 8)
    assert images.min() == 0 and images.max() == 255 and opened.manifest["class_names"] == list("0123456789")
    latents, read_labels = opened.read(np.arange(1797))
    np.testing.assert_array_equal(np.round((latents[:, 0] + 1) * 127.5), images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(read_labels, labels)
    np.testing.assert_array_equal(np.bincount(labels), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])


def test_a_shard_that_is_cut_short_while_mapped_is_one_clear_line(tmp_path):
    """Touching a page that is gone would end the process without a word (SIGBUS)."""
    write_set(tmp_path, random_latents(), np.arange(30) % 10)
    opened = LatentSet(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    os.truncate(shard, 100)
    with pytest.raises(UserError, match="shard-00001.safetensors was cut short"):
        opened.read(np.arange(30))


def test_the_kernel_reads_announced_rows_before_they_are_touched(tmp_path):
    """Their pages come into memory, where the file is on a disk; rows of an array in memory need nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    latents = np.zeros((512, 1, 1, 512, 4, 4), np.float16)
    data = write_set(tmp_path, latents, np.zeros(512, int), per_shard=512)
    array, rows = data._rows[0], [3, 500, 77]
    with open(next(tmp_path.glob("*.safetensors")), "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def resident(row: int) -> bool:
        begin = array[row].ctypes.data
        start, size = begin - begin % mmap.PAGESIZE, array.strides[0]
        vector = (ctypes.c_ubyte * (size // mmap.PAGESIZE + 1))()
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(begin - start + size), vector) == 0
        return all(value & 1 for value in vector[: (begin - start + size) // mmap.PAGESIZE])

    mapped.will_need(array, rows)
    deadline = time.monotonic() + 10
    while not all(map(resident, rows)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mapped.will_need(np.zeros((4, 4)), [0, 3])
