"""Solvers of the probability-flow ODE and of the reverse SDE, over a velocity function v(x, t).

A solver knows neither labels nor networks: `guided` turns a pair of predictions into one velocity beforehand. States are
kept in the dtype of `x` (give float64 for agreement with published code); t is passed as a Python float and falls from
1 (noise) to 0 (data). A grid of N + 1 times makes N steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import interpolant

Velocity = Callable[[Tensor, float], Tensor]
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]
Noise = Callable[[int], Tensor]

LAST_STEP = 0.04
"""Size of the SDE's final, noise-free step (SiT's and REPA's protocol)."""


def ode_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 1 to 0: even for shift 1, else t -> a t / (1 + (a - 1) t) with a = 1 / shift.

    A shift below 1 puts more steps near noise (LightningDiT, 0.3; Stable Diffusion 3 writes a).
    """
    a = 1 / shift
    return [a * t / (1 + (a - 1) * t) for t in torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()]


def sde_grid(steps: int, last: float = LAST_STEP) -> list[float]:
    """steps + 1 times: `steps` of them evenly from 1 to `last`, then 0."""
    return [*torch.linspace(1.0, last, steps, dtype=torch.float64).tolist(), 0.0]


def guided(
    conditional: Velocity, pair: Pair, scale: float, low: float = 0.0, high: float = 1.0, channels: int | None = None
) -> Velocity:
    """Velocity under classifier-free guidance while low <= t <= high, conditional elsewhere.

    Outside the interval, and at scale 1, the unconditional half is not evaluated. `pair` returns
    (unconditional, conditional). `channels` guides the first so many alone, the others stay conditional: SiT's and
    LightningDiT's published scales mean something under that rule only.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        if scale == 1 or not low <= t <= high:
            return conditional(x, t)
        unconditional, wanted = pair(x, t)
        if channels is None:
            return interpolant.guide(unconditional, wanted, scale)
        first = interpolant.guide(unconditional[:, :channels], wanted[:, :channels], scale)
        return torch.cat([first, wanted[:, channels:]], dim=1)

    return velocity


def euler(velocity: Velocity, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Euler's method for dx = v dt: one evaluation a step."""
    for t, after in itertools.pairwise(grid):
        x = x + (after - t) * velocity(x, t).to(x.dtype)
    return x


def heun(velocity: Velocity, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Heun's second-order method: two evaluations a step, one in the last (which is an Euler step)."""
    for step, (t, after) in enumerate(itertools.pairwise(grid)):
        here = velocity(x, t).to(x.dtype)
        ahead = x + (after - t) * here
        if step < len(grid) - 2:
            ahead = x + (after - t) * 0.5 * (here + velocity(ahead, after).to(x.dtype))
        x = ahead
    return x


def euler_maruyama(velocity: Velocity, x: Tensor, grid: Sequence[float], noise: Noise) -> Tensor:
    """Euler-Maruyama for the reverse SDE with diffusion w = 2 t; the last step is the drift alone.

    `noise(k)` is the standard normal draw of step k, of x's shape.
    """
    for step, (t, after) in enumerate(itertools.pairwise(grid)):
        drift = interpolant.sde_drift(
            x, velocity(x, t).to(x.dtype), torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        )
        mean = x + (after - t) * drift
        last = step == len(grid) - 2
        x = mean if last else mean + (2 * t * (t - after)) ** 0.5 * noise(step).to(x)
    return x


def dopri5(velocity: Velocity, x: Tensor, grid: Sequence[float], atol: float = 1e-6, rtol: float = 1e-3) -> Tensor:
    """Adaptive Dormand-Prince from the grid's first to its last time (SiT's tolerances), by torchdiffeq."""
    from torchdiffeq import odeint

    ends = torch.tensor([grid[0], grid[-1]], dtype=x.dtype, device=x.device)
    return odeint(
        lambda t, state: velocity(state, t.item()).to(x.dtype), x, ends, method="dopri5", atol=atol, rtol=rtol
    )[-1]


SOLVERS = {"euler": euler, "heun": heun, "dopri5": dopri5}


def evaluations(solver: str, grid: Sequence[float], scale: float = 1.0, low: float = 0.0, high: float = 1.0) -> int:
    """Network evaluations per sample; a guided evaluation counts twice."""
    times = list(grid[:-1])
    if solver == "heun":
        times += list(grid[1:-1])
    return sum(2 if scale != 1 and low <= t <= high else 1 for t in times)
