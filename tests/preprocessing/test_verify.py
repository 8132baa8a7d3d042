"""Verification: a sound set passes with true figures; the first damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import preprocessing.encode
from dataset import LatentSet
from models.latents import LatentSpace
from preprocessing import digits, shards, verify
from runtime import files
from runtime.errors import UserError
from tests.helpers import class_folders, encoding, tiny_vae


def write_set(folder: Path, latents: np.ndarray, labels: np.ndarray, scale: float = 1.0, classes: int = 2) -> None:
    entries = [
        shards.write_shard(folder, number, latents[at : at + 8], labels[at : at + 8])
        for number, at in enumerate(range(0, len(latents), 8))
    ]
    shards.write_manifest(
        folder,
        space=LatentSpace(name="test", channels=3, stride=8, shift=(0.0,), scale=(scale,)),
        resolution=32,
        latent_size=4,
        views=latents.shape[1],
        parts=latents.shape[2],
        dtype=str(latents.dtype),
        crop="adm",
        class_names=["cat", "dog", "elk"][:classes],
        images=False,
        shards=entries,
        source="test",
    )


def moments(count: int = 20) -> np.ndarray:
    """Means of deviation 4 and standard deviations of 3: samples of deviation 5."""
    mean = np.random.default_rng(0).normal(scale=4.0, size=(count, 2, 1, 3, 4, 4))
    return np.concatenate([mean, np.full_like(mean, 3.0)], 2).astype(np.float32)


def test_the_scale_is_that_of_samples(tmp_path, capsys):
    write_set(tmp_path, moments(400), np.arange(400) % 2, scale=0.2)
    verify.main([str(tmp_path), "--num-images", "0"])
    printed = capsys.readouterr().out
    std = float(printed.split(", std ")[1].split(";")[0])
    assert (
        abs(std - 1.0) < 0.01
        and "400 in 50 shards" in printed
        and "2, of 200 to 200 items" in printed
        and "sound" in printed
    )


def test_the_digits_are_their_own_reconstruction(tmp_path, capsys):
    digits.main(["--out", str(tmp_path / "digits")])
    verify.main(["--data-dir", str(tmp_path / "digits"), "--picture", str(tmp_path / "p.png"), "--num-images", "5"])
    assert Image.open(tmp_path / "p.png").size == (40, 8) and "sound" in capsys.readouterr().out


def test_reconstructions_with_and_without_kept_images(tmp_path, capsys, monkeypatch):
    folder, vae = class_folders(tmp_path / "set"), tiny_vae(tmp_path / "vae")

    def run(name: str, keep: list[str], *more: str) -> str:
        if not (tmp_path / name).exists():
            codec = "pixels" if "pixels" in name else vae
            preprocessing.encode.main(encoding(folder, codec, tmp_path / name, *keep))
        capsys.readouterr()
        verify.main([str(tmp_path / name), "--picture", str(tmp_path / "p.png"), *more])
        return capsys.readouterr().out

    monkeypatch.setattr(verify, "_SCALE", (0.0, 100.0))  # random weights have a scale of their own
    printed = run("kept", ["--keep-images"], "--num-images", "3")
    assert "PSNR" in printed and "15 decoded, 16 x 16" in printed and Image.open(tmp_path / "p.png").size == (48, 32)
    assert "PSNR" not in run("bare", []) and Image.open(tmp_path / "p.png").size == (128, 16)
    assert "PSNR" in run("bare", [], "--images", str(folder), "--vae", vae)
    psnr = float(run("pixels", ["--dtype", "float32"], "--images", str(folder)).split("PSNR ")[1].split(" ")[0])
    assert psnr > 100
    other = class_folders(tmp_path / "other", classes=1)
    with pytest.raises(UserError, match=r"does not hold item \d+ \(n0[12]/"):
        run("bare", [], "--images", str(other))
    (tmp_path / "vae").rename(tmp_path / "gone")
    assert "left out: VAE" in run("bare", [])
    with pytest.raises(UserError, match="VAE"):
        run("bare", [], "--vae", vae)


def reseal(folder: Path, shard: str) -> None:
    """Make the manifest agree with a shard that was changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["shards"]:
        if entry["file"] == shard:
            entry["sha256"] = files.digest(folder / shard)
    files.write_sealed(folder / "manifest.json", manifest)


