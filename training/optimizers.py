"""The optimiser of a run (AdamW, or Muon with AdamW), and its state by parameter name, as a checkpoint stores it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from config import TrainConfig
from models import Backbone
from runtime.errors import UserError
from training.muon import Muon


def build(config: TrainConfig, network: Backbone, heads: Mapping[str, nn.Module]) -> torch.optim.Optimizer | Muon:
    """The optimiser of `network` and of the trained parameters of `heads`, a group each, by their names."""
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
        fused=True,  # one kernel for all parameters
    )
    return Muon(network, adamw, lr=config.learning_rate, weight_decay=config.adam_weight_decay) if matrices else adamw


def state_of(
    optimizer: torch.optim.Optimizer | Muon, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], list[dict]]:
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


def restore(
    optimizer: torch.optim.Optimizer | Muon, tensors: Mapping[str, Tensor], names: Mapping[Tensor, str]
) -> None:
    """Give each parameter the state saved under its name, on its device. State of unknown names is refused."""
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        if name not in parameters:
            raise UserError(f"the optimiser state names {name}, which this run does not train")
        parameter = parameters[name]
        optimizer.state[parameter][slot] = value.to(parameter.device)
