"""External encoders: their preprocessing, their tokens, where weights come from, and images as a column of the data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from dataset import LatentSet
from models.checkpoint import Checkpoint
from models.encoders import ALIASES, DINOV2, Encoder, open_encoder
from models.peers import PEERS
from models.pixels import pixels
from preprocessing import shards
from runtime.errors import UserError
from runtime.jsonlines import read
from tests.helpers import Words
from training.batches import Batches

SMALL_DINO = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def dino() -> Encoder:
    """DINOv2's architecture on a 3 x 3 grid, random weights: for shapes alone."""
    return open_encoder(SMALL_DINO, grid=3, pretrained=False)


def images(count: int = 2, side: int = 8, channels: int = 1) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, side, side, channels), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def test_dinov2_returns_patch_tokens_on_the_students_grid(dino: Encoder) -> None:
    encoded = dino(images(2, 48, 3), attention=(9, 12))
    assert dino.side == 42 and encoded.tokens.shape == (2, 9, 384)
    assert {n: qk.shape for n, qk in encoded.attention.items()} == dict.fromkeys((9, 12), (2, 2, 6, 9, 64))
    assert dino.model.pos_embed.shape == (1, 10, 384)
    assert not dino.training and not any(p.requires_grad for p in dino.parameters())


def test_pixels_are_normalised_as_imagenet_then_resized_bicubically(dino: Encoder) -> None:
    given = images(2, 48, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = ((given / 255 - mean) / std).permute(0, 3, 1, 2)
    resized = F.interpolate(normal, 42, mode="bicubic", align_corners=False)
    torch.testing.assert_close(dino.prepare(given), resized, rtol=0, atol=1e-5)
    fitting = dino.prepare(images(1, 42, 3))
    torch.testing.assert_close(fitting, ((images(1, 42, 3) / 255 - mean) / std).permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    grey = dino.prepare(images(1, 42, 1))
    torch.testing.assert_close(grey[:, 0] * 0.229 + 0.485, grey[:, 2] * 0.225 + 0.406, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="4 channels"):
        dino.prepare(images(1, 42, 4))


def test_tokens_are_those_after_the_final_norm_without_the_class_token(encoder: Path) -> None:
    small = open_encoder(str(encoder), grid=4)
    whole = small.model.forward_features(small.prepare(images()))
    assert whole.shape == (2, 17, 32) and torch.equal(small(images()).tokens, whole[:, 1:])
    assert torch.allclose(whole.mean(-1), torch.zeros(2, 17), atol=1e-5)  # a fresh LayerNorm centres
    assert torch.equal(small.model.pos_embed, load_file(encoder / "model.safetensors")["pos_embed"])


def test_queries_and_keys_of_an_encoder_give_its_attention(encoder: Path) -> None:
    small, seen = open_encoder(str(encoder), grid=4), {}
    block = small.blocks[2]
    hook = block.attn.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    q, k = small(images(), attention=(3,)).attention[3].unbind(1)
    hook.remove()
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        torch.testing.assert_close(q[:, head], seen["x"][:, 1:] @ weight[:32][rows].T + bias[:32][rows])
        torch.testing.assert_close(k[:, head], seen["x"][:, 1:] @ weight[32:64][rows].T + bias[32:64][rows])
    assert not block.attn.qkv._forward_hooks  # nothing is left behind


def test_weights_from_a_file_and_positions_on_another_grid(encoder: Path, tmp_path: Path) -> None:
    weights = load_file(encoder / "model.safetensors")
    again = open_encoder("vit_small_patch14_dinov2", grid=3, pretrained=False)
    save_file(again.model.state_dict(), tmp_path / "dino.safetensors")
    fresh = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=42)
    opened = open_encoder("vit_small_patch14_dinov2", grid=2, weights=tmp_path / "dino.safetensors")
    assert opened.digest() != again.digest()  # positions moved
    assert torch.equal(opened.blocks[3].mlp.fc1.weight, again.blocks[3].mlp.fc1.weight)
    assert not torch.equal(opened.blocks[3].mlp.fc1.weight, fresh.blocks[3].mlp.fc1.weight)
    assert opened.model.pos_embed.shape == (1, 5, 384)
    with pytest.raises(UserError, match="absent.safetensors is missing"):
        open_encoder(SMALL_DINO, grid=2, weights=tmp_path / "absent.safetensors")
    save_file({"blocks.0.norm1.weight": weights["blocks.0.norm1.weight"]}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="of another network"):
        open_encoder(SMALL_DINO, grid=2, weights=tmp_path / "other.safetensors")


def test_mistakes_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean vit_small_patch14_dinov2"):
        open_encoder("vit_small_patch14_dinov", grid=2)
    with pytest.raises(UserError, match="neither a plain vision transformer nor a convolutional network but a Swin"):
        open_encoder("swin_tiny_patch4_window7_224", grid=2, pretrained=False)
    with pytest.raises(UserError, match="test_vit has no stages"):
        open_encoder("test_vit", grid=2, pretrained=False, stage=1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="weights of encoder vit_small_patch14_dinov2.lvd142m are neither local"
    ) as error:
        open_encoder(SMALL_DINO, grid=2)
    assert "hf download timm/vit_small_patch14_dinov2.lvd142m" in str(error.value) and "\n" not in str(error.value)


def test_a_convolutional_networks_grid_is_the_students() -> None:
    encoder = open_encoder("resnet10t", grid=3, pretrained=False, stage=3)
    assert encoder.side == 24 and encoder.heads == encoder.depth == 0 and not encoder.training
    given = images(2, 8, 1)
    seen, maps = {}, encoder.model.layer2
    hook = maps.register_forward_hook(lambda _, inputs, output: seen.update(map=output))
    tokens = encoder(given).tokens
    hook.remove()
    assert tokens.shape == (2, 9, encoder.width)
    # token 3 y + x is position (y, x) of the map
    torch.testing.assert_close(tokens[:, 5], seen["map"][:, :, 1, 2])
    with pytest.raises(UserError, match="has no attention maps"):
        encoder(given, attention=(1,))


def test_repas_names_are_those_of_timm() -> None:
    assert ALIASES["dinov2-vit-b"] == DINOV2 and "(default: dinov2-vit-b)" in PEERS["--enc-type"].reply
    assert set(ALIASES.values()) <= set(timm.list_pretrained())
    assert open_encoder("dinov2-vit-s", grid=2, pretrained=False).name == SMALL_DINO
    with pytest.raises(UserError, match=r"timm has no weights of MoCo v3 \(mocov3-vit-b\): give a folder") as error:
        open_encoder("mocov3-vit-b", grid=2)
    assert "\n" not in str(error.value)


def test_cached_tokens_are_those_of_the_images(tmp_path: Path, words: Words, encoder: Path) -> None:
    more = ("--align", "haste", "--align-hidden", 32, "--align-encoder", encoder, "--max-train-steps", 3)
    plain = train.main(words(tmp_path, "plain", *more))
    cached = train.main(words(tmp_path, "cached", *more, "--align-cache"))
    for expected, actual in zip(read(plain / "log.jsonl"), read(cached / "log.jsonl"), strict=True):
        assert expected["loss/haste"] == pytest.approx(actual["loss/haste"], rel=1e-4)
    first, second = Checkpoint.open(plain).tensors("network"), Checkpoint.open(cached).tensors("network")
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)
    assert (
        Checkpoint.open(plain).config["resolved"]["haste"]["encoder_digest"]
        == open_encoder(str(encoder), grid=4).digest()
    )


