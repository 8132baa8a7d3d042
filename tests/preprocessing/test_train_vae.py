"""The training of an autoencoder: loss, resume bit for bit, what is written, and the whole path of grey images."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

import preprocessing.encode
from dataset import LatentSet
from evaluations import reconstruction
from models.pixels import to_signed
from models.vae import open_codec
from preprocessing import quality, train_vae, verify
from preprocessing.images import ImageFiles, cropped
from runtime import jsonlines
from runtime.errors import EndedEarly, UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 smooth grey pictures of 16 x 16 pixels in two classes."""
    folder = tmp_path_factory.mktemp("images") / "grey"
    random = np.random.default_rng(0)
    for index in range(24):
        place = folder / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(256, size=(4, 4), dtype=np.uint8))
        coarse.resize((16, 16), Image.Resampling.BICUBIC).save(place / f"{index}.png")
    return folder


def words(images: Path, folder: Path, steps: int, *more: str) -> list[str]:
    given = ["--images", str(images), "--grey", "--resolution", "16", "--out", str(folder / "vae")]
    given += ["--run", str(folder / "run"), "--widths", "8", "16", "--batch-size", "8", "--log-steps", "1"]
    return [*given, "--steps", str(steps), *more]


def train(images: Path, folder: Path, steps: int, *more: str) -> dict[str, torch.Tensor]:
    train_vae.main(words(images, folder, steps, *more))
    return load_file(folder / "vae" / WEIGHTS)


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(images, folder, 80, "--learning-rate", "0.02")
    return folder


def test_the_loss_falls_and_every_step_has_a_line(trained: Path) -> None:
    lines = jsonlines.read(trained / "run" / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 81))
    assert np.mean([line["loss/loss"] for line in lines[-5:]]) < 0.6 * lines[0]["loss/loss"]
    for line in lines:
        total = line["loss/l1"] + line["loss/l2"] + 1e-4 * line["loss/kl"]
        assert line["loss/loss"] == pytest.approx(total, rel=1e-4)


