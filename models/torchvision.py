"""torchvision's MobileNetV2 under timm's names, so that its published file serves wherever timm's network does.

torchvision's `mobilenet_v2-b0353104.pth` (IMAGENET1K_V1, BSD licence) fits timm's `mobilenetv2_100`: the tensors are
the same in the same order, and so are the outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.archives import read_weights
from runtime import files
from runtime.errors import UserError, require

MOBILENET = "mobilenetv2_100"
# SHA-256 of the published files, by name.
PUBLISHED = {"mobilenet_v2-b0353104.pth": "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"}


def timm_weights(path: Path | str, name: str) -> dict[str, Tensor]:
    """The state dict in `path` for timm's model `name`: as it is, or translated if it is torchvision's MobileNetV2.

    Raises:
        UserError: the file is damaged, or holds torchvision's MobileNetV2 and `name` is another network.
    """
    import timm
    from torchvision.models import mobilenet_v2

    published = PUBLISHED.get(Path(path).name)
    require(
        published is None or not Path(path).is_file() or files.digest(path) == published,
        f"{path} is not torchvision's file of that name: its SHA-256 is another; fetch it again",
    )
    tensors = read_weights(path)
    if "features.0.0.weight" not in tensors:
        return tensors
    # of both networks only the names count: on meta no weights are drawn
    with torch.device("meta"):
        source, own = mobilenet_v2(weights=None).state_dict(), timm.create_model(MOBILENET).state_dict()
    misfit = min(source.keys() ^ tensors.keys(), default=None)
    require(
        name.split(".")[0] == MOBILENET and misfit is None,
        f"{path} is of torchvision's MobileNetV2"
        + (f", but {misfit} does not fit it; fetch it again" if misfit else f", not of {name}: give timm:{MOBILENET}"),
    )
    # the order of the file may be another (safetensors sorts), the order of the modules is that of both networks
    return {name: tensors[published_name] for name, published_name in zip(own, source, strict=True)}


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], path: Path | str, name: str) -> None:
    """Load a state dict of timm's names into a model without its classifier.

    Raises UserError if a tensor is missing, unknown or of another shape.
    """
    classifier: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    own = model.state_dict().keys()
    try:
        model.load_state_dict({key: x for key, x in tensors.items() if key in own or not key.startswith(heads)})
    except RuntimeError as error:
        # the first line of torch's message names the class, the second line shows the first misfit
        raise UserError(
            f"{path} is of another network than {name} ({str(error).splitlines()[1].strip()}); give the file of this "
            f"one"
        ) from error
