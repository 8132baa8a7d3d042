"""Alignments by name. Every file of this folder is imported, so that an `Alignment` in it registers itself."""

from __future__ import annotations

import importlib
import pkgutil

from alignment.base import Alignment, AlignOptions, BuildContext, Context
from runtime.errors import UserError, nearest

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def find(name: str) -> type[Alignment]:
    """The alignment class called `name`. Raises UserError with the nearest known name."""
    if name not in Alignment.registry:
        raise UserError(
            f"unknown alignment {name}{nearest(name, Alignment.registry)}; "
            f"known: none, {', '.join(sorted(Alignment.registry))}"
        )
    return Alignment.registry[name]


__all__ = ["AlignOptions", "Alignment", "BuildContext", "Context", "find"]
