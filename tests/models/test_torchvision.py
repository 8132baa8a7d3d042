"""MobileNetV2 with random weights: torchvision's network is the reference for timm's, through both kinds of file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from config import FeatureOptions
from evaluations.extractors import open_extractor
from models import torchvision as published
from models.encoders import open_encoder
from models.mobilenet import Perceptual
from runtime.errors import UserError

NAME = "timm:mobilenetv2_100@64"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """torchvision's network, with statistics of its norms that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.mobilenet_v2(weights=None)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def files(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """torchvision's state dict as .pth and, in another order, as safetensors; and the same of timm's names."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(network.state_dict(), folder / "theirs.pth")
    save_file(network.state_dict(), folder / "theirs.safetensors")
    save_file(published.timm_weights(folder / "theirs.pth", published.MOBILENET), folder / "timm.safetensors")
    return {path.name: path for path in folder.iterdir()}


def pictures(count: int = 3, side: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, side, side, channels), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


def test_features_are_torchvisions_through_every_file(network: nn.Module, files: dict[str, Path]) -> None:
    expected = network.features(normalised(pictures())).mean((2, 3))
    for path in files.values():
        extractor = open_extractor(FeatureOptions(features=NAME, feature_weights=str(path)))
        pool = extractor(pictures()).pool
        assert pool.shape == (3, 1280)
        torch.testing.assert_close(pool, expected, rtol=1e-4, atol=1e-5)
    grey = open_extractor(FeatureOptions(features=NAME, feature_weights=str(files["timm.safetensors"])))
    torch.testing.assert_close(
        grey(pictures(channels=1)).pool, grey(pictures(channels=1).expand(-1, -1, -1, 3)).pool, rtol=1e-5, atol=1e-6
    )


def test_other_files_are_refused_in_one_line(network: nn.Module, files: dict[str, Path], tmp_path: Path) -> None:
    def opened(path: Path, name: str = NAME) -> str:
        with pytest.raises(UserError) as error:
            open_extractor(FeatureOptions(features=name, feature_weights=str(path)))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "not of mobilenetv2_050: give timm:mobilenetv2_100" in opened(files["theirs.pth"], "timm:mobilenetv2_050")
    lacking = {name: x for name, x in network.state_dict().items() if name != "features.3.conv.1.0.weight"}
    torch.save(lacking, tmp_path / "lacking.pth")
    assert "features.3.conv.1.0.weight does not fit it" in opened(tmp_path / "lacking.pth")
    ours = published.timm_weights(files["timm.safetensors"], published.MOBILENET)
    save_file({name: x for name, x in ours.items() if name != "conv_head.weight"}, tmp_path / "lacking.safetensors")
    assert "of another network than mobilenetv2_100" in opened(tmp_path / "lacking.safetensors")
    # the published name promises the published file
    named = tmp_path / "mobilenet_v2-b0353104.pth"
    named.write_bytes(files["theirs.pth"].read_bytes())
    assert "SHA-256" in opened(named)
    with pytest.raises(UserError, match="not torchvision's file of that name"):
        published.timm_weights(named, published.MOBILENET)


def test_an_encoders_tokens_are_the_map_of_a_stage(network: nn.Module, files: dict[str, Path]) -> None:
    images = pictures(2, 32, 1)
    # where a stage of timm ends in torchvision's list of layers: the block before the next downsampling
    for stage, layers, side, width in ((None, 18, 128, 320), (-2, 14, 64, 96), (3, 7, 32, 32)):
        encoder = open_encoder("mobilenetv2_100", grid=4, weights=files["theirs.pth"], stage=stage)
        assert (encoder.side, encoder.width, encoder.depth) == (side, width, 0)
        seen = normalised(images.expand(-1, -1, -1, 3))
        seen = seen if side == 32 else F.interpolate(seen, (side, side), mode="bicubic")
        expected = network.features[:layers](seen)
        tokens = encoder(images).tokens
        assert tokens.shape == (2, 16, width) and expected.shape == (2, width, 4, 4)
        torch.testing.assert_close(tokens.transpose(1, 2).unflatten(2, (4, 4)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="stage 6 does not exist: encoder mobilenetv2_100 has stages 1 to 5"):
        open_encoder("mobilenetv2_100", grid=4, stage=6, pretrained=False)


def test_the_perceptual_distance_is_that_of_torchvisions_unit_features(
    network: nn.Module, files: dict[str, Path]
) -> None:
    a, b = (pictures(4)[at : at + 2] for at in (0, 2))
    distance = 0.0
    for layers in (2, 4, 7):
        x, y = (F.normalize(network.features[:layers](normalised(images))) for images in (a, b))
        distance += (x - y).square().sum(1).mean()
    perceptual = Perceptual(files["theirs.pth"])
    signed = [images.permute(0, 3, 1, 2) / 127.5 - 1 for images in (a, b)]
    torch.testing.assert_close(perceptual(*signed), torch.as_tensor(distance), rtol=1e-3, atol=1e-4)
    assert perceptual(signed[0], signed[0]) == 0
    first = signed[0].clone().requires_grad_()
    perceptual(first, signed[1]).backward()
    assert first.grad.abs().sum() > 0
