"""VA-VAE: an LDM-layout file converts into a diffusers folder that agrees with LDM's own forward, written here."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import convert, vavae
from models.vae import open_codec
from runtime.errors import UserError


class LDM:
    """LDM's KL autoencoder, written from its layout. Weights are drawn when first asked for, under LDM's names, so that
    the file that is converted comes from this forward and from nothing else."""

    def __init__(self, channels: tuple[int, ...], latent: int, blocks: int = 2, device: str = "cpu") -> None:
        self.channels, self.latent, self.blocks, self.device = channels, latent, blocks, device
        self.weights: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, name: str, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        if name not in self.weights:
            value = (
                torch.empty(shape, device=self.device)
                if self.device == "meta"
                else offset + scale * torch.randn(shape, generator=self.generator)
            )
            self.weights[name] = value
        return self.weights[name]

    def conv(
        self, name: str, x: Tensor, out: int, size: int = 3, stride: int = 1, padding: int | None = None
    ) -> Tensor:
        fan = x.shape[1] * size**2
        return F.conv2d(
            x,
            self.draw(f"{name}.weight", out, x.shape[1], size, size, scale=fan**-0.5),
            self.draw(f"{name}.bias", out, scale=0.1),
            stride,
            size // 2 if padding is None else padding,
        )

    def norm(self, name: str, x: Tensor) -> Tensor:
        width = x.shape[1]
        return F.group_norm(
            x,
            32,
            self.draw(f"{name}.weight", width, scale=0.2, offset=1.0),
            self.draw(f"{name}.bias", width, scale=0.2),
            eps=1e-6,
        )

    def residual(self, name: str, x: Tensor, out: int) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), out)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), out)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, 1))

    def attention(self, name: str, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h, c, 1).flatten(2) for part in "qkv")
        weights = (torch.einsum("nci,ncj->nij", q, k) / c**0.5).softmax(dim=-1)
        return x + self.conv(
            f"{name}.proj_out", torch.einsum("nij,ncj->nci", weights, v).view(n, c, height, width), c, 1
        )

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.residual(f"{name}.mid.block_1", x, x.shape[1])
        return self.residual(f"{name}.mid.block_2", self.attention(f"{name}.mid.attn_1", x), x.shape[1])

    def encode(self, x: Tensor) -> Tensor:
        """Moments: mean, then log-variance."""
        x = self.conv("encoder.conv_in", x, self.channels[0])
        last = len(self.channels) - 1
        for level, width in enumerate(self.channels):
            for block in range(self.blocks):
                x = self.residual(f"encoder.down.{level}.block.{block}", x, width)
                if level == last:
                    x = self.attention(f"encoder.down.{level}.attn.{block}", x)
            if level != last:
                x = self.conv(
                    f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), width, stride=2, padding=0
                )
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, 2 * self.latent), 2 * self.latent, 1)

    def decode(self, z: Tensor) -> Tensor:
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z, self.latent, 1), self.channels[-1])
        x = self.middle("decoder", x)
        last = len(self.channels) - 1
        for level in range(last, -1, -1):
            for block in range(self.blocks + 1):
                x = self.residual(f"decoder.up.{level}.block.{block}", x, self.channels[level])
                if level == last:
                    x = self.attention(f"decoder.up.{level}.attn.{block}", x)
            if level:
                x = self.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2.0), x.shape[1])
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), 3)


@pytest.fixture(scope="module")
def reference():
    """The reference, an image, its moments, a latent and its decoding, on a thin network of VA-VAE's shape."""
    ldm = LDM((32, 32, 64), latent=4)
    image = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = ldm.encode(image)
    latent = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(2))
    return ldm, image, moments, latent, ldm.decode(latent)


