"""What features know, as numbers: probes of the class, of the mask, and CKNNA. Nothing here knows a network or a file.

Every probe sees standardised features: each dimension minus its mean, over its standard deviation, both of the probe's training
part. Its penalty comes from one grid, `PENALTIES`, by the error on a fifth of the training part that is then given back: the same
rule for every width, so that probes of a narrow and of a wide network can be compared. All in float64, without any draw.

Notation: N images, T tokens of an image, D dimensions of a feature, P pixels of a token's patch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import require

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the squared norm in a probe's loss, which is a mean over its training part."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of the nearest-neighbour probe, as DINO's (arXiv 2104.14294)."""
NEAREST = 10
"""k of CKNNA, as in arXiv 2405.07987."""


def standardise(x: Tensor, like: Tensor) -> Tensor:
    """x (N, D) minus the mean of `like` (M, D), over its standard deviation; what does not vary there is 0."""
    return _over(x - like.mean(0), like.var(0, unbiased=False), like.square().mean(0))


def _over(centred: Tensor, variance: Tensor, square: Tensor) -> Tensor:
    """`centred` over the root of `variance` (D,), 0 where that is nothing but rounding of the mean `square` (D,)."""
    return torch.where(variance > 1e-12 * square, centred / variance.clamp(min=1e-300).sqrt(), 0.0)


