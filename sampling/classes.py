"""Names of classes: the data set's own, or ImageNet's if the classes are synsets or the labels are a thousand numbers.

`imagenet.tsv` lists the synsets of ImageNet-1k in the order of their labels, each with the first of its WordNet names
(as timm's ImageNetInfo has them).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UserError, nearest, require

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint


@functools.lru_cache(maxsize=1)
def imagenet() -> dict[str, str]:
    """Synset -> name, in the order of the labels 0 .. 999."""
    lines = Path(__file__).with_name("imagenet.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def readable(class_names: Sequence[str]) -> list[str]:
    """The names of a data set's classes, with ImageNet's word in place of a synset."""
    return [imagenet().get(name, name) for name in class_names]


def names_of(checkpoint: Checkpoint) -> list[str]:
    """The names of a checkpoint's classes, in the order of their labels."""
    data, count = checkpoint.config.get("data") or {}, checkpoint.spec.num_classes
    if names := data.get("class_names"):
        return readable(names)
    return list(imagenet().values()) if count == len(imagenet()) else [str(label) for label in range(count)]


def labels_of(words: Sequence[str], names: Sequence[str]) -> list[int]:
    """The label of each of `words`, which is a number or one of `names`.

    Raises:
        UserError: a number beyond the classes, or a name that no class or several classes have.
    """
    labels = []
    for word in words:
        matching = [label for label, name in enumerate(names) if name.lower() == word.lower()]
        # names come first: a class that is called 7 need not have the label 7
        if word.isdigit() and not matching:
            require(int(word) < len(names), f"--classes {word}: there are {len(names)} classes, 0 to {len(names) - 1}")
            matching = [int(word)]
        if not matching:
            raise UserError(f"--classes: no class is called {word}{nearest(word, names)}; give its name or its number")
        require(
            len(matching) == 1,
            f"--classes: {word} is the name of classes {' and '.join(map(str, matching))}: give the number",
        )
        labels += matching
    return labels
