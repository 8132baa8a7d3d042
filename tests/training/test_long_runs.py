"""Runs that are cut short, meet damage or share a folder: what stays, what is printed, and an exact continuation."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from models import checkpoint
from models.checkpoint import Checkpoint
from runtime import errors, files, seal, signals
from runtime.errors import EndedEarly, UserError
from runtime.jsonlines import read
from runtime.locks import LOCK
from tests.helpers import ROOT, Words, assert_same_bits, build_run, held_elsewhere, killed_writer
from training.between import ENDED_EARLY, Between
from training.log import RunLog
from training.run import Run


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Between], None]) -> None:
    """Call `action` once, when a run has taken `step` steps."""
    call = Between.__call__

    def wrapped(self: Between, *args: Any) -> None:
        if self.run.step == step:
            action(self)
        call(self, *args)

    monkeypatch.setattr(Between, "__call__", wrapped)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A run that ends early leaves its process deaf to these signals."""
    before = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, signals.ASKING)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT"])
def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    argv = words(tmp_path, "run", "--max-train-steps", 3)
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_DFL)  # a suite in the background may ignore some of them
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda _: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as caught:
            errors.run(lambda: train.main(argv))
    assert caught.value.code == 75
    last_line = capsys.readouterr().err.splitlines()[-1]  # below the progress bar
    assert last_line.startswith(f"ended early: asked to end by {name}: step 2 of 3 is saved")
    assert Checkpoint.open(tmp_path / "run").step == 2 and (tmp_path / "run" / ENDED_EARLY).is_file()
    if name == "SIGTERM":
        train.main(argv)
        assert_same_bits(tmp_path / "run", train.main(words(tmp_path / "whole", "run", "--max-train-steps", 3)))
        assert not (tmp_path / "run" / ENDED_EARLY).exists()


