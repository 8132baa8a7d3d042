"""What features encode, as numbers: probes of the class and of the mask, and CKNNA. Functions of arrays only.

A probe sees standardised features: each dimension minus its mean, divided by its standard deviation, both over the
probe's training part. Its penalty is the one of `PENALTIES` with the least error on a fifth of the training part; the
final fit uses that fifth too. The rule is the same for every width, so probes of narrow and wide networks can be
compared. Everything runs in float64 and draws no random numbers.

Notation: N images, T tokens of an image, D dimensions of a feature, P pixels of a token's patch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.errors import require

# imported where a probe is fitted: scikit-learn would slow the start of the commands
if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # weights of the squared norm, against a loss that is a mean
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the nearest-neighbour probe, as in DINO (arXiv 2104.14294)
NEAREST = 10  # k of CKNNA, as in arXiv 2405.07987


def standardise(x: Tensor, like: Tensor) -> Tensor:
    """x (N, D) minus the mean of `like` (M, D), divided by its standard deviation; 0 where `like` is constant."""
    return _over(x - like.mean(0), like.var(0, unbiased=False), like.square().mean(0))


def _over(centred: Tensor, variance: Tensor, square: Tensor) -> Tensor:
    """`centred` / sqrt(`variance` (D,)), 0 where the variance is only rounding error of the mean `square` (D,)."""
    return torch.where(variance > 1e-12 * square, centred / variance.clamp(min=1e-300).sqrt(), 0.0)


@dataclass(frozen=True)
class Linear:
    """x -> x W + b; W (D, out), b (out,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def logistic(x: Tensor, labels: Tensor, penalty: float, start: LogisticRegression | None = None) -> LogisticRegression:
    """Multinomial logistic regression: minimises mean cross-entropy + penalty/2 |W|^2 of the logits x W + b.

    x (N, D), labels (N,). `start` is fitted again from where it stands; it must know the same classes.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(solver="newton-cg", tol=1e-5, max_iter=1000, warm_start=True) if start is None else start
    # At scikit-learn's tolerance of 1e-4, fits under weak penalties stop short of their minimum. Below it, Newton's
    # method takes half the time of L-BFGS.
    # C multiplies the sum of the losses. For two classes scikit-learn fits one vector w, the difference of W's two
    # columns. They are w/2 and -w/2 at the minimum, so |W|^2 is |w|^2 / 2.
    model.C = (2 if len(labels.unique()) == 2 else 1) / (penalty * len(labels))
    return model.fit(x.numpy(), labels.numpy())


def class_accuracy(x: Tensor, labels: Tensor, parts: Sequence[Tensor]) -> float:
    """Accuracy of logistic regression on the held-out images.

    x (N, D), labels (N,) int64; parts: indices of the images to fit, to choose the penalty by (cross-entropy), to test.
    """
    from sklearn.metrics import log_loss

    fit, validate, test = parts
    if len(labels[fit].unique()) == 1:
        return (labels[test] == labels[fit[0]]).double().mean().item()
    inside, chosen, least = standardise(x[fit], x[fit]), PENALTIES[-1], math.inf
    # A class that `fit` lacks has no logit: its images cannot help to choose.
    known = validate[torch.isin(labels[validate], labels[fit])]
    outside, wanted, model = standardise(x[known], x[fit]).numpy(), labels[known].numpy(), None
    # Each fit starts from the solution for the next stronger penalty.
    for penalty in sorted(PENALTIES, reverse=True) if len(known) else ():
        model = logistic(inside, labels[fit], penalty, model)
        error = log_loss(wanted, model.predict_proba(outside), labels=model.classes_)
        if error >= least:
            break  # weaker penalties overfit
        chosen, least = penalty, error
        if model.score(outside, wanted) == 1:
            break  # weaker penalties only make the probe more certain
    train = torch.cat([fit, validate])
    model = logistic(standardise(x[train], x[train]), labels[train], chosen)
    return float(model.score(standardise(x[test], x[train]).numpy(), labels[test].numpy()))


def neighbour_accuracy(x: Tensor, labels: Tensor, parts: Sequence[Tensor]) -> float:
    """Accuracy of nearest neighbours on the held-out images, among the images of the first two parts.

    s is the cosine similarity of standardised features. Each of the `NEIGHBOURS` nearest votes with weight
    exp(s / TEMPERATURE).
    x (N, D), labels (N,) int64; parts as in `class_accuracy`.
    """
    from sklearn.neighbors import KNeighborsClassifier

    train, test = torch.cat(list(parts[:2])), parts[2]
    known, queries = (standardise(x[part], x[train]).numpy() for part in (train, test))
    model = KNeighborsClassifier(
        min(NEIGHBOURS, len(train)), metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    )
    return float(model.fit(known, labels[train].numpy()).score(queries, labels[test].numpy()))


@dataclass(frozen=True)
class TokenSums:
    """Sums over tokens z (A,) and their patches y (P,): enough for ridge regression of y on any linear map of z.

    With z = (f_u, f_c - f_u), every f_g = f_u + omega (f_c - f_u) is such a map, so no features are stored.
    """

    count: int
    z: Tensor  # (A,)
    zz: Tensor  # (A, A)
    zy: Tensor  # (A, P)
    y: Tensor  # (P,)
    yy: Tensor  # () sum of squares

    @classmethod
    def of(cls, z: Tensor, y: Tensor) -> TokenSums:
        """Of tokens z (M, A) and patches y (M, P), both float64."""
        return cls(len(z), z.sum(0), z.T @ z, z.T @ y, y.sum(0), y.square().sum())

    def __add__(self, other: TokenSums) -> TokenSums:
        return TokenSums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def mapped(self, by: Tensor) -> TokenSums:
        """Of the features z @ by, (A, D)."""
        return TokenSums(self.count, self.z @ by, by.T @ self.zz @ by, by.T @ self.zy, self.y, self.yy)


def ridge(sums: TokenSums, penalties: Sequence[float]) -> list[Linear]:
    """For each penalty the minimum of mean |z W + b - y|^2 + penalty |W|^2 over standardised z.

    The returned W and b apply to z itself.
    """
    mean, square = sums.z / sums.count, sums.zz.diagonal() / sums.count
    covariance = sums.zz / sums.count - torch.outer(mean, mean)
    scale = _over(torch.ones_like(mean), square - mean.square(), square)  # 1 / standard deviation
    spread, axes = torch.linalg.eigh(covariance * torch.outer(scale, scale))
    target = axes.T @ ((sums.zy - torch.outer(mean, sums.y)) / sums.count * scale[:, None])
    weights = [scale[:, None] * (axes @ (target / (spread.clamp(min=0) + penalty)[:, None])) for penalty in penalties]
    return [Linear(weight, sums.y / sums.count - mean @ weight) for weight in weights]


def squared_error(probe: Linear, sums: TokenSums) -> float:
    """Sum of |z W + b - y|^2 over the tokens of `sums`."""
    w, b = probe.weight, probe.bias
    predicted = (w * (sums.zz @ w)).sum() + 2 * b @ (sums.z @ w) + sums.count * b.square().sum()
    return (predicted - 2 * ((w * sums.zy).sum() + b @ sums.y) + sums.yy).item()


def mask_probe(fit: TokenSums, validate: TokenSums) -> Linear:
    """Ridge regression of patches on tokens, fitted to both sets; the penalty has the least error on `validate`."""
    errors = [squared_error(probe, validate) for probe in ridge(fit, PENALTIES)]
    return ridge(fit + validate, [PENALTIES[errors.index(min(errors))]])[0]


def confusion(predicted: Tensor, mask: Tensor) -> Tensor:
    """(2, 2) counts of pixels, [mask is 1][prediction is 1]. Add them over batches and pass the sum to `iou`."""
    return torch.bincount((2 * mask.long() + predicted.long()).flatten(), minlength=4).view(2, 2)


def iou(counts: Tensor) -> float:
    """mIoU of `counts` (2, 2) over all pixels of all held-out images together.

    The mean of the intersection over union of the foreground, TP / (TP + FP + FN), and of the background,
    TN / (TN + FP + FN). A class that occurs in neither mask nor prediction is left out.
    """
    shares = [
        counts[c, c].item() / union
        for c in (0, 1)
        if (union := (counts[c].sum() + counts[:, c].sum() - counts[c, c]).item())
    ]
    return sum(shares) / len(shares)


class Kernel(NamedTuple):
    """What CKNNA compares of N features, both (N, N)."""

    # inner products of the unit vectors
    products: Tensor
    # bool: j (column) is among the k nearest of i (row); i is not its own neighbour
    near: Tensor


def kernel(x: Tensor) -> Kernel:
    """Of features x (N, D). All that tie for the last place among the neighbours count."""
    unit = torch.nn.functional.normalize(x)
    products = unit @ unit.T
    others = products.clone().fill_diagonal_(-math.inf)
    k = min(NEAREST, len(x) - 1)
    return Kernel(products, others >= others.topk(k, dim=1).values[:, -1:] - 1e-12)


def cknna(a: Kernel, b: Kernel) -> float:
    """Centred kernel nearest-neighbour alignment as the paper writes it (arXiv 2405.07987, section A).

    With mutual neighbours alpha(i, j) = [j is among the k nearest of i in both] and kernels K, L centred per row,
    Align(K, L) = sum_ij alpha(i, j) K_ij L_ij, and CKNNA = Align(K, L) / sqrt(Align(K, K) Align(L, L)).
    """
    (k, near_k), (m, near_m) = ((each.products - each.products.mean(1, keepdim=True), each.near) for each in (a, b))

    def align(p: Tensor, q: Tensor, near: Tensor) -> float:
        return (p * q)[near].sum().item()

    own = align(k, k, near_k) * align(m, m, near_m)
    return align(k, m, near_k & near_m) / math.sqrt(own) if own > 0 else 0.0


def cknna_hsic(a: Kernel, b: Kernel) -> float:
    """The same quantity as its authors' code computes it (platonic-rep): HSIC of masked kernels that are not centred.

    With K', L' the inner products where alpha(i, j) = 1 and 0 elsewhere, of m = N features, Align(K, L) is the unbiased
    HSIC (Song et al. 2012, equation 5)
    [tr K'L' + sum K' sum L' / ((m - 1)(m - 2)) - 2 / (m - 2) 1'K'L'1] / (m (m - 3)),
    and the score Align(K, L) / (sqrt(Align(K, K) Align(L, L)) + 1e-6). Needs N > 3. 0 where a root does not exist.
    """
    m = len(a.products)

    def align(p: Tensor, q: Tensor, near: Tensor) -> float:
        p, q = p * near, q * near
        hsic = (p * q.T).sum() + p.sum() * q.sum() / ((m - 1) * (m - 2)) - 2 / (m - 2) * (p.sum(0) @ q.sum(1))
        return hsic.item() / (m * (m - 3))

    own = align(a.products, a.products, a.near) * align(b.products, b.products, b.near)
    return align(a.products, b.products, a.near & b.near) / (math.sqrt(own) + 1e-6) if own > 0 else 0.0


def principal(tokens: Tensor, count: int = 3) -> Tensor:
    """(M, count) coordinates of tokens (M, D) along their principal axes, in order of decreasing variance.

    scikit-learn makes the largest loading of each axis positive, so colours do not flip between runs.
    """
    from sklearn.decomposition import PCA

    require(
        min(tokens.shape) >= count,
        f"{count} principal components need at least as many tokens and dimensions, not {tokens.shape}",
    )
    return torch.from_numpy(PCA(count, svd_solver="covariance_eigh").fit_transform(tokens.double().numpy()))
