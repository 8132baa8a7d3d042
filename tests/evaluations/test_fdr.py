"""FDr: the mean ratio against distances computed separately, the unit of validation images, each extractor's features
computed by hand, and refused inputs. test_extractors compares Inception's features with torch-fidelity."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import FeatureOptions
from evaluations import fdr, reference
from evaluations.extractors import open_extractor
from runtime.errors import UserError


def images(seed: int, bright: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 180 + bright, (90, 8, 8, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> tuple[Path, list[str]]:
    """Samples, and references of training and validation images for two extractors: pixels and a small ViT."""
    folder, names = tmp_path_factory.mktemp("fdr"), ["pixels", f"timm:{encoder}"]
    for number, (kind, bright) in enumerate((("samples", 60), ("train", 0), ("val", 20))):
        np.savez(folder / f"{kind}.npz", arr_0=images(number, bright))
        (folder / kind).mkdir()
        for index, name in enumerate(names):
            if kind != "samples":
                reference.main(
                    [
                        "--images",
                        str(folder / f"{kind}.npz"),
                        "--features",
                        name,
                        "--out",
                        str(folder / kind / f"{index}.npz"),
                    ]
                )
    return folder, names


def distance(a: np.ndarray, b: np.ndarray, name: str) -> float:
    """By the matrix square root, from features extracted apart."""
    extractor = open_extractor(FeatureOptions(features=name))
    x, y = (extractor(torch.from_numpy(part)).pool.double().numpy() for part in (a, b))
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root))


def run(folder: Path, samples: str = "samples.npz", *more: str) -> dict:
    return fdr.main(
        ["--samples", str(folder / samples), "--train", str(folder / "train"), "--out", str(folder / "fdr.json"), *more]
    )


def test_the_mean_of_ratios(place: tuple[Path, list[str]], capsys: pytest.CaptureFixture) -> None:
    folder, names = place
    result = run(folder, "samples.npz", "--val", str(folder / "val"))
    sets = {
        kind: images(number, bright)
        for number, (kind, bright) in enumerate((("samples", 60), ("train", 0), ("val", 20)))
    }
    expected = [
        distance(sets["samples"], sets["train"], name) / distance(sets["val"], sets["train"], name) for name in names
    ]
    assert [row["ratio"] for row in result["extractors"]] == pytest.approx(expected, rel=1e-4)
    assert result["metrics"] == {"fdr2": pytest.approx(np.mean(expected), rel=1e-4)} and not result["six"]
    assert json.loads((folder / "fdr.json").read_text())["metrics"] == result["metrics"]
    printed = capsys.readouterr().out
    assert (
        all(f"{row['normaliser']:.4f}" in printed and row["features"] in printed for row in result["extractors"])
        and "not the six" in printed
    )


def test_validation_images_are_the_unit_and_training_images_nothing(place: tuple[Path, list[str]]) -> None:
    folder, _ = place
    more = ("--val", str(folder / "val"))
    assert run(folder, "val.npz", *more)["metrics"]["fdr2"] == pytest.approx(1, abs=1e-4)
    assert run(folder, "train.npz", *more)["metrics"]["fdr2"] == pytest.approx(0, abs=1e-4)


def test_published_normalisers_belong_to_the_six_alone(place: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = place
    with pytest.raises(UserError, match="no published normaliser for pixels features.*: give --val"):
        run(folder)
    train = dict.fromkeys(fdr.SIX)
    assert {name: unit for name, (unit, _) in fdr.normalisers(train, None).items()} == fdr.SIX and len(fdr.SIX) == 6
    with pytest.raises(UserError, match="holds no reference"):
        run(folder, "samples.npz", "--val", str(tmp_path))
    (tmp_path / "a.npz").write_bytes((folder / "val" / "0.npz").read_bytes())
    with pytest.raises(UserError, match="--val lacks a reference of timm:"):
        run(folder, "samples.npz", "--val", str(tmp_path))
    (tmp_path / "b.npz").write_bytes((folder / "val" / "0.npz").read_bytes())
    with pytest.raises(UserError, match="two references of pixels"):
        run(folder, "samples.npz", "--val", str(tmp_path))
    with pytest.raises(UserError, match="do not differ"):
        run(folder, "samples.npz", "--val", str(folder / "train"))
    np.savez(tmp_path / "b.npz", arr_0=images(0, 0))
    with pytest.raises(UserError, match="b.npz was not written by evaluations.reference"):
        run(folder, "samples.npz", "--val", str(tmp_path))


# The five networks of FDr6 that are timm's: small ones of the same families, and the published width.
FAMILIES = {
    "fdr:convnextv2_base.fcmae_ft_in22k_in1k@224": ({"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 1024),
    "fdr:vit_large_patch14_dinov2.lvd142m@256": ({"img_size": 98}, 1024),
    "fdr:vit_large_patch16_224.mae@224": ({"img_size": 64}, 1024),
    "fdr:vit_so400m_patch16_siglip_256.v2_webli@224": ({"img_size": 64}, 1152),
    "fdr:vit_large_patch14_clip_224.openai@256": ({"img_size": 56}, 1024),
}
SIDES = {224: 48, 256: 64}  # small ones: 64 is as little a multiple of 14 as 256


def by_hand(model: nn.Module, images: Tensor, side: int) -> Tensor:
    """(n, D): scaled without clamping, normalised with the network's own mean and deviation, pooled as its family is.

    timm pads and resamples positions by itself here (`dynamic_img_size`, `dynamic_img_pad`), as the authors have it do.
    """
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    x = F.interpolate(
        images.permute(0, 3, 1, 2).float(), size=(side, side), mode="bicubic", align_corners=False, antialias=True
    )
    x = (x - 255 * mean) / (255 * std)
    if hasattr(model, "stages"):  # ConvNeXt: the last stage, averaged over its positions
        for layer in (model.stem, *model.stages):
            x = layer(x)
        return torch.stack([x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])]).mean(0)
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        x = block(x)
    x = F.layer_norm(x, x.shape[-1:], model.norm.weight, model.norm.bias, model.norm.eps)
    if model.cls_token is not None:
        return x[:, 0]
    pool = model.attn_pool  # SigLIP: one learned query attends to all tokens, then a residual MLP
    query = pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
    key, value = pool.kv(x).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
    token = pool.proj((weights @ value).transpose(1, 2).flatten(2))
    return (token + pool.mlp(pool.norm(token)))[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_extractor_has_its_published_pooling_and_side(name: str, tmp_path: Path) -> None:
    import timm

    shape, _ = FAMILIES[name]
    architecture, side = name.removeprefix("fdr:").split("@")
    if name.startswith("fdr:vit"):
        shape = shape | {"embed_dim": 32, "depth": 2, "num_heads": 4}
    model = timm.create_model(architecture, num_classes=0, **shape).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # far from what zeros and ones would hide
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    timm.models.save_for_hf(model, tmp_path / "net", model_args=shape, safe_serialization=True)
    images = 255 * torch.randint(
        0, 2, (2, 80, 80, 3), generator=generator, dtype=torch.uint8
    )  # bicubic goes beyond these
    small = SIDES[int(side)]
    ours, timms = (
        open_extractor(FeatureOptions(features=f"{kind}:{tmp_path / 'net'}@{small}")) for kind in ("fdr", "timm")
    )

    peer = model
    if name.startswith("fdr:vit"):
        peer = timm.create_model(
            architecture, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True, **shape
        ).eval()
        peer.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = by_hand(peer, images, small)
    torch.testing.assert_close(ours(images).pool, expected, rtol=1e-4, atol=1e-4)
    inner = images // 4 + 96  # within these nothing is clamped: two families are pooled by timm as published
    same = torch.allclose(ours(inner).pool, timms(inner).pool, rtol=1e-2, atol=1e-2)
    assert same == any(family in name for family in (".mae", "siglip"))


def test_the_published_networks_are_of_these_families() -> None:
    import timm

    assert {"inception", *FAMILIES} == set(fdr.SIX)
    for name, (_, width) in FAMILIES.items():
        with torch.device("meta"):
            shallow = {"depths": (1, 1, 1, 1)} if "convnext" in name else {"depth": 1}
            model = timm.create_model(name.removeprefix("fdr:").split("@")[0], num_classes=0, **shallow)
        assert model.num_features == width
        if "convnext" not in name:
            assert (model.num_prefix_tokens, model.attn_pool is None) == ((0, False) if "siglip" in name else (1, True))
            assert type(model.norm).__name__ == "LayerNorm" and isinstance(model.fc_norm, nn.Identity)


def test_references_tell_the_two_poolings_apart(encoder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=images(0, 0))
    for kind in ("timm", "fdr"):
        reference.main(
            [
                "--images",
                str(tmp_path / "x.npz"),
                "--features",
                f"{kind}:{encoder}",
                "--out",
                str(tmp_path / f"{kind}.npz"),
            ]
        )
    stored = reference.read_compact(tmp_path / "fdr.npz")
    with pytest.raises(UserError, match=f"holds fdr:{encoder} features, not timm:"):
        stored.require(open_extractor(FeatureOptions(features=f"timm:{encoder}")))
    (tmp_path / "x.npz").unlink()
    assert set(fdr.references(str(tmp_path))) == {f"timm:{encoder}", f"fdr:{encoder}"}
