"""Muon on the blocks' matrices, AdamW on all else, as one optimiser.

    B <- mu B + (1 - mu) G,    O = orthogonalised (1 - mu) G + mu B,    W <- W - 0.2 sqrt(max(rows, columns)) lr O

with mu = 0.95: `torch.optim.Muon`, whose steps are scaled to AdamW's (Moonlight, arXiv 2502.16982), so that both take one rate. A
weight that holds several matrices (queries, keys and values; a block's six modulations) is orthogonalised matrix by matrix, as the
backbone declares them (`Backbone.matrices`): taken whole they hold Muon back in diffusion transformers (CMuon, arXiv 2608.02502).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import Backbone

GROUP = "network/muon"
MOMENTUM = 0.95


class Muon:
    """What a run needs of an optimiser: groups, state, `step` and `zero_grad`.

    torch's optimisers refuse a view, so each matrix of a weight is a parameter of its own over the weight's storage: `parts` has
    their names, `name[number]` from 0, under which a checkpoint keeps their state. Between steps they have no gradient.

    Args:
        adamw: the optimiser of every other parameter.
    """

    found_inf: Tensor | None = None
    """() float32, on the device: not 0 where the step is not to be taken. The host need not look at it."""

    def __init__(self, network: Backbone, adamw: torch.optim.AdamW, *, lr: float, weight_decay: float) -> None:
        weights, self.parts, matrices = dict(network.named_parameters()), {}, []
        self._split: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
        for name, count in network.matrices().items():
            parts = [weights[name]]
            if count > 1:
                parts = [nn.Parameter(part) for part in weights[name].detach().chunk(count)]
                self._split.append((weights[name], parts))
                self.parts |= {part: f"{name}[{number}]" for number, part in enumerate(parts)}
            matrices += parts
        self._adamw = adamw
        self._muon = torch.optim.Muon(
            [{"name": GROUP, "params": matrices}],
            lr=lr,
            weight_decay=weight_decay,
            momentum=MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        self.param_groups = [*adamw.param_groups, *self._muon.param_groups]
        self.state = self._muon.state = adamw.state

    @torch.no_grad()
    def step(self) -> None:
        """Both steps, from the gradients of the network's and the heads' own parameters."""
        for weight, parts in self._split:
            if weight.grad is not None:
                for part, gradient in zip(parts, weight.grad.chunk(len(parts)), strict=True):
                    part.grad = gradient
        self._adamw.param_groups = [
            group for group in self.param_groups if group["name"] != GROUP
        ]  # those of ended heads are gone
        before = []
        if self.found_inf is not None:  # AdamW's fused kernel looks at it itself
            self._adamw.found_inf = self.found_inf
            before = [
                (value, value.clone())
                for part in self._muon.param_groups[0]["params"]
                for value in (part, self.state[part].setdefault("momentum_buffer", torch.zeros_like(part)))
            ]
        self._adamw.step()
        self._muon.step()
        for value, earlier in before:
            torch.where(self.found_inf != 0, earlier, value, out=value)
        for part in self.parts:
            part.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for parameter in [
            *(p for group in self.param_groups for p in group["params"]),
            *(weight for weight, _ in self._split),
        ]:
            parameter.grad = None
