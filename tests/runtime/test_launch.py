"""The start of a process: what the launcher and the machine offer."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from runtime import launch


def test_a_gpu_that_this_torch_cannot_use_is_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def printed(driver: bool, usable: bool, visible: str = "0") -> str:
        monkeypatch.setattr("os.path.exists", lambda path: driver and path == "/proc/driver/nvidia/version")
        monkeypatch.setattr("torch.cuda.is_available", lambda: usable)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        launch._note_unused_gpu()
        return capsys.readouterr().out

    line = printed(driver=True, usable=False)
    assert line.count("\n") == 1 and torch.__version__ in line and "install the torch that fits the driver" in line
    assert not printed(driver=True, usable=True) and not printed(driver=False, usable=False)
    assert not printed(driver=True, usable=False, visible="")  # hidden on purpose


def test_commands_wait_longer_for_the_main_process_than_nccl_does() -> None:
    """The main process writes and digests 10 GB of samples meanwhile; training keeps torch's own time unless asked."""
    assert launch.accelerator().init_handler.timeout > timedelta(hours=2)
    assert launch.accelerator(None).init_handler is None
