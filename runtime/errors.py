"""The one class of error that a user can cause, and the one place where it is caught.

A `UserError` is a sentence that says what is wrong and what to do about it. Whatever detects the mistake raises it;
`run` turns it into one line on standard error and exit code 2. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake that the user can correct: one line, naming the culprit and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def nearest(word: str, choices: Iterable[str]) -> str:
    """' (did you mean X?)' for the choice closest to `word`, or '' where none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def run(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one line and exit code 2, running out of memory likewise."""
    try:
        main()
    except UserError as error:
        _exit(str(error))
    except KeyboardInterrupt:
        _exit("interrupted", code=130)
    except MemoryError:
        _exit("out of memory: lower --batch-size, or raise --gradient-accumulation-steps")
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(error, torch.cuda.OutOfMemoryError):
            _exit("CUDA out of memory: lower --batch-size, or raise --gradient-accumulation-steps")
        raise


def _exit(message: str, code: int = 2) -> None:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    print(f"error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)
