"""Frozen external encoders: vision transformers and convolutional networks of timm that own their preprocessing.

An encoder maps images as they are stored to tokens on the student's token grid. It scales and normalises pixels as in
the encoder's training (ImageNet's mean and std for DINOv2), resizes them bicubically to grid x patch pixels (16 x 14 =
224 for images of 256 pixels and DINOv2), and resamples the absolute positions to that grid, all in REPA's order. For a
convolutional network the stride of the chosen stage stands in place of the patch (MobileNetV2's last: 32).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.archives import digest
from models.hub_client import reached
from models.torchvision import load_strictly, timm_weights
from runtime.errors import UserError, nearest, require

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

DINOV2 = "vit_base_patch14_dinov2.lvd142m"
# REPA's --enc-type -> timm's name of the same weights; CLIP's are OpenAI's, which use QuickGELU.
ALIASES = {
    **{f"dinov2-vit-{size[0]}": f"vit_{size}_patch14_dinov2.lvd142m" for size in ("small", "base", "large", "giant")},
    **{
        f"dinov2reg-vit-{size[0]}": f"vit_{size}_patch14_reg4_dinov2.lvd142m"
        for size in ("small", "base", "large", "giant")
    },
    "dinov1-vit-b": "vit_base_patch16_224.dino",
    "clip-vit-L": "vit_large_patch14_clip_quickgelu_224.openai",
    "mae-vit-l": "vit_large_patch16_224.mae",
    "jepa-vit-h": "vit_huge_patch14_gap_224.in1k_ijepa",
}


@dataclass(frozen=True)
class Encoded:
    """An encoder's view of N images; every tensor has one row per image."""

    # (N, T, D) patch tokens after the final norm, without class and register tokens
    tokens: Tensor
    # block, from 1 -> (N, 2, heads, T, head_dim), the patch tokens' queries and keys as they enter the dot product
    attention: dict[int, Tensor]


class Encoder(nn.Module):
    """A frozen network as a function from images to tokens on a grid. Use `open_encoder`.

    Args:
        side: pixels along one side of its input.
        channels: of its input.
        width: of a token.
        depth: its blocks with attention; 0 for a convolutional network.
        heads: of each.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, name: str, *, side: int, channels: int, width: int, depth: int = 0, heads: int = 0
    ) -> None:
        super().__init__()
        self.model: Any = model  # nn.Module does not declare the attributes of timm's models
        self.name, self.side, self.channels, self.width = name, side, channels, width
        self.depth, self.heads = depth, heads
        # ImageNet's mean and std, unless the model records its own
        for key, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            values = (getattr(model, "pretrained_cfg", None) or {}).get(key) or default
            self.register_buffer(key, torch.tensor(values[: self.channels]).view(1, -1, 1, 1), persistent=False)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Blocks of one shape, which may be compiled."""
        return ()

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (N, R, R, channels) -> float32 (N, channels, side, side) as in the encoder's training; grey repeats."""
        x = images.permute(0, 3, 1, 2).float() / 255
        require(
            x.shape[1] in (1, self.channels),
            f"the images have {x.shape[1]} channels, {self.name} takes {self.channels}: choose another encoder",
        )
        x = (x.expand(-1, self.channels, -1, -1) - self.mean) / self.std
        return x if x.shape[-1] == self.side else F.interpolate(x, (self.side, self.side), mode="bicubic")

    def forward(self, images: Tensor, attention: Collection[int] = ()) -> Encoded:
        """Encode uint8 images (N, R, R, channels), with the queries and keys of the blocks `attention`."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 over the weights."""
        return digest(self.model.state_dict())


class Transformer(Encoder):
    """A timm vision transformer, its patch grid set to `grid` x `grid`: one patch for each of the student's tokens."""

    def __init__(self, model: VisionTransformer, name: str, grid: int) -> None:
        super().__init__(
            model,
            name,
            side=grid * model.patch_embed.patch_size[0],
            channels=model.patch_embed.proj.in_channels,
            width=model.embed_dim,
            depth=len(model.blocks),
            heads=cast(Any, model.blocks[0]).attn.num_heads,
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    def forward(self, images: Tensor, attention: Collection[int] = ()) -> Encoded:
        recorded: dict[int, Tensor] = {}
        # timm's fused attention does not return q and k, so hooks read them from the layer that computes them.
        hooks = [
            self._attention(number).qkv.register_forward_hook(functools.partial(self._record, recorded, number))
            for number in attention
        ]
        try:
            tokens = self.model.forward_features(self.prepare(images))
        finally:
            for hook in hooks:
                hook.remove()
        if isinstance(self.model.norm, nn.Identity):  # then timm would norm pooled tokens; these are not pooled
            tokens = self.model.fc_norm(tokens)
        return Encoded(tokens[:, self.model.num_prefix_tokens :], recorded)

    def _attention(self, number: int) -> Any:
        return self.model.blocks[number - 1].attn

    def _record(self, recorded: dict[int, Tensor], number: int, _layer: nn.Module, _inputs: Any, qkv: Tensor) -> None:
        """Forward hook of block `number`'s qkv layer."""
        attn = self._attention(number)
        patches = qkv[:, self.model.num_prefix_tokens :]
        q, k, _ = patches.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        recorded[number] = torch.stack([attn.q_norm(q), attn.k_norm(k)], dim=1)


class Convolutional(Encoder):
    """A convolutional network of timm: the tokens are the positions of the map of one stage.

    Args:
        grid: positions along one side; the input has grid x stride pixels, so that the map needs no resampling.
        stage: from 1, or from -1 backwards.
    """

    def __init__(self, model: nn.Module, name: str, grid: int, stage: int) -> None:
        stages: Any = model.feature_info
        require(
            stage != 0 and -len(stages) <= stage <= len(stages),
            f"stage {stage} does not exist: encoder {name} has stages 1 to {len(stages)}",
        )
        self.stage = stage - 1 if stage > 0 else len(stages) + stage
        about = stages[self.stage]
        first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
        super().__init__(
            model, name, side=grid * about["reduction"], channels=first.in_channels, width=about["num_chs"]
        )

    def forward(self, images: Tensor, attention: Collection[int] = ()) -> Encoded:
        require(not attention, f"encoder {self.name} is convolutional and has no attention maps")
        maps = self.model.forward_intermediates(
            self.prepare(images), indices=[self.stage], intermediates_only=True, stop_early=True
        )
        return Encoded(maps[0].flatten(2).transpose(1, 2), {})


def open_folder(folder: Path, pretrained: bool = True) -> nn.Module:
    """The network, without its classifier, in a folder that timm's `save_for_hf` wrote.

    Raises UserError if the folder is not one, or is damaged.
    """
    import timm
    from safetensors import SafetensorError

    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is damaged, or not a folder that timm's save_for_hf wrote ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); restore it from a copy, or give another"
        ) from error


