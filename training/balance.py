"""How hard each alignment pulls beside denoising: the ratio of their gradient norms, measured now and then.

    ratio = || grad lambda L_align || / || grad L_diff ||

over the parameters of the network that both losses reach (embeddings and the blocks up to the tapped one), for the global
batch of a step, at the weights before it. The two gradients are computed apart from the step's own, so that the run's
numbers are the same bits with and without.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from loss import Batch

PREFIX = "grad_norm_ratio/"
LOW, HIGH = 0.01, 3.0
"""Below, an alignment hardly acts; above, it outweighs denoising. Healthy runs of the digits: 0.03 to 1.2."""
ROW = 3
"""Measurements in a row outside the band that are worth a word: near initialisation, and in single batches, ratios stray."""


def ratios(
    learner: nn.Module, micros: list[Batch], weights: Mapping[str, float], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Each alignment's ratio, a scalar on the device; `learner` may be wrapped. Nothing waits for the device.

    Costs a forward and a backward pass for denoising and for each alignment: with one of them, about two steps.
    """
    inner = accelerator.unwrap_model(learner)  # DDP's own reduction is for the gradients of a step
    denoising = _squares(inner, micros, "diffusion", 1.0, accelerator)
    found = {}
    for name, weight in weights.items():
        aligning = _squares(inner, micros, name, weight, accelerator)
        found[name] = (sum(aligning.values()) / sum(denoising[key] for key in aligning)).sqrt()
    return found


def _squares(
    learner: nn.Module, micros: list[Batch], name: str, weight: float, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Squared norm of the gradient of one weighted loss, averaged over micro-batches and processes, by parameter that it reaches."""
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
    """Says once when an alignment has left the band, and again only after it has been back."""

    def __init__(self) -> None:
        self._row: dict[str, tuple[str, int]] = {}

    def __call__(self, values: Mapping[str, float]) -> list[str]:
        """What to say of the ratios among the values of a report."""
        said = []
        for key, ratio in values.items():
            if not key.startswith(PREFIX):
                continue
            side = "above" if ratio > HIGH else "below" if ratio < LOW else "inside"
            before, count = self._row.get(key, ("", 0))
            self._row[key] = side, count + 1 if side == before else 1
            if side != "inside" and self._row[key][1] == ROW:
                said.append(self._words(key.removeprefix(PREFIX), ratio, side))
        return said

    @staticmethod
    def _words(name: str, ratio: float, side: str) -> str:
        what = (
            f"has been above {HIGH:g} {ROW} times in a row: it outweighs denoising; a lower --align-weight, or an earlier stop,"
            if side == "above"
            else f"has been below {LOW:g} {ROW} times in a row: it hardly acts; a higher --align-weight"
        )
        return f"warning: the gradient-norm ratio of {name} to denoising, now {ratio:.3g}, {what} may help (docs/long-runs.md)"
