"""The manifest of a latent set: the description of the set, and the check of its shards against it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict

from models.latents import LatentSpace
from runtime import files, schema
from runtime.errors import UserError, require
from runtime.mapped import map_shard
from runtime.schema import Field

FORMAT = 2
MANIFEST = "manifest.json"
Count = Annotated[int, Field(ge=1, le=2**40)]


class Shard(TypedDict):
    """A shard in the manifest."""

    file: str
    count: Annotated[int, Field(ge=0)]
    sha256: str


class Manifest(TypedDict):
    """What every manifest holds."""

    format: int
    space: dict[str, Any]
    resolution: Count
    latent_size: Count
    views: Literal[1, 2]
    parts: Literal[1, 2]
    dtype: Literal["float16", "float32"]
    num_classes: Count
    class_names: list[str]
    count: Count
    images: bool
    shards: list[Shard]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the set at `path`. Raises UserError if it is missing, of another format or incomplete."""
    require(
        path.is_dir(), f"there is no latent set at {path}; make one with python -m preprocessing.encode (or .digits)"
    )
    file = path / MANIFEST
    if not file.exists():
        problem = (
            "is unfinished: run its preprocessing command again"
            if any(path.glob("shard-*"))
            else "is not a latent set: give a folder that python -m preprocessing.encode made"
        )
        raise UserError(f"{path} {problem} ({MANIFEST} is missing)")
    manifest = files.read_json(file)
    require(
        isinstance(manifest, dict) and manifest.get("format") == FORMAT,
        f"{file} is not of format {FORMAT}; encode the set again with this version",
    )
    files.require_sealed(file, manifest)
    schema.checked(Manifest, manifest, file, "encode the set again")
    # a name with a path in it would read files of other folders
    for shard in manifest["shards"]:
        require(
            Path(shard["file"]).name == shard["file"],
            f"{file} names the shard {shard['file']} outside its folder; encode the set again",
        )
    return manifest


def read_space(path: Path, manifest: Mapping[str, Any]) -> LatentSpace:
    """The latent space that the manifest of the set at `path` describes. Raises UserError."""
    try:
        return LatentSpace.from_json(manifest["space"])
    except UserError as error:
        raise UserError(f"{path / MANIFEST}: {error}; encode the set again") from error


def require_intact(folder: Path, entry: Mapping[str, Any]) -> None:
    """Raise UserError if the bytes of a shard differ from the digest in its `entry` of the manifest."""
    file = folder / entry["file"]
    map_shard(file)  # has its own messages for a missing and a truncated file
    require(
        files.digest(file) == entry["sha256"],
        f"{file} is damaged: its checksum is not the manifest's; copy or encode it again",
    )