def test_a_cache_in_bf16_is_what_autocast_would_give(tmp_path: Path, words: Words, encoder: Path) -> None:
    more = (
        "--align",
        "repa",
        "--align-hidden",
        32,
        "--align-encoder",
        encoder,
        "--max-train-steps",
        2,
        "--mixed-precision",
        "bf16",
    )
    plain, cached = (
        train.main(words(tmp_path, name, *more, *cache)) for name, cache in (("a", ()), ("b", ("--align-cache",)))
    )
    for expected, actual in zip(read(plain / "log.jsonl"), read(cached / "log.jsonl"), strict=True):
        assert expected["loss/repa"] == pytest.approx(actual["loss/repa"], abs=2e-3)


def test_a_cache_beyond_its_limit_is_refused(
    tmp_path: Path, words: Words, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignment.external.LIMIT", 1000)
    with pytest.raises(UserError, match="leave out --align-cache"):
        train.main(
            words(tmp_path, "x", "--align", "repa", "--align-encoder", encoder, "--align-cache", "--max-train-steps", 1)
        )


def test_the_image_column_is_mirrored_as_the_latent_is(tmp_path: Path) -> None:
    """A set of two views and kept images: each row's image shows what its latent was encoded from."""
    from training import command

    pictures = images(40, 8, 1).numpy()
    latents = np.stack([pictures, pictures[:, :, ::-1]], 1).transpose(0, 1, 4, 2, 3)[:, :, None] / np.float32(127.5) - 1
    encoded = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture[..., 0]).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    entry = shards.write_shard(tmp_path, 0, latents.astype(np.float32), np.arange(40) % 10, images=encoded)
    shards.write_manifest(
        tmp_path,
        space=pixels(1),
        resolution=8,
        latent_size=8,
        views=2,
        parts=1,
        dtype="float32",
        crop="none",
        class_names=list("0123456789"),
        images=True,
        shards=[entry],
        source="test",
    )
    data = LatentSet(tmp_path)
    config, _ = command.resolve(["--data-dir", str(tmp_path), "--exp-name", "x", "--batch-size", "16"], "train", None)
    source = Batches(config, data, torch.device("cpu"), 0, 1)
    wants = type(
        "Wants",
        (),
        {
            "columns": ("image", "row"),
            "draw": lambda *_: {},
            "labelled_only": False,
            "segmented": False,
            "options": type("O", (), {"interval": None, "time_weights": "none"}),
        },
    )
    ((samples,),) = source.steps(0, 1, {"x": wants})
    from_latents = ((samples.x0 + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(samples.columns["image"], from_latents)
    view = samples.columns["row"] % 2
    assert 0 < view.sum() < 16
    assert torch.equal(
        samples.columns["image"], torch.from_numpy(data.images(samples.columns["row"].numpy() // 2, view.numpy()))
    )
