"""The gradient norm of each alignment relative to that of denoising, measured now and then.

    ratio = || grad lambda L_align || / || grad L_diff ||

over the parameters of the network that both losses reach (embeddings and the blocks up to the tapped one), for the
global batch of a step, at the weights before it. Both gradients are computed apart from the step's own, so the bits of
the run do not change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from loss import Batch, Learner

PREFIX = "grad_norm_ratio/"
# Below LOW an alignment has little effect; above HIGH it outweighs denoising. Healthy digits runs: 0.03 to 1.2.
LOW, HIGH = 0.01, 3.0
# Measurements in a row outside the band before a warning: near initialisation and in single batches ratios stray.
ROW = 3


def ratios(
    learner: nn.Module, micros: list[Batch], weights: Mapping[str, float], accelerator: Accelerator
) -> dict[str, Tensor]:
    """The ratio of each alignment, a scalar on the device. `learner` may be wrapped. Nothing waits for the device.

    Costs a forward and a backward pass for denoising and for each alignment: about two steps for one alignment.
    """
    inner: Learner = accelerator.unwrap_model(learner)  # DDP would reduce these gradients as those of a step
    denoising = _squares(inner, micros, "diffusion", 1.0, accelerator)
    ratios, zero = {}, torch.zeros((), device=accelerator.device)
    for name, weight in weights.items():
        aligning = _squares(inner, micros, name, weight, accelerator)
        ratios[name] = (sum(aligning.values(), zero) / sum((denoising[key] for key in aligning), zero)).sqrt()
    return ratios


def _squares(
    learner: Learner, micros: list[Batch], name: str, weight: float, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Squared gradient norm of one weighted loss, by parameter that it reaches.

    The gradient is averaged over micro-batches and processes.
    """
    names, parameters = zip(*learner.network.named_parameters(), strict=True)
    gradients: list[Tensor | None] = []
    for batch in micros:
        loss = weight * learner(batch)[name].mean() / len(micros)
        more = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = (
            [a if a is None else a + b for a, b in zip(gradients, more, strict=True)] if gradients else list(more)
        )
    return {
        key: accelerator.reduce(gradient, "mean").float().square().sum()
        for key, gradient in zip(names, gradients, strict=True)
        if gradient is not None
    }


class RatioMonitor:
    """Warns once when an alignment leaves the band, and again only after it came back."""

    def __init__(self) -> None:
        self._row: dict[str, tuple[str, int]] = {}

    def __call__(self, values: Mapping[str, float]) -> list[str]:
        """Warnings about the ratios among the values of a report."""
        warnings = []
        for key, ratio in values.items():
            if not key.startswith(PREFIX):
                continue
            side = "above" if ratio > HIGH else "below" if ratio < LOW else "inside"
            before, count = self._row.get(key, ("", 0))
            self._row[key] = side, count + 1 if side == before else 1
            if side != "inside" and self._row[key][1] == ROW:
                warnings.append(self._words(key.removeprefix(PREFIX), ratio, side))
        return warnings

    @staticmethod
    def _words(name: str, ratio: float, side: str) -> str:
        bound, effect, remedy = {
            "above": (HIGH, "it outweighs denoising", "a lower --align-weight or an earlier stop"),
            "below": (LOW, "it has little effect", "a higher --align-weight"),
        }[side]
        return (
            f"warning: the gradient-norm ratio of {name} to denoising, now {ratio:.3g}, has been {side} {bound:g} "
            f"{ROW} times in a row: {effect}; {remedy} may help (docs/long-runs.md)"
        )
