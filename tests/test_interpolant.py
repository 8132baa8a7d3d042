"""Laws of the interpolant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import interpolant

TIMES = torch.tensor([0.0, 0.03, 0.5, 0.81, 1.0], dtype=torch.float64)


def draws() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))


def test_velocity_is_the_time_derivative_of_the_path() -> None:
    x0, eps = draws()
    _, derivative = torch.autograd.functional.jvp(
        lambda t: interpolant.corrupt(x0, eps, t), TIMES, torch.ones_like(TIMES)
    )
    torch.testing.assert_close(interpolant.velocity(x0, eps), derivative)


def test_ends_of_the_path() -> None:
    x0, eps = draws()
    assert torch.equal(interpolant.corrupt(x0, eps, torch.zeros(5).double()), x0)
    assert torch.equal(interpolant.corrupt(x0, eps, torch.ones(5).double()), eps)


def test_velocity_determines_data_and_noise() -> None:
    x0, eps = draws()
    xt, v = interpolant.corrupt(x0, eps, TIMES), interpolant.velocity(x0, eps)
    torch.testing.assert_close(interpolant.data_from_velocity(xt, v, TIMES), x0)
    torch.testing.assert_close(interpolant.noise_from_velocity(xt, v, TIMES), eps)


def test_score_of_gaussian_data_against_autodiff() -> None:
    """For x0 ~ N(0, s^2): x_t ~ N(0, (1-t)^2 s^2 + t^2), whose log density autodiff differentiates."""
    s, t = 1.7, torch.tensor([0.2, 0.6, 0.95], dtype=torch.float64)
    xt = torch.tensor([0.3, -1.1, 2.0], dtype=torch.float64, requires_grad=True)
    variance = (1 - t) ** 2 * s**2 + t**2
    (score,) = torch.autograd.grad((-(xt**2) / (2 * variance)).sum(), xt)
    # E[v | x_t] by Gaussian conditioning: cov(eps - x0, x_t) / var(x_t) x_t
    v = (t - (1 - t) * s**2) / variance * xt.detach()
    torch.testing.assert_close(interpolant.score_from_velocity(xt.detach(), v, t), score)
    torch.testing.assert_close(interpolant.sde_drift(xt.detach(), v, t), v - t * score)


@given(scale=st.floats(-5, 50))
def test_guidance_is_affine_between_its_ends(scale: float) -> None:
    u, c = draws()
    assert torch.equal(interpolant.guide(u, c, 0.0), u)
    torch.testing.assert_close(interpolant.guide(u, c, 1.0), c)
    torch.testing.assert_close(interpolant.guide(u, c, scale), (1 - scale) * u + scale * c)
    torch.testing.assert_close(interpolant.guide(u, u, scale), u)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.9, 7.0])
def test_guiding_the_velocity_is_guiding_the_drift(scale: float) -> None:
    u, c = draws()
    xt = u + 2 * c
    guided_drift = interpolant.guide(interpolant.sde_drift(xt, u, TIMES), interpolant.sde_drift(xt, c, TIMES), scale)
    torch.testing.assert_close(interpolant.sde_drift(xt, interpolant.guide(u, c, scale), TIMES), guided_drift)