def test_a_changed_bit_is_found(tmp_path):
    write_set(tmp_path, moments(), np.arange(20) % 2, scale=0.2)
    shard = tmp_path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="shard-00001.safetensors is damaged: its checksum"):
        verify.main([str(tmp_path)])
    shard.write_bytes(data[:-7])
    with pytest.raises(UserError, match="shard-00001.safetensors is truncated"):
        verify.main([str(tmp_path)])


@pytest.mark.parametrize(("value", "part"), [(np.nan, 0), (np.inf, 1), (-1.0, 1)])
def test_the_first_wrong_latent_is_named(tmp_path, value, part):
    write_set(tmp_path, moments(), np.arange(20) % 2, scale=0.2)
    shard = tmp_path / "shard-00001.safetensors"
    tensors = files.load_tensors(shard)
    for item in (5, 6):
        tensors["latents"][item, 1, part, 0, 0, 0] = value
    files.save_tensors(shard, tensors)
    reseal(tmp_path, shard.name)
    with pytest.raises(UserError, match="item 13 of .*, view 1, has latents that are not finite or a negative"):
        verify.main([str(tmp_path)])


def test_a_wrong_scale_and_an_empty_class_are_found(tmp_path):
    write_set(tmp_path / "scale", moments(), np.arange(20) % 2, scale=1.0)
    with pytest.raises(UserError, match=r"standard deviation of 5\.?\d* after shift"):
        verify.main([str(tmp_path / "scale")])
    write_set(tmp_path / "class", moments(), np.arange(20) % 2, scale=0.2, classes=3)
    with pytest.raises(UserError, match=r"class 2 \(elk\) of .* has no item"):
        verify.main([str(tmp_path / "class")])
    assert len(LatentSet(tmp_path / "class")) == 20


def test_an_autoencoder_that_does_not_reconstruct_is_warned_of(tmp_path, capsys, monkeypatch):
    """Random weights: whole files of a useless space. Encoding says so at its end, verification at every look."""
    from preprocessing import quality

    folder, vae = class_folders(tmp_path / "set"), tiny_vae(tmp_path / "vae")
    preprocessing.encode.main(encoding(folder, vae, tmp_path / "latents", "--keep-images"))
    printed = capsys.readouterr().out
    psnr, std = (float(printed.split(word)[1].split()[0].rstrip(".;")) for word in ("PSNR ", "standard deviation of "))
    assert psnr < 18 and "warning: reconstructions of" in printed and "8 items decoded again" in printed
    latents = LatentSet(tmp_path / "latents")
    raw = latents.read(quality.spread(15, 8))[0][:, 0]
    assert std == pytest.approx(float(np.std(raw, ddof=1) * 0.18215), abs=0.006)
    monkeypatch.setattr(verify, "_SCALE", (0.0, 100.0))
    verify.main([str(tmp_path / "latents")])
    printed = capsys.readouterr().out
    assert "warning         reconstructions of" in printed and "see the warning" in printed and "sound" not in printed
    monkeypatch.setattr(quality, "PSNR", 0.0)
    monkeypatch.setattr(quality, "SCALE", (0.0, 100.0))
    verify.main([str(tmp_path / "latents")])
    assert "result          sound" in capsys.readouterr().out


def test_a_scale_off_by_a_factor_is_warned_of(tmp_path, capsys):
    write_set(tmp_path, moments(), np.arange(20) % 2, scale=0.034)
    verify.main([str(tmp_path), "--num-images", "0"])
    assert "standard deviation of 0.17, and the recipes expect about 1" in capsys.readouterr().out
