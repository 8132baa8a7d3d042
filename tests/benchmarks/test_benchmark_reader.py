"""The reader's benchmark runs, compares like with like, and finds anonymous memory flat."""

from __future__ import annotations

import json
import mmap

from benchmarks import reader


def test_anonymous_memory_is_what_is_measured():
    before = reader.resident()["RssAnon"]
    with mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:  # malloc may hand out what it kept
        held.write(b"x" * (64 << 20))
        assert 60 < reader.resident()["RssAnon"] - before < 140  # the bytes that were copied may still be kept


def test_it_runs_at_tiny_size(tmp_path):
    reader.main(
        [
            "--items",
            "16",
            "--batch-size",
            "8",
            "--repetitions",
            "2",
            "--sparse-items",
            "5000",
            "--sparse-batches",
            "20",
            "--folder",
            str(tmp_path),
            "--out",
            str(tmp_path / "result.json"),
        ]
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["microseconds_per_item"]) == {"shards", "shards, float32", "npy", "png+npy"}
    assert result["times_faster"]["png+npy"]["median"] > result["times_faster"]["npy"]["median"] > 1
    assert result["resident_mib"]["anonymous_growth"] < 8 and result["sparse_items"] == 5000
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
