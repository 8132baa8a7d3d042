"""The metrics benchmark at tiny size: every part runs, and agrees with scipy."""

from __future__ import annotations

import json

import pytest

from benchmarks import metrics as benchmark


@pytest.mark.parametrize("part", benchmark.PARTS)
def test_every_part_measures(part, capsys):
    benchmark.main(["--samples", "60", "--reference", "40", "--dimensions", "32", "--threads", "1", "--part", part])
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] >= 0 and found["peak_gib"] > 0 and found["value"] is not None


def test_agreement_with_scipy(monkeypatch):
    monkeypatch.setattr(
        benchmark,
        "AGREEMENT",
        [(name, 48, *counts) for name, counts in (("full", (200, 300)), ("few", (20, 300)), ("both", (20, 30)))],
    )
    assert all(row["relative_difference"] < 1e-6 for row in benchmark.agreement())


def test_the_result_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        benchmark,
        "in_process",
        lambda part, config: benchmark.agreement() if part == "agreement" else benchmark.measure(config, part),
    )
    monkeypatch.setattr(benchmark, "AGREEMENT", [("full", 16, 50, 60)])
    out = tmp_path / "result.json"
    benchmark.main(["--samples", "30", "--reference", "20", "--dimensions", "16", "--out", str(out)])
    assert set(json.loads(out.read_text())["parts"]) == set(benchmark.PARTS)
    assert "adm_fp16" in capsys.readouterr().out
