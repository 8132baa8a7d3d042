"""Solvers against closed forms, laws and published code; guidance; the registry of solvers."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import generate
import models
from models.backbone import Backbone
from models.pixels import PixelCodec, pixels
from runtime.options import as_dict
from sampling import solvers
from sampling.config import SamplingConfig
from sampling.sampler import Sampler
from tests.helpers import DATA, PARITY_SIT, ROOT, perturbed

SPEC = models.spec("SiT-Tiny/2", in_channels=4, input_size=8, num_classes=10)


def gaussian(x: Tensor, t: float, s: float = 0.5) -> Tensor:
    """Exact velocity for x0 ~ N(0, s^2)."""
    return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("heun2", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    """The ODE maps x(1) to s x(1) for Gaussian data; the error falls as steps^-order."""
    x, integrate = torch.ones(1, 1, dtype=torch.float64), solvers.SOLVERS[solver].integrate
    errors = [abs(integrate(gaussian, x, solvers.ode_grid(n)).item() - 0.5) for n in (64, 128)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_heun2_is_torchdiffeqs_and_heun_differs_in_the_last_step() -> None:
    """Internal Guidance samples by torchdiffeq's heun2 on a shifted grid."""
    from torchdiffeq import odeint

    x, grid = torch.ones(1, 1, dtype=torch.float64), solvers.ode_grid(9, 0.3)
    times = torch.tensor(grid, dtype=torch.float64)
    reference = odeint(lambda t, state: gaussian(state, t.item()), x, times, method="heun2")
    torch.testing.assert_close(solvers.heun2(gaussian, x, grid), reference[-1], rtol=1e-14, atol=0)
    shorter = solvers.heun(gaussian, x, grid)
    torch.testing.assert_close(shorter, reference[-2] + (grid[-1] - grid[-2]) * gaussian(reference[-2], grid[-2]))
    assert abs(shorter - reference[-1]).item() > 1e-4


def test_dopri5_is_accurate() -> None:
    x = torch.ones(1, 1, dtype=torch.float64)
    assert solvers.dopri5(gaussian, x, solvers.ode_grid(2), 1e-8, 1e-6).item() == pytest.approx(0.5, abs=1e-5)


