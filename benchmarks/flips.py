"""Flipped bits, one at a time, over every kind of file that is read again: refused, or without effect."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bad_world
from benchmarks.bad_world import World
from dataset import LatentSet
from models.archives import read_archive
from models.checkpoint import Checkpoint
from runtime import files
from runtime.errors import UserError, require
from sampling import store


def flips(world: World, place: Path, chances: Iterable[tuple[int, random.Random]]) -> Iterator[tuple[str, str | None]]:
    """Turn one bit of the copy of an artefact for each (number, its randomness); yields what came of it, and the fault if it is one.

    The number chooses the file, one after the other; the randomness the place in it.
    """
    readers: list[tuple[str, str, Callable[[Path], Any]]] = []
    for name in (
        "config.json",
        "network.safetensors",
        "ema.safetensors",
        "heads.safetensors",
        "optimizer.safetensors",
        "optimizer.json",
    ):
        readers.append(("exps/stage1/checkpoints/0000001", name, _checkpoint))
    for name in ("manifest.json", "shard-00000.safetensors"):
        readers.append(("data", name, _latents))
    readers += [("samples", name, _samples) for name in ("samples.npz", "samples.json")]
    readers.append(("weights.pt", "", _weights))
    wanted = {(artefact, name): reader(world.path(artefact)) for artefact, name, reader in readers}
    for number, chance in chances:
        artefact, name, reader = readers[number % len(readers)]
        folder = bad_world.copied(world, artefact, place / f"flip{number}")
        file = folder / name if name else folder
        content = bytearray(file.read_bytes())
        where, bit = chance.randrange(len(content)), chance.randrange(8)
        content[where] ^= 1 << bit
        file.write_bytes(content)
        fault = None
        try:
            same = _same(reader(folder), wanted[artefact, name])
        except UserError:
            came_to = "refused"
        else:
            came_to = "accepted with the same meaning" if same else "accepted with another meaning"
            if not same:
                fault = f"{artefact}/{name}: bit {bit} of byte {where} is accepted with another meaning"
        shutil.rmtree(place / f"flip{number}")
        yield came_to, fault


def _checkpoint(folder: Path) -> Any:
    checkpoint = Checkpoint.open(folder)
    checkpoint.require_whole()
    config = {key: value for key, value in checkpoint.config.items() if key != files.SEAL}
    tensors = [checkpoint.tensors(name) for name in ("network", "ema", "heads", "optimizer")]
    return config, files.read_json(folder / "optimizer.json"), tensors


def _latents(folder: Path) -> Any:
    latents = LatentSet(folder)
    latents.check_digests()
    latents.require_intact(wait=None)
    return {key: value for key, value in latents.manifest.items() if key != files.SEAL}, latents.read(
        np.arange(len(latents))
    )


def _samples(folder: Path) -> Any:
    settings = {key: value for key, value in store.read_record(folder / "samples.json").items() if key != "samples"}
    require(store.finished(folder, settings), "the samples are not finished")
    with np.load(folder / "samples.npz") as archive:
        return settings, archive["arr_0"], archive["labels"]


def _weights(file: Path) -> Any:
    return read_archive(file)


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of plain values, arrays and tensors are equal."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(np.array_equal(np.asarray(one), np.asarray(other)))
