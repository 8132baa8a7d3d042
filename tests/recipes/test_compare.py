"""The comparison on the digits: rows, resume, table and results, at the smallest size that runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from recipes import compare_digits
from runtime.errors import UserError


def test_rows_run_once_and_the_table_follows_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(compare_digits, "train_encoder", functools.partial(compare_digits.train_encoder, epochs=4))
    argv = [
        "--out",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "table"),
        "--steps",
        "4",
        "--batch-size",
        "16",
        "--seeds",
        "0",
        "1",
        "--samples",
        "20",
        "--rows",
        "plain",
        "latent",
        "guided",
        "repa",
    ]
    compare_digits.main(argv)
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "table.json").read_text())
    rows = {row["key"]: row for row in results["rows"]}
    assert (
        0.3 < results["encoder_accuracy"] < 1
        and f"{100 * results['encoder_accuracy']:.1f}% held-out" in rows["repa"]["name"]
    )
    frechet = {key: [one["fd"] for one in row["metrics"].values()] for key, row in rows.items()}
    assert all(len(values) == 2 and values[0] != values[1] for values in frechet.values())
    paired = [a - b for a, b in zip(frechet["repa"], frechet["plain"], strict=True)]
    table = (tmp_path / "table.txt").read_text()
    line = next(line for line in table.splitlines() if line.startswith("REPA"))
    assert f"{sum(frechet['repa']) / 2:.3f} ±" in line and f"{sum(paired) / 2:.3f} ±" in line
    assert table in text
    teacher = tmp_path / "runs" / "steps4-batch16" / "seed0" / "exps" / "guided" / "run.json"
    assert json.loads(teacher.read_text())["align"]["guided"]["teacher"]["step"] == 2  # half the run
    assert json.loads(teacher.read_text())["align"]["guided"]["stop"] == 1  # a quarter of it

    monkeypatch.setattr("train.main", lambda argv: pytest.fail("a finished run was run again"))
    compare_digits.main(argv)
    assert (tmp_path / "table.txt").read_text() == table


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        compare_digits.main(["--steps", "6"])
    with pytest.raises(UserError, match="no row is called rapa"):
        compare_digits.main(["--rows", "rapa"])