def open_encoder(
    name: str, *, grid: int, weights: Path | str | None = None, pretrained: bool = True, stage: int | None = None
) -> Encoder:
    """The encoder called `name`, in float32 on the CPU, its token grid set to `grid` x `grid`.

    Args:
        name: a timm model (`vit_base_patch14_dinov2.lvd142m`), REPA's name of it (`dinov2-vit-b`), or a folder that
            timm's `save_for_hf` wrote.
        weights: a local weight file to use instead of the hub's, in timm's or the authors' layout, or torchvision's
            (`models.torchvision`).
        pretrained: False leaves the weights random, for shapes and costs.
        stage: of a convolutional network, whose map holds the tokens: from 1, or from -1 backwards (None: the last).

    Raises:
        UserError: no such model; weights that are missing, damaged or of another network; neither a plain vision
            transformer nor a convolutional network; or a stage that it does not have.
    """
    from timm.models.vision_transformer import VisionTransformer

    name = ALIASES.get(name, name)
    model: Any = _create(name, pretrained=pretrained and weights is None)
    plain = isinstance(model, VisionTransformer)
    require(
        plain or is_convolutional(model),
        f"encoder {name} is neither a plain vision transformer nor a "
        f"convolutional network but a {type(model).__name__}; choose a vit_ model",
    )
    require(not plain or stage is None, f"encoder {name} has no stages, its tokens are the last block's: leave it out")
    if pretrained and weights is not None:
        _load(model, Path(weights), name)
    if not plain:
        return Convolutional(model, name, grid, -1 if stage is None else stage).eval().requires_grad_(False)
    # after the weights, because it resamples their positions to the grid
    model.set_input_size(img_size=(grid * model.patch_embed.patch_size[0],) * 2)
    return Transformer(model, name, grid).eval().requires_grad_(False)


def is_convolutional(model: nn.Module) -> bool:
    """Whether the stages of a timm model are maps, and nothing in it attends."""
    attends = any("attention" in type(layer).__name__.lower() for layer in model.modules())
    return hasattr(model, "forward_intermediates") and hasattr(model, "feature_info") and not attends


def _create(name: str, pretrained: bool) -> nn.Module:
    """The timm model, or the model of a folder, called `name`, with its own weights or random ones."""
    import timm

    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return open_folder(folder, pretrained)
    require(
        not name.startswith("mocov3-"),
        f"timm has no weights of MoCo v3 ({name}): give a folder that timm's save_for_hf wrote with them, or another "
        f"encoder",
    )
    require(
        name.startswith("hf-hub:") or timm.is_model(name.split(".")[0].removeprefix("timm/")),
        f"no encoder is called {name}{nearest(name, [*ALIASES, *timm.list_models('vit*')])}: give a model of timm, one "
        f"of REPA's names ({', '.join(ALIASES)}), or a folder with its config.json and weights",
    )
    if not pretrained:
        return timm.create_model(name, pretrained=False, num_classes=0)
    with reached() as unreached:
        try:
            return timm.create_model(name, pretrained=True, num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            failure = error
        # the hub's own message has many lines; the first says what failed
        reason = unreached or (str(failure).strip() or type(failure).__name__).split("\n")[0]
        hub = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else f"timm/{name}"
        raise UserError(
            f"the weights of encoder {name} are neither local nor available from the hub ({reason}); on a machine with "
            f"a network, run: hf download {hub}; or give the file with --align-encoder-weights (training) or "
            f"--encoder-weights (probe)"
        ) from failure


def _load(model: nn.Module, file: Path, name: str) -> None:
    """Load a local weight file, in timm's or the authors' layout, without a classifier."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    require(file.is_file(), f"encoder {name}: {file} is missing; give the file that holds its weights")
    tensors = timm_weights(file, name)
    if isinstance(model, VisionTransformer):
        tensors = checkpoint_filter_fn(tensors, model)
        tensors = {key: value for key, value in tensors.items() if not key.startswith("head.")}
    load_strictly(model, tensors, file, name)