def test_sde_reaches_the_data_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda _: torch.randn(20_000, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    x = solvers.euler_maruyama(gaussian, draw(0), solvers.sde_grid(200, 0.04), draw)
    assert x.mean().item() == pytest.approx(0, abs=0.015)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_grids() -> None:
    assert solvers.ode_grid(4) == [1, 0.75, 0.5, 0.25, 0]
    sde = SamplingConfig().times()
    assert len(sde) == 251 and sde[0] == 1 and sde[-2] == pytest.approx(0.04) and sde[-1] == 0
    # LightningDiT writes the shift in its own time u = 1 - t: u' = s u / (1 + (s - 1) u)
    u = torch.linspace(0, 1, 250, dtype=torch.float64)
    points = SamplingConfig(mode="ode", grid="points", timestep_shift=0.3)
    shifted = torch.tensor(points.times(), dtype=torch.float64)
    torch.testing.assert_close(1 - shifted, 0.3 * u / (1 - 0.7 * u))


def count_rows(network: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """(time, rows) of every call of `network` from now on."""
    calls: list[tuple[float, int]] = []
    forward = network.forward

    def counted(x: Tensor, t: Tensor, *rest: object, **named: object) -> object:
        calls.append((t[0].item(), len(x)))
        return forward(x, t, *rest, **named)

    monkeypatch.setattr(network, "forward", counted)
    return calls


def test_guidance_interval_is_inclusive_and_saves_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """u + s (c - u) inside the interval, c outside it, where the unconditional half is not evaluated."""
    network, y, null = perturbed(SPEC), torch.tensor([1, 2]), torch.full((2,), 10)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def velocity(labels: Tensor, t: float, **settings: object) -> Tensor:
        sampler = Sampler(network, PixelCodec(pixels(4)), SamplingConfig(mode="ode", **settings), 2)
        with torch.no_grad():
            return sampler._velocity(labels)(x, t)

    interval = {"cfg_scale": 3.0, "guidance_low": 0.25, "guidance_high": 0.75}
    calls = count_rows(network, monkeypatch)
    guided = {t: velocity(y, t, **interval) for t in (1.0, 0.75, 0.5, 0.25, 0.2)}
    assert calls == [(1.0, 2), (0.75, 4), (0.5, 4), (0.25, 4), (pytest.approx(0.2), 2)]
    for t, actual in guided.items():
        conditional, unconditional = velocity(y, t), velocity(null, t)
        expected = unconditional + 3 * (conditional - unconditional) if 0.25 <= t <= 0.75 else conditional
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(velocity(y, 0.5, cfg_scale=0.0), velocity(null, 0.5), rtol=0, atol=1e-5)
    first3 = velocity(y, 0.5, cfg_scale=3.0, guidance_channels="first3")
    assert torch.equal(first3[:, :3], guided[0.5][:, :3])
    torch.testing.assert_close(first3[:, 3:], velocity(y, 0.5)[:, 3:], rtol=0, atol=1e-5)
    assert not torch.allclose(first3, guided[0.5])


def test_evaluations_of_published_settings() -> None:
    assert SamplingConfig().evaluations == 250
    assert SamplingConfig(cfg_scale=1.8, guidance_high=0.7).evaluations == 250 + 172  # REPA: 172 guided
    assert SamplingConfig(mode="ode", solver="heun", num_steps=10).evaluations == 19
    assert SamplingConfig(mode="ode", solver="dopri5").evaluations is None


def midpoint(velocity: solvers.Velocity, x: Tensor, grid: Sequence[float]) -> Tensor:
    for t, after in itertools.pairwise(grid):
        middle = x + (after - t) / 2 * velocity(x, t)
        x = x + (after - t) * velocity(middle, (t + after) / 2)
    return x


def midpoint_times(grid: Sequence[float]) -> list[float]:
    return [time for t, after in itertools.pairwise(grid) for time in (t, (t + after) / 2)]


def test_a_new_solver_is_one_entry(
    guided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Registered once, it is offered by the option, samples, and has its evaluations counted as they are made."""
    monkeypatch.setitem(solvers.SOLVERS, "midpoint", solvers.Solver(midpoint, midpoint_times))
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert "{euler,heun,heun2,dopri5,midpoint}" in capsys.readouterr().out
    rows: list[int] = []
    forward = Backbone.forward
    monkeypatch.setattr(
        Backbone, "forward", lambda self, x, *a, **k: (rows.append(len(x)), forward(self, x, *a, **k))[1]
    )
    words = ["--ckpt", str(guided), "--num-fid-samples", "3", "--mode", "ode", "--num-steps", "4", "--cfg-scale", "2"]
    out = generate.main([*words, "--guidance-low", "0.4", "--solver", "midpoint", "--out", str(tmp_path / "out")])
    evaluations = json.loads((out / "samples.json").read_text())["evaluations"]
    assert evaluations == sum(rows) / 3 == 8 + 5  # guided at 1, 0.875, 0.75, 0.625 and 0.5
    x, grid = torch.ones(1, 1, dtype=torch.float64), solvers.ode_grid(64)
    assert midpoint(gaussian, x, grid).item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("solver", ["euler", "heun", "heun2"])
def test_the_times_of_a_solver_are_those_at_which_it_evaluates(solver: str) -> None:
    grid, times = solvers.ode_grid(5, 0.3), []
    solvers.SOLVERS[solver].integrate(lambda x, t: (times.append(t), x)[1], torch.ones(1), grid)
    assert sorted(times) == sorted(solvers.SOLVERS[solver].times(grid))


def test_the_options_of_sampling_need_no_torch() -> None:
    code = (
        "import sys; from sampling import config; assert 'torch' not in sys.modules, 'torch'; config.SamplingConfig()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert "evaluations" not in as_dict(SamplingConfig())


class Noise:
    """Replays recorded draws."""

    def __init__(self, draws: Tensor) -> None:
        self.draws = draws

    def __call__(self, step: int) -> Tensor:
        return self.draws[step]


@pytest.mark.parametrize("case", ["euler_plain", "euler_cfg_interval", "heun_plain", "sde_plain", "sde_cfg_interval"])
def test_published_samplers(case: str) -> None:
    """REPA's loops on a tiny SiT (t = 1 is noise, float64 states)."""
    weights = {
        k.removeprefix("weights."): v
        for k, v in load_file(DATA / "repa_sit.safetensors").items()
        if k.startswith("weights.") and "projectors" not in k and "pos_embed" not in k
    }
    network = models.build(PARITY_SIT, weights=weights).eval()
    stored = load_file(DATA / "repa_samplers.safetensors")
    scale, low, high = {"euler_cfg_interval": (2.5, 0.2, 0.7), "sde_cfg_interval": (1.9, 0.0, 0.65)}.get(
        case, (1.0, 0.0, 1.0)
    )
    settings = SamplingConfig(cfg_scale=scale, guidance_low=low, guidance_high=high)
    velocity = Sampler(network, PixelCodec(pixels(4)), settings, 2)._velocity(stored["y"])
    x = stored["latents"].double()
    with torch.no_grad():
        if case.startswith("sde"):
            result = solvers.euler_maruyama(velocity, x, solvers.sde_grid(8, 0.04), Noise(stored[f"{case}.noise"]))
        else:
            solver = solvers.SOLVERS[case.split("_")[0]]
            result = solver.integrate(velocity, x, solvers.ode_grid(6 if "heun" in case else 8))
    torch.testing.assert_close(result, stored[case], atol=1e-4, rtol=0)
