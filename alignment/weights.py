"""Weights of tokens and of times: where an alignment pulls, at the same mean strength.

    tokens, `residual`   w_k = c_k / mean over k of c_k,   c_k = clip(sg e_k / mean over k of sg e_k, 1/4, 4)
    times, `smooth`      w_i = s(t_i) / mean over the global batch of s(t),   s(t) = sigmoid(20 (0.7 - t))

e_k is the distance of token k to its target: tokens that lag behind weigh more (RARE, arXiv 2609.34732, with
e = (1 - cos) / 2). The times are those of VA-REPA (arXiv 2602.05435), t = 1 is noise; its code divides by the sum of
the weights of what one process sees, here it is that of the global batch, whatever the number of processes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LEAST, MOST = 1 / 4, 4.0
SHARPNESS, MIDDLE = 20.0, 0.7


def present_mean(distances: Tensor, route: Tensor | None = None) -> Tensor:
    """(N,) mean of `distances` (N, T) over the tokens whose weight in `route` (N, T) is not zero; over all without."""
    if route is None:
        return distances.mean(1)
    present = route != 0
    return distances.where(present, 0).sum(1) / present.sum(1)


def by_residual(distances: Tensor, route: Tensor | None = None) -> Tensor:
    """Weights (N, T) of mean 1 for tokens with these `distances` (N, T); constants, without a gradient.

    With the weights of a route (N, T) the mean distance is that of its tokens, and the two weights are multiplied.
    """
    distances = distances.detach()
    mean = present_mean(distances, route)[:, None].clamp(min=torch.finfo(distances.dtype).tiny)
    weights = (distances / mean).clamp(LEAST, MOST)
    if route is not None:
        weights = weights * route
    return weights / weights.mean(1, keepdim=True)


def smooth(t: np.ndarray) -> np.ndarray:
    """s(t), of the shape of `t`."""
    return 1 / (1 + np.exp(-SHARPNESS * (MIDDLE - t.astype(np.float64))))
