"""The calls to the Hugging Face hub, and the message if it does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import UserError

# A checkpoint on the hub is hub:user/name or hub:user/name@REVISION.
PREFIX = "hub:"


@contextmanager
def answered(what: str) -> Iterator[None]:
    """Turn an error or a missing answer of the hub into one line."""
    import httpx

    try:
        yield
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
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
