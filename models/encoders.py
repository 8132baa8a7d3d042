"""Frozen external encoders: vision transformers of timm that own their preprocessing.

An encoder takes images as they are stored and returns patch tokens on the student's token grid: pixels are scaled and
normalised as the encoder was trained (ImageNet's mean and std for DINOv2), resized bicubically to grid x patch
pixels (16 x 14 = 224 for images of 256 pixels and DINOv2), and the absolute positions are resampled to that grid, all in
REPA's order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.archives import read_weights
from runtime.errors import UserError, nearest, require

DINOV2 = "vit_base_patch14_dinov2.lvd142m"


@dataclass(frozen=True)
class Encoded:
    """What an encoder says of N images; every tensor has one row per image."""

    tokens: Tensor
    """(N, T, D) patch tokens after the final norm, class and register tokens left out."""
    attention: dict[int, Tensor]
    """Block, from 1 -> (N, 2, heads, T, head_dim), the patch tokens' queries and keys as they enter the dot product."""


class Encoder(nn.Module):
    """A timm vision transformer as a function from images to patch tokens. Use `open_encoder`."""

    def __init__(self, model: nn.Module, name: str, grid: int) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.grid = grid
        self.side = grid * model.patch_embed.patch_size[0]
        self.channels: int = model.patch_embed.proj.in_channels
        self.width: int = model.embed_dim
        for key, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            values = (model.pretrained_cfg or {}).get(key) or default
            self.register_buffer(key, torch.tensor(values[: self.channels]).view(1, -1, 1, 1), persistent=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    @property
    def heads(self) -> int:
        return self.blocks[0].attn.num_heads

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (N, R, R, channels) -> float32 (N, channels, side, side) as the encoder was trained; grey repeats."""
        x = images.permute(0, 3, 1, 2).float() / 255
        require(
            x.shape[1] in (1, self.channels),
            f"the images have {x.shape[1]} channels, {self.name} takes {self.channels}: choose another encoder",
        )
        x = (x.expand(-1, self.channels, -1, -1) - self.mean) / self.std
        return x if x.shape[-1] == self.side else F.interpolate(x, (self.side, self.side), mode="bicubic")

    def forward(self, images: Tensor, attention: Collection[int] = ()) -> Encoded:
        """Encode uint8 images (N, R, R, channels); `attention` names the blocks whose queries and keys are wanted."""
        kept: dict[int, Tensor] = {}
        hooks = [
            self.blocks[number - 1].attn.qkv.register_forward_hook(self._keeper(kept, number)) for number in attention
        ]
        try:
            tokens = self.model.forward_features(self.prepare(images))
        finally:
            for hook in hooks:
                hook.remove()
        if isinstance(self.model.norm, nn.Identity):  # timm norms pooled tokens instead; here they are not pooled
            tokens = self.model.fc_norm(tokens)
        return Encoded(tokens[:, self.model.num_prefix_tokens :], kept)

    def _keeper(self, kept: dict[int, Tensor], number: int):
        attn = self.blocks[number - 1].attn

        def keep(_module: nn.Module, _inputs: tuple, qkv: Tensor) -> None:
            patches = qkv[:, self.model.num_prefix_tokens :]
            q, k, _ = patches.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            kept[number] = torch.stack([attn.q_norm(q), attn.k_norm(k)], dim=1)

        return keep

    def digest(self) -> str:
        """SHA-256 over the weights."""
        state = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            state.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return state.hexdigest()


def open_folder(folder: Path, pretrained: bool = True) -> nn.Module:
    """The network, without its classifier, in a folder that timm's `save_for_hf` wrote. Raises UserError where it is none, or damaged."""
    import timm
    from safetensors import SafetensorError

    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=pretrained, num_classes=0)
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as error:  # whatever the folder holds
        raise UserError(
            f"{folder} is damaged, or no folder that timm's save_for_hf wrote ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); restore it from a copy, or give another"
        ) from error


def open_encoder(name: str, *, grid: int, weights: Path | str | None = None, pretrained: bool = True) -> Encoder:
    """The encoder called `name`, in float32 on the CPU, its patch grid set to `grid` x `grid`.

    Args:
        name: a timm model, e.g. `vit_base_patch14_dinov2.lvd142m`, or a folder that timm's `save_for_hf` wrote.
        weights: a local weight file in place of the hub's, timm's or the authors' layout.
        pretrained: False leaves the weights random, for shapes and costs alone.

    Raises:
        UserError: no such model, weights absent, damaged or of another network, or no plain vision transformer.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    folder = Path(name).expanduser()
    local = (folder / "config.json").is_file()
    known = local or name.startswith("hf-hub:") or timm.is_model(name.split(".")[0].removeprefix("timm/"))
    require(
        known,
        f"no encoder is called {name}{nearest(name, timm.list_models('vit*'))}: give a model of timm, or a folder "
        f"with its config.json and weights",
    )
    try:
        model = (
            open_folder(folder, pretrained and weights is None)
            if local
            else timm.create_model(name, pretrained=pretrained and weights is None, num_classes=0)
        )
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        hub = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else f"timm/{name}"
        raise UserError(
            f"the weights of encoder {name} are neither local nor available from the hub ({reason}); where there is a "
            f"network, run: hf download {hub}; or give its file (--align-encoder-weights or, where there is no alignment, "
            f"--encoder-weights)"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"encoder {name} is not a plain vision transformer but a {type(model).__name__}; choose a vit_ model"
        )
    if pretrained and weights is not None:
        require(Path(weights).is_file(), f"encoder {name}: {weights} is missing; give the file that holds its weights")
        tensors = read_weights(weights)
        state = {
            key: value for key, value in checkpoint_filter_fn(tensors, model).items() if not key.startswith("head.")
        }
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"encoder {name}: {weights} is of another network ({str(error).splitlines()[1].strip()})"
            ) from error
    model.set_input_size(img_size=(grid * model.patch_embed.patch_size[0],) * 2)
    return Encoder(model, name, grid).eval().requires_grad_(False)
