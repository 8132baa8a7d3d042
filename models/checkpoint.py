"""Checkpoints that describe themselves: a folder of plain tensors and one readable JSON.

    0200000/
      config.json             model, latent space, data, options, step, teacher, versions, digest of every file
      network.safetensors     the trained network, published parameter names
      ema.safetensors         its exponential moving average; ema-0.9995.safetensors, ...: further averages
      heads.safetensors       the alignments' heads, apart, so that sampling never meets them
      optimizer.safetensors   optimiser state by parameter name; optimizer.json holds its groups

`Checkpoint.open` accepts such a folder, a run that holds some (its latest) or RUN@STEP, and needs nothing else to rebuild
the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from models import Backbone, ModelSpec, hub_client
from models.latents import LatentSpace
from runtime import files
from runtime.errors import UserError

FORMAT = 1


class Checkpoint:
    """A checkpoint on disk, read lazily: opening it reads the JSON alone."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.step: int = config["step"]
        self.files: dict[str, str] = config["files"]
        self.spec = ModelSpec.from_json(config["model"])
        self.space = LatentSpace.from_json(config["space"])

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Open a checkpoint folder, the latest checkpoint of a run folder, or RUN@STEP.

        Raises:
            UserError: nothing there, or a folder that is not a checkpoint.
        """
        folder = locate(path)
        config = files.read_json(folder / "config.json")
        if not isinstance(config, dict) or config.get("kind") != "checkpoint" or config.get("format") != FORMAT:
            raise UserError(f"{folder} is not a checkpoint of format {FORMAT}: its config.json says otherwise")
        try:
            return cls(folder, config)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}/config.json is damaged ({error}); use another checkpoint") from error

    @property
    def has_null(self) -> bool:
        """Whether the null label was trained: label dropout made it. Of imported weights it is taken for granted."""
        train = self.config.get("train")
        return train is None or train["cfg_prob"] > 0

    @property
    def epochs(self) -> float | None:
        """Passes over the data set that it was trained for; None of imported weights."""
        train, data = self.config.get("train"), self.config.get("data")
        if not train or not data:
            return None
        return self.step / max(1, data["count"] // train["batch_size"])

    @property
    def digest(self) -> str:
        """SHA-256 over config.json, which itself holds the digest of every other file."""
        return files.digest(self.path / "config.json")

    @property
    def weights(self) -> list[str]:
        """What `network` can be asked for: raw, ema, ema-DECAY."""
        names = [name.removesuffix(".safetensors") for name in self.files]
        return [*(["raw"] if "network" in names else []), *(name for name in names if name.split("-")[0] == "ema")]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file (`network` or `raw`, `ema`, `ema-DECAY`, `heads`, `optimizer`), verified against the recorded digest."""
        file = self.path / f"{'network' if name == 'raw' else name}.safetensors"
        recorded = self.files.get(file.name)
        if recorded is None:
            raise UserError(f"{self.path} has no {file.name}; its weights are {' and '.join(self.weights)} (--weights; of a teacher "
                            f"--guiding-weights, of --init-ckpt --init-weights)")
        if not file.is_file():
            raise UserError(f"{file} is missing; the checkpoint is incomplete, use another one")
        if files.digest(file) != recorded:
            raise UserError(f"{file} is damaged: its digest differs from config.json; use another checkpoint")
        return files.load_tensors(file)

    def network(self, weights: str = "ema", depth: int | None = None) -> Backbone:
        """The network on the CPU in eval mode. `weights` is `ema`, `raw` or `ema-DECAY`; `depth` keeps the first blocks alone.

        Raises:
            UserError: weights that the checkpoint lacks, or that do not fit the recorded architecture.
        """
        tensors = self.tensors(weights)
        if depth is not None:
            wanted = models.parameter_names(self.spec, depth=depth)
            tensors = {name: tensors[name] for name in wanted if name in tensors}
        return models.build(self.spec, depth=depth, weights=tensors).eval().requires_grad_(False)


