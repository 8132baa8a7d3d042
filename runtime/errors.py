"""The one class of error that a user can cause, and the one place where it is caught.

A `UserError` is a sentence that says what is wrong and how to correct it. The code that detects the mistake raises it;
`run` turns it into one line on standard error and exit code 2. Everything else is a bug and keeps its traceback.

Exit codes: 0 done, 2 a mistake that the user can correct, 75 stopped early on request with everything saved (the same
command continues), 130 interrupted, 1 a bug or a lost process.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

# EX_TEMPFAIL of sysexits.h: schedulers can be configured to requeue a job that exits with it.
TRY_AGAIN = 75
# Errors of the operating system that another place on disk avoids.
_PLACES = (
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.EIO,
    errno.ESTALE,
)
# How the communication libraries say that the process at the other end has ended or stands still.
_CONTACT_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "timed out waiting",
    "broken pipe",
    "remote process exited",
    "application timeout caused pair closure",
)


class UserError(Exception):
    """A mistake that the user can correct: one line that names the culprit and the remedy."""


class EndedEarly(Exception):
    """The program stopped on request and has saved its work; the same command continues it."""


class LostContact(Exception):
    """Another process of this launch has ended or stands still."""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def note(text: str) -> None:
    """Print a note on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {shown(text)}", flush=True)


def nearest(word: str, choices: Iterable[str]) -> str:
    """' (did you mean X?)' for the choice closest to `word`, or '' if every choice is very different."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def run(main: Callable[[], object]) -> None:
    """Run a command's `main`; print one line and exit if it raises an error that a user can cause or correct."""
    try:
        main()
    except UserError as error:
        _exit(str(error))
    except EndedEarly as end:
        _exit(str(end), TRY_AGAIN, "ended early")
    except LostContact as error:
        _exit(str(error), code=1)
    except KeyboardInterrupt:
        _exit("interrupted", code=130)
    except MemoryError as error:
        _exit(_out_of_memory(str(error)))
    except OSError as error:
        if error.errno not in _PLACES:
            raise
        _exit(f"cannot use {error.filename or 'a file'}: {error.strerror}; choose another place")
    except RuntimeError as error:
        # Importing torch takes seconds. A command that has not imported it cannot have raised its errors.
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(error, torch.cuda.OutOfMemoryError):
            _exit("CUDA out of memory: lower --batch-size, or raise --gradient-accumulation-steps")
        if "can't allocate memory" in str(error):
            _exit(_out_of_memory())
        if contact_lost(error):
            _exit("lost contact with another process of this launch; its own message says why it ended", code=1)
        raise


def _out_of_memory(about: str = "") -> str:
    return (
        f"out of memory{f' ({about})' if about else ''}: free some, or lower --batch-size, --workers, "
        f"--num-fid-samples or the width of a head, or give --resident disk"
    )


def contact_lost(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process ended or stood still."""
    text = str(error).lower()
    return any(words in text for words in _CONTACT_LOST)


def shown(text: object) -> str:
    """Text from a file or the command line as a terminal can show it: control characters are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def _exit(message: str, code: int = 2, word: str = "error") -> None:
    # The message needs a line of its own below the bars. Without this module, no bar was ever opened.
    if progress := sys.modules.get("runtime.progress"):
        progress.end()
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    print(f"{word}{where}: {' '.join(shown(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)
