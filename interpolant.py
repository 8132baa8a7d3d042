"""The linear interpolant and the algebra of its predictions.

Time runs from data to noise: t = 0 is data, t = 1 is noise. With clean latent x0 and noise eps ~ N(0, I),

    x_t   = alpha(t) x0 + sigma(t) eps,       alpha = 1 - t,  sigma = t                                     (1)
    v     = d x_t / d t = alpha'(t) x0 + sigma'(t) eps = eps - x0                                           (2)

The network predicts v. From (1) and (2) every other quantity follows without dividing by alpha or sigma, except the
score, which has sigma in its denominator:

    x0    = x_t - t v                                                                                       (3)
    eps   = x_t + (1 - t) v                                                                                 (4)
    score = grad log p_t(x_t) = -eps / sigma = -(x_t + (1 - t) v) / t                                       (5)

The probability-flow ODE is dx = v dt. With diffusion w(t) = 2 sigma(t) = 2 t the reverse SDE that keeps the same
marginals is dx = (v - w/2 score) dt + sqrt(w) dW, whose drift by (5) is affine in v and free of division:

    v - t score = x_t + (2 - t) v                                                                           (6)

Shapes: x0, eps, x_t, v are (N, ...); t is (N,) and is broadcast over the trailing axes.
"""

from __future__ import annotations

from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """t (N,) with trailing axes of size one, so that it broadcasts against `like` (N, ...)."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def alpha(t: Tensor) -> Tensor:
    """Weight of the data in x_t."""
    return 1 - t


def sigma(t: Tensor) -> Tensor:
    """Weight of the noise in x_t."""
    return t


def corrupt(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t of equation (1), (N, ...)."""
    t = expand(t, x0)
    return alpha(t) * x0 + sigma(t) * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """v of equation (2), the target of the flow-matching loss."""
    return eps - x0


def data_from_velocity(xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 of equation (3)."""
    return xt - expand(t, xt) * v


def noise_from_velocity(xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """eps of equation (4)."""
    return xt + (1 - expand(t, xt)) * v


def score_from_velocity(xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Score of equation (5); t > 0."""
    return -noise_from_velocity(xt, v, t) / sigma(expand(t, xt))


def sde_drift(xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Drift of the reverse SDE with diffusion w = 2 t, equation (6)."""
    return xt + (2 - expand(t, xt)) * v


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance u + scale (c - u), of velocities (paper, equation 2) or of features (equation 3)."""
    return unconditional + scale * (conditional - unconditional)
