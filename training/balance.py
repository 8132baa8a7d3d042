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
# Before this step ratios are large for every method: the last layer starts at zero, and through it denoising hardly
# reaches the blocks. On the digits at a rate of 1e-4, `latent`, `repa` and `dispersive` had 1.3 to 4.8 at step 30 and
# 0.02 to 0.3 at step 100.
SETTLED = 100
# Measurements in a row on a side of the band before something is said: too much is said at once, for an alignment may
# last a few hundred steps, and single batches stray towards little.
ROW = {"above": 1, "below": 3, "inside": 3}


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
    """Warns once when an alignment leaves the band, and again only after it came back.

    Args:
        weights: of each alignment, without its schedule.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        # alignment -> its side of the band, and the measurements in a row there; the side that was last spoken of
        self._row: dict[str, tuple[str, int]] = {}
        self._known: dict[str, str] = {}

    def __call__(self, step: int, ratios: Mapping[str, float]) -> list[str]:
        """Warnings about the ratios measured in optimiser step `step`, from 1."""
        warnings = []
        for name, ratio in ratios.items() if step >= SETTLED else ():
            side = "above" if ratio > HIGH else "below" if ratio < LOW else "inside"
            before, count = self._row.get(name, ("", 0))
            self._row[name] = side, count + 1 if side == before else 1
            if self._row[name][1] >= ROW[side] and side != self._known.get(name, "inside"):
                self._known[name] = side
                if side != "inside":
                    warnings.append(self._words(step, name, ratio, side))
        return warnings

    def _words(self, step: int, name: str, ratio: float, side: str) -> str:
        if side == "above":
            return (
                f"warning: at step {step} the gradient norm of {name} is {ratio:.3g} times that of denoising: it "
                f"outweighs denoising; --{name}-weight {self._weights[name] / ratio:.2g} would bring it to 1 "
                f"(docs/training.md)"
            )
        return (
            f"warning: the gradient-norm ratio of {name} to denoising, now {ratio:.3g}, has been below {LOW:g} "
            f"{ROW[side]} times in a row: it has little effect; a higher --{name}-weight may help (docs/training.md)"
        )
