"""The losses of the first steps of every method are the committed ones, and the band would catch a factor of two."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from runtime import files
from runtime.errors import UserError
from tests.golden import __main__ as golden

SHORT = 20
CURVES = files.read_json(golden.FILE)["curves"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curves")


@pytest.mark.parametrize("method", golden.METHODS)
def test_the_first_steps_are_the_committed_ones(method: str, work: Path) -> None:
    assert len(CURVES[method]["loss/diffusion"]) == 200 // golden.EVERY
    curves = golden.measure(method, SHORT, work)
    assert len(curves["loss/diffusion"]) == SHORT // golden.EVERY
    assert golden.differences(curves, CURVES[method]) == []


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
    method: str, target: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden._prepare(method, work)
    module, name = target.rsplit(".", 1)
    right = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(target, lambda *args, **more: 2 * right(*args, **more))
    curves = golden.measure(method, golden.EVERY, work, name=f"{method}-doubled")
    assert golden.differences(curves, CURVES[method])


@pytest.mark.parametrize(
    ("method", "flag", "value"),
    [
        ("latent", "--align-weight", "1"),
        ("guided", "--align-weight", "0.25"),
        ("dispersive", "--align-weight", "1"),
        ("sra", "--align-weight", "0.4"),
    ],
)
def test_a_wrong_weight_leaves_the_band_within_the_first_steps(method: str, flag: str, value: str, work: Path) -> None:
    curves = golden.measure(method, SHORT, work, (flag, value), name=f"{method}-weight")
    assert golden.differences(curves, CURVES[method])


def test_the_command_names_a_curve_that_left_the_band(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Then --write commits it, and leaves the others as they are."""
    file = tmp_path / "curves.json"
    files.write_json(file, {"curves": {"sra": CURVES["sra"], "none": CURVES["none"]}})
    moved = {name: [1.1 * value for value in values] for name, values in CURVES["none"].items()}
    monkeypatch.setattr(golden, "FILE", file)
    monkeypatch.setattr(golden, "measure", lambda *_: moved)
    with pytest.raises(UserError, match="the losses of none left the band; .* --write"):
        golden.main(["--methods", "none"])
    assert "none: loss/diffusion at step 10 is" in capsys.readouterr().out
    golden.main(["--methods", "none", "--write"])
    assert files.read_json(file)["curves"] == {"sra": CURVES["sra"], "none": moved}
    golden.main(["--methods", "none"])
