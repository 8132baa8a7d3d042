"""Latent spaces and the VAEs behind them, on a real `AutoencoderKL` of toy size."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models.hub_client import reached
from models.latents import LatentSpace
from models.pixels import pixels, to_uint8
from models.vae import open_codec, read_statistics
from preprocessing import encode
from runtime.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vaes") / "sd-vae-toy"
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        norm_num_groups=4,
        scaling_factor=0.25,
        shift_factor=0.5,
    ).save_pretrained(folder)
    return folder


def edited(vae, tmp_path, **config):
    """A copy of the VAE folder whose config says otherwise."""
    folder = shutil.copytree(vae, tmp_path / "edited")
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(value | config))
    return folder


def images(count=2, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_normalisation_is_by_channel_and_inverts():
    space = LatentSpace(name="va-vae", channels=2, stride=16, shift=(1.0, -2.0), scale=(0.5, 4.0))
    raw = torch.randn(3, 2, 4, 4)
    x = space.normalise(raw)
    torch.testing.assert_close(x[:, 1], (raw[:, 1] + 2) * 4)
    torch.testing.assert_close(space.denormalise(x), raw)
    assert space.normalise(raw.double()).dtype == torch.float64
    assert LatentSpace.from_json(json.loads(json.dumps(space.to_json()))) == space


def test_pixels_are_the_identity():
    codec = open_codec(None, space=pixels(1, shift=(0.1,), scale=(2.0,)))
    x = torch.rand(2, 1, 8, 8)
    mean, std = codec.encode(x)
    assert torch.equal(mean, x) and not std.any()
    torch.testing.assert_close(codec.decode(codec.space.normalise(mean)), x)
    assert open_codec("pixels").space == pixels(3)


def test_a_vae_gives_its_own_space_and_the_moments_of_diffusers(vae):
    from diffusers import AutoencoderKL

    codec = open_codec(str(vae))
    assert (codec.space.name, codec.space.channels, codec.space.stride) == ("sd-vae", 3, 4)
    assert (codec.space.shift, codec.space.scale) == ((0.5,), (0.25,))
    model = AutoencoderKL.from_pretrained(vae).eval()
    with torch.no_grad():
        posterior = model.encode(images()).latent_dist
        decoded = model.decode(posterior.mean).sample
    mean, std = codec.encode(images())
    assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std) and mean.shape == (2, 3, 4, 4)
    torch.testing.assert_close(codec.decode(codec.space.normalise(mean)), decoded, rtol=0, atol=1e-5)
    coarse = open_codec(str(vae), dtype=torch.bfloat16).decode(codec.space.normalise(mean))
    assert coarse.dtype == torch.float32 and 1e-5 < (coarse - decoded).abs().max() < 0.1


def test_the_published_sizes_and_scale():
    """SD-VAE: 256 and 512 pixels give 32 and 64 latents a side, scale 0.18215, no shift (on a thinner VAE)."""
    from diffusers import AutoencoderKL

    from models.vae import VaeCodec, _space_of

    model = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    for name in ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"):
        space = _space_of(name, model, None)
        assert (space.name, space.channels, space.stride, space.shift, space.scale) == (
            "sd-vae",
            4,
            8,
            (0.0,),
            (0.18215,),
        )
    codec = VaeCodec(model, space, "cpu", torch.float32)
    for size in (256, 512):
        mean, _ = codec.encode(images(1, size))
        assert mean.shape == (1, 4, size // 8, size // 8) and codec.decode(mean).shape == (1, 3, size, size)


def test_statistics_come_from_the_config_or_from_the_published_files(vae, tmp_path):
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 4.0, 0.3])
    folder = edited(vae, tmp_path, latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0)
    shape = (1, 3, 1, 1)
    torch.save({"mean": mean.view(shape), "std": std.view(shape)}, tmp_path / "latents_stats.pt")
    torch.save(
        {"latents_bias": mean.view(shape), "latents_scale": 1 / std.view(shape)}, tmp_path / "e2e-latents-stats.pt"
    )
    raw = torch.randn(2, 3, 4, 4)
    spaces = [open_codec(str(folder)).space] + [
        open_codec(str(vae), statistics=tmp_path / name).space for name in ("latents_stats.pt", "e2e-latents-stats.pt")
    ]
    for space in spaces:
        torch.testing.assert_close(space.normalise(raw), (raw - mean.view(shape)) / std.view(shape))


def test_broken_statistics_are_named(tmp_path):
    torch.save({"means": torch.zeros(1)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"no weights")
    for name, message in (("a.pt", "neither mean and std nor"), ("b.pt", "damaged"), ("c.pt", "cannot read .*c.pt")):
        with pytest.raises(UserError, match=message):
            read_statistics(tmp_path / name)
    with pytest.raises(UserError, match="shift needs 1 or 4"):
        LatentSpace(name="x", channels=4, stride=8, shift=(0.0, 0.0), scale=(1.0,))


def test_latents_are_decoded_only_with_a_vae_of_the_same_encoder(vae, tmp_path):
    space = open_codec(str(vae)).space
    decoder = shutil.copytree(vae, tmp_path / "other-decoder")
    tensors = load_file(decoder / WEIGHTS)
    save_file(tensors | {"decoder.conv_in.bias": tensors["decoder.conv_in.bias"] + 1}, decoder / WEIGHTS)
    assert open_codec(str(decoder), space=space).space == space
    save_file(tensors | {"encoder.conv_in.bias": tensors["encoder.conv_in.bias"] + 1}, decoder / WEIGHTS)
    with pytest.raises(UserError, match="does not fit these latents .the encoder"):
        open_codec(str(decoder), space=space)
    with pytest.raises(UserError, match="channels 4 against 3"):
        open_codec(str(vae), space=LatentSpace(name="sd-vae", channels=4, stride=4, shift=(0.0,), scale=(1.0,)))
    with pytest.raises(UserError, match="pass its hub id"):
        open_codec("pixels", space=space)
    assert open_codec(None, space=space).space.vae == str(vae)


def test_spaces_differ_in_what_a_network_would_notice():
    space = LatentSpace(name="a", channels=2, stride=8, shift=(0.0,), scale=(0.5,))
    same = LatentSpace(name="b", channels=2, stride=8, shift=(0.0, 0.0), scale=(0.5, 0.5), vae="elsewhere", digest="1")
    assert space.difference(same) is None
    assert "scale" in space.difference(LatentSpace(name="a", channels=2, stride=8, shift=(0.0,), scale=(0.25,)))
    assert "stride" in space.difference(LatentSpace(name="a", channels=2, stride=16, shift=(0.0,), scale=(0.5,)))


def test_a_vae_that_is_absent_or_damaged_is_one_line(vae, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def refusal(name) -> str:
        with pytest.raises(UserError) as caught:
            open_codec(str(name))
        return str(caught.value)

    assert "config.json is neither in the hub's cache" in refusal("someone/some-vae")
    assert f"{tmp_path / 'nowhere' / 'config.json'} is missing" in refusal(tmp_path / "nowhere")
    folder = shutil.copytree(vae, tmp_path / "damaged")
    tensors = load_file(folder / WEIGHTS)
    bias = tensors.pop("encoder.conv_in.bias")
    save_file(tensors, folder / WEIGHTS)
    assert "does not fit config.json (encoder.conv_in.bias)" in refusal(folder)
    save_file(tensors | {"encoder.conv_in.bias": bias, "stray": bias.clone()}, folder / WEIGHTS)
    assert "does not fit config.json (stray)" in refusal(folder)
    save_file(tensors | {"encoder.conv_in.bias": torch.zeros(5)}, folder / WEIGHTS)
    assert "encoder.conv_in.bias" in refusal(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:2000])
    assert f"{folder / WEIGHTS} is damaged" in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert f"{folder / WEIGHTS} is missing" in refusal(folder)
    assert "give an AutoencoderKL" in refusal(edited(vae, tmp_path, _class_name="AutoencoderTiny"))


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    """The hub's own client would try five times for each file; here nothing listens at the hub's address."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with reached() as reason:
        assert constants.HF_HUB_OFFLINE and "http://127.0.0.1:9 does not answer" in reason
    assert not constants.HF_HUB_OFFLINE
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a" / "1.png")
    words = ["--images", str(tmp_path / "images"), "--resolution", "32", "--out", str(tmp_path / "out")]
    for resolve, remedy in (
        (lambda: encode.main([*words, "--vae", "someone/some-vae"]), "or --vae pixels"),
        (lambda: open_codec("someone/some-vae", otherwise="; or leave it out"), "; or leave it out"),
    ):
        with pytest.raises(UserError, match="does not answer") as caught:
            resolve()
        assert remedy in str(caught.value) and "hf download someone/some-vae" in str(caught.value)
    assert time.monotonic() - began < 10


def test_a_hub_id_is_read_from_the_cache_without_a_network(vae, tmp_path, monkeypatch):
    import huggingface_hub.constants

    snapshot = tmp_path / "models--someone--some-vae" / "snapshots" / "0123"
    shutil.copytree(vae, snapshot)
    (tmp_path / "models--someone--some-vae" / "refs").mkdir()
    (tmp_path / "models--someone--some-vae" / "refs" / "main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("asked the network"))
    space = open_codec("someone/some-vae").space
    assert (space.name, space.vae) == ("some-vae", "someone/some-vae")
    assert space.difference(open_codec(str(vae)).space) is None


def test_rounding_rules():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(x, "truncate").flatten().tolist() == [0, 0, 127, 255, 255]
    levels = torch.arange(256.0).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels / 127.5 - 1).float().permute(0, 3, 1, 2), levels)
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
