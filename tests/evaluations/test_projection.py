"""Projected statistics are those of projected features, and their distance is at most that of the features."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaluations import evaluate, metrics, projection
from evaluations.metrics import Moments, Statistics
from runtime import files
from tests.helpers import ROOT


def drawn(seed: int, width: int, count: int = 300) -> torch.Tensor:
    """Features (count, width) with a mean and a spread of their own."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + 0.3 * seed


def statistics(x: torch.Tensor) -> Statistics:
    moments = Moments()
    moments.add(x)
    return moments.statistics()


@pytest.mark.parametrize("width", [10, 64, 65, 200])
def test_the_projection_is_orthonormal_and_lowers_the_distance(width: int) -> None:
    p, x, r = projection.basis("inception", width), drawn(1, width), drawn(2, width)
    size = min(width, 64)
    torch.testing.assert_close(p.T @ p, torch.eye(size, dtype=torch.float64))
    a, b = (projection.project(statistics(features), "inception") for features in (x, r))
    torch.testing.assert_close(a, statistics(x @ p))
    whole, part = metrics.frechet(statistics(x), statistics(r)), metrics.frechet(a, b)
    if width > 64:
        assert 0 < part < whole and not torch.equal(p, projection.basis("pixels", width))
    else:
        assert part == pytest.approx(whole, rel=1e-9)


def test_what_is_packed_is_unpacked_and_small(tmp_path: Path) -> None:
    projected = projection.project(statistics(drawn(1, 100)), "pixels")
    files.save_tensors(tmp_path / "s.safetensors", projection.pack(projected, "0."))
    again = projection.unpack(files.load_tensors(tmp_path / "s.safetensors"), "0.")
    torch.testing.assert_close(again, projected, rtol=0, atol=1e-15)
    assert (tmp_path / "s.safetensors").stat().st_size < 17_500
    with pytest.raises(ValueError, match="upper triangle"):
        projection.unpack({"mean": torch.zeros(3).double(), "covariance": torch.zeros(5).double()})


def test_the_basis_is_the_same_in_another_process() -> None:
    code = "from evaluations import projection; print(projection.basis('pixels', 70)[3, :4].tolist())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    torch.testing.assert_close(
        torch.tensor(eval(run.stdout), dtype=torch.float64), projection.basis("pixels", 70)[3, :4], rtol=0, atol=1e-14
    )


def test_a_score_writes_the_statistics_that_give_its_projected_distance(data: Path, tmp_path: Path) -> None:
    """Two runs: each has its own statistics, in one file whose digest stands in the sealed result."""
    import numpy as np

    noise = np.random.default_rng(0).integers(256, size=(2, 40, 8, 8, 1), dtype=np.uint8)
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", arr_0=noise[number])
    words = ["--samples", str(tmp_path / "0.npz"), str(tmp_path / "1.npz"), "--reference", str(data)]
    evaluate.main([*words, "--features", "pixels", "--out", str(tmp_path / "m.json")])
    result = files.read_sealed(tmp_path / "m.json")
    assert result["statistics"] == files.digest(tmp_path / "m.safetensors")
    tensors = files.load_tensors(tmp_path / "m.safetensors")
    for number, run in enumerate(result["runs"]):
        both = [projection.unpack(tensors, f"{number}.{part}.") for part in ("samples", "reference")]
        assert metrics.frechet(*both) == pytest.approx(run["projected"]["fd"], rel=1e-7)
        assert run["projected"] == {"fd": pytest.approx(run["metrics"]["fd"], rel=1e-6), "width": 64}
