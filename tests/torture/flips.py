"""Flipped bits, one at a time, in every kind of file that is read again: refused, or without effect.

Hypothesis picks the file, the byte and the bit.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dataset import LatentSet
from models.archives import read_archive
from models.checkpoint import Checkpoint
from runtime import files
from runtime.errors import UserError, require
from sampling import store
from tests.torture.world import World

HEALTHY = list(HealthCheck)
REFUSED, SAME, OTHER = "refused", "accepted with the same meaning", "accepted with another meaning"


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
    manifest = {key: value for key, value in latents.manifest.items() if key != files.SEAL}
    return manifest, latents.read(np.arange(len(latents)))


def _samples(folder: Path) -> Any:
    record = store.read_record(folder / "samples.json")
    settings = {key: value for key, value in record.items() if key not in store.DIGESTS}
    require(store.finished(folder, settings), "the samples are not finished")
    with np.load(folder / "samples.npz") as archive:
        return settings, archive["arr_0"], archive["labels"]


class Target(NamedTuple):
    """A file, the artefact that it belongs to, and what reads the artefact."""

    artefact: str
    file: str
    read: Callable[[Path], Any]


CHECKPOINT = "exps/stage1/checkpoints/0000001"
TARGETS = [
    *(Target(CHECKPOINT, f"{name}.safetensors", _checkpoint) for name in ("network", "ema", "heads", "optimizer")),
    *(Target(CHECKPOINT, name, _checkpoint) for name in ("config.json", "optimizer.json")),
    *(Target("data", name, _latents) for name in ("manifest.json", "shard-00000.safetensors")),
    *(Target("samples", name, _samples) for name in ("samples.npz", "samples.json")),
    Target("weights.pt", "", read_archive),
]


class Flip(NamedTuple):
    target: Target
    byte: int
    bit: int

    def outcome(self, world: World, scratch: Path) -> str:
        """What the reader makes of the flip: one of HEALTHY = list(HealthCheck)
        REFUSED, SAME, OTHER."""
        target = self.target
        place = world.copy(target.artefact, scratch / "flip")
        file = place / target.file
        content = bytearray(file.read_bytes())
        content[self.byte] ^= 1 << self.bit
        file.write_bytes(content)
        try:
            return SAME if _equal(target.read(place), _sound(world, target)) else OTHER
        except UserError:
            return REFUSED
        finally:
            shutil.rmtree(scratch / "flip")


def flips(world: World) -> st.SearchStrategy[Flip]:
    """One bit of any target. Headers lie at the start or the end of a file, so places there are as likely as others."""

    def of(target: Target) -> st.SearchStrategy[Flip]:
        size = (world.path(target.artefact) / target.file).stat().st_size
        anywhere = st.randoms(use_true_random=True).map(lambda random: random.randrange(size))
        at_start, at_end = st.integers(0, size - 1), st.integers(1, size).map(lambda place: size - place)
        return st.builds(Flip, st.just(target), at_start | at_end | anywhere, st.integers(0, 7))

    return st.sampled_from(TARGETS).flatmap(of)


def run(world: World, scratch: Path, count: int, first: int) -> tuple[Counter[str], list[str]]:
    """Try `count` flips, the same for the same `first`; returns how many came to what, and the faults."""
    outcomes: Counter[str] = Counter()
    faults: list[str] = []

    @seed(first)
    @settings(max_examples=count, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=HEALTHY)
    @given(flips(world))
    def flip_one(flip: Flip) -> None:
        outcome = flip.outcome(world, scratch)
        outcomes[outcome] += 1
        if outcome == OTHER:
            faults.append(f"{flip.target.artefact} {flip.target.file}: byte {flip.byte}, bit {flip.bit}: {OTHER}")

    flip_one()
    return outcomes, faults


@cache
def _sound(world: World, target: Target) -> Any:
    """What the reader makes of the undamaged file."""
    return target.read(world.path(target.artefact))


def _equal(a: Any, b: Any) -> bool:
    """Whether two nests of plain values, arrays and tensors are equal."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(np.array_equal(np.asarray(a), np.asarray(b)))
