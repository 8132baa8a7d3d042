"""What may continue what: finding a run's checkpoint, refusing one that does not fit, and restoring it.

A run is continued under the options, data and precision that it had; what may change is listed in `config.FREE_ON_RESUME`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from config import FREE_ON_RESUME
from models import checkpoint
from models.checkpoint import Checkpoint
from runtime import launch
from runtime.errors import UserError, require
from runtime.options import as_dict
from training.setup import Setup


def find(folder: Path, setup: Setup, dtype: torch.dtype | None) -> Checkpoint | None:
    """The latest checkpoint of the run in `folder`, None where there is none yet.

    Raises:
        UserError: it is of another network, data set, precision or options.
    """
    latest = checkpoint.latest(folder)
    if latest is None:
        return None
    earlier = Checkpoint.open(latest)
    _require_same(folder, earlier, setup, dtype)
    return earlier


def _require_same(folder: Path, earlier: Checkpoint, setup: Setup, dtype: torch.dtype | None) -> None:
    """Refuse to continue a run under options, data or an architecture that are not its own."""
    where, config = f"{folder} cannot be continued", setup.config
    require(earlier.spec == setup.spec, f"{where}: its network is {differences(earlier.spec.to_json(), setup.spec.to_json())}; "
                                        f"use its --model, or another --exp-name")
    require(earlier.config["data"]["digest"] == setup.data.digest, f"{where}: {config.data_dir} is another latent set "
                                                                   f"than the one it was trained on; use another --exp-name")
    precision = launch.precision_name(dtype)
    require(earlier.config["precision"] == precision, f"{where}: it was trained in {earlier.config['precision']}, not {precision}; "
                                                      f"say --mixed-precision {'no' if dtype else 'bf16'}")
    now = json.loads(json.dumps({"train": as_dict(config), **{name: as_dict(chosen) for name, chosen in setup.options.items()}}))
    then = {"train": earlier.config["train"], **earlier.config["align"]}
    require(now.keys() == then.keys(), f"{where}: its alignments are {list(then)[1:]}, not {list(now)[1:]}; "
                                       f"use another --exp-name")
    for section, values in now.items():
        for key, value in values.items():
            if key not in FREE_ON_RESUME and then[section].get(key) != value:
                raise UserError(f"{where}: its {key.replace('_', '-')} is {then[section].get(key)}, not {value}; "
                                f"use the same options, or another --exp-name")


def network(setup: Setup, earlier: Checkpoint | None) -> models.Backbone:
    """The network that training goes on with: of the run's checkpoint, of `--init-ckpt`, or fresh."""
    if earlier is not None:
        return models.build(setup.spec, weights=earlier.tensors("network"))
    if setup.config.init_ckpt is None:
        return models.build(setup.spec, seed=setup.config.seed)
    source = Checkpoint.open(setup.config.init_ckpt)
    difference = source.space.difference(setup.data.space)
    require(difference is None,
            f"--init-ckpt {source.path} was trained on other latents than {setup.config.data_dir} ({difference})")
    return start_from(source, setup.spec, setup.config.seed)


def start_from(source: Checkpoint, spec: models.ModelSpec, seed: int) -> models.Backbone:
    """A network with the EMA weights of `source`; the label table is fresh where the classes differ.

    Raises UserError where anything else differs.
    """
    same = dataclasses.replace(source.spec, num_classes=spec.num_classes)
    require(same == spec, f"--init-ckpt {source.path} does not fit: its network is {differences(same.to_json(), spec.to_json())}")
    tensors = source.tensors("ema" if "ema.safetensors" in source.config["files"] else "network")
    if source.spec.num_classes != spec.num_classes:
        table = "y_embedder.embedding_table.weight"
        tensors[table] = models.build(spec, seed=seed).state_dict()[table]
    return models.build(spec, weights=tensors)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """'key old (not new)' for each key whose value has changed."""
    return ", ".join(f"{key} {then[key]} (not {now[key]})" for key in then if then[key] != now[key])


def teacher_loader(folder: Path, resolved: Mapping[str, Any]) -> Callable[[str], Checkpoint]:
    """Opens a teacher's checkpoint: for a resumed run the very one it began with, though that run may have gone on since."""
    began_with = {choices["guiding_ckpt"]: choices["teacher"] for choices in resolved.values() if "teacher" in choices}

    def load(path: str) -> Checkpoint:
        if path not in began_with:
            return Checkpoint.open(path)
        teacher = Checkpoint.open(began_with[path]["path"])
        require(teacher.digest == began_with[path]["digest"],
                f"{folder} cannot be continued: its teacher {teacher.path} has changed since; use another --exp-name")
        return teacher

    return load


def restore(earlier: Checkpoint, ema: nn.Module, alignments: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer,
            names: Mapping[Tensor, str]) -> None:
    """Load the checkpoint's EMA, the heads of the living `alignments`, and the optimiser state of the parameters in `names`."""
    ema.load_state_dict(earlier.tensors("ema"))
    if alignments and "heads.safetensors" in earlier.config["files"]:
        heads = earlier.tensors("heads")
        for name, alignment in alignments.items():
            alignment.load_state_dict({key.removeprefix(f"{name}."): value for key, value in heads.items()
                                       if key.startswith(f"{name}.")})
    living = ("network.", *(f"{name}." for name in alignments))
    state = {key: value for key, value in earlier.tensors("optimizer").items() if key.startswith(living)}
    checkpoint.restore_optimizer(optimizer, state, names)
