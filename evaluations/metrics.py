"""The metrics as functions of features.

Notation: x (N, D) float32 features of the samples, r (M, D) of the reference. The definitions are those of ADM's
evaluator (Dhariwal and Nichol, 2021), which published ImageNet numbers use; the mode `adm_fp16` rounds as it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from config import PRECISION_MODES
from runtime.arithmetic import exact_arithmetic
from runtime.errors import UserError, nearest

NEIGHBOURS = 3  # k of precision and recall
CHUNK = 5000  # samples per chunk of the Inception Score
PROJECTIONS, SEED = 1000, 2020  # of MIND, as published
BLOCK = 10_000  # ADM decides for each block of this size whether half precision was enough


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of a set of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor


@dataclass
class Moments:
    """Mean and covariance of a stream of features, in float64 by the pairwise update of Chan et al. (1979).

    The result does not depend on how the stream is cut into batches or processes, beyond float64 rounding.
    """

    count: int = 0
    mean: Tensor = torch.zeros(0, dtype=torch.float64)
    scatter: Tensor = torch.zeros(0, dtype=torch.float64)  # sum of (x - mean) (x - mean)^T

    def add(self, x: Tensor) -> None:
        """Add features (n, D) of any float type and device."""
        x = x.double()
        mean = x.mean(0)
        self.merge(Moments(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other: Moments) -> None:
        """Add another set."""
        if self.count == 0:
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter.clone()
        elif other.count:
            total = self.count + other.count
            delta = other.mean - self.mean
            self.scatter += other.scatter
            self.scatter.addr_(delta, delta, alpha=self.count * other.count / total)
            self.mean = self.mean + delta * (other.count / total)
            self.count = total

    def cpu(self) -> Moments:
        """A copy on the CPU."""
        return Moments(self.count, self.mean.cpu().clone(), self.scatter.cpu().clone())

    def statistics(self) -> Statistics:
        """Mean and covariance with divisor N - 1. Raises UserError for fewer than two samples, or NaN among them."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.count}")
        covariance = self.scatter.cpu() / (self.count - 1)
        if not covariance.isfinite().all():
            raise UserError("the features hold NaN or infinite values; the extractor's weights are broken")
        return Statistics(self.mean.cpu(), covariance)


def frechet(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians.

    The trace of the root is the sum of the roots of the eigenvalues of A B: no matrix square root, and rank-deficient
    covariances (fewer samples than dimensions, dead features) need no offset on the diagonal.

    Raises:
        UserError: the dimensions differ, a value is not finite, or A B has eigenvalues no covariances could give.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"the samples have {len(a.mean)} features and the reference {len(b.mean)}; use one extractor")
    product = a.covariance @ b.covariance
    if not product.isfinite().all():
        raise UserError("the statistics hold NaN or infinite values; rebuild the reference")
    roots = _eigenvalues(product).sqrt()
    if roots.imag.abs().max() > 1e-3 * roots.real.max().clamp(min=1):
        raise UserError("a stored covariance is not positive semi-definite; the reference is damaged")
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * roots.real.sum()
    return distance.item()


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues on one thread: more threads gain a fifth at best, and take ten times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.linalg.eigvals(matrix)
    finally:
        torch.set_num_threads(threads)


def inception_score(logits: Tensor, chunk: int = CHUNK) -> float:
    """exp(E[KL(p(y|x) || p(y))]), the mean over chunks of `chunk` samples in the order given.

    logits (N, K). A shorter last chunk counts like the others. The order matters: if the samples are sorted by
    class, each chunk's marginal p(y) is narrow and the score is low.
    """
    scores = []
    for part in logits.split(chunk):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        divergence = (p * log_p - torch.xlogy(p, p.mean(0))).sum(1)  # xlogy: 0 log 0 = 0
        scores.append(divergence.mean().exp())
    return torch.stack(scores).mean().item()


