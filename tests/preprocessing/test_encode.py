"""Encoding: the same bytes however it was interrupted and by however many processes; bad input is one clear line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import preprocessing.encode
import preprocessing.encoding
from dataset import LatentSet
from models.vae import open_codec
from preprocessing import digits, shards
from preprocessing.images import ImageFiles, cropped
from preprocessing.job import STOPPED
from runtime import files, locks
from runtime.errors import UserError
from tests.helpers import (
    ROOT,
    SmallCodec,
    class_folders,
    encoding,
    held_elsewhere,
    killed_writer,
    photograph,
    tiny_vae,
    zipped,
)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    return tiny_vae(tmp_path_factory.mktemp("vae") / "tiny-vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return class_folders(tmp_path_factory.mktemp("images") / "set")


def arguments(images: Path, vae: str, out: Path, *more: str) -> list[str]:
    return encoding(images, vae, out, "--batch-size", "2", "--shard-size", "4", *more)


def encode(images: Path, vae: str, out: Path, *more: str) -> LatentSet:
    preprocessing.encode.main(arguments(images, vae, out, *more))
    return LatentSet(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (locks.LOCK, STOPPED)}


def crops(folder: Path) -> np.ndarray:
    source = ImageFiles(folder)
    return np.stack([cropped(source, index, 16) for index in range(len(source.names))])


def to_input(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_moments_are_the_encoders_and_the_second_view_is_the_mirrored_image(folder, vae, tmp_path):
    opened = encode(folder, vae, tmp_path / "out", "--flip", "--keep-images", "--dtype", "float32")
    codec, images = open_codec(vae), crops(folder)
    assert (opened.views, opened.parts, opened.channels, opened.latent_size, opened.num_classes) == (2, 2, 4, 4, 3)
    assert opened.space == codec.space and opened.space.scale == (0.18215,) and opened.manifest["resolution"] == 16
    for view, seen in enumerate((images, images[:, :, ::-1].copy())):
        mean, std = codec.encode(to_input(seen))
        read, labels = opened.read(np.arange(15), np.full(15, view))
        torch.testing.assert_close(torch.from_numpy(read[:, 0]), mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.from_numpy(read[:, 1]), std, atol=1e-5, rtol=1e-5)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    np.testing.assert_array_equal(opened.images(np.arange(15)), images)
    assert opened.name(7) == "item 7 (n01/2.png)" and len(opened.manifest["shards"]) == 4


def test_options_of_precision_and_samples_act(folder, vae, tmp_path):
    full = encode(folder, vae, tmp_path / "full", "--dtype", "float32").read(np.arange(15))[0]
    half = encode(folder, vae, tmp_path / "half")
    assert half.manifest["dtype"] == "float16"
    np.testing.assert_array_equal(half.read(np.arange(15))[0], full.astype(np.float16))
    bf16 = encode(folder, vae, tmp_path / "bf16", "--mixed-precision", "bf16", "--dtype", "float32").read(
        np.arange(15)
    )[0]
    assert 0 < np.abs(bf16 - full).max() < 0.1

    def sample(name: str, *more: str) -> np.ndarray:
        opened = encode(folder, vae, tmp_path / name, "--no-moments", "--dtype", "float32", *more)
        assert opened.parts == 1
        return opened.read(np.arange(15))[0][:, 0]

    first, other_batches, other_seed = sample("a"), sample("b", "--batch-size", "3"), sample("c", "--seed", "1")
    np.testing.assert_allclose(first, other_batches, atol=1e-4)
    noise = (first - full[:, 0]) / full[:, 1]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1 and np.abs(first - other_seed).max() > 0.1


def test_pixels_statistics_grey_and_zip(folder, vae, tmp_path):
    archive = zipped(folder, tmp_path / "set.zip")
    colour = encode(archive, "pixels", tmp_path / "colour", "--dtype", "float32")
    assert colour.parts == 1 and colour.space.name == "pixels"
    np.testing.assert_array_equal(
        np.round((colour.read(np.arange(15))[0][:, 0] + 1) * 127.5), crops(folder).transpose(0, 3, 1, 2)
    )
    assert encode(archive, "pixels", tmp_path / "grey", "--grey").channels == 1
    torch.save(
        {"mean": torch.arange(4.0).reshape(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 4.0)}, tmp_path / "stats.pt"
    )
    scaled = encode(folder, vae, tmp_path / "scaled", "--statistics", str(tmp_path / "stats.pt"))
    assert scaled.space.shift == (0.0, 1.0, 2.0, 3.0) and scaled.space.scale == (0.25,) * 4
    for wrong, message in (
        (["--grey"], "takes RGB: leave out --grey"),
        (["--resolution", "18"], "not a multiple of 4"),
        (["--batch-size", "0"], "--batch-size 0 must lie in"),
    ):
        with pytest.raises(UserError, match=message):
            encode(folder, vae, tmp_path / "wrong", *wrong)
    with pytest.raises(UserError, match="--statistics scales"):
        encode(folder, "pixels", tmp_path / "wrong", "--statistics", "x")


def test_worker_processes_change_nothing(folder, tmp_path):
    alone = encode(folder, "pixels", tmp_path / "alone", "--keep-images")
    helped = encode(folder, "pixels", tmp_path / "helped", "--keep-images", "--workers", "2")
    assert alone.digest == helped.digest


def test_killed_and_started_again_it_finishes_with_the_same_bytes(folder, vae, tmp_path, monkeypatch, capsys):
    encode(folder, vae, tmp_path / "whole", "--flip", "--keep-images")
    write, calls, left = shards.write_shard, [], []

    def killed(folder: Path, number: int, *rest, **named):
        calls.append(number)
        if len(calls) == 3:
            left.append(killed_writer(folder / "shard-00002.safetensors").name)
            raise KeyboardInterrupt
        return write(folder, number, *rest, **named)

    monkeypatch.setattr(shards, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, vae, tmp_path / "again", "--flip", "--keep-images")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        ".shard-00000.safetensors.json",
        ".shard-00001.safetensors.json",
        *left,
        "job.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    with pytest.raises(UserError, match="is unfinished"):
        LatentSet(tmp_path / "again")
    first = tmp_path / "again" / "shard-00000.safetensors"
    content = bytearray(first.read_bytes())
    content[-9] ^= 1  # a shard that is kept is read again, and compared with what was written
    first.write_bytes(content)
    encode(folder, vae, tmp_path / "again", "--flip", "--keep-images")
    assert calls[3:] == [0, 2, 3] and "shard-00000.safetensors is damaged" in capsys.readouterr().out
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    (tmp_path / "again" / ".shard-00003.safetensors.json").touch()  # as a kill after the manifest leaves it
    encode(folder, vae, tmp_path / "again", "--flip", "--keep-images")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert len(calls) == 6 and "finished already" in capsys.readouterr().out


PROBE = """
import sys, accelerate, preprocessing.encode, preprocessing.encoding
from runtime import errors
from tests.helpers import SmallCodec
bad, *arguments = sys.argv[1:]
try:
    preprocessing.encode.main(["--images", bad, "--vae", "pixels", "--resolution", "16", "--shard-size", "4",
                               "--out", bad + "-out"])
