"""The manifest of a latent set: what the set says of itself, and whether its shards are what it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from models.latents import LatentSpace
from runtime import files, schema
from runtime.errors import UserError, require
from runtime.mapped import map_shard

FORMAT = 2
"""The manifest is sealed (`runtime.files.seal`)."""
MANIFEST = "manifest.json"
Count = Annotated[int, Field(ge=1, le=2**40)]


class Shard(TypedDict):
    """What the manifest says of a shard."""

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
    """The manifest of the set at `path`. Raises UserError where it is missing, of another format or incomplete."""
    if not path.is_dir():
        raise UserError(f"there is no latent set at {path}; make one with python -m preprocessing.encode (or .digits)")
    if not (path / MANIFEST).exists():
        begun = (
            "is unfinished: run its preprocessing command again"
            if any(path.glob("shard-*"))
            else "is not a latent set: give the folder of one, as python -m preprocessing.encode makes it"
        )
        raise UserError(f"{path} {begun} ({MANIFEST} is missing)")
    file = path / MANIFEST
    manifest = files.read_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file} is not of format {FORMAT}; encode the set again with this version")
    files.require_sealed(file, manifest)
    schema.checked(Manifest, manifest, file, "encode the set again")
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
    """Raise UserError where the bytes of a shard are not those that its `entry` of the manifest promises."""
    file = folder / entry["file"]
    map_shard(file)  # says 'missing' and 'truncated' in those words
    if files.digest(file) != entry["sha256"]:
        raise UserError(f"{file} is damaged: its checksum is not the manifest's; copy or encode it again")
