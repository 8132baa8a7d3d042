"""Checkpoints that describe themselves: a folder of plain tensors and one readable JSON.

    0200000/
      config.json             model, latent space, data, options, step, teacher, versions, the digest of every file,
                              and a seal over its own content
      network.safetensors     the trained network, published parameter names
      ema.safetensors         its exponential moving average; ema-0.9995.safetensors, ...: further averages
      heads.safetensors       the alignments' heads; NAME-head-ema.safetensors: average of a head that predicts the
                              velocity
      optimizer.safetensors   optimiser state by parameter name, name[part] for Muon's; optimizer.json holds its groups

`Checkpoint.open` accepts such a folder, a run (its latest checkpoint) or RUN@STEP, and needs nothing else to rebuild
the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typing_extensions import NotRequired, TypedDict

import models
from models import hub_client
from models.latents import LatentSpace
from runtime import files, schema
from runtime.errors import UserError, require
from runtime.schema import Field

if TYPE_CHECKING:
    from torch import Tensor

    from models import Backbone, ModelSpec

FORMAT = 2


class Config(TypedDict):
    """What every config.json holds; that of a run adds its data, options and resolved choices."""

    format: int
    kind: str
    model: dict[str, Any]
    space: dict[str, Any]
    step: Annotated[int, Field(ge=0)]
    files: dict[str, str]
    train: NotRequired[dict[str, Any]]
    align: NotRequired[dict[str, dict[str, Any]]]
    resolved: NotRequired[dict[str, dict[str, Any]]]
    data: NotRequired[dict[str, Any]]
    precision: NotRequired[str]


class Checkpoint:
    """A checkpoint on disk, read lazily: opening it reads only the JSON."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.step: int = config["step"]
        self.files: dict[str, str] = config["files"]
        self._intact: set[str] = set()
        self.spec = models.ModelSpec.from_json(config["model"])
        self.space = LatentSpace.from_json(config["space"])

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Open a checkpoint folder, the latest checkpoint of a run folder, or RUN@STEP.

        Raises:
            UserError: nothing there, or a folder that is not a checkpoint.
        """
        folder = locate(path)
        file = folder / "config.json"
        config = files.read_json(file)
        require(
            isinstance(config, dict) and config.get("kind") == "checkpoint" and config.get("format") == FORMAT,
            f"{folder} is not a checkpoint of format {FORMAT}: its config.json says otherwise; use another checkpoint",
        )
        # the seal finds damage, the schema a config that somebody wrote, the step a folder that was renamed
        files.require_sealed(file, config)
        schema.checked(Config, config, file, "use another checkpoint")
        require(
            folder.parent.name != "checkpoints" or not folder.name.isdigit() or int(folder.name) == config["step"],
            f"{folder} says it is step {config['step']}: the folder was renamed or copied over another; use another "
            f"checkpoint",
        )
        try:
            opened = cls(folder, config)
            models.architecture(opened.spec)
            require(
                opened.space.channels == opened.spec.in_channels,
                f"its network reads {opened.spec.in_channels} channels, its latent space has {opened.space.channels}",
            )
            return opened
        except UserError as error:
            raise UserError(f"{file}: {error}; use another checkpoint") from error

    def require_whole(self) -> None:
        """Raise UserError unless every file of the checkpoint is the one that was written."""
        for name in self.files:
            self.require_intact(name)

    def require_intact(self, name: str) -> None:
        """Raise UserError unless the file `name` has the recorded digest; checked once."""
        file = self.path / name
        if name in self._intact:
            return
        require(
            Path(name).name == name,
            f"{self.path / 'config.json'} is damaged: it names the file {name} outside its folder; use another "
            f"checkpoint",
        )
        require(file.is_file(), f"{file} is missing; the checkpoint is incomplete, use another one")
        require(
            files.digest(file) == self.files[name],
            f"{file} is damaged: its digest differs from config.json; use another checkpoint",
        )
        self._intact.add(name)

    @property
    def name(self) -> str:
        """RUN@STEP, or the checkpoint folder's name."""
        in_run = self.path.parent.name == "checkpoints"
        return f"{self.path.parent.parent.name}@{self.step}" if in_run else self.path.name

    @property
    def has_null(self) -> bool:
        """Whether the null label was trained, by label dropout; assumed of imported weights unless they say no."""
        train = self.config.get("train")
        return self.config.get("source", {}).get("has_null", True) if train is None else train["cfg_prob"] > 0

    @property
    def epochs(self) -> float | None:
        """Passes over the data set that it was trained for; None for imported weights."""
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
        """The weights that `network` can load: raw, ema, ema-DECAY."""
        names = [name.removesuffix(".safetensors") for name in self.files]
        return [*(["raw"] if "network" in names else []), *(name for name in names if name.split("-")[0] == "ema")]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file (`raw`, `ema`, `ema-DECAY`, `heads`, `optimizer`), after a check of its digest."""
        file = self.path / f"{'network' if name == 'raw' else name}.safetensors"
        require(
            file.name in self.files,
            f"{self.path} has no {file.name}; its weights are {' and '.join(self.weights)}: choose one with --weights, "
            f"--guiding-weights or the like",
        )
        self.require_intact(file.name)
        return files.load_tensors(file)

    def network(self, weights: str = "ema", depth: int | None = None) -> Backbone:
        """The network on the CPU in eval mode, with the weights `ema`, `raw` or `ema-DECAY`.

        With `depth`, only its first blocks.

        Raises:
            UserError: weights that the checkpoint lacks, or that do not fit the recorded architecture.
        """
        tensors = self.tensors(weights)
        models.require_finite(tensors, f"{self.path} ({weights} weights)")
        if depth is not None:
            needed = models.outline(self.spec, depth=depth).state_dict()
            tensors = {name: tensors[name] for name in needed if name in tensors}
        return models.build(self.spec, depth=depth, weights=tensors).eval().requires_grad_(False)


def locate(name: Path | str) -> Path:
    """The checkpoint folder that `name` stands for: a checkpoint folder, a run (its latest), RUN@STEP or hub:user/name.

    Raises:
        UserError: no such checkpoint; lists the steps of a run.
    """
    if str(name).startswith(hub_client.PREFIX):
        return hub_client.fetch(str(name))
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    require(
        not folder.is_file(),
        f"{name} is a file, not a checkpoint: python -m models.convert {name} --out ckpts/{folder.stem} makes a "
        f"checkpoint of published weights",
    )
    # a folder whose own name has an @ comes first
    run, at, step = str(name).rpartition("@")
    if at and step.isdigit() and not folder.exists():
        steps = {int(path.name): path for path in reversed(saved(run))}
        known = ", ".join(map(str, steps)) or "none"
        require(int(step) in steps, f"{name}: run {run} has no checkpoint of step {int(step)}; its steps are {known}")
        return steps[int(step)]
    newest = latest(folder)
    if newest is None:
        raise UserError(f"no checkpoint in {name}: give a checkpoint folder (it holds config.json), a run, or RUN@STEP")
    return newest


def saved(run: Path | str) -> list[Path]:
    """The checkpoint folders in `run` or `run/checkpoints`, the newest first, by the number in their names."""
    for folder in (Path(run) / "checkpoints", Path(run)):
        # not glob, to which a folder that cannot be read is an empty one
        with files.reading(folder):
            steps = [p for p in folder.iterdir() if p.name.isdigit() and p.is_dir()] if folder.is_dir() else []
        if steps:
            return sorted(steps, key=lambda p: int(p.name), reverse=True)
    return []


def latest(run: Path | str) -> Path | None:
    """The newest checkpoint of `run`, or None. Raises UserError if it has lost its config.json."""
    newest = next(iter(saved(run)), None)
    require(
        newest is None or (newest / "config.json").is_file(),
        f"{newest}, the newest checkpoint of {run}, is damaged: its config.json is missing; name an older one",
    )
    return newest


def newest_whole(run: Path | str) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of `run` whose files are all intact, and what is wrong with each newer checkpoint.

    Raises:
        UserError: a newer one cannot be read (permission, a failing disk or server): it may be whole.
    """
    problems: dict[Path, str] = {}
    for folder in saved(run):
        try:
            with files.reading(folder):
                require((folder / "config.json").is_file(), f"{folder} has no config.json")
                Checkpoint.open(folder).require_whole()
            return folder, problems
        except files.Unreadable:
            raise
        except UserError as error:
            problems[folder] = str(error)
    return None, problems


