"""What a step costs where nothing can be timed: counts of reads, calls, operators and compilations."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training import command
from training.batches import AHEAD, Batches
from training.ema import EMA
from training.run import Run

Words = Callable[..., list[str]]


def opened(argv: list[str], program: str = "train") -> Run:
    return Run(*command.resolve(argv, program, None, ("guided",) if program == "train_guide" else ()))


def test_two_steps_are_read_ahead_and_none_beyond_the_end(tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch):
    run = opened(words(tmp_path, "run"))
    source = Batches(run.config, run.data, run.device, 0, 1)
    read, known = [], threading.Condition()
    inner = source._read

    def counted(step: int, columns: set[str]):
        with known:
            read.append(step)
            known.notify_all()
        return inner(step, columns)

    monkeypatch.setattr(source, "_read", counted)
    for step, (batch,) in enumerate(source.steps(0, 5, {})):
        wanted = min(step + AHEAD, 4)
        with known:  # the reader is a thread: it gets there on its own while this step is held
            assert known.wait_for(lambda wanted=wanted: read[-1] == wanted, timeout=10)
        assert torch.equal(batch.t, torch.from_numpy(inner(step, set())[0].t))
    assert read == [0, 1, 2, 3, 4]


def test_the_average_follows_parameters_that_have_moved(tmp_path: Path, words: Words):
    """`Module.to` and `copy_` leave the parameter and replace, or fill, what it holds: both must be seen."""
    network = opened(words(tmp_path, "run")).network
    ema = EMA(network, 0.5)
    weight, average = network.x_embedder.proj.weight, ema.network.x_embedder.proj.weight
    start = average.clone()
    held = weight.data_ptr()
    network.to(torch.float64).to(torch.float32)
    ema.network.to(torch.float64).to(torch.float32)
    assert network.x_embedder.proj.weight is weight and weight.data_ptr() != held
    with torch.no_grad():
        weight.add_(1)
    ema.update(1)
    torch.testing.assert_close(ema.network.x_embedder.proj.weight, start + 0.5)
