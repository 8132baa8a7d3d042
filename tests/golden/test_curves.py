"""The losses of the first steps of every method are the committed ones, and the band would catch a factor of two."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import curves
from runtime import files

SHORT = 20


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curves")


@pytest.mark.parametrize("method", list(curves.METHODS))
def test_the_first_steps_are_the_committed_ones(method: str, work: Path) -> None:
    golden = files.read_json(curves.FILE)["curves"][method]
    assert len(golden["loss/diffusion"]) == 200 // curves.EVERY
    found = curves.measure(method, SHORT, work)
    assert len(found["loss/diffusion"]) == SHORT // curves.EVERY and curves.differences(found, golden) == []


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("latent", "alignment.latent.squared_error"),
        ("guided", "alignment.guided.squared_error"),
        ("none", "loss.flow_matching"),
        ("repa", "alignment.repa.cosine"),
        ("layersync", "alignment.layersync.cosine"),
        ("sra", "alignment.sra.smooth_l1"),
        ("haste", "alignment.haste.attention_loss"),
        ("latent-sra2", "alignment.latent.smooth_l1"),
    ],
)
def test_a_wrong_factor_of_two_in_a_term_leaves_the_band(
    method: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    module, name = target.rsplit(".", 1)
    right = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(target, lambda *args, **more: 2 * right(*args, **more))
    found = curves.measure(method, curves.EVERY, tmp_path)
    assert curves.differences(found, files.read_json(curves.FILE)["curves"][method])


@pytest.mark.parametrize(
    ("method", "flag", "value"),
    [
        ("latent", "--align-weight", "1"),
        ("guided", "--align-weight", "0.25"),
        ("dispersive", "--align-weight", "1"),
        ("sra", "--align-weight", "0.4"),
    ],
)
def test_a_wrong_weight_leaves_the_band_within_the_committed_steps(
    method: str, flag: str, value: str, tmp_path: Path
) -> None:
    found = curves.measure(method, 2 * SHORT, tmp_path, (flag, value))
    assert curves.differences(found, files.read_json(curves.FILE)["curves"][method])