def test_a_killed_run_ends_with_the_same_bits(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(images, tmp_path / "whole", 7)
    advance = train_vae.Training.advance

    def killed_after_four(self: train_vae.Training) -> dict[str, torch.Tensor]:
        if self.step == 4:
            raise KeyboardInterrupt
        return advance(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_vae.Training, "advance", killed_after_four)
        train(images, tmp_path / "cut", 7, "--save-steps", "3")
    assert not (tmp_path / "cut" / "vae").exists()
    # steps 4 and later run again, and have one line each
    resumed = train(images, tmp_path / "cut", 7, "--save-steps", "5")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [
        [{**line, "images_per_second": 0} for line in jsonlines.read(tmp_path / name / "run" / "log.jsonl")]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    configs = [(tmp_path / name / "vae" / "config.json").read_text() for name in ("whole", "cut")]
    assert configs[0] == configs[1]


def test_a_signal_saves_first(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = train_vae.Training.advance

    def asked_in_the_second(self: train_vae.Training) -> dict[str, torch.Tensor]:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self)

    with monkeypatch.context() as patch, pytest.raises(EndedEarly, match="the same command continues"):
        patch.setattr(train_vae.Training, "advance", asked_in_the_second)
        train(images, tmp_path, 5)
    assert int(load_file(tmp_path / "run" / train_vae.CHECKPOINT)["taken"]) == 2
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_finished_run_is_left_alone(images: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "vae" / WEIGHTS).stat().st_mtime_ns
    train(images, trained, 80, "--learning-rate", "0.02")
    assert "finished already" in capsys.readouterr().out
    assert (trained / "vae" / WEIGHTS).stat().st_mtime_ns == before


def test_the_perceptual_term_joins_the_loss(images: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(torchvision.models.mobilenet_v2(weights=None).state_dict(), tmp_path / "mobilenet.pth")
    more = ("--perceptual", "0.5", "--perceptual-weights", str(tmp_path / "mobilenet.pth"))
    with_it, without = train(images, tmp_path / "with", 2, *more), train(images, tmp_path / "without", 2)
    line, plain = (jsonlines.read(tmp_path / name / "run" / "log.jsonl")[0] for name in ("with", "without"))
    assert line["loss/perceptual"] > 0 and line["loss/l1"] == plain["loss/l1"]
    assert line["loss/loss"] == pytest.approx(plain["loss/loss"] + 0.5 * line["loss/perceptual"], rel=1e-4)
    assert not torch.equal(with_it["decoder.conv_out.weight"], without["decoder.conv_out.weight"])


def test_another_seed_draws_other_numbers(images: Path, tmp_path: Path) -> None:
    first, second = (train(images, tmp_path / seed, 2, "--seed", seed) for seed in "01")
    assert all(not torch.equal(first[name], second[name]) for name in first if name.endswith("conv1.weight"))


def test_scale_and_shift_are_those_of_the_draws(images: Path, trained: Path) -> None:
    codec, source = open_codec(str(trained / "vae")), ImageFiles(images)
    mean, std = codec.encode(to_signed(torch.from_numpy(np.stack([cropped(source, i, 16, True) for i in range(24)]))))
    draws = torch.cat([codec.space.normalise(mean + std * torch.randn(mean.shape)) for _ in range(200)])
    assert draws.mean((0, 2, 3)).abs().max() < 0.02
    assert (draws.std((0, 2, 3)) - 1).abs().max() < 0.02
    assert codec.image_channels == 1 and codec.space.stride == 2 and len(codec.space.scale) == 4


def test_grey_images_go_through_encode_decode_and_verify(images: Path, trained: Path, tmp_path: Path, capsys) -> None:
    vae, out = str(trained / "vae"), tmp_path / "set"
    given = ["--images", str(images), "--vae", vae, "--resolution", "16", "--workers", "0", "--out", str(out)]
    with pytest.raises(UserError, match="takes grey images: give --grey"):
        preprocessing.encode.main(given)
    preprocessing.encode.main([*given, "--grey", "--keep-images"])
    opened, codec = LatentSet(out), open_codec(vae)
    assert opened.images(np.arange(3)).shape == (3, 16, 16, 1) and opened.parts == 2
    decoded = quality.decoded(opened, np.arange(24), codec)
    assert decoded.shape == (24, 16, 16, 1)
    assert quality.psnr(decoded, opened.images(np.arange(24))).mean() > 10
    capsys.readouterr()
    verify.main([str(out), "--num-images", "4"])
    with_images = capsys.readouterr().out
    preprocessing.encode.main([*given[:-1], str(tmp_path / "bare"), "--grey"])
    capsys.readouterr()
    verify.main([str(tmp_path / "bare"), "--images", str(images), "--num-images", "4"])
    figure = next(line for line in with_images.splitlines() if line.startswith("reconstruction"))
    assert figure in capsys.readouterr().out


def test_reconstruction_is_measured_and_the_card_says_so(images: Path, trained: Path, tmp_path: Path) -> None:
    vae = trained / "vae"
    given = ["--vae", str(vae), "--images", str(images), "--grey", "--features", "pixels"]
    values = reconstruction.main([*given, "--card", "--data-licence", "drawn for this test"])
    codec, source = open_codec(str(vae)), ImageFiles(images)
    originals = np.stack([cropped(source, index, 16, True) for index in range(24)])
    mean = codec.encode(to_signed(torch.from_numpy(originals)))[0]
    decoded = codec.decode(codec.space.normalise(mean)).clamp(-1, 1).numpy()
    error = ((decoded.transpose(0, 2, 3, 1) - (originals / 127.5 - 1)) ** 2).mean((1, 2, 3))
    assert values["psnr"] == pytest.approx((10 * np.log10(4 / error)).mean(), abs=0.02)
    assert values["fd"] > 0
    card = (vae / "README.md").read_text()
    for part in (f"{values['psnr']:.2f} dB", "pixels", "--steps 80", "--widths 8 16", "drawn for this test", "torch"):
        assert part in card
    with pytest.raises(UserError, match="16 x 16 x 3 do not suit"):
        reconstruction.main([word for word in given if word != "--grey"])
    with pytest.raises(UserError, match="has no training.json"):
        reconstruction.main(["--vae", str(tmp_path), "--images", str(images), "--card"])


def test_mistakes_are_one_clear_line(images: Path, trained: Path, tmp_path: Path) -> None:
    for more, message in (
        (("--widths", "8", "12"), "must be multiples of 8"),
        (("--resolution", "15"), "--resolution 15 is not a multiple of 2"),
        (("--l1", "0", "--l2", "0"), "leave nothing that compares pixels"),
        (("--perceptual", "0.1"), "go together"),
        (("--batch-size", "25"), "holds 24 images"),
    ):
        with pytest.raises(UserError, match=message):
            train(images, tmp_path, 1, *more)
    with pytest.raises(UserError, match="holds a run with another kl"):
        train_vae.main(
            [*words(images, trained, 80, "--learning-rate", "0.02", "--kl", "1"), "--out", str(tmp_path / "vae")]
        )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UserError, match="is not what this command wrote there"):
        train_vae.main([*words(images, tmp_path, 1), "--out", str(tmp_path / "mine")])
