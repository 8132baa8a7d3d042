"""The registry of architectures and their sizes, and what makes a network of them.

To add an architecture, write a file with a subclass of `Backbone`, which registers itself, and import the file below
(docs/adding-a-backbone.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models import sit, lightningdit  # noqa: F401 - the import registers them; SiT comes first  # isort: skip
from models.backbone import (
    ARCHITECTURES,
    CONDITION,
    QK,
    VELOCITY,
    Backbone,
    ModelSpec,
    Output,
    Tap,
    check_weights,
    initial_weights,
    parameter_count,
)
from models.layers import patchify, unpatchify
from runtime.errors import UserError, nearest, require

__all__ = [
    "ARCHITECTURES",
    "CONDITION",
    "QK",
    "VELOCITY",
    "Backbone",
    "ModelSpec",
    "Output",
    "Tap",
    "architecture",
    "build",
    "check_weights",
    "names",
    "outline",
    "parameter_count",
    "patchify",
    "require_finite",
    "spec",
    "unpatchify",
]


def names() -> list[str]:
    """Every registered model."""
    return [name for kind in ARCHITECTURES.values() for name in kind.sizes]


def spec(name: str, *, in_channels: int, input_size: int, num_classes: int, qk_norm: bool = False) -> ModelSpec:
    """The registered model `name` on latents (in_channels, input_size, input_size).

    Raises:
        UserError: no such model, or a latent that its patches do not tile.
    """
    for kind in ARCHITECTURES.values():
        if name in kind.sizes:
            depth, hidden_size, num_heads, patch_size = kind.sizes[name]
            return ModelSpec(
                name=name,
                architecture=kind.architecture,
                depth=depth,
                hidden_size=hidden_size,
                num_heads=num_heads,
                patch_size=patch_size,
                in_channels=in_channels,
                input_size=input_size,
                num_classes=num_classes,
                qk_norm=qk_norm,
            )
    raise UserError(f"no model is called {name}{nearest(name, names())}; there are {', '.join(names())}")


def architecture(spec: ModelSpec) -> type[Backbone]:
    """The class of the network that `spec` describes. Raises UserError if its architecture is not registered."""
    if spec.architecture not in ARCHITECTURES:
        raise UserError(
            f"no architecture is called {spec.architecture}{nearest(spec.architecture, ARCHITECTURES)}; there are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[spec.architecture]


def outline(spec: ModelSpec, *, depth: int | None = None) -> Backbone:
    """The network on the meta device: names and shapes, no weights."""
    with torch.device("meta"):
        return architecture(spec)(spec, depth)


def build(
    spec: ModelSpec, *, seed: int = 0, depth: int | None = None, weights: Mapping[str, Tensor] | None = None
) -> Backbone:
    """A float32 network on the CPU, with `weights` or, without them, freshly initialised from `seed`.

    The global random generator is neither read nor moved. With `depth`, only the first blocks and no final layer are
    built (a teacher read at a block); `weights` then has the names of `outline(spec, depth=depth)` and no others.

    Raises:
        UserError: `depth` beyond the network, or weights that do not fit exactly.
    """
    network = outline(spec, depth=depth)
    if weights is None:
        network.load_state_dict(initial_weights(network, seed), assign=True)
    else:
        check_weights(network, weights, spec.name)
        copies = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
        network.load_state_dict(copies, assign=True)
    return network


def require_finite(weights: Mapping[str, Tensor], where: object) -> None:
    """Raise UserError, naming the tensor, if a weight is infinite or not a number."""
    for name, value in weights.items():
        require(
            not value.is_floating_point() or bool(torch.isfinite(value).all()),
            f"{where} holds numbers that are not finite, first in {name}; use another checkpoint",
        )
