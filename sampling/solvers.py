"""Solvers of the probability-flow ODE and of the reverse SDE, over a velocity function v(x, t).

A solver knows neither labels nor networks nor guidance. States keep the dtype of `x` (give float64 for agreement with
published code); t is a Python float and falls from 1 (noise) to 0 (data). A grid of N + 1 times makes N steps.

`SOLVERS` is the one list of the ODE's solvers: the choices of `--solver` and the count of network evaluations follow
from it. The options import this file, so torch is imported inside the functions that need it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Velocity = Callable[["Tensor", float], "Tensor"]


def ode_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 1 to 0: even for shift 1, else t -> a t / (1 + (a - 1) t) with a = 1 / shift.

    A shift below 1 puts more steps near noise (LightningDiT, 0.3; Stable Diffusion 3 writes a).
    """
    a = 1 / shift
    return [a * t / (1 + (a - 1) * t) for t in _even(1.0, 0.0, steps + 1)]


def sde_grid(steps: int, last: float) -> list[float]:
    """steps + 1 times: `steps` of them evenly from 1 to `last`, then 0."""
    return [*_even(1.0, last, steps), 0.0]


def _even(start: float, stop: float, count: int) -> list[float]:
    import torch

    return torch.linspace(start, stop, count, dtype=torch.float64).tolist()


def euler(velocity: Velocity, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Euler's method for dx = v dt: one evaluation a step."""
    for t, after in itertools.pairwise(grid):
        x = x + (after - t) * velocity(x, t).to(x.dtype)
    return x


def heun2(velocity: Velocity, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Heun's second-order method: two evaluations in every step, the last included (torchdiffeq's heun2)."""
    for t, after in itertools.pairwise(grid):
        here = velocity(x, t).to(x.dtype)
        there = velocity(x + (after - t) * here, after).to(x.dtype)
        x = x + (after - t) * 0.5 * (here + there)
    return x


def heun(velocity: Velocity, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Heun's method up to the last step, which is an Euler step: REPA's and EDM's."""
    return euler(velocity, heun2(velocity, x, grid[:-1]), grid[-2:])


def dopri5(velocity: Velocity, x: Tensor, grid: Sequence[float], atol: float = 1e-6, rtol: float = 1e-3) -> Tensor:
    """Adaptive Dormand-Prince from the grid's first to its last time (SiT's tolerances), by torchdiffeq."""
    from torchdiffeq import odeint

    ends = x.new_tensor([grid[0], grid[-1]])
    return odeint(
        lambda t, state: velocity(state, t.item()).to(x.dtype), x, ends, method="dopri5", atol=atol, rtol=rtol
    )[-1]


class Solver(NamedTuple):
    """A solver of the ODE: how it goes through a grid of times, and at which times it evaluates the velocity."""

    integrate: Callable[[Velocity, Tensor, Sequence[float]], Tensor]
    # Grid -> every time of an evaluation, repeated where it evaluates twice; None if it chooses the times itself.
    times: Callable[[Sequence[float]], Sequence[float]] | None


SOLVERS = {
    "euler": Solver(euler, lambda grid: grid[:-1]),
    "heun": Solver(heun, lambda grid: [*grid[:-1], *grid[1:-1]]),
    "heun2": Solver(heun2, lambda grid: [*grid[:-1], *grid[1:]]),
    "dopri5": Solver(dopri5, None),
}


def euler_maruyama(velocity: Velocity, x: Tensor, grid: Sequence[float], noise: Callable[[int], Tensor]) -> Tensor:
    """Euler-Maruyama for the reverse SDE with diffusion w = 2 t; the last step is the drift alone.

    It evaluates where Euler's method does. `noise(k)` is the standard normal draw of step k, of x's shape.
    """
    import interpolant

    for step, (t, after) in enumerate(itertools.pairwise(grid)):
        drift = interpolant.sde_drift(x, velocity(x, t).to(x.dtype), x.new_full((len(x),), t))
        mean = x + (after - t) * drift
        last = step == len(grid) - 2
        x = mean if last else mean + (2 * t * (t - after)) ** 0.5 * noise(step).to(x)
    return x
