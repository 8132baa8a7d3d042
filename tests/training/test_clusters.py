"""Launching: the configurations that ship, and two nodes simulated by two launchers of one process each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import train
from models.checkpoint import Checkpoint
from runtime.jsonlines import read
from tests.helpers import ROOT, Words


@pytest.mark.parametrize("name, machines, processes", [("one-gpu", 1, 1), ("eight-gpus", 1, 8), ("two-nodes", 2, 16)])
def test_configurations_match_their_names(name: str, machines: int, processes: int) -> None:
    config = load_config_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes, config.mixed_precision, config.use_cpu) == (
        machines,
        processes,
        "no",
        False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(node: int, port: int) -> list[str]:
    return [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs" / "two-nodes.yaml"),
        "--num_processes",
        "2",
        "--main_process_ip",
        "127.0.0.1",
        "--main_process_port",
        str(port),
        "--machine_rank",
        str(node),
    ]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def test_two_nodes_train_one_run(tmp_path: Path, words: Words) -> None:
    argv, port = words(tmp_path, "run", "--max-train-steps", 2), free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, *launcher(node, port), "train.py", *argv],
            cwd=ROOT,
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for node in (0, 1)
    ]
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    # only the first node prints
    assert "batch 16 = 2 process(es) x 1 micro-batch(es) x 8" in outputs[0] and "batch 16" not in outputs[1]
    assert Checkpoint.open(tmp_path / "run").step == 2
    alone = train.main([*argv, "--output-dir", str(tmp_path / "alone")])
    for here, there in zip(read(alone / "log.jsonl"), read(tmp_path / "run" / "log.jsonl"), strict=True):
        assert here["loss/diffusion"] == pytest.approx(there["loss/diffusion"], abs=1e-5)


def test_torchrun_works_as_well(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom runtime.launch import accelerator\nseen = accelerator()\n"
        "Path(__file__).with_name(f'rank-{seen.process_index}').write_text(f'of {seen.num_processes}')"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(free_port()),
            str(script),
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {file.name: file.read_text() for file in tmp_path.glob("rank-*")} == {"rank-0": "of 2", "rank-1": "of 2"}
