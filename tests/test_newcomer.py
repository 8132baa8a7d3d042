"""The newcomer's path: own JPEGs, an autoencoder, both stages, pictures, a score, and the use from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate
import train
import train_guide
from evaluations import evaluate
from models import hub
from models.checkpoint import Checkpoint
from preprocessing import encode, verify
from runtime import files
from runtime.errors import UserError
from tests.helpers import ROOT, photograph, tiny_vae

TINY = [
    "--model",
    "SiT-Tiny/2",
    "--batch-size",
    "32",
    "--max-train-steps",
    "9",
    "--ema-decay",
    "0.9",
    "--ema-warmup",
    "--log-steps",
    "3",
    "--align-hidden",
    "32",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 JPEGs in two class folders, in a folder `train`."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(300):
        place = folder / "train" / ("cats" if number % 3 else "dogs") / f"{number:03d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        photograph(number, 40 + number % 7, 34).save(place, quality=90)
    return folder


def test_own_images_all_the_way(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def printed() -> str:
        return capsys.readouterr().out

    vae, latents, output = tiny_vae(tmp_path / "vae"), tmp_path / "set", ["--output-dir", str(tmp_path / "exps")]
    encoding = ["--vae", vae, "--resolution", "16", "--flip", "--keep-images", "--workers", "0", "--out", str(latents)]
    with pytest.raises(UserError, match=f"probably {photos / 'train'} "):
        encode.main(["--images", str(photos), *encoding])
    encode.main(["--images", str(photos / "train"), *encoding])
    # the weights of the autoencoder are random, which is warned of
    output_of_encode = printed()
    assert all(words in output_of_encode for words in ("300 images, 2 classes", "PSNR", "warning: reconstructions of"))
    rescaled(latents)
    verify.main([str(latents)])
    assert "300 in 1 shards" in printed()
    # both stages; the second takes its network from the first
    train.main(["--data-dir", str(latents), *output, "--exp-name", "one", "--align", "latent", *TINY])
    assert "warning" not in printed()
    stage2 = train_guide.main(
        [
            "--data-dir",
            str(latents),
            *output,
            "--exp-name",
            "two",
            "--guiding-ckpt",
            str(tmp_path / "exps" / "one"),
            "--align-stop-steps",
            "6",
            *TINY[2:],
        ]
    )
    introduction = printed()
    assert "taken over from" in introduction and "--model SiT-Tiny/2" in introduction
    assert Checkpoint.open(stage2).step == 9
    # a picture of chosen classes, a score
    drawn = generate.main(
        [
            "--ckpt",
            str(stage2),
            "--classes",
            "dogs",
            "cats",
            "--per-class",
            "3",
            "--num-steps",
            "3",
            "--cfg-scale",
            "2",
            "--out",
            str(tmp_path / "drawn"),
        ]
    )
    assert (
        np.load(drawn / "samples.npz")["labels"].tolist() == [1, 1, 1, 0, 0, 0]
        and Image.open(drawn / "grid.png").size[0] > 3 * 64
    )
    many = generate.main(
        ["--ckpt", str(stage2), "--num-fid-samples", "40", "--num-steps", "3", "--out", str(tmp_path / "many")]
    )
    evaluate.main(
        [
            "--samples",
            str(many),
            "--reference",
            str(latents),
            "--features",
            "pixels",
            "--out",
            str(tmp_path / "metrics.json"),
        ]
    )
    assert json.loads((tmp_path / "metrics.json").read_text())["num_samples"] == 40
    # to a shared folder, and from there into another folder
    shared = hub.main([str(stage2), "--to", str(tmp_path / "shared"), "--metrics", str(tmp_path / "metrics.json")])
    assert "` items of 2 classes" in (shared / "README.md").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    generate.main(["--ckpt", str(shared), "--num-fid-samples", "2", "--num-steps", "2", "--out", "drawn"])
    assert (tmp_path / "elsewhere" / "drawn" / "samples.npz").is_file()


def test_another_folders_scripts_find_the_code(tmp_path: Path) -> None:
    """In the two lines that the README gives, and as a module on the path; nothing is installed."""
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom config import RECIPES\nassert 'digits' in RECIPES"
    for arguments, environment in (
        (["-c", script], {}),
        (["-m", "generate", "--list-presets"], {"PYTHONPATH": str(ROOT)}),
    ):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **environment},
        )
        assert done.returncode == 0, done.stderr
    assert "repa-cfg" in done.stdout


def rescaled(latents: Path) -> None:
    """Give a latent set the scale that brings it to a deviation of 1, as if the autoencoder were a sound one."""
    from dataset import LatentSet

    data = LatentSet(latents)
    moments = data.read(np.arange(len(data)))[0]
    std = float(np.sqrt(moments[:, 0].var() + (moments[:, 1] ** 2).mean()))
    manifest = json.loads((latents / "manifest.json").read_text())
    manifest["space"]["scale"] = [1 / std]
    files.write_sealed(latents / "manifest.json", manifest)
