"""Statistics of features under a fixed projection to 64 dimensions: small enough for a record (17 KB in float64).

Of features in D dimensions with mean m and covariance C, the features P^T x have the mean P^T m and the covariance
P^T C P, so nothing is extracted twice. P (D, 64) has orthonormal columns; up to 64 dimensions it is the identity.

The Frechet distance of two projected sets is at most that of the sets: of two Gaussians it is the squared Wasserstein-2
distance, the least mean squared distance |x - y|^2 over all couplings, and |P^T (x - y)| <= |x - y| for each pair of
the best coupling. With D <= 64 both are equal.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from evaluations.metrics import Statistics
from runtime.streams import Stream

WIDTH = 64


@functools.lru_cache(maxsize=4)
def basis(features: str, width: int) -> Tensor:
    """P (width, min(width, 64)) float64 with orthonormal columns, a function of the features' name and width.

    P is Q of the QR decomposition, with a positive diagonal of R, of a normal matrix; this decomposition is unique.
    """
    if width <= WIDTH:
        return torch.eye(width, dtype=torch.float64)
    normal = Stream(0, f"projection/{features}", width).normal((width, WIDTH)).double()
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()


def project(statistics: Statistics, features: str) -> Statistics:
    """Mean (k,) and covariance (k, k) of the projected features, k = min(D, 64)."""
    p = basis(features, len(statistics.mean))
    return Statistics(p.T @ statistics.mean, p.T @ statistics.covariance @ p)


def pack(statistics: Statistics, prefix: str = "") -> dict[str, Tensor]:
    """PREFIXmean (k,) and PREFIXcovariance (k (k + 1) / 2,), the upper triangle row by row, both float64."""
    covariance = statistics.covariance
    rows, columns = torch.triu_indices(*covariance.shape)
    return {f"{prefix}mean": statistics.mean, f"{prefix}covariance": covariance[rows, columns]}


def unpack(tensors: Mapping[str, Tensor], prefix: str = "") -> Statistics:
    """The statistics that `pack` packed. Raises KeyError or ValueError if `tensors` are not such."""
    mean, upper = tensors[f"{prefix}mean"], tensors[f"{prefix}covariance"]
    rows, columns = torch.triu_indices(len(mean), len(mean))
    if mean.ndim != 1 or upper.shape != rows.shape or {mean.dtype, upper.dtype} != {torch.float64}:
        raise ValueError("not a mean (k,) and the upper triangle of a covariance (k, k) in float64")
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    covariance[rows, columns] = covariance[columns, rows] = upper
    return Statistics(mean, covariance)
