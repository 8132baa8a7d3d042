"""A classifier on an extractor's features, fitted to training images: do samples show the class they were drawn for?

It is logistic regression on standardised features; its penalty is chosen on a fifth of the training images. A reference
carries it (`--classifier` of `evaluations.reference`), and then every score against that reference has
`classifier_accuracy`: the share of samples that it assigns to their label.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typing_extensions import TypedDict

from runtime.errors import require
from runtime.schema import Field
from runtime.streams import Stream

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.npy import NpzArchive


class AboutClassifier(TypedDict):
    """How a classifier was made, and how often it is right on the images of its reference."""

    kind: str
    trained_on: str
    sha256: str
    num_images: Annotated[int, Field(ge=1)]
    penalty: float
    accuracy: float


@dataclass(frozen=True)
class Classifier:
    """Logits x W + b of features; weight (D, K), bias (K,), float32."""

    weight: Tensor
    bias: Tensor
    about: AboutClassifier


def accuracy(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor) -> float:
    """Share of features x (N, D) to which the logits x W + b give the class of labels (N,); all on the CPU."""
    return ((x @ weight + bias).argmax(1) == labels).double().mean().item()


def read(archive: NpzArchive, about: AboutClassifier | None, width: int) -> Classifier | None:
    """The classifier in a compact reference, if it has one. Raises UserError if its arrays do not fit."""
    import numpy as np
    import torch

    if about is None:
        return None
    heads = {name: archive.header(name) for name in ("classifier_weight", "classifier_bias") if name in archive.names}
    require(
        len(heads) == 2
        and all(head.dtype == np.float32 for head in heads.values())
        and heads["classifier_weight"].shape == (width, *heads["classifier_bias"].shape),
        f"{archive.path}: its classifier must be float32 ({width}, K) and (K,); make it again",
    )
    weight, bias = (torch.from_numpy(archive.read(name)) for name in heads)
    return Classifier(weight, bias, about)


def fit(path: Path | str, pool: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Weight (D, K), bias (K,) and penalty of the classifier of training features pool (N, D) with labels (N,).

    Raises UserError if the file `path` holds no features with labels, or not all classes.
    """
    require(
        pool is not None and labels is not None,
        f"--classifier {path} holds no features with labels; make it of training images in class folders",
    )
    import torch

    from evaluations import representation

    assert pool is not None and labels is not None
    classes = int(labels.max()) + 1
    order = torch.from_numpy(Stream(0, "classifier/split").permutation(len(labels)))
    validate, rest = order[: len(order) // 5], order[len(order) // 5 :]
    require(
        1 < classes == len(labels[rest].unique()),
        f"--classifier {path} needs images of at least two classes, several of each",
    )
    x = pool.double()
    inside, outside = (representation.standardise(x[part], x[rest]) for part in (rest, validate))
    scores = {}
    model = None
    # from the strongest, as each fit starts from the solution of the one before
    for penalty in sorted(representation.PENALTIES, reverse=True):
        model = representation.logistic(inside, labels[rest], penalty, model)
        scores[penalty] = model.score(outside.numpy(), labels[validate].numpy())
        if scores[penalty] < max(scores.values()):
            break
    penalty = max(scores, key=lambda key: (scores[key], key))
    model = representation.logistic(representation.standardise(x, x), labels, penalty)
    # in terms of the features themselves: standardising is linear too
    origin = representation.standardise(torch.zeros(1, x.shape[1], dtype=x.dtype), x)
    scale = representation.standardise(torch.ones(1, x.shape[1], dtype=x.dtype), x) - origin
    weight, bias = torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)
    if classes == 2:  # scikit-learn fits the difference of the two
        weight, bias = torch.cat([-weight / 2, weight / 2], 1), torch.cat([-bias / 2, bias / 2])
    return (scale.T * weight).float(), (origin @ weight + bias)[0].float(), penalty
