"""The end of a program: a mistake is one line with its exit code, and a bug keeps its traceback."""

from __future__ import annotations

import errno

import pytest
import torch

from runtime import errors, progress
from runtime.errors import UserError


def test_a_mistake_is_one_line_with_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UserError("something is\nwrong; correct it")

    with pytest.raises(SystemExit) as caught:
        errors.run(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: something is wrong; correct it\n"


def test_an_error_has_a_line_of_its_own_below_a_bar(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        for _ in progress.bar(range(3)):
            raise UserError("something is wrong; correct it")

    with pytest.raises(SystemExit):
        errors.run(main)
    assert capsys.readouterr().err.endswith("\nerror: something is wrong; correct it\n")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        errors.run(lambda: 1 / 0)


@pytest.mark.parametrize(
    "error, message",
    [
        (MemoryError(), "out of memory: free some, or lower --batch-size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory: free some, or lower --batch-size",
        ),
        (MemoryError("an array of 9 TiB"), "out of memory (an array of 9 TiB): free some"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to"),
            "CUDA out of memory: lower --batch-size, or raise --gradient-accu",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/x/y"),
            "cannot use /x/y: Read-only file system; choose another place",
        ),
        (OSError(errno.EIO, "Input/output error", "/x"), "cannot use /x: Input/output error; choose another place"),
    ],
)
def test_a_resource_that_runs_out_is_one_line(capsys: pytest.CaptureFixture, error: Exception, message: str) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        errors.run(main)
    output = capsys.readouterr().err
    assert caught.value.code == 2 and output.startswith(f"error: {message}") and output.count("\n") == 1
