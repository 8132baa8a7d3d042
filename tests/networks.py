"""Networks and inputs that several tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import models

DATA = Path(__file__).parent / "data"


def inputs(spec: models.ModelSpec, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, spec.in_channels, spec.input_size, spec.input_size, generator=generator)
    return x, torch.rand(count, generator=generator), torch.arange(count) % (spec.num_classes + 1)


def perturbed(spec: models.ModelSpec, **arguments) -> models.Backbone:
    """A network none of whose weights is zero, so that every path carries signal."""
    network = models.build(spec, **arguments)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def parity(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights in a parity file, and everything else in it."""
    tensors = load_file(DATA / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return weights, {key: value for key, value in tensors.items() if not key.startswith("weights.")}
