"""Solvers against closed forms, laws and published code."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import models
from sampling import solvers
from tests.helpers import DATA


def gaussian(x: Tensor, t: float, s: float = 0.5) -> Tensor:
    """Exact velocity for x0 ~ N(0, s^2)."""
    return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    """The ODE maps x(1) to s x(1) for Gaussian data; the error falls as steps^-order."""
    x = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(solvers.SOLVERS[solver](gaussian, x, solvers.ode_grid(n)).item() - 0.5) for n in (64, 128)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_dopri5_is_accurate() -> None:
    x = torch.ones(1, 1, dtype=torch.float64)
    assert solvers.dopri5(gaussian, x, solvers.ode_grid(2), 1e-8, 1e-6).item() == pytest.approx(0.5, abs=1e-5)


def test_sde_reaches_the_data_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda _: torch.randn(20_000, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    x = solvers.euler_maruyama(gaussian, draw(0), solvers.sde_grid(200), draw)
    assert x.mean().item() == pytest.approx(0, abs=0.015)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_grids() -> None:
    assert solvers.ode_grid(4) == [1, 0.75, 0.5, 0.25, 0]
    sde = solvers.sde_grid(250)
    assert len(sde) == 251 and sde[0] == 1 and sde[-2] == pytest.approx(0.04) and sde[-1] == 0
    # LightningDiT writes the shift in its own time u = 1 - t: u' = s u / (1 + (s - 1) u)
    u = torch.linspace(0, 1, 250, dtype=torch.float64)
    shifted = torch.tensor(solvers.ode_grid(249, 0.3), dtype=torch.float64)
    torch.testing.assert_close(1 - shifted, 0.3 * u / (1 - 0.7 * u))


def test_guidance_interval_is_inclusive_and_saves_evaluations() -> None:
    called = []

    def one(x: Tensor, t: float) -> Tensor:
        called.append((t, 1))
        return x

    def two(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        called.append((t, 2))
        return torch.zeros_like(x), x

    x = torch.ones(1, 4, 1, 1)
    velocity = solvers.guided(one, two, 3.0, 0.25, 0.75)
    values = [velocity(x, t).mean().item() for t in (1.0, 0.75, 0.5, 0.25, 0.2)]
    assert values == [1, 3, 3, 3, 1]
    assert [count for _, count in called] == [1, 2, 2, 2, 1]
    assert solvers.guided(one, two, 1.0)(x, 0.5).mean() == 1 and called[-1] == (0.5, 1)
    assert solvers.guided(one, two, 0.0)(x, 0.5).mean() == 0  # scale 0 is unconditional
    first3 = solvers.guided(one, two, 3.0, channels=3)(x, 0.5)
    assert first3[0, :, 0, 0].tolist() == [3, 3, 3, 1]


def test_evaluations_of_published_settings() -> None:
    grid = solvers.sde_grid(250)
    assert solvers.evaluations("euler", grid) == 250
    assert solvers.evaluations("euler", grid, 1.8, 0.0, 0.7) == 250 + 172  # REPA: 172 guided
    assert solvers.evaluations("heun", solvers.ode_grid(10)) == 19


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
    spec = models.ModelSpec(
        name="custom",
        architecture="sit",
        depth=4,
        hidden_size=48,
        num_heads=4,
        patch_size=2,
        in_channels=4,
        input_size=8,
        num_classes=10,
    )
    network = models.build(spec, weights=weights).eval()
    stored = load_file(DATA / "repa_samplers.safetensors")
    y = stored["y"]

    @torch.no_grad()
    def predict(x: Tensor, t: float, labels: Tensor) -> Tensor:
        return network(x.float(), torch.full((len(x),), t), labels).velocity.double()

    scale, low, high = {"euler_cfg_interval": (2.5, 0.2, 0.7), "sde_cfg_interval": (1.9, 0.0, 0.65)}.get(
        case, (1.0, 0.0, 1.0)
    )
    velocity = solvers.guided(
        lambda x, t: predict(x, t, y),
        lambda x, t: (predict(x, t, torch.full_like(y, 10)), predict(x, t, y)),
        scale,
        low,
        high,
    )
    x = stored["latents"].double()
    if case.startswith("sde"):
        result = solvers.euler_maruyama(velocity, x, solvers.sde_grid(8), Noise(stored[f"{case}.noise"]))
    else:
        result = solvers.SOLVERS[case.split("_")[0]](velocity, x, solvers.ode_grid(6 if "heun" in case else 8))
    torch.testing.assert_close(result, stored[case], atol=1e-4, rtol=0)
