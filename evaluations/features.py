"""Feature extractors: uint8 images to the vectors that the metrics compare. Each owns its preprocessing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.archives import read_weights
from models.encoders import open_folder
from runtime import files
from runtime.arithmetic import exact_arithmetic
from runtime.errors import UserError, nearest

SCENES = "scenes"
MAX_PIXELS = 4096  # the covariance of D features takes 8 D^2 bytes


class Features(NamedTuple):
    """pool (n, D) for the Frechet distance, precision and recall; spatial (n, S) for sFID, where there is one."""

    pool: Tensor
    spatial: Tensor | None = None


class Extractor(Protocol):
    """A frozen network, or none. `head` (K, D) turns pool features into the Inception Score's logits, if it exists."""

    name: str
    weights: str | None  # SHA-256 of the weights file
    head: Tensor | None
    note: str | None  # to be printed with every result
    device: torch.device

    def __call__(self, images: Tensor) -> Features:
        """uint8 images (n, H, W, C), on any device, to float32 features on `device`. UserError where it cannot."""
        ...


class Pixels:
    """The image itself, flattened, uint8 / 127.5 - 1: for images so small that pixels are features (the digits)."""

    name = "pixels"
    weights = head = note = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, images: Tensor) -> Features:
        count = images[0].numel()
        if count > MAX_PIXELS:
            raise UserError(f"pixels are features for images of at most {MAX_PIXELS} values, these have {count}; "
                            "use --features inception")
        with exact_arithmetic():
            return Features(images.to(self.device).flatten(1).float() / 127.5 - 1)


class Timm:
    """Pooled features of a timm model: `timm:NAME` or `timm:NAME@SIDE` (images scaled to SIDE, else to its own size).

    NAME may be a folder that timm's `save_for_hf` wrote; `scenes` is the one of this package that knows the scenes.

    `timm:vit_large_patch14_dinov2.lvd142m@224` gives the features of FD-DINOv2 (Stein et al., 2023). The whole image is
    scaled, bicubic and antialiased, without a crop.

    weights: safetensors or PyTorch file of a state dict, in timm's layout or one that timm converts; None takes the
    published weights from the hub's cache, or downloads them.

    Raises:
        UserError: no such model, its weights absent and out of reach, or a file that is not this model's.
    """

    head = note = None

    def __init__(self, name: str, weights: Path | str | None = None, device: torch.device | str = "cpu") -> None:
        self.name, self.device = name, torch.device(device)
        model_name, _, side = (name.removeprefix("timm:") if name != SCENES else str(Path(__file__).with_name(SCENES))).partition("@")
        kept = Path(model_name) / "model.safetensors"
        self.weights = checked_digest(Path(weights)) if weights else files.digest(kept) if kept.is_file() else None
        if side and not side.isdecimal():
            raise UserError(f"--features {name}: {side} is not a size in pixels; write timm:NAME@224")
        self._model = _timm_model(model_name, weights).eval().requires_grad_(False).to(self.device)
        source = self._model.pretrained_cfg
        self._side = int(side) if side else source["input_size"][1]
        if side and hasattr(self._model, "set_input_size"):
            self._model.set_input_size(img_size=(self._side, self._side))
        self._mean, self._std = (torch.tensor(source[key], device=self.device)[:, None, None]
                                 for key in ("mean", "std"))

    def __call__(self, images: Tensor) -> Features:
        with exact_arithmetic():
            x = images.to(self.device).permute(0, 3, 1, 2).float() / 255
            size = (self._side, self._side)
            x = nn.functional.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
            return Features(self._model((x - self._mean) / self._std).float())  # broadcasts grey to three channels


def _timm_model(name: str, weights: Path | str | None) -> nn.Module:
    import timm

    if (Path(name) / "config.json").is_file():
        if weights is not None:
            raise UserError(f"--features timm:{name} is a folder with weights of its own: leave out --feature-weights")
        return open_folder(Path(name))
    if not timm.is_model(name):
        raise UserError(f"--features timm:{name}: timm has no such model{nearest(name, timm.list_models())}; see timm.list_models()")
    if weights is None:
        try:
            return timm.create_model(name, pretrained=True, num_classes=0)
        except (OSError, RuntimeError) as error:
            raise UserError(f"the weights of timm's {name} are neither in the cache nor within reach "
                            f"({str(error).splitlines()[0]}); give them as --feature-weights FILE") from error
    try:
        return timm.create_model(name, pretrained=True, num_classes=0,
                                 pretrained_cfg_overlay={"state_dict": read_weights(weights)})
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{weights} holds no weights of timm's {name} ({str(error).splitlines()[0]}); give its own") from error


def checked_digest(path: Path) -> str:
    """SHA-256 of a weights file; UserError where it differs from the eight hexadecimal digits in the file's name."""
    if not path.is_file():
        raise UserError(f"there is no weights file {path}; check the path")
    digest = files.digest(path)
    named = re.search(r"-([0-9a-f]{8})\.[^.]+$", path.name)
    if named and not digest.startswith(named[1]):
        raise UserError(f"{path} is damaged: its SHA-256 begins with {digest[:8]}, not {named[1]}; fetch it again")
    return digest
