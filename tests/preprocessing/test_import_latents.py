"""Latents of REPA and LightningDiT, in folders of the published formats, read as their own readers would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dataset import LatentSet
from preprocessing import import_latents
from preprocessing.images import png
from runtime.errors import UserError
from tests.helpers import photograph, tiny_vae


def repa(folder: Path, count: int = 7) -> tuple[np.ndarray, list[int]]:
    """A folder as REPA's preprocessing leaves it; labels listed in another order than the files."""
    moments = np.random.default_rng(0).normal(size=(count, 8, 4, 4)).astype(np.float32)
    moments[:, 4:] = np.abs(moments[:, 4:])
    labels = [(3 * index) % 4 for index in range(count)]
    for kind in ("images", "vae-sd"):
        (folder / kind / "00000").mkdir(parents=True)
    for index, item in enumerate(moments):
        np.save(folder / "vae-sd" / "00000" / f"img-mean-std-{index:08d}.npy", item)
        (folder / "images" / "00000" / f"img{index:08d}.png").write_bytes(png(np.asarray(photograph(index, 32, 32))))
    pairs = [[f"00000/img-mean-std-{index:08d}.npy", label] for index, label in enumerate(labels)]
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": pairs[::-1]}))
    return moments, labels


def lightningdit(folder: Path, counts: tuple[int, ...] = (5, 5, 2)) -> dict[str, torch.Tensor]:
    """A folder as LightningDiT's feature extraction leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    everything: dict[str, list] = {"latents": [], "latents_flip": [], "labels": []}
    for number, count in enumerate(counts):
        part = {
            "latents": torch.randn(count, 6, 4, 4, generator=generator),
            "latents_flip": torch.randn(count, 6, 4, 4, generator=generator),
            "labels": torch.randint(9, (count,), generator=generator),
        }
        save_file(
            part,
            folder / f"latents_rank{number % 2:02d}_shard{number // 2:03d}.safetensors",
            metadata={"total_size": str(count), "dtype": "torch.float32", "device": "cpu"},
        )
        for key in everything:
            everything[key].append(part[key])
    torch.save(
        {"mean": torch.arange(6.0).reshape(1, 6, 1, 1), "std": torch.arange(1.0, 7.0).reshape(1, 6, 1, 1)},
        folder / "latents_stats.pt",
    )
    order = [0, 2, 1]  # the files by name
    return {key: torch.cat([value[number] for number in order]) for key, value in everything.items()}


def imported(source: Path, out: Path, *more: str) -> LatentSet:
    import_latents.main([str(source), "--out", str(out), *more])
    return LatentSet(out)


def test_repa_folders(tmp_path):
    moments, labels = repa(tmp_path / "peer")
    opened = imported(tmp_path / "peer", tmp_path / "out", "--shard-size", "3", "--keep-images", "--dtype", "float32")
    latents, read_labels = opened.read(np.arange(7))
    np.testing.assert_array_equal(latents.reshape(7, 8, 4, 4), moments)
    assert read_labels.tolist() == labels and opened.num_classes == 4 and opened.manifest["resolution"] == 32
    assert opened.space.scale == (0.18215,) and opened.space.name == "sd-vae" and len(opened.manifest["shards"]) == 3
    np.testing.assert_array_equal(opened.images([4])[0], np.asarray(photograph(4, 32, 32)))
    half = imported(tmp_path / "peer" / "vae-sd", tmp_path / "half", "--num-classes", "1000")
    assert half.num_classes == 1000 and half.manifest["dtype"] == "float16"
    np.testing.assert_array_equal(half.read(np.arange(7))[0].reshape(7, 8, 4, 4), moments.astype(np.float16))
    known = imported(tmp_path / "peer", tmp_path / "known", "--vae", tiny_vae(tmp_path / "vae"))
    assert known.space.digest and known.space.stride == 4


def test_lightningdit_folders(tmp_path):
    expected = lightningdit(tmp_path / "peer")
    opened = imported(tmp_path / "peer", tmp_path / "out", "--dtype", "float32")
    for view, key in enumerate(("latents", "latents_flip")):
        read, labels = opened.read(np.arange(12), np.full(12, view))
        np.testing.assert_array_equal(read[:, 0], expected[key].numpy())
        np.testing.assert_array_equal(labels, expected["labels"].numpy())
    mean, std = torch.arange(6.0).reshape(1, 6, 1, 1), torch.arange(1.0, 7.0).reshape(1, 6, 1, 1)
    seen = opened.space.normalise(torch.from_numpy(opened.read(np.arange(12))[0][:, 0]))
    torch.testing.assert_close(seen, (expected["latents"] - mean) / std)
    assert (opened.views, opened.parts, opened.manifest["resolution"], opened.space.name) == (2, 1, 64, "va-vae")
    (tmp_path / "peer" / "latents_stats.pt").rename(tmp_path / "elsewhere.pt")
    with pytest.raises(UserError, match="latents_stats.pt is missing.*--statistics"):
        imported(tmp_path / "peer", tmp_path / "none")
    again = imported(
        tmp_path / "peer", tmp_path / "again", "--dtype", "float32", "--statistics", str(tmp_path / "elsewhere.pt")
    )
    assert again.space == opened.space


def test_an_interrupted_import_continues_to_the_same_bytes(tmp_path, monkeypatch):
    repa(tmp_path / "peer")
    whole = imported(tmp_path / "peer", tmp_path / "whole", "--shard-size", "3")
    shard = import_latents.RepaFolder.shard
    monkeypatch.setattr(
        import_latents.RepaFolder,
        "shard",
        lambda self, number: (_ for _ in ()).throw(KeyboardInterrupt) if number else shard(self, number),
    )
    with pytest.raises(KeyboardInterrupt):
        imported(tmp_path / "peer", tmp_path / "out", "--shard-size", "3")
    monkeypatch.setattr(
        import_latents.RepaFolder,
        "shard",
        lambda self, number: shard(self, number) if number else pytest.fail("shard 0 was whole"),
    )
    assert imported(tmp_path / "peer", tmp_path / "out", "--shard-size", "3").digest == whole.digest


def first(folder: Path) -> Path:
    return folder / "vae-sd" / "00000" / "img-mean-std-00000001.npy"


@pytest.mark.parametrize(
    ("spoil", "message", "more"),
    [
        (lambda f: first(f).unlink(), "gives a label to 00000/img-mean-std-00000001.npy", ()),
        (lambda f: first(f).write_bytes(first(f).read_bytes()[:-9]), "00000001.npy cannot be read", ()),
        (lambda f: np.save(first(f), np.zeros((8, 5, 5), np.float32)), "00000001.npy has shape", ()),
        (lambda f: np.save(first(f), np.zeros((4, 4))), r"00000001.npy is float64 \(4, 4\)", ()),
        (lambda f: np.save(first(f), np.full((8, 4, 4), -1.0)), "00000001.npy has a negative standard deviation", ()),
        (lambda f: np.save(first(f), np.full((8, 4, 4), np.nan)), "00000001.npy has a latent that is not finite", ()),
        (lambda f: np.save(first(f), np.full((8, 4, 4), 1e6)), "--dtype float32", ()),
        (lambda f: (f / "vae-sd" / "dataset.json").unlink(), "cannot read .*dataset.json: .*it holds the labels", ()),
        (
            lambda f: (f / "images" / "00000" / "img00000002.png").unlink(),
            "cannot read .*img00000002.png: .*it is the image of",
            ("--keep-images",),
        ),
        (lambda f: None, "--num-classes 3: .* has the label 3", ("--num-classes", "3")),
    ],
)
def test_damaged_repa_folders_are_one_clear_line(tmp_path, spoil, message, more):
    repa(tmp_path / "peer")
    spoil(tmp_path / "peer")
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "peer", tmp_path / "out", *more)
    assert not (tmp_path / "out" / "manifest.json").exists()


def rewritten(folder: Path, **changed: torch.Tensor | None) -> None:
    part = {
        "latents": torch.zeros(2, 6, 4, 4),
        "latents_flip": torch.zeros(2, 6, 4, 4),
        "labels": torch.zeros(2).long(),
    }
    part = {key: value for key, value in {**part, **changed}.items() if value is not None}
    save_file(part, folder / "latents_rank01_shard000.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: rewritten(f, latents_flip=None), "shard000.safetensors lacks latents_flip"),
        (lambda f: rewritten(f, labels=torch.zeros(3).long()), "does not fit 3 labels"),
        (lambda f: rewritten(f, latents=torch.zeros(2, 5, 4, 4)), "does not fit"),
        (lambda f: rewritten(f, latents=torch.zeros(2, 6, 4, 4).bfloat16()), "as BF16"),
        (lambda f: rewritten(f, labels=torch.full((2,), -1)), "labels from -"),
        (lambda f: (f / "latents_rank01_shard000.safetensors").write_bytes(b"x" * 99), "truncated or not"),
    ],
)
def test_damaged_lightningdit_folders_are_one_clear_line(tmp_path, spoil, message):
    lightningdit(tmp_path / "peer")
    spoil(tmp_path / "peer")
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "peer", tmp_path / "out")


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder of REPA's"):
        imported(tmp_path, tmp_path / "out")
    lightningdit(tmp_path / "peer")
    with pytest.raises(UserError, match="--keep-images"):
        imported(tmp_path / "peer", tmp_path / "out", "--keep-images")
    with pytest.raises(UserError, match="shift needs 1 or 4 finite numbers"):
        imported(tmp_path / "peer", tmp_path / "out", "--vae", tiny_vae(tmp_path / "vae"))
    repa(tmp_path / "other")
    with pytest.raises(UserError, match="latents of 4 channels, those of wide-vae have 6"):
        imported(tmp_path / "other", tmp_path / "out", "--vae", tiny_vae(tmp_path / "wide-vae", channels=6))
