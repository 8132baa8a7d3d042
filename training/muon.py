"""Muon for the blocks' matrices and AdamW for the rest, as one optimiser.

    B <- mu B + (1 - mu) G,    O = orthogonalised (1 - mu) G + mu B,    W <- W - 0.2 sqrt(max(rows, columns)) lr O

with mu = 0.95 and steps scaled to AdamW's (Moonlight, arXiv 2502.16982), so that both take one rate. A weight may hold
several matrices (queries, keys and values; a block's six modulations). Each is orthogonalised by itself, as the
backbone declares them (`Backbone.matrices`): as one matrix they hold Muon back in diffusion transformers (CMuon, arXiv
2608.02502). All matrices of one shape are orthogonalised in one batch.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import torch
from torch import Tensor, nn

from models import Backbone

GROUP = "network/muon"
MOMENTUM = 0.95
# Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon: X <- a X + (b A + c A^2) X with A = X X^T
COEFFICIENTS, ITERATIONS, EPSILON = (3.4445, -4.7750, 2.0315), 5, 1e-7
PRECISION = torch.bfloat16


def orthogonalised(x: Tensor) -> Tensor:
    """(k, rows, columns): each matrix with its singular values moved to about 1 (0.7 to 1.2), in `PRECISION`."""
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPSILON)).to(PRECISION)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def flops(network: Backbone) -> int:
    """FLOPs of orthogonalising the matrices of `network` once, as each step does; nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    weights = dict(network.named_parameters())
    with FlopCounterMode(display=False) as counter:
        for name, count in network.matrices().items():
            rows, columns = weights[name].shape
            orthogonalised(torch.empty(count, rows // count, columns, device="meta"))
    return counter.get_total_flops()


class Muon:
    """The part of an optimiser's interface that a run uses: groups, state, `step` and `zero_grad`.

    Each matrix of a weight that holds several is a parameter over the weight's storage. `parts` has their names
    (`name[number]`, from 0), under which a checkpoint saves their state. Between steps they have no gradient.

    Args:
        adamw: the optimiser of every other parameter.
    """

    # () float32 on the device: not 0 if the step must be skipped. The host never reads it.
    found_inf: Tensor | None = None

    def __init__(self, network: Backbone, adamw: torch.optim.AdamW, *, lr: float, weight_decay: float) -> None:
        weights = dict(network.named_parameters())
        self.parts: dict[nn.Parameter, str] = {}
        matrices: list[nn.Parameter] = []
        self._split: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
        for name, count in network.matrices().items():
            parts = [weights[name]]
            # each matrix becomes a parameter over the weight's own storage, so an update of one is an update of both
            if count > 1:
                parts = [nn.Parameter(part) for part in weights[name].detach().chunk(count)]
                self._split.append((weights[name], parts))
                self.parts |= {part: f"{name}[{number}]" for number, part in enumerate(parts)}
            matrices += parts
        self._adamw, self.state = adamw, adamw.state
        self._group: dict[str, Any] = {"name": GROUP, "params": matrices, "lr": lr, "weight_decay": weight_decay}
        self.param_groups = [*adamw.param_groups, self._group]

    @torch.no_grad()
    def step(self) -> None:
        """Take both steps, from the gradients of the network's and the heads' parameters."""
        for weight, parts in self._split:
            if weight.grad is not None:
                for part, gradient in zip(parts, weight.grad.chunk(len(parts)), strict=True):
                    part.grad = gradient
        # the run removes the groups of heads that have ended
        self._adamw.param_groups = [group for group in self.param_groups if group["name"] != GROUP]
        if self.found_inf is not None:
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        stacks = collections.defaultdict(list)
        for part in self._group["params"]:
            if part.grad is not None:
                stacks[part.shape].append(part)
        for alike in stacks.values():
            self._step(alike)
        for part in self.parts:
            part.grad = None

    def _step(self, matrices: list[Tensor]) -> None:
        """Muon's step of `matrices` of one shape."""
        lr, decay = self._group["lr"], self._group["lr"] * self._group["weight_decay"]
        rate = 0.2 * math.sqrt(max(matrices[0].shape)) * lr
        gradients = torch.stack([matrix.grad for matrix in matrices])  # type: ignore[misc]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        keep: Tensor | float = 1.0
        # a skipped step multiplies by 1 and adds 0: nothing is read by the host, nothing has to be restored
        if self.found_inf is not None:
            skip = self.found_inf != 0
            keep, gradients = (~skip).to(gradients.dtype), gradients.masked_fill(skip, 0)
        gradients *= 1 - MOMENTUM
        torch._foreach_mul_(buffers, 1 - (1 - MOMENTUM) * keep)
        torch._foreach_add_(buffers, list(gradients.unbind()))
        moves = orthogonalised(gradients.add_(torch.stack(buffers), alpha=MOMENTUM)).to(gradients.dtype)
        torch._foreach_mul_(matrices, 1 - decay * keep)
        torch._foreach_sub_(matrices, list((moves * (rate * keep)).unbind()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in [*members, *(weight for weight, _ in self._split)]:
            parameter.grad = None