def locate(name: Path | str) -> Path:
    """The checkpoint folder that `name` stands for: a checkpoint folder, a run (its latest), RUN@STEP or hub:user/name.

    Raises:
        UserError: there is none; says which steps a run has.
    """
    if str(name).startswith(hub_client.PREFIX):
        return hub_client.fetch(str(name))
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if folder.is_file():
        raise UserError(f"{name} is a file, not a checkpoint: python -m models.convert {name} --out ckpts/{folder.stem} makes one of "
                        f"published weights")
    run, at, step = str(name).rpartition("@")
    if at and step.isdigit() and not folder.exists():
        steps = of_run(run)
        if int(step) not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{name}: run {run} has no checkpoint of step {int(step)}; its steps are {known}")
        return steps[int(step)]
    newest = latest(folder)
    if newest is None:
        raise UserError(f"no checkpoint in {name}: give a checkpoint folder (it holds config.json), a run, or RUN@STEP")
    return newest


def of_run(run: Path | str) -> dict[int, Path]:
    """The checkpoints in `run/checkpoints` or `run` by step, ascending; the step is the number in a checkpoint's name."""
    for folder in (Path(run) / "checkpoints", Path(run)):
        steps = {int(p.name): p for p in folder.glob("*") if p.name.isdigit() and (p / "config.json").is_file()} \
            if folder.is_dir() else {}
        if steps:
            return dict(sorted(steps.items()))
    return {}


def latest(run: Path | str) -> Path | None:
    """The checkpoint of `run` with the highest step, None where there is none."""
    return next(reversed(of_run(run).values()), None)


def prune(folder: Path, limit: int | None, every: int | None) -> None:
    """Remove the checkpoints of a run but the latest `limit`; those whose step is a multiple of `every` stay as well."""
    if limit is None:
        return
    steps = sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    for path in steps[:-limit]:
        if every is None or int(path.name) % every:
            files.remove(path)


def write(
    path: Path | str,
    *,
    spec: ModelSpec,
    space: LatentSpace,
    step: int,
    network: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None = None,
    averages: Mapping[str, Mapping[str, Tensor]] | None = None,
    heads: Mapping[str, Tensor] | None = None,
    optimizer: tuple[Mapping[str, Tensor], list[dict[str, Any]]] | None = None,
    **meta: Any,
) -> None:
    """Write a checkpoint folder in one step: it is whole or absent. `meta` joins config.json as it is.

    `averages` are further moving averages by name (`ema-0.9995`); `optimizer` is (state tensors by 'parameter/slot', groups
    as JSON values).
    """
    parts = {"network": network, "ema": ema, **(averages or {}), "heads": heads, "optimizer": optimizer[0] if optimizer else None}
    with files.replacing(path) as folder:
        folder.mkdir()
        for name, tensors in parts.items():
            if tensors:
                files.save_tensors(folder / f"{name}.safetensors", dict(tensors))
        if optimizer:
            files.write_json(folder / "optimizer.json", optimizer[1])
        digests = {file.name: files.digest(file) for file in sorted(folder.iterdir())}
        files.write_json(folder / "config.json", {
            "format": FORMAT, "kind": "checkpoint", "model": spec.to_json(), "space": space.to_json(),
            "step": step, **meta, "versions": versions(), "files": digests})


def versions() -> dict[str, str]:
    """Versions of the libraries that numbers depend on."""
    versions = {}
    for name in ("torch", "numpy", "accelerate", "diffusers", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> tuple[dict[str, Tensor], list[dict]]:
    """The optimiser's state by parameter name: tensors under 'name/slot', and its groups as JSON values."""
    tensors = {f"{names[parameter]}/{slot}": torch.as_tensor(value)
               for parameter, state in optimizer.state.items() for slot, value in state.items()}
    groups = [{**{key: value for key, value in group.items() if key != "params"}, "params": [names[p] for p in group["params"]]}
              for group in optimizer.param_groups]
    return tensors, json.loads(json.dumps(groups))


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[Tensor, str]) -> None:
    """Give each parameter the state saved under its name, on its device. State of unknown names is refused."""
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        if name not in parameters:
            raise UserError(f"the optimiser state names {name}, which this run does not train")
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU unless fused or capturable
        device = "cpu" if slot == "step" and not any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups) \
            else parameter.device
        optimizer.state[parameter][slot] = value.to(device)
