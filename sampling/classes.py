"""Names of classes: a data set's own, or ImageNet's where it speaks of synsets or has nothing but a thousand numbers.

`imagenet.tsv` lists the synsets of ImageNet-1k in the order of their labels, each with the first of its WordNet names (as
timm's ImageNetInfo has them).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from models.checkpoint import Checkpoint
from runtime.errors import UserError, nearest, require


@functools.lru_cache(maxsize=1)
def imagenet() -> dict[str, str]:
    """Synset -> name, in the order of the labels 0 .. 999."""
    lines = Path(__file__).with_name("imagenet.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def spoken(class_names: Sequence[str]) -> list[str]:
    """What the classes of a data set are called: their own names, those of synsets in words."""
    return [imagenet().get(name, name) for name in class_names]


def names_of(checkpoint: Checkpoint) -> list[str]:
    """What the classes of a checkpoint are called: one name a label."""
    data, count = checkpoint.config.get("data") or {}, checkpoint.spec.num_classes
    if names := data.get("class_names"):
        return spoken(names)
    return list(imagenet().values()) if count == len(imagenet()) else [str(label) for label in range(count)]


def labels_of(words: Sequence[str], names: Sequence[str]) -> list[int]:
    """The label that each of `words`, a number or a name, stands for.

    Raises:
        UserError: a number beyond the classes, a name that is none or several of `names`.
    """
    labels = []
    for word in words:
        named = [label for label, name in enumerate(names) if name.lower() == word.lower()]
        if word.isdigit() and not named:
            require(int(word) < len(names), f"--classes {word}: there are {len(names)} classes, 0 to {len(names) - 1}")
            named = [int(word)]
        if not named:
            raise UserError(f"--classes: no class is called {word}{nearest(word, names)}; give its name or its number")
        require(
            len(named) == 1,
            f"--classes: {word} is the name of classes {' and '.join(map(str, named))}: give the number",
        )
        labels += named
    return labels
