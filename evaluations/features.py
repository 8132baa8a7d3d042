"""Feature extractors: uint8 images to the vectors that the metrics compare. Each owns its preprocessing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.encoders import is_convolutional, open_folder
from models.hub_client import reached
from models.torchvision import load_strictly, timm_weights
from runtime import files
from runtime.arithmetic import exact_arithmetic
from runtime.errors import UserError, nearest

MAX_PIXELS = 4096  # the covariance of D features takes 8 D^2 bytes


class Features(NamedTuple):
    """pool (n, D) for the Frechet distance, precision and recall; spatial (n, S) for sFID, if the network has it."""

    pool: Tensor
    spatial: Tensor | None = None


class Extractor:
    """Images to features. `head` (K, D) turns pool features into the Inception Score's logits, if it exists."""

    name: str
    device: torch.device
    weights: str | None = None  # SHA-256 of the weights file
    head: Tensor | None = None
    note: str | None = None  # printed with every result

    def __call__(self, images: Tensor) -> Features:
        """uint8 images (n, H, W, C) on any device to float32 features on `device`. Raises UserError if it cannot."""
        raise NotImplementedError


class Pixels(Extractor):
    """The flattened image, uint8 / 127.5 - 1: for images so small that pixels serve as features (the digits)."""

    name = "pixels"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, images: Tensor) -> Features:
        count = images[0].numel()
        if count > MAX_PIXELS:
            raise UserError(
                f"pixels are features for images of at most {MAX_PIXELS} values, these have {count}; "
                "use --features inception"
            )
        with exact_arithmetic():
            return Features(images.to(self.device).flatten(1).float() / 127.5 - 1)


class Timm(Extractor):
    """Pooled features of a timm model, as timm pools them: `timm:NAME` or `timm:NAME@SIDE`.

    Images are scaled to SIDE, by default to the model's own size. NAME may be a folder that timm's `save_for_hf` wrote.

    `timm:vit_large_patch14_dinov2.lvd142m@224` gives the features of FD-DINOv2 (Stein et al., 2023). The whole image is
    scaled, bicubic and antialiased, without a crop.

    weights: safetensors or PyTorch file of a state dict, in timm's layout, one that timm converts, or torchvision's
    (`models.torchvision`); None takes the published weights from the hub's cache, or downloads them.

    Raises:
        UserError: timm has no such model, its weights cannot be loaded, or the file belongs to another model.
    """

    def __init__(self, name: str, weights: Path | str | None = None, device: torch.device | str = "cpu") -> None:
        self.name, self.device = name, torch.device(device)
        model_name, _, side = name.partition(":")[2].partition("@")
        stored = Path(model_name) / "model.safetensors"
        self.weights = checked_digest(Path(weights)) if weights else files.digest(stored) if stored.is_file() else None
        if side and not side.isdecimal():
            raise UserError(f"--features {name}: {side} is not a size in pixels; write {name.partition('@')[0]}@224")
        model = _timm_model(name.partition("@")[0], model_name, weights)
        self._model = model.eval().requires_grad_(False).to(self.device)
        if is_convolutional(model):
            self._model.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
        source = self._model.pretrained_cfg
        # Releases of timm differ in the size that a saved folder states.
        own = getattr(getattr(self._model, "patch_embed", None), "img_size", None)
        self._side = int(side) if side else (own or source["input_size"][1:])[0]
        if (side or self._filling()) and hasattr(self._model, "set_input_size"):
            self._model.set_input_size(img_size=(self._side + self._filling(),) * 2)
        self._mean, self._std = (
            torch.tensor(source[key], device=self.device)[:, None, None] for key in ("mean", "std")
        )

    def __call__(self, images: Tensor) -> Features:
        with exact_arithmetic():
            x = images.to(self.device).permute(0, 3, 1, 2).float() / 255
            x = nn.functional.interpolate(x, (self._side, self._side), mode="bicubic", antialias=True)
            return Features(self._pooled(x).float())

    def _filling(self) -> int:
        """Pixels to add on the right and below."""
        return 0

    def _pooled(self, x: Tensor) -> Tensor:
        """Scaled images (n, C, side, side) to (n, D); the difference broadcasts grey to three channels."""
        return self._model((x.clamp(0, 1) - self._mean) / self._std)


class FDr(Timm):
    """`fdr:NAME@SIDE`: the features of a timm model that FDr compares, as in its authors' code (arXiv 2604.28190).

    With a class token, the features are that token after the final norm; otherwise the attention pool, or the mean of
    the tokens if the network has no such pool. A convolutional network gives the mean over space, without the norm of
    the head through which timm's own features pass. Images are scaled as for `timm:NAME`, but values that the bicubic
    weights carry beyond black and white are not clamped. If the patch does not divide the side (256 by 14), zeros are
    appended after the normalisation.

    The authors ran the networks under autocast in bfloat16; features here are float32.
    """

    def _filling(self) -> int:
        return -self._side % self._model.patch_embed.patch_size[0] if hasattr(self._model, "patch_embed") else 0

    def _pooled(self, x: Tensor) -> Tensor:
        x = nn.functional.pad((x - self._mean) / self._std, (0, self._filling()) * 2)
        features = self._model.forward_features(x)
        if features.ndim == 4:
            return features.mean((2, 3))
        if self._model.num_prefix_tokens:
            return features[:, 0]
        attention = getattr(self._model, "attn_pool", None)
        return features.mean(1) if attention is None else attention(features)


def _timm_model(given: str, name: str, weights: Path | str | None) -> Any:
    """A model of timm or of a folder. Any: nn.Module does not declare the attributes of timm's models."""
    import timm

    if (Path(name) / "config.json").is_file():
        if weights is not None:
            raise UserError(f"--features {given} is a folder with weights of its own: leave out --feature-weights")
        return open_folder(Path(name))
    if not timm.is_model(name):
        raise UserError(
            f"--features {given}: timm has no such model{nearest(name, timm.list_models())}; see timm.list_models()"
        )
    if weights is None:
        with reached() as unreached:
            try:
                return timm.create_model(name, pretrained=True, num_classes=0)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"the weights of timm's {name} are neither in the cache nor within reach "
                    f"({unreached or str(error).splitlines()[0]}); where there is a network, run: hf download "
                    f"timm/{name}; or give --feature-weights FILE where the command takes it"
                ) from error
    tensors = timm_weights(weights, name)
    # the networks of this module have one layout, so every tensor must be there
    if not hasattr(sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn"):
        model = timm.create_model(name, num_classes=0)
        load_strictly(model, tensors, weights, name)
        return model
    # through timm's own loader, which adapts published files to the model without its classifier, and is not strict
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"state_dict": tensors})
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"{weights} holds no weights of timm's {name} ({str(error).splitlines()[0]}); give its own"
        ) from error


def checked_digest(path: Path) -> str:
    """SHA-256 of a weights file. Raises UserError unless it begins with the eight digits in the file's name."""
    if not path.is_file():
        raise UserError(f"there is no weights file {path}; check the path")
    digest = files.digest(path)
    named = re.search(r"-([0-9a-f]{8})\.[^.]+$", path.name)
    if named and not digest.startswith(named[1]):
        raise UserError(f"{path} is damaged: its SHA-256 begins with {digest[:8]}, not {named[1]}; fetch it again")
    return digest
