"""The measurements of Internal Guidance and Muon, at a size that only shows that every row is what it says."""

from __future__ import annotations

import json
from pathlib import Path

from models.checkpoint import Checkpoint
from recipes import beyond_digits


def test_every_row_is_trained_drawn_and_kept(tmp_path: Path) -> None:
    words = [
        "--out",
        str(tmp_path / "out"),
        "--results",
        str(tmp_path / "table"),
        "--steps",
        "4",
        "--seeds",
        "0",
        "--batch-size",
        "8",
        "--samples",
        "8",
        "--scales",
        "1",
        "3",
        "--rates",
        "0.001",
        "0.01",
    ]
    found = beyond_digits.main(words)
    rows = [
        f"{name}, w = {scale}" for name in beyond_digits.NETWORKS for scale in ((1, 3) if name != "plain" else (1,))
    ]
    assert list(found["internal"]) == rows and len(found["muon"]) in (2, 3)
    runs = tmp_path / "out" / "steps4-batch8" / "seed0"
    aligned = {
        run.name: set(Checkpoint.open(run).config["align"]) for run in runs.iterdir() if (run / "checkpoints").is_dir()
    }
    assert (
        aligned["plain"] == set()
        and aligned["second-velocity"] == {"internal"}
        and aligned["stage-1-velocity-target"] == {"latent"}
    )
    assert aligned["stage-2-second-velocity"] == {"guided", "internal"}
    assert Checkpoint.open(runs / "muon-0.01").config["train"]["optimizer"] == "muon"
    guided = json.loads((runs / "second-velocity" / "samples" / "internal-scale-3" / "metrics.json").read_text())
    assert guided["samples"]["settings"]["internal_scale"] == 3
    assert (tmp_path / "table.txt").read_text().count("\n") > 10
    trained = {file: file.stat().st_mtime_ns for file in runs.glob("*/seconds.json")}
    assert beyond_digits.main([*words, "--parts", "internal"])["internal"] == found["internal"]
    assert {file: file.stat().st_mtime_ns for file in runs.glob("*/seconds.json")} == trained


def test_a_row_is_compared_seed_by_seed_with_the_first_and_with_its_own_network() -> None:
    found = {"plain, w = 1": {0: 3.0, 1: 5.0}, "second, w = 1": {0: 2.0, 1: 6.0}, "second, w = 1.4": {0: 1.0, 1: 5.5}}
    lines = [line.split("  ") for line in beyond_digits.table(found).splitlines()]
    last = [cell.strip() for cell in lines[-1] if cell.strip()]
    assert last == ["second, w = 1.4", "3.250 ± 3.182", "-0.750 ± 1.768", "-0.750 ± 0.354"]
    assert "own" not in beyond_digits.table({"adamw, rate 1": {0: 1.0}, "muon, rate 1": {0: 2.0}})