def test_a_second_signal_ends_at_once() -> None:
    program = (
        "import os, signal, sys, time\nfrom runtime import signals\nsignals.TWICE = 0.2\n"
        "with signals.noted() as asked:\n print('ready', flush=True)\n while True: time.sleep(0.02)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(3):  # a launcher forwards a signal that its processes have already received: it counts once
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        assert process.poll() is None
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


def test_a_second_signal_after_the_save_keeps_the_exit_code(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the end is recorded, while the log closes, and after the last line."""
    argv = words(tmp_path, "run", "--max-train-steps", 3)
    monkeypatch.setattr(signals, "TWICE", -1.0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    at_step(monkeypatch, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))

    def signalled(call: Callable) -> Callable:
        def instead(*args: Any, **named: Any) -> Any:
            if "ended-early" in str(args[0]) or args[1:] == ():
                os.kill(os.getpid(), signal.SIGTERM)
            return call(*args, **named)

        return instead

    monkeypatch.setattr(files, "write_json", signalled(files.write_json))
    monkeypatch.setattr(RunLog, "close", signalled(RunLog.close))
    with pytest.raises(SystemExit) as caught:
        errors.run(lambda: train.main(argv))
    os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 75


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.noted() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        assert asked.by is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_max_hours_ends_in_time_and_minutes_between_checkpoints(tmp_path: Path, words: Words) -> None:
    with pytest.raises(EndedEarly, match="--max-hours 1e-06"):
        train.main(words(tmp_path, "short", "--max-train-steps", 4, "--max-hours", 1e-6))
    assert Checkpoint.open(tmp_path / "short").step == 1
    run = train.main(
        words(tmp_path, "often", "--max-train-steps", 5, "--checkpointing-steps", 2, checkpointing_minutes=1e-6)
    )
    steps = {int(path.name): files.read_json(path / "config.json")["kept"] for path in checkpoint.saved(run)}
    assert steps == {1: False, 2: True, 3: False, 4: True, 5: True}  # the last two of those that the clock asked for
    run = train.main(words(tmp_path, "more", "--max-train-steps", 5, checkpointing_minutes=1e-6))
    assert [path.name for path in checkpoint.saved(run)] == ["0000005", "0000004", "0000003"]
    run = train.main(words(tmp_path, "never", "--max-train-steps", 3, checkpointing_minutes=0))
    assert [path.name for path in checkpoint.saved(run)] == ["0000003"]


def test_a_run_holds_its_folder(tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = words(tmp_path, "run", "--max-train-steps", 1)
    with held_elsewhere(tmp_path / "run" / LOCK), pytest.raises(UserError, match="another process is writing .*run"):
        train.main(argv)
    seen = []
    at_step(monkeypatch, 1, lambda state: seen.append(json.loads((state.run.folder / LOCK).read_text())))
    train.main(argv)
    assert seen[0]["process"] == os.getpid() and not (tmp_path / "run" / LOCK).exists()
    program = f"import sys; sys.argv[1:] = {argv!r}; import train; from runtime import errors; errors.run(train.main)"
    from runtime import locks

    with locks.locked(tmp_path / "run", "wait"):  # a real second process names the holder
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"process {os.getpid()} on " in done.stderr and "since 20" in done.stderr


@pytest.mark.parametrize("how", ["network.safetensors", "optimizer.json", "config.json", "no config.json", "edited"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_note(
    tmp_path: Path, words: Words, capsys: pytest.CaptureFixture, how: str
) -> None:
    argv = words(tmp_path, "run", "--max-train-steps", 4, "--checkpointing-steps", 2)
    run = train.main(argv)
    whole = {name: value.clone() for name, value in Checkpoint.open(run).tensors("network").items()}
    newest = run / "checkpoints" / "0000004"
    if how == "no config.json":
        (newest / "config.json").unlink()
    elif how == "edited":
        config = newest / "config.json"
        config.write_text(config.read_text().replace('"num_heads": 4', '"num_heads": 8'))
    else:
        content = bytearray((newest / how).read_bytes())
        content[len(content) // 2] ^= 4
        (newest / how).write_bytes(content)
    left = killed_writer(run / "checkpoints" / "0000006")
    capsys.readouterr()
    train.main(argv)
    output = capsys.readouterr().out
    assert (
        "continuing from 0000002, the newest intact one; 0000004 is now 0000004.damaged" in output
        and left.name in output
    )
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["0000002", "0000004", "0000004.damaged"]
    assert all(torch.equal(value, whole[name]) for name, value in Checkpoint.open(run).tensors("network").items())


@pytest.mark.parametrize(
    ("place", "code"),
    [("0000002/network.safetensors", errno.EIO), ("0000002/config.json", errno.EACCES), ("", errno.ESTALE)],
)
def test_a_checkpoint_that_cannot_be_read_is_not_damaged(tmp_path: Path, words: Words, place: str, code: int) -> None:
    """The run stops with the cause and changes nothing: it neither goes back nor starts again."""
    run = train.main(words(tmp_path, "run", "--max-train-steps", 2, "--checkpointing-steps", 1))
    closed = os.path.join(run / "checkpoints", place).rstrip("/")
    before, failing = sorted(run.rglob("*")), True

    def fail(event: str, arguments: tuple[Any, ...]) -> None:
        # a hook stays for the life of the process
        if failing and event in ("open", "os.scandir", "os.listdir") and str(arguments[0]) == closed:
            raise OSError(code, os.strerror(code), closed)

    sys.addaudithook(fail)
    with pytest.raises(UserError, match=f"cannot read .*{place}.*{os.strerror(code)}"):
        train.main(words(tmp_path, "run", "--max-train-steps", 3, "--checkpointing-steps", 1))
    failing = False
    assert sorted(run.rglob("*")) == before


def test_no_whole_checkpoint_is_no_fresh_start(tmp_path: Path, words: Words) -> None:
    run = train.main(words(tmp_path, "run", "--max-train-steps", 1))
    (run / "checkpoints" / "0000001" / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint of .*run is intact.*ema.safetensors is missing"):
        train.main(words(tmp_path, "run", "--max-train-steps", 2))


def test_the_description_in_a_checkpoint_is_checked(
    tmp_path: Path, words: Words, capsys: pytest.CaptureFixture
) -> None:
    run = train.main(words(tmp_path, "run", "--align", "latent", "--align-hidden", 8, "--max-train-steps", 1))
    folder = run / "checkpoints" / "0000001"
    config = folder / "config.json"
    sound = files.read_json(config)
    config.write_text(json.dumps({**sound, "space": {**sound["space"], "scale": [2.0]}}))
    with pytest.raises(UserError, match=r"edited since .* python -m runtime.seal .*config.json"):
        Checkpoint.open(run)
    seal.main([str(config)])
    assert Checkpoint.open(run).space.scale == (2.0,) and "sealed" in capsys.readouterr().out
    files.write_sealed(config, {**sound, "step": 7})
    with pytest.raises(UserError, match="says it is step 7"):
        Checkpoint.open(run)
    files.write_sealed(
        config, {**sound, "files": {k: v for k, v in sound["files"].items() if not k.startswith("heads")}}
    )
    with pytest.raises(UserError, match="heads.safetensors"):
        train.main(words(tmp_path, "run", "--align", "latent", "--align-hidden", 8, "--max-train-steps", 2))
    heads = files.load_tensors(folder / "heads.safetensors")
    whole = (folder / "heads.safetensors").read_bytes()
    lost = sorted(heads)[0]
    files.save_tensors(folder / "heads.safetensors", {name: value for name, value in heads.items() if name != lost})
    digests = {**sound["files"], "heads.safetensors": files.digest(folder / "heads.safetensors")}
    files.write_sealed(config, {**sound, "files": digests})
    with pytest.raises(UserError, match=f"lacks {lost} among its heads"):
        train.main(words(tmp_path, "run", "--align", "latent", "--align-hidden", 8, "--max-train-steps", 2))
    (folder / "heads.safetensors").write_bytes(whole)
    files.write_json(config, {k: v for k, v in {**sound, "format": 1}.items() if k != files.SEAL})
    capsys.readouterr()
    with pytest.raises(UserError, match="not a checkpoint of format 2"):
        Checkpoint.open(run)
    files.write_sealed(config, {**sound, "model": {**sound["model"], "depth": 1_000_000}})
    with pytest.raises(UserError, match=r"config.json: .*depth 1000000"):
        Checkpoint.open(run)


def broken_steps(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the gradients of these steps NaN."""
    passes = Run.batches

    def batches(self: Run, end: int) -> Any:
        import dataclasses

        for number, micros in enumerate(passes(self, end), self.step + 1):
            yield (
                [dataclasses.replace(micro, x0=micro.x0 * float("nan")) for micro in micros]
                if number in steps
                else micros
            )

    monkeypatch.setattr(Run, "batches", batches)


def test_a_step_without_a_finite_gradient_is_not_taken(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = train.main(words(tmp_path / "a", "run", "--max-train-steps", 4, "--skip-steps", 2, 3))
    broken_steps(monkeypatch, 2, 3)
    run = train.main(words(tmp_path / "b", "run", "--max-train-steps", 4, "--log-steps", 4))
    line = read(run / "log.jsonl")[-1]
    assert line["skipped_steps"] == 2 and np.isfinite(line["loss/diffusion"])
    here, there = Checkpoint.open(run).tensors("network"), Checkpoint.open(skipped).tensors("network")
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_many_such_steps_end_the_run_and_its_remedies_work(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes back to its last good checkpoint, and the words of the message continue from there."""
    argv = words(tmp_path / "a", "run", "--checkpointing-steps", 2, "--log-steps", 40, "--mixed-precision", "bf16")
    run = tmp_path / "a" / "run"

    def stopped(*more: str) -> str:
        with pytest.raises(UserError) as caught:
            train.main([*argv, "--max-train-steps", "30", *more])
        return str(caught.value)

    with monkeypatch.context() as patch:
        broken_steps(patch, *range(4, 18))
        message = stopped()
        assert "\n" not in message and "gradient of steps 4 to 13 is not finite" in message
        assert (
            f"goes back to {run}@2, the last good checkpoint" in message
            and "--mixed-precision no" in message
            and "--qk-norm" in message
        )
        record = files.read_json(run / "not-finite.json")
        assert record["steps"] == [4, 13] and len(record["items"]["4"]) == 16
        assert f"items {', '.join(map(str, record['items']['4'][:4]))}, ..." in message
        before = Checkpoint.open(run)
        assert before.step == 2  # no checkpoint while gradients are not finite
        assert stopped() == message  # without the remedy it meets them again
        words_of = re.search(r"--skip-steps \d+ \d+", message)[0].split()
        assert words_of == ["--skip-steps", "4", "13"]
        train.main([*argv, "--max-train-steps", "20", *words_of])
        at_once = train.main([*words(tmp_path / "b", "run"), *argv[-6:], "--max-train-steps", "20", *words_of])
    assert sum(line.get("skipped_steps", 0) for line in read(run / "log.jsonl")) == 4  # 14 to 17: not yet too many
    assert Checkpoint.open(run).step == 20
    assert_same_bits(run, at_once)
    with pytest.raises(UserError, match="give --mixed-precision"):
        monkeypatch.setattr("runtime.launch.precision", lambda *_: None)
        train.main([*argv[:-2], "--max-train-steps", "21"])


def test_steps_that_are_skipped_already_stay_so_in_the_next_remedy(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = words(tmp_path, "run", "--max-train-steps", 30, "--log-steps", 11)
    broken_steps(monkeypatch, *range(2, 22))
    with pytest.raises(
        UserError, match="begins anew, as there is no checkpoint yet, with --skip-steps 2 11 past"
    ) as caught:
        train.main(argv)
    assert "--mixed-precision no" not in str(caught.value)  # the run has that precision already
    with pytest.raises(UserError, match="steps 12 to 21 is not finite.* with --skip-steps 2 21 past"):
        train.main([*argv, "--skip-steps", "2", "11", "--qk-norm"])
    train.main([*argv, "--skip-steps", "2", "21", "--exp-name", "on"])


def test_the_other_precision_leads_on_too(tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = words(tmp_path, "run", "--checkpointing-steps", 2, "--log-steps", 40, "--max-train-steps", 16)
    with monkeypatch.context() as patch:
        broken_steps(patch, *range(4, 17))
        with pytest.raises(UserError, match="--mixed-precision no"):
            train.main([*argv, "--mixed-precision", "bf16"])
    train.main([*argv, "--mixed-precision", "no"])  # assumes that gradients are finite there
    assert Checkpoint.open(tmp_path / "run").config["precision"] == "fp32"


@pytest.mark.parametrize(
    ("module", "culprit"),
    [
        (lambda run: run.ema.network, "EMA of "),
        (lambda run: run.averages["ema-0.5"].network, "ema-0.5 of "),
        (lambda run: run.alignments["latent"], "the head of latent: "),
    ],
)
def test_averages_and_heads_are_looked_at_before_they_are_saved(
    tmp_path: Path,
    words: Words,
    monkeypatch: pytest.MonkeyPatch,
    module: Callable[[Run], torch.nn.Module],
    culprit: str,
) -> None:
    def spoil(state: Between) -> None:
        with torch.no_grad():
            next(iter(module(state.run).parameters())).fill_(float("nan"))

    at_step(monkeypatch, 1, spoil)
    with pytest.raises(UserError, match=f"^{culprit}.* is not finite"):
        train.main(
            words(
                tmp_path,
                "run",
                "--max-train-steps",
                1,
                "--align",
                "latent",
                "--align-hidden",
                8,
                ema_extra_decays=[0.5],
            )
        )
    assert not checkpoint.saved(tmp_path / "run")


def test_a_damaged_shard_stops_training(tmp_path: Path, words: Words, data: Path) -> None:
    import shutil

    shutil.copytree(data, tmp_path / "flipped")
    shard = next((tmp_path / "flipped").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    argv = [*words(tmp_path, "run", "--max-train-steps", 2), "--data-dir", str(tmp_path / "flipped")]
    with pytest.raises(UserError, match=r"shard-00000.safetensors is damaged"):
        train.main(argv)
    assert not checkpoint.saved(tmp_path / "run")
    (tmp_path / "unverified.json").write_text(json.dumps({"train": {"verify": False}}))
    train.main([*argv, "--config", str(tmp_path / "unverified.json")])


PAIR = """
import json, os, sys, time
import train
from runtime import errors
from training.between import Between
call, begun = Between.__call__, time.monotonic()
def wrapped(self, *args):
    call(self, *args)
    if self.run.step == 3:
        open(f"{sys.argv[1]}-{self.run.accelerator.process_index}-{os.getpid()}", "w").close()
    time.sleep(0.05)
Between.__call__ = wrapped
errors.run(lambda: train.main(sys.argv[2:]))
"""


def launched(tmp_path: Path, argv: list[str], steps: int) -> tuple[subprocess.Popen, list[int]]:
    """Two processes that train, and their ids once they have taken three steps."""
    (tmp_path / "pair.py").write_text(PAIR)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
            str(tmp_path / "pair.py"),
            str(tmp_path / "at"),
            *argv,
            "--max-train-steps",
            str(steps),
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    until = time.monotonic() + 300  # a loaded machine starts slowly
    while len(marks := sorted(tmp_path.glob("at-*"))) < 2 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    if len(marks) < 2:
        process.kill()  # its processes notice it and end
        pytest.fail(process.communicate()[0])
    return process, [int(path.name.split("-")[-1]) for path in marks]


def test_two_processes_end_at_the_same_step_when_one_is_asked(tmp_path: Path, words: Words) -> None:
    process, ranks = launched(tmp_path, words(tmp_path, "run"), 2000)
    os.kill(ranks[1], signal.SIGUSR1)
    output = process.communicate(timeout=300)[0]
    assert "asked to end by SIGUSR1" in output and "another process was asked to end" in output, output
    step = json.loads((tmp_path / "run" / ENDED_EARLY).read_text())["step"]
    assert Checkpoint.open(tmp_path / "run").step == step < 200
    assert not (tmp_path / "run" / LOCK).exists()


def test_processes_whose_launcher_is_killed_save_and_end(tmp_path: Path, words: Words) -> None:
    process, ranks = launched(tmp_path, words(tmp_path, "run"), 2000)
    process.kill()
    process.wait()
    until = time.monotonic() + 300
    while (
        any(
            Path(f"/proc/{rank}").exists() and "Z" not in Path(f"/proc/{rank}/stat").read_text().split()[2]
            for rank in ranks
        )
        and time.monotonic() < until
    ):
        time.sleep(0.05)
    assert time.monotonic() < until
    assert "launcher is gone" in json.loads((tmp_path / "run" / ENDED_EARLY).read_text())["why"]


def test_no_process_outlives_its_launcher_for_long() -> None:
    """Even if it waits for ever, as in a collective operation."""
    child = (
        "import os, time\nfrom runtime import launch\nlaunch.WATCH = launch.GRACE = 0.1\nlaunch._watch_launcher()\n"
        "print(os.getpid(), flush=True)\ntime.sleep(600)"
    )
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    parent = f"import subprocess, sys, os\n{start}\nsys.stdin.read()\nos._exit(0)"
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
        env={**os.environ, "LOCAL_RANK": "0"},
    ) as process:
        number = int(process.stdout.readline())
        assert Path(f"/proc/{number}").exists()
        process.stdin.close()
        assert (
            "launcher of this process is gone" in process.stderr.read()
        )  # reads to the end: the child holds stderr open


def test_a_process_that_stands_still_ends_the_others(tmp_path: Path, words: Words) -> None:
    process, ranks = launched(tmp_path, words(tmp_path, "run", timeout_minutes=0.1), 2000)
    os.kill(ranks[1], signal.SIGSTOP)
    try:
        output, until = "", time.monotonic() + 300
        while "lost contact" not in output and time.monotonic() < until:
            output += process.stdout.readline()
        assert "log.jsonl" in output and "the same command continues" in output, output
    finally:
        os.kill(ranks[1], signal.SIGCONT)
        process.communicate(timeout=300)


def test_what_would_fail_later_fails_before_the_first_step(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from collections import namedtuple

    from sampling import preview
    from training import preflight

    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 1_000_000))
        with pytest.raises(UserError, match="no room for a checkpoint .* are free"):
            train.main(words(tmp_path, "full", "--max-train-steps", 1))
        patch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 40_000_000))
        train.main(words(tmp_path, "tight", "--max-train-steps", 3, "--checkpointing-steps", 1, ema_extra_decays=[0.5]))
    assert "3 checkpoints are to come" in capsys.readouterr().out
    size = sum(file.stat().st_size for file in Checkpoint.open(tmp_path / "tight").path.glob("*.safetensors"))
    run = build_run(words(tmp_path, "tight", ema_extra_decays=[0.5]))
    assert preflight.checkpoint_bytes(run) == pytest.approx(size, rel=0.02)
    with monkeypatch.context() as patch:
        patch.setattr("runtime.files.load_tensors", lambda _: {"tensor": torch.zeros(1000)})
        with pytest.raises(UserError, match="loses what is written"):
            train.main(words(tmp_path, "lossy", "--max-train-steps", 1))

    def unable(*_: Any) -> None:
        raise UserError("cannot draw; use something else")

    monkeypatch.setattr(preview, "write", unable)
    with pytest.raises(UserError, match="cannot draw"):
        train.main(words(tmp_path, "blind", "--max-train-steps", 9, "--sampling-steps", 9))
    assert read(tmp_path / "blind" / "log.jsonl") == []


def test_memory_and_open_files_stay_flat(tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 90 steps with reports, checkpoints and previews; `tests.torture --long-steps` is the long form."""
    import psutil

    process, seen = psutil.Process(), {}
    for step in (30, 90):
        at_step(
            monkeypatch,
            step,
            lambda state: seen.update(
                {state.run.step: (process.memory_info().rss, process.num_fds(), process.num_threads())}
            ),
        )
    train.main(
        words(
            tmp_path,
            "run",
            "--batch-size",
            2,
            "--log-steps",
            5,
            "--max-train-steps",
            90,
            "--checkpointing-steps",
            20,
            "--sampling-steps",
            29,
            "--align",
            "latent",
            "--align-hidden",
            8,
        )
    )
    (memory, opened, threads), (memory_later, opened_later, threads_later) = seen[30], seen[90]
    assert opened_later <= opened and threads_later <= threads and memory_later < memory + 30e6


def test_the_page_on_long_runs_names_what_there_is() -> None:
    from config import TrainConfig
    from generate import GenerateConfig
    from runtime.options import flags_of, options_of
    from tests.torture import parts as torture

    text = (ROOT / "docs" / "long-runs.md").read_text()
    schemas = (TrainConfig, GenerateConfig, torture.Options)
    known = {flag for schema in schemas for opt in options_of(schema) for flag in flags_of(opt.field)}
    known |= {"--align", "--num_processes", "--signal"}
    assert set(re.findall(r"--[a-z][a-z_-]*", text)) <= known
    assert f"| {errors.TRY_AGAIN} | ended early" in text and ENDED_EARLY in text and "`not-finite.json`" in text
