"""JSON from disk checked against the shape that it should have, by pydantic, with the path of the wrong field.

pydantic comes with wandb, which is required anyway. Its strict mode turns neither "3" into 3 nor True into 1, and its
errors name the field that is wrong. Checks written by hand had missed one wrong shape in ten. Where it is missing (on
a machine rented for measurements, which reads only what it has just written) one line says that nothing is checked.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from runtime import files
from runtime.errors import UserError, note

if TYPE_CHECKING or find_spec("pydantic"):
    from pydantic import Field, TypeAdapter, ValidationError
else:
    note("pydantic is not installed: descriptions in files are read unchecked; pip install -r requirements.txt")

    class ValidationError(Exception):
        """Never raised."""

    def Field(**_: Any) -> None:
        """Bounds, unused."""

    class TypeAdapter:
        """Makes a dataclass of JSON as pydantic does, and lets everything else through."""

        def __init__(self, kind: type) -> None:
            self.kind = kind

        def validate_json(self, text: str, strict: bool) -> Any:
            value = json.loads(text)
            if not is_dataclass(self.kind):
                return value
            known = {field.name for field in fields(self.kind)} & value.keys()
            return self.kind(**{k: tuple(value[k]) if isinstance(value[k], list) else value[k] for k in known})


T = TypeVar("T")
# A finite number.
Number = Annotated[float, Field(allow_inf_nan=False)]

# Building an adapter takes milliseconds, and the same few types are checked again and again.
_adapter: Callable[[Any], TypeAdapter[Any]] = functools.lru_cache(maxsize=64)(TypeAdapter)


def checked(kind: type[T], value: Any, where: object, remedy: str = "restore it from a copy") -> T:
    """`value`, plain JSON, as a `kind` (TypedDict, dataclass, ...); dataclasses drop keys that `kind` does not name.

    Raises:
        UserError: the value has another shape; the message holds `where`, the path of the field, what is wrong with
            it, and `remedy`.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"])) or "the whole"
        actual = "" if fault["type"] == "missing" else f", not {_short(fault['input'])}"
        raise UserError(
            f"{where} is damaged or from another version: {place}: {fault['msg'][:1].lower()}{fault['msg'][1:]}{actual}"
            f"; {remedy}"
        ) from error


def read(kind: type[T], path: Any, remedy: str = "restore it from a copy", sealed: bool = False) -> T:
    """The JSON file at `path` as a `kind`.

    Raises:
        UserError: it is missing, broken, of another shape or, if it should be `sealed`, was changed.
    """
    value = files.read_json(path)
    shaped = checked(kind, value, path, remedy)
    if sealed:
        files.require_sealed(path, value)
    return shaped


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
