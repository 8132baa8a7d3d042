"""Commands as forked processes, which a preloaded library (`faults.c`) kills or lets fail at their n-th file operation.

A server has imported the project once; a trial is a fork of it and takes a tenth of a second. Where no C compiler is
found, an audit hook of Python stands for the library: it sees the operations of Python itself alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.helpers import ROOT

# Seconds after which a trial counts as one that hangs.
LIMIT = 120.0
HANGS = "hangs"
LIBRARY = "TORTURE_FAULTS"


@dataclass(frozen=True)
class Trial:
    """A command, and what happens at its operation number `at` below a folder; 0: nothing."""

    command: str
    argv: list[str]
    below: str = "/nowhere"
    at: int = 0
    # an errno; 0: SIGKILL
    code: int = 0


@dataclass(frozen=True)
class Ending:
    """Exit code (negative: the signal) or `HANGS`, standard error, and operations if it was not killed."""

    code: int | str
    errors: str
    operations: int

    @property
    def clean(self) -> bool:
        """Whether the command succeeded or answered in one line."""
        return self.code == 0 or (self.code == 2 and "Traceback" not in self.errors)


def build(folder: Path) -> Path | None:
    """Compile the library into `folder`; None where no compiler is found."""
    compiler, library = shutil.which("cc"), folder / "faults.so"
    if compiler is None:
        return None
    source = Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@contextlib.contextmanager
def server(library: Path | None) -> Iterator[Callable[..., list[Ending]]]:
    """Yields a function that runs trials, all at once, and returns their endings."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if library is not None:
        environment |= {"LD_PRELOAD": str(library), LIBRARY: str(library)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.torture.forks"],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout

        def run(*trials: Trial) -> list[Ending]:
            print(json.dumps([asdict(trial) for trial in trials]), file=process.stdin, flush=True)
            return [Ending(**ending) for ending in json.loads(process.stdout.readline())]

        yield run
        process.stdin.close()


def serve() -> None:
    """Answer each line of trials on standard input with a line of endings."""
    # imported before the first fork
    import torch

    from tests.torture.world import COMMANDS
    from training import posthoc

    torch.set_num_threads(1)
    mains = {**{name: command.main for name, command in COMMANDS.items()}, "posthoc": posthoc.main}
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for number, trial in enumerate(json.loads(line)):
                place = Path(folder) / str(number)
                children.append((_fork(mains[trial["command"]], trial, place), place))
            endings = [_ending(child, place) for child, place in children]
        os.write(answers, (json.dumps(endings) + "\n").encode())


def _fork(main: Callable[[Sequence[str]], object], trial: dict[str, Any], place: Path) -> int:
    """Start a trial; returns its process. It writes `place`.err and `place`.count."""
    if child := os.fork():
        return child
    code = 1
    # whatever ends the command, this process must not go on as a second server
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(f"{place}.err", os.O_WRONLY | os.O_CREAT), 2)
        code = _run(main, trial, place)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(main: Callable[[Sequence[str]], object], trial: dict[str, Any], place: Path) -> int:
    from runtime import errors

    count = _arm(trial["below"], trial["at"], trial["code"])
    code: Any = 0
    try:
        errors.run(lambda: main(trial["argv"]))
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    Path(f"{place}.count").write_text(str(count()))
    return int(code)


def _arm(below: str, at: int, code: int) -> Callable[[], int]:
    """Prepare the fault in this process; returns what counts the operations so far."""
    if LIBRARY in os.environ:
        library = ctypes.CDLL(os.environ[LIBRARY])
        library.faults_arm(os.fsencode(below), ctypes.c_long(at), code)
        return library.faults_count
    operations = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operations
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        if not any(str(argument).startswith(below) for argument in arguments[:2]):
            return
        operations += 1
        if operations == at:
            if not code:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(code, os.strerror(code), str(arguments[0]))

    sys.addaudithook(hook)
    return lambda: operations


def _ending(child: int, place: Path) -> dict[str, Any]:
    end = time.monotonic() + LIMIT
    while not (waited := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.003)
    code = os.waitstatus_to_exitcode(waited[1]) if waited[0] else HANGS
    count = Path(f"{place}.count")
    return {
        "code": code,
        "errors": Path(f"{place}.err").read_text(errors="replace")[-1500:],
        "operations": int(count.read_text()) if count.exists() else 0,
    }


if __name__ == "__main__":
    serve()
