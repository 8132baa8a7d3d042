"""Muon for the blocks' matrices and AdamW for the rest, as one optimiser.

    B <- mu B + (1 - mu) G,    O = orthogonalised (1 - mu) G + mu B,    W <- W - 0.2 sqrt(max(rows, columns)) lr O

with mu = 0.95: `torch.optim.Muon`, with steps scaled to AdamW's (Moonlight, arXiv 2502.16982), so that both take one
rate. A weight may hold several matrices (queries, keys and values; a block's six modulations). Each is orthogonalised
by itself, as the backbone declares them (`Backbone.matrices`): as one matrix they hold Muon back in diffusion
transformers (CMuon, arXiv 2608.02502).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import Backbone

GROUP = "network/muon"
MOMENTUM = 0.95


class Muon:
    """The part of an optimiser's interface that a run uses: groups, state, `step` and `zero_grad`.

    torch's optimisers refuse views, so each matrix of a weight is its own parameter over the weight's storage. `parts`
    has their names (`name[number]`, from 0), under which a checkpoint saves their state. Between steps they have no
    gradient.

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
        """Take both steps, from the gradients of the network's and the heads' parameters."""
        for weight, parts in self._split:
            if weight.grad is not None:
                for part, gradient in zip(parts, weight.grad.chunk(len(parts)), strict=True):
                    part.grad = gradient
        # the run removes the groups of heads that have ended
        self._adamw.param_groups = [group for group in self.param_groups if group["name"] != GROUP]
        before = []
        # AdamW's fused kernel skips the step by itself; Muon's values are restored afterwards
        if self.found_inf is not None:
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            before = [
                (value, value.clone())
                for part in self._muon.param_groups[0]["params"]
                for value in (part, self.state[part].setdefault("momentum_buffer", torch.zeros_like(part)))
            ]
        self._adamw.step()
        self._muon.step()
        for value, earlier in before:
            torch.where(self.found_inf.bool(), earlier, value, out=value)  # type: ignore[union-attr]
        for part in self.parts:
            part.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in [*members, *(weight for weight, _ in self._split)]:
            parameter.grad = None