def read_config(path: Path) -> dict[str, Any]:
    """The object in config.json in the folder `path`, as it is; empty if there is no such object."""
    config = files.read_json(path / "config.json") if (path / "config.json").is_file() else None
    return config if isinstance(config, dict) else {}


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder whose config.json says checkpoint."""
    return read_config(path).get("kind") == "checkpoint"


def is_converted(path: Path, any_origin: bool = False) -> bool:
    """Whether `path` holds a checkpoint or VAE that `models.convert` wrote, or `any_origin`, and no other files."""
    config = read_config(path)
    if config.get("kind") == "checkpoint" and isinstance(config.get("files"), dict):
        names, converted = {"config.json", *config["files"]}, "source" in config
    elif config.get("_class_name") == "AutoencoderKL":
        names = {"config.json", "diffusion_pytorch_model.safetensors", "source.json"}
        converted = (path / "source.json").is_file()
    else:
        return False
    return (converted or any_origin) and {file.name for file in path.iterdir()} <= names


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
    ours: Callable[[Path], bool] = is_checkpoint,
    **meta: Any,
) -> None:
    """Write a checkpoint folder atomically: it is whole or absent. `meta` is added to config.json as it is.

    `averages` are further moving averages by name (`ema-0.9995`); `ours` decides what may be replaced; `optimizer` is
    (state tensors by 'parameter/slot', groups as JSON values).
    """
    parts = {
        "network": network,
        "ema": ema,
        **(averages or {}),
        "heads": heads,
        "optimizer": optimizer[0] if optimizer else None,
    }
    with files.replacing(path, ours) as folder:
        folder.mkdir()
        for name, tensors in parts.items():
            if tensors:
                files.save_tensors(folder / f"{name}.safetensors", dict(tensors))
        if optimizer:
            files.write_json(folder / "optimizer.json", optimizer[1])
        # config.json comes last: it holds the digests of all other files, and a folder without it is no checkpoint
        digests = {file.name: files.digest(file) for file in sorted(folder.iterdir())}
        files.write_sealed(
            folder / "config.json",
            {
                "format": FORMAT,
                "kind": "checkpoint",
                "model": spec.to_json(),
                "space": space.to_json(),
                "step": step,
                **meta,
                "versions": versions(),
                "files": digests,
            },
        )


def versions() -> dict[str, str]:
    """Versions of the libraries that numbers depend on."""
    return {name: version(name) for name in ("torch", "numpy", "accelerate", "diffusers", "safetensors")}