@exact_arithmetic()
def precision_recall(x: Tensor, r: Tensor, *, mode: str = "adm_fp16", k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019) as ADM computes them.

    Around every point lies a ball that reaches its k-th neighbour in its own set. Precision is the share of samples
    inside a ball of the reference, recall the share of reference points inside a ball of the samples; the rim counts.

    mode: "adm_fp16", squared distances rounded to half precision as ADM does, which raises both numbers a little
    (what published tables hold); "fp32", exact.

    Raises UserError for an unknown mode, or a set of fewer than k + 1 points.
    """
    for name, points in (("samples", x), ("reference images", r)):
        if len(points) <= k:
            raise UserError(f"precision and recall need at least {k + 1} {name}, got {len(points)}")
    samples, reference = _Points(x, mode), _Points(r, mode)
    x_radii, r_radii = _radii(samples, k), _radii(reference, k)
    inside_r = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    inside_x = torch.zeros(len(r), dtype=torch.bool, device=x.device)
    # The distances of one block serve both numbers.
    for rows in reference.blocks():
        for columns in samples.blocks():
            distances = _distances(reference, rows, samples, columns)
            inside_r[columns] |= (distances <= r_radii[rows, None]).any(0)
            inside_x[rows] |= (distances <= x_radii[columns]).any(1)
    return inside_r.double().mean().item(), inside_x.double().mean().item()


@exact_arithmetic()
def class_accuracy(x: Tensor, labels: Tensor, r: Tensor, reference_labels: Tensor) -> float:
    """Share of samples whose nearest reference point carries the sample's label.

    x (N, D) with labels (N,), r (M, D) with reference_labels (M,).
    """
    reference, reference_labels = _Points(r, "fp32"), reference_labels.to(r.device)
    correct = 0.0
    for part, wanted in zip(x.split(1000), labels.split(1000), strict=True):
        closest = _distances(_Points(part, "fp32"), slice(None), reference, slice(None)).argmin(1)
        correct += (reference_labels[closest] == wanted.to(closest.device)).sum().item()
    return correct / len(x)


@exact_arithmetic()
def mind(x: Tensor, r: Tensor, projections: int = PROJECTIONS, seed: int = SEED) -> float:
    """Monge Inception Distance (Berthet et al., arXiv 2605.06797): 3 D times the squared sliced Wasserstein-2 distance.

    The mean over random directions u of mean_i (sort(u.x)_i - sort(u.r)_i)^2, times 3 D. 5,000 samples agree with a
    Frechet distance of 50,000. The larger set is cut to a random subset of the size of the smaller one. Subset and
    directions are torch-fidelity's, because they are part of the definition; no stream of this project draws them.

    Raises UserError if the sets have different features.
    """
    if x.shape[1] != r.shape[1]:
        raise UserError(f"the samples have {x.shape[1]} features and the reference {r.shape[1]}; use one extractor")
    generator, count, width = torch.Generator().manual_seed(seed), min(len(x), len(r)), x.shape[1]
    x, r = (
        points
        if len(points) == count
        else points[torch.randperm(len(points), generator=generator)[:count].to(points.device)]
        for points in (x, r)
    )
    directions = torch.randn(projections, width, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
    total = 0.0
    for some in directions.to(x.device).split(100):  # 100 columns of 50,000 numbers are 20 MB
        sorted_x, sorted_r = ((points.float() @ some.T).sort(0).values for points in (x, r))
        total += (sorted_x - sorted_r).square().double().mean(0).sum().item()
    return 3 * width * total / projections


class _Points:
    """Features (N, D) with their squared norms, exact and, in ADM's mode, rounded to half precision."""

    def __init__(self, features: Tensor, mode: str) -> None:
        if mode not in PRECISION_MODES:
            modes = " or ".join(PRECISION_MODES)
            raise UserError(f"unknown precision mode {mode}{nearest(mode, PRECISION_MODES)}; use {modes}")
        self.half = mode == "adm_fp16"
        self.exact = features.float()
        self.norms = self.exact.square().sum(1)
        if self.half:
            self.rounded = self.exact.half().float()  # float32, so that products accumulate in float32
            # ADM sums the squares in half precision, in an order that depends on its device and cannot be reproduced
            self.half_norms = self.rounded.square().half().float().sum(1).half()

    def __len__(self) -> int:
        return len(self.exact)

    def blocks(self) -> Iterator[slice]:
        return (slice(start, min(start + BLOCK, len(self))) for start in range(0, len(self), BLOCK))


def _distances(u: _Points, rows: slice, v: _Points, columns: slice) -> Tensor:
    """Squared distances |u|^2 - 2 u.v + |v|^2 of a block, (rows, columns) float32, at least 0.

    In half mode, a block with any value beyond half's range is recomputed exactly, as in ADM.
    """
    if u.half:
        block = _expand(u.rounded[rows], u.half_norms[rows], v.rounded[columns], v.half_norms[columns])
        if block.max().isfinite():  # max passes NaN on, and costs a tenth of isfinite().all()
            return block
    return _expand(u.exact[rows], u.norms[rows], v.exact[columns], v.norms[columns])


def _expand(u: Tensor, u_norms: Tensor, v: Tensor, v_norms: Tensor, rows: int = 512) -> Tensor:
    """Sum the three terms in the norms' precision, left to right; in blocks of rows that fit the caches."""
    out = torch.empty(len(u), len(v), device=u.device)
    for part, norms, target in zip(u.split(rows), u_norms.split(rows), out.split(rows), strict=True):
        doubled = (part @ v.T).mul_(2).to(norms.dtype)
        target.copy_((norms[:, None] - doubled).add_(v_norms).clamp_(min=0))
    return out


def _radii(points: _Points, k: int) -> Tensor:
    """(N,) squared distance of each point to its k-th neighbour in its own set, the point itself not counted."""
    radii = []
    for rows in points.blocks():
        smallest = torch.empty(rows.stop - rows.start, 0, device=points.exact.device)
        for columns in points.blocks():
            block = _distances(points, rows, points, columns)
            candidates = block.topk(min(k + 1, block.shape[1]), largest=False).values
            smallest = torch.cat([smallest, candidates], 1).sort(1).values[:, : k + 1]
        radii.append(smallest[:, k])
    return torch.cat(radii)