def test_an_ldm_file_converts_and_agrees_with_ldms_forward(reference, tmp_path, capsys):
    ldm, image, moments, latent, decoded = reference
    extra = {
        "foundation_model.model.norm.weight": torch.zeros(2),
        "linear_proj.weight": torch.zeros(2),
        "loss.logvar": torch.zeros(1),
    }
    torch.save({"state_dict": ldm.weights | extra, "epoch": 3}, tmp_path / "vavae.pt")
    torch.save(
        {"mean": torch.full((1, 4, 1, 1), 0.5), "std": torch.full((1, 4, 1, 1), 4.0)}, tmp_path / "latents_stats.pt"
    )
    folder = convert.main(
        [
            str(tmp_path / "vavae.pt"),
            "--out",
            str(tmp_path / "vavae-f4"),
            "--statistics",
            str(tmp_path / "latents_stats.pt"),
        ]
    )
    ignored = ["epoch", "foundation_model.* (1 tensors)", "linear_proj.* (1 tensors)", "loss.* (1 tensors)"]
    assert json.loads((folder / "source.json").read_text())["ignored"] == ignored
    assert ", ".join(ignored) in capsys.readouterr().out

    codec = open_codec(str(folder))
    assert (codec.space.name, codec.space.channels, codec.space.stride) == ("va-vae", 4, 4)
    assert codec.space.shift == (0.5,) * 4 and codec.space.scale == (0.25,) * 4
    mean, std = codec.encode(image)
    torch.testing.assert_close(mean, moments[:, :4], rtol=0, atol=2e-5)
    torch.testing.assert_close(std, (0.5 * moments[:, 4:].clamp(-30, 20)).exp(), rtol=0, atol=2e-5)
    torch.testing.assert_close(codec.decode((latent - 0.5) / 4), decoded, rtol=0, atol=5e-5)
    assert moments[:, :4].std() > 0.1 and decoded.std() > 0.1


def test_the_attention_inside_the_lowest_level_is_there(reference):
    """What diffusers' own converters lose: without it the reference itself gives other latents."""
    ldm, image, moments, _, _ = reference
    without = LDM(ldm.channels, ldm.latent)
    without.weights = ldm.weights
    without.attention = lambda name, x: x if ".down." in name else LDM.attention(without, name, x)
    assert (without.encode(image) - moments).abs().max() > 1e-2


def test_the_published_network_has_its_342_tensors_and_69836067_parameters():
    from diffusers import AutoencoderKL

    ldm = LDM((128, 128, 256, 256, 512), latent=32, device="meta")
    assert ldm.encode(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 64, 16, 16)
    assert ldm.decode(torch.empty(1, 32, 16, 16, device="meta")).shape == (1, 3, 256, 256)
    with torch.device("meta"):
        model = AutoencoderKL(**vavae.read_config(ldm.weights))
    own = {name: value.numel() for name, value in model.state_dict().items()}
    assert {vavae.rename(name, 5): value.numel() for name, value in ldm.weights.items()} == own
    assert (len(own), sum(own.values())) == (342, 69_836_067)


def test_a_vae_that_does_not_fit_is_refused(reference, tmp_path):
    weights = reference[0].weights
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, tmp_path / "stats.pt")
    for number, (value, arguments, message) in enumerate(
        (
            (
                {k: v for k, v in weights.items() if "up.0.block.2.conv1" not in k},
                [],
                "VA-VAE, which .* should be: decoder.up_blocks.2.resnets.2",
            ),
            (
                {k: v for k, v in weights.items() if "decoder.conv_out" not in k},
                [],
                "decoder.conv_out.weight is missing",
            ),
            (weights | {"encoder.extra": torch.zeros(1)}, [], "should be: encoder.extra"),
            (weights | {"quant_conv.bias": torch.zeros(3)}, [], "should be: quant_conv.bias"),
            (weights, ["--statistics", str(tmp_path / "stats.pt")], "4 latent channels, the statistics have 3"),
            (weights, ["--num-heads", "4"], "is a VAE"),
        )
    ):
        torch.save(value, tmp_path / f"{number}.pt")
        with pytest.raises(UserError, match=message):
            convert.main([str(tmp_path / f"{number}.pt"), "--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()
