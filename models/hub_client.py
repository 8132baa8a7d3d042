"""The calls to the Hugging Face hub, and what is said where it does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import UserError

PREFIX = "hub:"
"""What the name of a checkpoint on the hub begins with: hub:user/name, hub:user/name@REVISION."""

FILES = ["config.json", "*.safetensors"]


@contextmanager
def answered(what: str) -> Iterator[None]:
    """Turn the hub's refusals, and its silence, into one line."""
    import httpx

    try:
        yield
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot {what}: {reason}; is there a network, is the name right, are you logged in (hf auth login)?"
        ) from error


def fetch(name: str) -> Path:
    """The local copy of the checkpoint `name` (hub:user/name[@REVISION]), downloaded where it is not in the hub's cache.

    Raises:
        UserError: there is no such checkpoint, or no way to it.
    """
    import huggingface_hub

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    with answered(f"fetch {name}"):
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=FILES))
