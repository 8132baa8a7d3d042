"""The optimiser of a run: AdamW, or Muon beside it; and its state under the names of parameters, as a checkpoint keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from config import TrainConfig
from models import Backbone
from runtime.errors import UserError
from training.muon import Muon


def build(
    config: TrainConfig, network: Backbone, heads: Mapping[str, nn.Module], fused: bool
) -> torch.optim.Optimizer | Muon:
    """The optimiser of `network` and of the trained parameters of `heads`, a group each, by their names.

    Args:
        fused: one kernel for all of AdamW; else its loop over parameters, whose bits earlier runs on a CPU in float32 have.
    """
    matrices = network.matrices() if config.optimizer == "muon" else {}
    groups = [{"name": "network", "params": [p for name, p in network.named_parameters() if name not in matrices]}]
    groups += [
        {"name": name, "params": parameters} for name, head in heads.items() if (parameters := list(head.parameters()))
    ]
    adamw = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=fused,
    )
    return Muon(network, adamw, lr=config.learning_rate, weight_decay=config.adam_weight_decay) if matrices else adamw


def state_of(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> tuple[dict[str, Tensor], list[dict]]:
    """The optimiser's state by parameter name: tensors under 'name/slot', and its groups as JSON values."""
    tensors = {
        f"{names[parameter]}/{slot}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for slot, value in state.items()
    }
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [names[p] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    return tensors, json.loads(json.dumps(groups))


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> None:
    """Give each parameter the state saved under its name, on its device. State of unknown names is refused."""
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        if name not in parameters:
            raise UserError(f"the optimiser state names {name}, which this run does not train")
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU unless fused or capturable
        device = (
            "cpu"
            if slot == "step" and not any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
            else parameter.device
        )
        optimizer.state[parameter][slot] = value.to(device)
