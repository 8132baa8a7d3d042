"""Measured release: averages, rule and weights against a reference in NumPy."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from alignment import AlignOptions, find
from alignment.interval import Selection
from alignment.release import Release
from runtime.errors import UserError
from tests.alignment.conftest import SPEC
from tests.helpers import micro_batch
from training.release import Residuals, decide


def curve(count: int, length: float) -> np.ndarray:
    """A residual that falls to 0.3 within about `length` steps, with noise."""
    steps = np.arange(count)
    return 0.3 + 0.5 * np.exp(-steps / length) + 0.01 * np.random.default_rng(0).standard_normal(count)


def averages_of(residuals: np.ndarray, decays: tuple[float, float]) -> np.ndarray:
    """(count, 2) fast and slow average after each residual."""
    rows, state = [], np.array([residuals[0]] * 2)
    for residual in residuals:
        state = np.array(decays) * state + (1 - np.array(decays)) * residual
        rows.append(state)
    return np.array(rows)


def test_the_decays_are_those_of_rare_at_its_length() -> None:
    assert AlignOptions(schedule="plateau").ramp == 50_000
    np.testing.assert_allclose(1 - Release(50_000).rates.numpy(), [0.999, 0.99995], rtol=1e-14)


@pytest.mark.parametrize(("ramp", "length"), [(200, 300), (150, 300), (200, 1)])
def test_the_plateau_is_noticed_where_the_reference_notices_it(ramp: int, length: float) -> None:
    residuals = curve(5000, length)
    expected = averages_of(residuals, (1 - 50 / ramp, 1 - 2.5 / ramp))
    gap = (expected[:, 1] - expected[:, 0]) / expected[:, 1]
    after = next(step for step in range(1, 5001) if step >= ramp and step % 100 == 0 and gap[step - 1] < 0.02)
    assert length == 1 or after > ramp + 100

    release, ended = Release(ramp), {}
    options = AlignOptions(schedule="plateau", plateau_steps=ramp)
    run: Any = SimpleNamespace(
        alignments={"latent": SimpleNamespace(release=release, options=options)},
        setup=SimpleNamespace(stops={"latent": None}),
        end_at=lambda name, stop: ended.update({name: stop}),
    )
    for run.step, residual in enumerate(residuals.astype(np.float32), 1):
        release.update(torch.tensor(residual), torch.tensor(True))
        np.testing.assert_allclose(release.averages.numpy(), expected[run.step - 1], rtol=1e-6)
        if lines := decide(run):
            break
    assert ended == {"latent": run.step + ramp} and run.step == after
    assert f"its weight falls to 0 at step {run.step + ramp}" in lines[0] and len(lines) == 1
    # once the weight falls nothing is read, and the end stays
    run.setup.stops, run.end_at = ended, None
    run.step += 100
    assert decide(run) == []


def test_the_latest_end_begins_the_decay_of_a_residual_that_still_falls() -> None:
    options = AlignOptions(schedule="plateau", plateau_steps=100, stop_steps=350)
    release = Release(100)
    run: Any = SimpleNamespace(
        alignments={"latent": SimpleNamespace(release=release, options=options)},
        setup=SimpleNamespace(stops={"latent": options.stop(10)}),
    )
    lines = []
    for run.step in range(1, 351):
        release.update(torch.tensor(1000.0 - run.step), torch.tensor(True))
        lines += decide(run)
    assert len(lines) == 1 and lines[0].startswith("step 250: the residual of latent still falls")


def test_the_weight_is_constant_then_a_cosine_that_ends_at_the_stop() -> None:
    options = AlignOptions(schedule="plateau", plateau_steps=100)
    assert options.stop(10) is None and options.weight_at(10**6, None, 10) == 0.5
    weights = [options.weight_at(step, 350, 10) for step in (0, 249, 250, 275, 300, 349, 350, 400)]
    expected = [0.5, 0.5, 0.5, 0.25 * (1 + math.sqrt(0.5)), 0.25, 0.25 * (1 - math.cos(math.pi / 100)), 0, 0]
    assert weights == pytest.approx(expected)
    late = find("sra").Options(schedule="plateau", plateau_steps=100, weight=0.5)
    assert [late.weight_at(step, 350, 10) for step in (0, 300, 350)] == pytest.approx([0.5, 0.25, 0])


def test_options_of_a_plateau_that_cannot_be() -> None:
    with pytest.raises(UserError, match="--align-plateau-steps belongs to --align-schedule plateau"):
        AlignOptions(plateau_steps=100)
    with pytest.raises(UserError, match="latest end at step 199 leaves no step to measure"):
        AlignOptions(schedule="plateau", plateau_steps=100, stop_steps=199).stop(10)
    assert AlignOptions(schedule="plateau", plateau_steps=100, stop_steps=200).stop(10) == 200


def test_a_measured_end_replaces_the_published_stop() -> None:
    for name, required in (("guided", {"guiding_ckpt": "x"}), ("haste", {})):
        kind = find(name)
        for schedule, stops in (("constant", True), ("plateau", False)):
            options = kind.resolve(kind.Options(schedule=schedule, **required), SPEC)
            assert (options.stop(100) is not None) == stops
        latest = kind.resolve(kind.Options(schedule="plateau", stop_steps=123_456, **required), SPEC)
        assert latest.stop(100) == 123_456


@pytest.mark.parametrize("cuts", [(6,), (2, 4, 6)])
def test_the_residual_of_a_step_is_the_mean_over_the_samples_chosen(cuts: tuple[int, ...]) -> None:
    """Whatever the micro-batches; a step that is not taken, or in which no sample was chosen, does not count."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    alignment: Any = SimpleNamespace(release=Release(50), residual=None)
    residuals = Residuals({"latent": alignment, "sra": SimpleNamespace(release=None)}, Accelerator(cpu=True))

    def step(chosen: Tensor, norm: float) -> list[float]:
        for start, end in zip((0, *cuts), cuts, strict=False):
            index = chosen[start:end].nonzero().flatten()
            selection = Selection(index, len(index) / (end - start), len(index))
            # a micro-batch without a chosen sample sees its first
            alignment.residual = values[start:end][index if len(index) else [0]]
            residuals.add(micro_batch(selections={"latent": selection}))
        residuals.step(torch.tensor(norm))
        return alignment.release.averages.tolist()

    first = step(values > 2.5, 1.0)
    assert first == [4.5, 4.5]
    assert step(values > 0, math.inf) == first and step(values > 9, 1.0) == first
    assert step(values > 4.5, 1.0) == pytest.approx([5.5, 4.5 + 0.05 * 1.0])
