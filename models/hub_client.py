"""The calls to the Hugging Face hub, and the message if it does not answer."""

from __future__ import annotations

import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import UserError

# A checkpoint on the hub is hub:user/name or hub:user/name@REVISION.
PREFIX = "hub:"


# Seconds that the hub may take to answer.
PATIENCE = 5


@contextmanager
def reached() -> Iterator[str | None]:
    """Inside, calls to the hub end at once if it does not answer: they use its cache alone. Yields why, else None.

    The hub's own client tries five times, up to a minute in all, for each file.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    reason = None if offline else _silence(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = offline or reason is not None
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = offline


def _silence(address: str) -> str | None:
    """Why the server at `address` does not answer, None if it does, be it by an error."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE):
            return None
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        cause = getattr(error, "reason", error)
        # a certificate that only the hub's own client accepts is an answer too
        return None if isinstance(cause, ssl.SSLError) else f"{address} does not answer: {cause}"


def _errors_of_clients() -> tuple[type[Exception], ...]:
    """The errors of the hub's client, and of the HTTP library on which the installed one stands."""
    return (OSError, ValueError, *(sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules))


@contextmanager
def answered(what: str) -> Iterator[None]:
    """Turn an error or a missing answer of the hub into one line."""
    with reached() as unreached:
        try:
            yield
        except _errors_of_clients() as error:
            reason = unreached or str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(
                f"cannot {what}: {reason}; is there a network, is the name right, are you logged in (hf auth login)?"
            ) from error


def fetch(name: str) -> Path:
    """The local copy of the checkpoint `name` (hub:user/name[@REVISION]), downloaded if the hub's cache lacks it.

    Raises:
        UserError: the checkpoint does not exist, or the hub cannot be reached.
    """
    import huggingface_hub

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    with answered(f"fetch {name}"):
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=["config.json", "*.safetensors"]
            )
        )
