"""Trackers: what a real offline wandb run and real event files hold, across a resume."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import train
from models.checkpoint import Checkpoint
from runtime import launch
from runtime.errors import UserError
from runtime.jsonlines import read
from sampling import preview
from sampling.config import SamplingConfig
from tests.helpers import Words
from training.tracker import Tracker

BLOCK = 32768


@pytest.fixture(autouse=True)
def quick_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "SETTINGS", SamplingConfig(mode="ode", num_steps=2))


def records(file: Path) -> Iterator[Any]:
    """The records of a wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def whole(file: Path) -> list[Any]:
    """All records of a run that has ended; wandb's own process may still be writing the last ones."""
    for _ in range(100):
        seen = list(records(file))
        if any(record.HasField("exit") for record in seen):
            return seen
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def test_a_continued_run_is_one_wandb_run(tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # it reads the environment once a process
    environment = {
        "MODE": "offline",
        "PROJECT": "our-project",
        "ENTITY": "our-lab",
        "TAGS": "first,second",
        "SILENT": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    argv = words(
        tmp_path, "run", "--report-to", "wandb", "--align", "latent", "--align-hidden", 16, "--sampling-steps", 2
    )
    run = train.main([*argv, "--max-train-steps", "2"])
    train.main([*argv, "--max-train-steps", "3"])
    written = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    known = json.loads((run / "tracker.json").read_text())["wandb"]
    assert len(written) == 2 and {file.name for file in written} == {f"run-{known}.wandb"}
    first, second = map(whole, written)
    opened = next(record.run for record in first if record.HasField("run"))
    assert (opened.run_id, opened.project, opened.entity, list(opened.tags)) == (
        known,
        "our-project",
        "our-lab",
        ["first", "second"],
    )
    settings = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for record in first
        if record.HasField("config")
        for item in record.config.update
    }
    assert settings["latent/depth"] == 1 and settings["latent/weight"] == 0.5 and settings["learning_rate"] == 1e-3
    assert (
        settings["device"] == "cpu" and settings["commit"] == str(launch.commit()) and settings["precision"] == "fp32"
    )
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for part in (first, second)
        for record in part
        if record.HasField("history")
    ]
    assert [row["_step"] for row in rows if "loss/diffusion" in row] == [1, 2, 3]
    assert all(row["learning_rate"] == 1e-3 and "loss/latent" in row for row in rows if "loss/diffusion" in row)
    shown = [row["samples"] for row in rows if "samples" in row]
    assert len(shown) == 1 and list((run / "wandb").glob("offline-run-*/files/media/images/samples_2_*.png"))


def test_event_files_hold_every_step_once_across_a_resume(tmp_path: Path, words: Words) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = words(tmp_path, "run", "--report-to", "tensorboard", "--sampling-steps", 2, "--checkpointing-steps", 2)
    run = train.main([*argv, "--max-train-steps", "3"])
    shutil.rmtree(run / "checkpoints" / "0000003")  # as if killed after step 3 had been logged
    train.main([*argv, "--max-train-steps", "4"])
    folder = run / "tensorboard"
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss/diffusion")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss/diffusion")] == pytest.approx(
        [line["loss/diffusion"] for line in read(run / "log.jsonl")], rel=1e-4
    )
    assert all(event.value == pytest.approx(1e-3) for event in events.Scalars("learning_rate"))
    assert [event.step for event in events.Images("samples")] == [2, 4]
    assert "commit" in next(folder.glob("*/hparams.yml")).read_text()


def test_a_tracker_that_is_not_installed_is_missed_before_anything_is_read(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, kind, None)
        with pytest.raises(UserError, match=f"pip install {kind}, or --report-to none"):
            train.main([*words(tmp_path, "run", "--report-to", kind), "--data-dir", "nowhere"])
    assert not (tmp_path / "run").exists()


def test_the_commit_is_that_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed code is dirty, a changed ledger is not."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    code, ledger = tmp_path / "runtime" / "launch.py", tmp_path / "results" / "ledger.csv"
    for file in (code, ledger):
        file.parent.mkdir()
        file.write_text("first")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    monkeypatch.setattr(launch, "__file__", str(code))
    assert launch.commit() == head
    ledger.write_text("second")
    assert launch.commit() == head
    code.write_text("second")
    assert launch.commit() == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert launch.commit() is None


def test_a_tracker_whose_process_is_killed_does_not_end_the_run(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A real wandb run whose own process dies after the first step."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = Tracker.log

    def kill_first(self: Tracker, step: int, values: Any) -> None:
        if step == 2:
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith("wandb"):
                    process.kill()
                    process.wait()
        log(self, step, values)

    monkeypatch.setattr(Tracker, "log", kill_first)
    run = train.main(words(tmp_path, "run", "--report-to", "wandb", "--sampling-steps", 2, "--max-train-steps", 4))
    output = capsys.readouterr().out
    assert output.count("warning: --report-to wandb has failed (") == 1
    assert Checkpoint.open(run).step == 4 and [line["step"] for line in read(run / "log.jsonl")] == [1, 2, 3, 4]
    wandb.teardown()  # as at exit: nothing is left that raises


@pytest.mark.parametrize("when", ["log", "finish"])
def test_a_full_disk_of_the_tracker_does_not_end_the_run(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, when: str
) -> None:
    from accelerate.tracking import TensorBoardTracker

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, when, full)
    run = train.main(words(tmp_path, "run", "--report-to", "tensorboard", "--max-train-steps", 3))
    assert capsys.readouterr().out.count("tensorboard has failed ([Errno 28] No space left") == 1
    assert Checkpoint.open(run).step == 3