except errors.UserError as error:
    print("refused", error, flush=True)
preprocessing.encoding.open_codec = lambda *_, **__: SmallCodec()
preprocessing.encode.main(arguments)
assert accelerate.PartialState().num_processes == 2
sys.stdout.write("two\\n")  # one write: processes share the pipe
"""


def test_two_processes_finish_what_one_began_with_the_bytes_of_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing.encoding, "open_codec", lambda *_, **__: SmallCodec())
    whole = encode(folder, "small", tmp_path / "whole", "--flip")
    (tmp_path / "two").mkdir()
    for name in ("job.json", "shard-00002.safetensors"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "two")
    files.write_json(
        tmp_path / "two" / ".shard-00002.safetensors.json",
        files.read_json(tmp_path / "whole" / "manifest.json")["shards"][2],
    )
    images = class_folders(tmp_path / "bad")
    (images / "n01" / "3.png").write_bytes(b"")  # in shard 2, which the first process encodes
    (tmp_path / "probe.py").write_text(PROBE)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        str(tmp_path / "probe.py"),
        str(images),
        *arguments(folder, "small", tmp_path / "two", "--flip"),
    ]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.split().count("two") == 2, done.stderr
    assert done.stdout.count("refused") == done.stdout.count("n01/3.png is empty") == 2
    assert "continuing: 1 of 4 shards" in done.stdout
    assert (
        contents(tmp_path / "two") == contents(tmp_path / "whole")
        and whole.digest == LatentSet(tmp_path / "two").digest
    )


def test_a_folder_of_another_job_or_of_something_else_is_refused(folder, tmp_path):
    encode(folder, "pixels", tmp_path / "out")
    with pytest.raises(UserError, match=r"another job \(it differs in dtype\)"):
        encode(folder, "pixels", tmp_path / "out", "--dtype", "float32")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        encode(folder, "pixels", tmp_path / "other")
    with held_elsewhere(tmp_path / "busy" / locks.LOCK), pytest.raises(UserError, match="another process is writing"):
        encode(folder, "pixels", tmp_path / "busy")


def test_a_start_killed_while_it_wrote_its_description_is_no_foreign_folder(folder, tmp_path):
    (tmp_path / "out").mkdir()
    left = killed_writer(tmp_path / "out" / "job.json")
    encode(folder, "pixels", tmp_path / "out")
    encode(folder, "pixels", tmp_path / "whole")
    assert not left.exists() and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_records_that_a_kill_after_the_manifest_left_are_removed(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shards, "forget", lambda *_: None)
        encode(folder, "pixels", tmp_path / "out")
    assert any(tmp_path.glob("out/.shard-*.json"))
    encode(folder, "pixels", tmp_path / "out")
    assert not any(tmp_path.glob("out/.shard-*.json"))


def test_photographs_that_cannot_be_read_stand_in_the_manifest(tmp_path, capsys):
    folder = class_folders(tmp_path / "set", classes=1)
    (folder / "n00" / "a.heic").write_bytes(b"x")
    assert encode(folder, "pixels", tmp_path / "out").manifest["skipped"] == ["n00/a.heic"]
    assert "warning: 1 .heic left out" in capsys.readouterr().out


@pytest.fixture
def spoiled(tmp_path) -> Path:
    folder = class_folders(tmp_path / "set")
    (folder / "n00" / "3.png").write_bytes(b"")
    (folder / "n02" / "4.png").write_bytes((folder / "n02" / "4.png").read_bytes()[:-300])
    return folder


def test_a_bad_image_stops_the_work_and_skip_bad_counts_them(spoiled, tmp_path):
    with pytest.raises(UserError, match=r"n00/3.png is empty .*--skip-bad N"):
        encode(spoiled, "pixels", tmp_path / "out")
    with pytest.raises(UserError, match=r"n02/4.png cannot be read .*2 images are bad, --skip-bad allows 1"):
        encode(spoiled, "pixels", tmp_path / "out", "--skip-bad", "1")
    with pytest.raises(UserError, match="is unfinished|not a latent set"):
        LatentSet(tmp_path / "out")
    opened = encode(spoiled, "pixels", tmp_path / "out", "--skip-bad", "2")
    assert len(opened) == 13 and opened.manifest["skipped"] == ["n00/3.png", "n02/4.png"]
    assert [shard["count"] for shard in opened.manifest["shards"]] == [3, 4, 4, 2]
    assert opened.name(3) == "item 3 (n00/4.png)" and opened.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 4


def test_a_restart_counts_the_bad_images_of_earlier_starts(spoiled, tmp_path):
    with pytest.raises(UserError):
        encode(spoiled, "pixels", tmp_path / "out", "--skip-bad", "1")  # shard 0, one short, is kept
    with pytest.raises(UserError, match="2 images cannot be used and --skip-bad allows 1"):
        encode(spoiled, "pixels", tmp_path / "out", "--skip-bad", "1")


def test_a_shard_of_bad_images_alone(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(8):
        photograph(number).save(folder / f"{number}.png") if number >= 4 else (folder / f"{number}.png").write_bytes(
            b""
        )
    opened = encode(folder, "pixels", tmp_path / "out", "--skip-bad", "4", "--keep-images")
    assert (
        len(opened) == 4
        and opened.read(np.arange(4))[0].shape == (4, 1, 3, 16, 16)
        and opened.images([3]).shape[0] == 1
    )


def test_too_little_disk_is_refused_beforehand_and_a_full_disk_leaves_nothing_half(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=99))
    with pytest.raises(UserError, match="needs .* GiB and has"):
        encode(folder, "pixels", tmp_path / "out")
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*shard-00000"):
            encode(folder, "pixels", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(contents(tmp_path / "out")) == ["job.json"]
    assert len(encode(folder, "pixels", tmp_path / "out")) == 15


def test_a_folder_that_cannot_be_made_is_one_clear_line(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        encode(folder, "pixels", tmp_path / "file" / "out")


def test_count_and_disk_are_printed(folder, tmp_path, capsys):
    encode(folder, "pixels", tmp_path / "out")
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("15 images, 3 classes", "needed", "free", "1 process"))


def test_the_digits_go_through_the_same_code(tmp_path):
    digits.main(["--out", str(tmp_path)])
    settings = json.loads((tmp_path / "job.json").read_text())
    assert settings["grey"] and settings["resolution"] == 8 and LatentSet(tmp_path).manifest["crop"] == "adm"


def test_a_killed_decoding_process_is_one_clear_line(folder, tmp_path, monkeypatch):
    import signal

    from preprocessing import loading

    parent, crop = os.getpid(), loading.cropped

    def killed(*arguments):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return crop(*arguments)

    monkeypatch.setattr(loading, "cropped", killed)
    with pytest.raises(UserError, match="a decoding process was killed.*--workers"):
        encode(folder, "pixels", tmp_path / "out", "--workers", "1")
