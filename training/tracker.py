"""A tracker beside the log: Weights & Biases or TensorBoard, through Accelerate.

A continued run continues its record: the run's folder holds its id (`tracker.json`), and TensorBoard drops what the
repeated steps log again. `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_TAGS`, `WANDB_MODE` and `WANDB_DIR` work as usual.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from runtime import files
from runtime.errors import UserError, note, require

PROJECT = "self-transcendence"


def require_installed(kind: str) -> None:
    """Raise UserError if the tracker `kind` is not installed; Accelerate would go on without it."""
    require(
        kind == "none" or importlib.util.find_spec(kind) is not None,
        f"--report-to {kind}: it is not installed: pip install {kind}, or --report-to none",
    )


class Tracker:
    """Values and pictures by step; nothing for the kind `none`. Every process calls it, the main one writes.

    A tracker that cannot start is refused. One that fails later is given up with a warning: it never ends a run.
    """

    def __init__(
        self, accelerator: Accelerator, kind: str, folder: Path, start: int, settings: Mapping[str, Any]
    ) -> None:
        self._accelerator, self._kind, self._failed = accelerator, kind, False
        if kind == "none":
            return
        project = os.environ.get("WANDB_PROJECT", PROJECT) if kind == "wandb" else kind
        options = _wandb(folder) if kind == "wandb" else {"purge_step": start + 1}
        try:
            accelerator.init_trackers(
                project,
                {name: _plain(value) for name, value in settings.items()},
                {kind: options} if accelerator.is_main_process else {},
            )
        except _failures(kind) as error:
            raise UserError(
                f"--report-to {kind}: {error}; log in, set WANDB_MODE=offline, or --report-to none"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step."""
        self._attempt(lambda: self._accelerator.log(dict(values), step=step))

    def picture(self, step: int, name: str, path: Path) -> None:
        """The picture in the file `path`. Only the main process has it and calls this."""

        def show() -> None:
            from PIL import Image

            image = np.asarray(Image.open(path, formats=["PNG"]).convert("RGB"))[None]
            layout = {"dataformats": "NHWC"} if self._kind == "tensorboard" else {}
            self._accelerator.get_tracker(self._kind).log_images({name: image}, step=step, **layout)

        self._attempt(show)

    def close(self) -> None:
        """End the tracker's run."""
        # not `end_training`, which ends the process group too, and only where the tracker has not failed
        self._attempt(lambda: [tracker.finish() for tracker in self._accelerator.trackers])
        if self._failed and self._kind == "wandb":
            import wandb

            # it would print a traceback when Python exits
            with contextlib.suppress(Exception):
                wandb.teardown()

    def _attempt(self, act: Callable[[], object]) -> None:
        """Let the tracker act; if it fails, print a warning and go on without it."""
        if self._kind == "none" or self._failed:
            return
        try:
            act()
        # the libraries behind it raise errors of many kinds (lost processes, full disks, their own)
        except Exception as error:
            note(f"warning: --report-to {self._kind} has failed ({error}): the run goes on without it")
            self._failed = True


def _wandb(folder: Path) -> dict[str, Any]:
    """Arguments that open the run under the id with which it began."""
    record = folder / "tracker.json"
    if not record.is_file():
        files.write_json(record, {"wandb": uuid.uuid4().hex[:8]})
    where = {} if "WANDB_DIR" in os.environ else {"dir": str(folder)}
    return {"name": folder.name, "id": files.read_json(record)["wandb"], "resume": "allow", **where}


def _failures(kind: str) -> tuple[type[Exception], ...]:
    """Errors that the tracker raises if it cannot start: no account, no network."""
    if kind != "wandb":
        return ()
    import wandb

    return (wandb.errors.Error,)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, bool)) else str(value)