@dataclass(frozen=True)
class Linear:
    """x -> x W + b; W (D, out), b (out,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def logistic(
    x: Tensor, labels: Tensor, classes: int, penalty: float, start: Linear | None = None, tolerance: float = 1e-5
) -> Linear:
    """Multinomial logistic regression: the minimum of mean cross-entropy + penalty/2 |W|^2 (the bias is free).

    x (N, D), labels (N,) int64. L-BFGS over all of x, in the coordinates of its principal axes scaled by an upper bound of the
    curvature along each: the minimum is the same, and a few dozen steps reach it whatever the features' spectrum.
    """
    spread, axes = torch.linalg.eigh(x.T @ x / len(x))
    scaling = axes / (spread.clamp(min=0) / 4 + penalty).sqrt()
    unscaling = axes.T * (spread.clamp(min=0) / 4 + penalty).sqrt()[:, None]
    rotated = x @ scaling
    weight = x.new_zeros(x.shape[1], classes) if start is None else unscaling @ start.weight
    bias = x.new_zeros(classes) if start is None else start.bias.clone()
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    target = torch.nn.functional.one_hot(labels, classes).to(x)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        """Loss, and its gradient by hand: p - target is all that autograd would find."""
        log_p = (rotated @ weight + bias).log_softmax(1)
        error = (log_p.exp() - target) / len(x)
        plain = scaling @ weight
        weight.grad = rotated.T @ error + penalty * (scaling.T @ plain)
        bias.grad = error.sum(0)
        return -(log_p * target).sum() / len(x) + penalty / 2 * plain.square().sum()

    solver.step(closure)
    return Linear(scaling @ weight.detach(), bias.detach())


def class_accuracy(x: Tensor, labels: Tensor, parts: Sequence[Tensor], classes: int) -> float:
    """Share of the held-out images whose class logistic regression finds in their features.

    x (N, D), labels (N,) int64; parts: places of the images to fit, to choose the penalty by (cross-entropy), and held out.
    """
    fit, validate, test = parts

    inside, outside = standardise(x[fit], x[fit]), standardise(x[validate], x[fit])
    probe, chosen, least = None, PENALTIES[-1], math.inf
    for penalty in sorted(PENALTIES, reverse=True):  # each begins where a stronger penalty ended
        probe = logistic(inside, labels[fit], classes, penalty, probe, tolerance=1e-4)
        answers = probe(outside)
        error = torch.nn.functional.cross_entropy(answers, labels[validate]).item()
        if error >= least:
            break  # weaker penalties overfit
        chosen, least = penalty, error
        if (answers.argmax(1) == labels[validate]).all():
            break  # weaker ones could only be surer of it
    train = torch.cat([fit, validate])
    probe = logistic(standardise(x[train], x[train]), labels[train], classes, chosen, probe)
    return (probe(standardise(x[test], x[train])).argmax(1) == labels[test]).double().mean().item()


def neighbour_accuracy(x: Tensor, labels: Tensor, parts: Sequence[Tensor], classes: int) -> float:
    """Share of the held-out images whose class their nearest neighbours of the others vote for.

    Cosine similarity s of standardised features; each of the `NEIGHBOURS` nearest votes with weight exp(s / TEMPERATURE).
    x (N, D), labels (N,) int64; parts as in `class_accuracy`: the first two are the neighbours.
    """
    train, test = torch.cat(list(parts[:2])), parts[2]
    known, asked = (torch.nn.functional.normalize(standardise(x[part], x[train])) for part in (train, test))
    near = (asked @ known.T).topk(min(NEIGHBOURS, len(train)), dim=1)
    votes = x.new_zeros(len(test), classes).scatter_add_(
        1, labels[train][near.indices], (near.values / TEMPERATURE).exp()
    )
    return (votes.argmax(1) == labels[test]).double().mean().item()


@dataclass(frozen=True)
class Moments:
    """Sums over tokens z (A,) and their patches y (P,): all that ridge regression of y on z, or on any linear map of z, needs.

    f_u and f_c - f_u of a token as one z hold f_g = f_u + omega (f_c - f_u) for every omega, so that features need not be kept.
    """

    count: int
    z: Tensor
    """(A,)"""
    zz: Tensor
    """(A, A)"""
    zy: Tensor
    """(A, P)"""
    y: Tensor
    """(P,)"""
    yy: Tensor
    """() sum of squares"""

    @classmethod
    def of(cls, z: Tensor, y: Tensor) -> Moments:
        """Of tokens z (M, A) and patches y (M, P), both float64."""
        return cls(len(z), z.sum(0), z.T @ z, z.T @ y, y.sum(0), y.square().sum())

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def mapped(self, by: Tensor) -> Moments:
        """Of the features z @ by, (A, D)."""
        return Moments(self.count, self.z @ by, by.T @ self.zz @ by, by.T @ self.zy, self.y, self.yy)


def ridge(moments: Moments, penalties: Sequence[float]) -> list[Linear]:
    """For each penalty the minimum of mean |z W + b - y|^2 + penalty |W|^2, z standardised; W and b are for z as it was."""
    mean, square = moments.z / moments.count, moments.zz.diagonal() / moments.count
    covariance = moments.zz / moments.count - torch.outer(mean, mean)
    scale = _over(torch.ones_like(mean), square - mean.square(), square)  # 1 / standard deviation
    spread, axes = torch.linalg.eigh(covariance * torch.outer(scale, scale))
    target = axes.T @ ((moments.zy - torch.outer(mean, moments.y)) / moments.count * scale[:, None])
    weights = [scale[:, None] * (axes @ (target / (spread.clamp(min=0) + penalty)[:, None])) for penalty in penalties]
    return [Linear(weight, moments.y / moments.count - mean @ weight) for weight in weights]


def squared_error(probe: Linear, moments: Moments) -> float:
    """Sum of |z W + b - y|^2 over the tokens behind `moments`."""
    w, b = probe.weight, probe.bias
    predicted = (w * (moments.zz @ w)).sum() + 2 * b @ (moments.z @ w) + moments.count * b.square().sum()
    return (predicted - 2 * ((w * moments.zy).sum() + b @ moments.y) + moments.yy).item()


def mask_probe(fit: Moments, validate: Moments) -> Linear:
    """The ridge regression of patches on tokens, its penalty chosen by the squared error on `validate`, fitted to both."""
    errors = [squared_error(probe, validate) for probe in ridge(fit, PENALTIES)]
    return ridge(fit + validate, [PENALTIES[errors.index(min(errors))]])[0]


def confusion(predicted: Tensor, mask: Tensor) -> Tensor:
    """(2, 2) counts of pixels, [mask is 1][prediction is 1]; they add up over batches, and `iou` makes a number of them."""
    return torch.bincount((2 * mask.long() + predicted.long()).flatten(), minlength=4).view(2, 2)


def iou(counts: Tensor) -> float:
    """mIoU of `counts` (2, 2) over all pixels of all held-out images together: the mean of the intersection over union of the
    foreground, TP / (TP + FP + FN), and of the background, TN / (TN + FP + FN). A class that is nowhere is left out."""
    shares = [
        counts[c, c].item() / union
        for c in (0, 1)
        if (union := (counts[c].sum() + counts[:, c].sum() - counts[c, c]).item())
    ]
    return sum(shares) / len(shares)


def kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """What CKNNA compares of features x (N, D): the inner products of their unit vectors (N, N), centred per row, and who is
    among the k nearest of whom (N, N) bool, oneself not; where several tie for the last place, all of them."""
    unit = torch.nn.functional.normalize(x)
    products = unit @ unit.T
    others = products.clone().fill_diagonal_(-math.inf)
    k = min(NEAREST, len(x) - 1)
    return products - products.mean(1, keepdim=True), others >= others.topk(k, dim=1).values[:, -1:] - 1e-12


def cknna(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Centred kernel nearest-neighbour alignment (arXiv 2405.07987, section A) of two kernels over the same images.

    With mutual neighbours alpha(i, j) = [j is among the k nearest of i in both] and kernels K, L centred per row,
    Align(K, L) = sum_ij alpha(i, j) K_ij L_ij, and CKNNA = Align(K, L) / sqrt(Align(K, K) Align(L, L)).
    """

    def align(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> float:
        return (p[0] * q[0])[p[1] & q[1]].sum().item()

    own = align(a, a) * align(b, b)
    return align(a, b) / math.sqrt(own) if own > 0 else 0.0


Measure = Callable[[Tensor, Tensor, Sequence[Tensor], int], float]
CLASS_PROBES: dict[str, Measure] = {"accuracy": class_accuracy, "knn": neighbour_accuracy}


def principal(tokens: Tensor, count: int = 3) -> Tensor:
    """(M, count) coordinates of tokens (M, D) along their principal axes, the widest first.

    Each axis points to where its largest loading in absolute value is positive, so that colours do not flip between runs.
    """
    require(
        min(tokens.shape) >= count,
        f"{count} principal components need at least as many tokens and dimensions, not {tokens.shape}",
    )
    centred = tokens.double() - tokens.double().mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes[:, -count:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return centred @ (axes * largest.sign())
