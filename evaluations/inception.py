"""The Inception network of FID ("2015-12-05"), with ADM's preprocessing and ADM's choice of features.

The blocks are torch-fidelity's, whose parameter names the published weights use. This file holds the steps around them,
each of which has a wrong variant that shifts the numbers: TensorFlow 1's bilinear resize without half-pixel centres,
(x - 128) / 128, sFID's features taken after the activation and flattened in (H, W, C) order, logits without bias.
"""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluations.features import MAX_PIXELS, Extractor, Features, checked_digest
from models.archives import read_weights
from runtime import files
from runtime.arithmetic import exact_arithmetic
from runtime.errors import UserError

DIGEST = "6726825d"
FILE = f"weights-inception-2015-12-05-{DIGEST}.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SIDE = 299
SPATIAL_CHANNELS = 7  # of the 192 of mixed_6/conv: 17 * 17 * 7 = 2023 features


class Inception(Extractor):
    """Pool features (2048) for FID, Inception Score, precision and recall, spatial features (2023) for sFID.

    weights: file of the published weights, a plain state dict; None takes it from torch.hub's cache, or downloads it.

    Raises:
        UserError: there is neither file nor connection, the file's digest is not the one in its name, or the file
            is not such a state dict.
    """

    name = "inception"

    def __init__(self, weights: Path | str | None = None, device: torch.device | str = "cpu") -> None:
        path = Path(weights) if weights else published()
        self.device = torch.device(device)
        self.weights = checked_digest(path)
        self.note = (
            None
            if self.weights.startswith(DIGEST)
            else f"{path.name} is not the published network: its numbers cannot be compared with published ones"
        )
        network = build()
        try:
            network.load_state_dict(read_weights(path))
        except RuntimeError as error:
            raise UserError(f"{path} holds no weights of this network; get {FILE} from {URL}") from error
        network.eval().requires_grad_(False).to(self.device)
        self.head = network.get_parameter("fc.weight")  # (1008, 2048)
        self._layers = dict(network.named_children())
        del self._layers["fc"]

    def __call__(self, images: Tensor) -> Features:
        """uint8 (n, H, W, 3) of any size to pool (n, 2048) and spatial (n, 2023), float32."""
        if images.shape[-1] != 3:
            raise UserError(
                f"inception needs images of 3 channels, these have {images.shape[-1]}; use --features pixels"
            )
        with exact_arithmetic():
            x = (resize(images.to(self.device).permute(0, 3, 1, 2).float(), SIDE) - 128) / 128
            for name, layer in self._layers.items():
                if name == "Mixed_6d":  # TensorFlow's mixed_6/conv: one 1x1 convolution, cheap enough to run twice
                    spatial = layer.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
                x = layer(x)
            return Features(x.mean((2, 3)), spatial)


def build() -> nn.Sequential:
    """The network, randomly initialised, on the current device: children in order of execution, then `fc`."""
    from torch_fidelity.feature_extractor_inceptionv3 import (
        BasicConv2d,
        InceptionA,
        InceptionB,
        InceptionC,
        InceptionD,
        InceptionE_1,
        InceptionE_2,
    )

    return nn.Sequential(
        OrderedDict(
            Conv2d_1a_3x3=BasicConv2d(3, 32, kernel_size=3, stride=2),
            Conv2d_2a_3x3=BasicConv2d(32, 32, kernel_size=3),
            Conv2d_2b_3x3=BasicConv2d(32, 64, kernel_size=3, padding=1),
            MaxPool_1=nn.MaxPool2d(3, 2),
            Conv2d_3b_1x1=BasicConv2d(64, 80, kernel_size=1),
            Conv2d_4a_3x3=BasicConv2d(80, 192, kernel_size=3),
            MaxPool_2=nn.MaxPool2d(3, 2),
            Mixed_5b=InceptionA(192, pool_features=32),
            Mixed_5c=InceptionA(256, pool_features=64),
            Mixed_5d=InceptionA(288, pool_features=64),
            Mixed_6a=InceptionB(288),
            Mixed_6b=InceptionC(768, channels_7x7=128),
            Mixed_6c=InceptionC(768, channels_7x7=160),
            Mixed_6d=InceptionC(768, channels_7x7=160),
            Mixed_6e=InceptionC(768, channels_7x7=192),
            Mixed_7a=InceptionD(768),
            Mixed_7b=InceptionE_1(1280),
            Mixed_7c=InceptionE_2(2048),
            fc=nn.Linear(2048, 1008),
        )
    )


def resize(x: Tensor, side: int) -> Tensor:
    """TensorFlow 1's ResizeBilinear of float (n, C, H, W) to (n, C, side, side): source = target * (in / out).

    No half-pixel centres, no antialiasing; the last row and column are repeated. As two matrix products.
    """
    rows, columns = (_interpolation(size, side).to(x) for size in x.shape[2:])
    return rows @ x @ columns.T


def _interpolation(size: int, side: int) -> Tensor:
    """(side, size): each row holds the two weights of one target position; positions in float32, as in TensorFlow."""
    position = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
    low = position.floor().long()
    high = (low + 1).clamp(max=size - 1)
    share = position - low
    matrix = torch.zeros(side, size)
    matrix.scatter_add_(1, low[:, None], (1 - share)[:, None])
    return matrix.scatter_add_(1, high[:, None], share[:, None])


def published() -> Path:
    """The published weights in torch.hub's cache, downloaded on first use. Raises UserError if that fails."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.is_file():
        try:
            with (
                urllib.request.urlopen(URL, timeout=10) as source,
                files.replacing(path) as temporary,
                open(temporary, "wb") as target,
            ):
                shutil.copyfileobj(source, target)
        except (urllib.error.URLError, TimeoutError) as error:
            raise UserError(
                f"cannot download {FILE} ({getattr(error, 'reason', error)}); fetch {URL} elsewhere and "
                f"give it as --feature-weights FILE (evaluations.fdr: --inception-weights), or compare images of at "
                f"most {MAX_PIXELS:,} values (36 x 36 in colour) by --features pixels, on a scale of its own"
            ) from error
    return path
