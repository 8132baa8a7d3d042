"""Rows are chains of commands that parse; a row of each table runs to its record; records hold, verdicts are right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import generate
from config import RECIPES, TrainConfig
from evaluations.histories import spent
from preprocessing import digits
from recipes import __main__ as recipes
from recipes import chain, record, rehearsal, rows, runner, scale, table
from runtime import jsonlines, signals
from runtime.errors import EndedEarly, UserError
from runtime.options import read
from sampling import presets
from tests.helpers import ROOT, class_folders, killed_writer, tiny_vae
from training import command

RUN = (
    "table1/SiT-B-2/repa-80",
    "table2/LightningDiT-XL-1/guided-400",
    "table3/SiT-XL-2/guided-100",
    "table4/SiT-B-2/full",
    "table5/SiT-B-2/REPA-teacher",
    "figure8/SiT-XL-2/guided-stop-100K",
    "figure4/SiT-B-2/none",
)
STEPS = 9


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A row of each table and figure, from nothing to its record; samplers take fewer steps than their presets say."""
    folder = tmp_path_factory.mktemp("recipes")
    few = {
        name: dataclasses.replace(preset, settings={**preset.settings, "num_steps": STEPS})
        for name, preset in presets.PRESETS.items()
        if "num_steps" in preset.settings
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "PRESETS", {**presets.PRESETS, **few})
        for name in RUN:
            recipes.main(
                ["run", name, "--scale", "tiny", "--work", str(folder / "work"), "--results", str(folder / "results")]
            )
        yield folder  # records are checked against these presets


def test_every_row_of_the_tables_is_listed_with_its_published_number(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert {name: len(rows.of_table(name)) for name in rows.TABLES} == {
        "table1": 28,
        "table2": 8,
        "table3": 4,
        "table4": 4,
        "table5": 18,
        "figure4": 3,
        "figure8": 10,
        "section4.5": 3,
        "peers": 18,
        "photographs": 50,
        "digits": 22,
    }
    assert all(row.published is not None for row in rows.rows().values() if row.table.startswith("table"))
    fids = {
        name: rows.find(name).published.metrics["fid"]
        for name in (
            "table1/SiT-XL-2/guided-80",
            "table2/SiT-XL-2/guided-400",
            "table3/SiT-XL-2/guided-200",
            "table4/SiT-B-2/plain-teacher",
            "table5/SiT-B-2/omega-45",
        )
    }
    assert list(fids.values()) == [7.51, 1.44, 1.76, 25.21, 23.01]
    recipes.main(["list", "table5", "--results", str(tmp_path)])
    text = capsys.readouterr().out
    assert (
        "table5/SiT-B-2/blocks-10-to-6" in text
        and "24.05" in text
        and len({len(line.rstrip()) for line in text.splitlines()[:2]}) <= 2
    )


@pytest.mark.parametrize("name", list(rows.rows()))
def test_every_command_of_every_row_parses(name: str) -> None:
    row = rows.find(name)
    for size in scale.SCALES.values():
        if row.table not in rows.PAPER and "--preset" in size.sample[""]:  # a preset is complete
            if row.sampling != ("",):
                with pytest.raises(UserError, match=f"no preset of --scale {size.name} takes"):
                    chain.build(row, size, 3, Path("work"))
            continue
        plan = chain.build(row, size, 3, Path("work"))
        for link in plan.links:
            program, *words = link.words
            assert shlex.split(link.command())[1:] == list(link.words)
            if program.startswith("train"):
                config, _options = command.resolve(words, program, None, ("guided",) if "guide" in program else ())
                assert config.seed == 3 and f"{config.max_train_steps:07d}" in str(link.makes)
            elif program == "generate.py":
                read(generate.GenerateConfig, words, prog=program, between=presets.settings)
        assert plan.scores and plan.scores[-1].step == plan.step
        places = {score.link.makes for score in plan.scores}
        assert size.name == "tiny" or len(places) == len(plan.scores)  # there several epochs end at one step


def trained(name: str, size: str = "paper") -> TrainConfig:
    """The options under which a row's own run trains."""
    link = next(
        link
        for link in chain.build(rows.find(name), scale.find(size), 0, Path("work")).links[::-1]
        if "train" in link.name
    )
    program, *words = link.words
    return command.resolve(words, program, None, ("guided",) if "guide" in program else ())[0]


def test_rows_name_their_recipes_and_no_other_recipe_exists() -> None:
    assert trained("table2/LightningDiT-XL-1/none-800").uniform_from_epoch == 480  # as its authors ended logit-normal t
    assert trained("table1/LightningDiT-XL-1/none-64").uniform_from_epoch is None
    assert trained("table2/LightningDiT-XL-1/guided-400").time_sampling == "logit-normal"
    used = {
        trained(name, size).recipe
        for name in ("table1/SiT-B-2/none-80", "digits/SiT-B-2/plain")
        for size in scale.SCALES
    }
    assert used | {row.recipe for row in rows.rows().values()} == set(RECIPES)


def test_a_row_is_trained_with_flips_if_its_published_number_was() -> None:
    for row in (row for row in rows.rows().values() if row.table in rows.PAPER):
        plan = chain.build(row, scale.find("paper"), 0, Path("work"))
        published = row.published is not None and bool(row.published.flips)
        assert ("--flip" in plan.links[0].words) == (published or row.family == "lightningdit"), row.name
        sets = {words[words.index("--data-dir") + 1] for link in plan.links if "--data-dir" in (words := link.words)}
        assert sets == {str(plan.links[0].makes.parent)}  # its teacher and trunk see the same
    assert rows.find("table2/SiT-XL-2/none-1400").extras == rows.find("table3/SiT-XL-2/none-600").extras == ["flips"]
    assert rows.find("table4/SiT-B-2/plain").extras == []


def test_rows_share_what_they_have_in_common() -> None:
    work, paper = Path("work"), scale.find("paper")
    full, default, omega = (
        chain.build(rows.find(name), paper, 0, work)
        for name in ("table4/SiT-B-2/full", "table5/SiT-B-2/default", "table5/SiT-B-2/omega-45")
    )
    assert full.run == default.run != omega.run and full.teacher == default.teacher == omega.teacher
    stage1 = chain.build(rows.find("table1/SiT-B-2/latent-80"), paper, 0, work)
    assert stage1.run == full.teacher[0] and (stage1.step, full.teacher[1]) == (400_000, 200_000)
    assert (
        chain.build(rows.find("table1/SiT-B-2/none-120"), paper, 0, work).run
        == chain.build(rows.find("table1/SiT-B-2/none-80"), paper, 0, work).run
    )
    other = chain.build(rows.find("table4/SiT-B-2/full"), paper, 1, work)
    assert other.run != full.run and other.links[0].makes == full.links[0].makes  # another seed, the same latents
    branch = chain.build(rows.find("figure8/SiT-XL-2/guided-stop-50K"), paper, 0, work)
    words = branch.links[-2].words
    assert (
        words[words.index("--branch-from") + 1].endswith("@50000")
        and words[words.index("--align-stop-steps") + 1] == "50000"
    )


def test_the_counted_costs_are_those_of_the_rows() -> None:
    from recipes import costs

    hours = costs.paper_hours()
    assert set(hours) == {row.name for row in rows.rows().values() if row.table in rows.PAPER}
    row = rows.find("table4/SiT-B-2/stage1")
    assert hours[row.name] == pytest.approx(costs.flops(row, scale.find("paper")) / costs.TERAFLOPS / 3600e12)


def test_show_prints_the_chain_and_its_cost(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    recipes.main(
        ["show", "table4/SiT-B-2/stage1", "--work", str(tmp_path), "--images-per-second", "2000", "--nodes", "2"]
    )
    text = capsys.readouterr().out
    assert "accelerate launch --multi_gpu --num_processes 16 --num_machines 2" in text and "--align latent" in text
    assert "# published: fid 32.2, is 52.38 (not stated; trained without flips; ImageNet 256, no guidance" in text
    assert "14.2 hours" in text or "14.3 hours" in text  # 400,000 steps of 256 at 2,000 images per second
    flops = float(text.split(" FLOPs in all")[0].split()[-1])
    assert flops == pytest.approx(
        400_000 * 256 * 6 * (23.0e9 + 1.88e9), rel=0.02
    )  # three forward passes of multiply-adds, head and all


def test_what_is_left_counts_shared_runs_once(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    from recipes import costs

    tiny = scale.find("tiny")
    full, default, stage1 = (
        rows.find(name) for name in ("table4/SiT-B-2/full", "table5/SiT-B-2/default", "table4/SiT-B-2/stage1")
    )
    both = costs.flops(full, tiny)
    assert costs.outstanding([full], tiny) == costs.outstanding([full, default], tiny) == both
    teacher = costs.flops(full.of_teacher(), tiny)
    longer = costs.flops(stage1, tiny)
    assert costs.outstanding([full, stage1], tiny) == pytest.approx(
        both - teacher + longer
    ) and longer == pytest.approx(2 * teacher)
    recipes.main(["cost", "table4/SiT-B-2/full", "--scale", "tiny", "--results", str(tmp_path), "--teraflops", "1e-6"])
    assert f"{both / 1e6 / 3600:,.0f}" in capsys.readouterr().out


def test_a_row_of_each_table_leaves_a_record_that_holds(place: Path, capsys: pytest.CaptureFixture) -> None:
    # by row: their folders begin with a date, and midnight may come between two
    records = sorted(record.load(place / "results"), key=lambda entry: entry["row"])
    assert [entry["row"] for entry in records] == sorted(RUN)
    for entry in records:
        folder = place / "results" / "records" / entry["folder"]
        assert entry["status"] == "finished" and record.check(folder) == []
        written = {"record.json", "config.json", "metrics.json", "features.safetensors", "log.jsonl"}
        assert written == {file.name for file in folder.iterdir()}
        assert (
            entry["commands"]
            and entry["digests"]["data"]
            and entry["images_per_second"] > 0
            and entry["device_hours"]["training"] > 0
        )
        assert (entry["device_hours"]["stage 1"] > 0) == (
            "guided" in entry["row"] or "full" in entry["row"] or "teacher" in entry["row"]
        )
        assert all(score["metrics"]["fd"] > 0 for score in entry["scores"])
        assert jsonlines.read(folder / "log.jsonl")[0]["step"] == 1  # a branch's with its trunk's
    assert [len(entry["scores"]) for entry in records if entry["row"].startswith(("table1", "figure4"))] == [8, 2]
    ledger = (place / "results" / "ledger.csv").read_text().splitlines()
    assert len(ledger) == 1 + sum(len(score["metrics"]) for entry in records for score in entry["scores"])
    recipes.main(["check", "--results", str(place / "results")])
    assert capsys.readouterr().out.count("holds") == len(RUN)


def test_a_repeated_chain_keeps_its_record_and_another_result_adds_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The first time is that after a kill between a record and the ledger, which left a folder half written too."""
    results = Path(shutil.copytree(place / "results", tmp_path / "results"))
    before = {file: file.read_bytes() for file in results.rglob("*.json")}
    ledger = (results / "ledger.csv").read_bytes()
    (results / "ledger.csv").unlink()
    killed_writer(results / "records" / "2026-01-01-row")
    argv = ["run", RUN[3], "--scale", "tiny", "--work", str(place / "work"), "--results", str(results)]
    recipes.main(argv)
    printed = capsys.readouterr().out
    assert printed.count("done: ") == 4 and "\n$ " not in printed
    assert (results / "ledger.csv").read_bytes() == ledger
    assert {file: file.read_bytes() for file in results.rglob("*.json")} == before and not [*results.rglob(".*")]
    (earlier,) = [entry["folder"] for entry in record.load(results) if entry["row"] == RUN[3]]
    score = results / "records" / earlier / "metrics.json"
    score.write_text(score.read_text().replace('"fd": ', '"fd": 1'))
    recipes.main(argv)
    assert [entry["row"] for entry in record.load(results)].count(RUN[3]) == 2
    assert score.read_bytes() != before[score]


def test_a_whole_table_leaves_out_what_has_a_record(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr("recipes.runner.run", lambda row, size, seed, *rest, **more: asked.append((row.name, seed)))
    argv = ["--scale", "tiny", "--work", str(place / "work"), "--results", str(place / "results"), "--seeds", "0:2"]
    recipes.main(["run", "table4", *argv])
    names = [row.name for row in rows.of_table("table4")]
    assert asked == [(name, 0) for name in names if name != "table4/SiT-B-2/full"] + [(name, 1) for name in names]
    assert "recorded already: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda folder: (folder / "metrics.json").write_text(
                (folder / "metrics.json").read_text().replace('"fd": ', '"fd": 1')
            ),
            "has changed",
        ),
        (lambda folder: (folder / "log.jsonl").unlink(), "its files are"),
        (lambda folder: folder.rename(folder.with_name("2020-01-01-else")), "should be called after"),
    ],
)
def test_a_record_that_was_touched_is_named(
    change: object, expected: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = next((place / "results" / "records").glob("*table4*"))
    shutil.copytree(source, tmp_path / "records" / source.name)
    change(tmp_path / "records" / source.name)
    with pytest.raises(UserError, match="1 of 1 records failed the check"):
        recipes.main(["check", "--results", str(tmp_path)])
    assert expected in capsys.readouterr().out


def test_numbers_that_do_not_follow_from_the_rest_are_named(place: Path, tmp_path: Path) -> None:
    from runtime import files

    source = next((place / "results" / "records").glob("*table4*"))
    for name, old, new, expected in (
        ("metrics.json", f'"num_steps": {STEPS}', '"num_steps": 50', "does not give its key"),
        ("metrics.json", '"flops": ', '"flops": 1', "steps and .* FLOPs, not"),
        ("log.jsonl", '"images_per_second": ', '"images_per_second": 1', "images per second, not"),
    ):
        folder = tmp_path / expected[:4] / source.name
        shutil.copytree(source, folder)
        (folder / name).write_text((folder / name).read_text().replace(old, new))
        summary = json.loads((folder / "record.json").read_text())
        summary["files"][name] = files.digest(folder / name)  # as someone would who edits a record by hand
        (folder / "record.json").write_text(json.dumps(summary))
        assert re.search(expected, " ".join(record.check(folder)))
    whole = json.loads((source / "record.json").read_text())
    without = [
        {key: value for key, value in whole.items() if key != left_out} for left_out in ("step", "images_per_second")
    ]
    for text, wrong in (
        ("{}", "row: field required"),
        ("[]", "record.json is damaged"),
        ('{"row": 3}', "row: .* not 3"),
        *((json.dumps(entry), "field required") for entry in without),
    ):
        (folder / "record.json").write_text(text)
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "damaged" / "records" / "one")
        for words in (["check"], ["list"], ["table", "4"], ["claims"], ["publish"]):
            with pytest.raises(UserError, match=wrong):
                recipes.main(
                    [*words, "--results", str(tmp_path / "damaged")] if words != ["check"] else ["check", str(folder)]
                )


SCORE = {
    "preset": "p",
    "epochs": 1,
    "step": 1,
    "metrics": {"fd": 1.0},
    "num_samples": 4,
    "key": "k",
    "protocol": {},
    "device_hours": {"training": 1, "stage 1": 0},
    "flops": 1,
    "fd64": 1.0,
    "feature_width": 64,
    "reference_statistics": "r",
    "checkpoint": "c",
}


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        (
            "metrics.json",
            json.dumps({"scores": [{**SCORE, "metrics": {"precision": 1.0}}]}),
            "a score without fid or fd; restore it",
        ),
        (
            "metrics.json",
            json.dumps({"scores": [{**SCORE, "metrics": {"fd": 10**400}}]}),
            "metrics.fd: input should be a .* number",
        ),
        ("metrics.json", json.dumps({"scores": [{**SCORE, "epochs": 10**400}]}), "epochs: input should be a .* number"),
        (
            "metrics.json",
            json.dumps({"scores": [{**SCORE, "device_hours": {"training": 1}}]}),
            "stage 1: field required",
        ),
        ("config.json", "{}", "train: field required"),
        ("config.json", '{"train": {"batch_size": "x"}}', 'train.batch_size: .* not "x"'),
    ],
)
def test_a_record_whose_files_are_of_another_shape_is_refused(
    name: str, text: str, wrong: str, place: Path, tmp_path: Path
) -> None:
    from runtime import files

    folder = Path(shutil.copytree(next((place / "results" / "records").glob("*table4*")), tmp_path / "records" / "one"))
    (folder / name).write_text(text)
    summary = json.loads((folder / "record.json").read_text())
    summary["files"][name] = files.digest(folder / name)
    named = folder.rename(folder.with_name(f"{summary['date']}-{summary['row'].replace('/', '-')}-tiny-s0"))
    (named / "record.json").write_text(json.dumps(summary))
    for words in [["check"], ["list"], ["table", "4"], ["publish"]] if name == "metrics.json" else [["check"]]:
        with pytest.raises(UserError, match=wrong):
            recipes.main([*words, "--results", str(tmp_path)])


def test_a_rate_of_nothing_in_a_log_is_no_crash(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(next((place / "results" / "records").glob("*table4*")), tmp_path / "one"))
    for line in (
        '{"step": 4, "images_per_second": 0}',
        '{"step": 4, "images_per_second": "x"}',
        '{"step": "x"}',
        "[]",
        "nonsense",
    ):
        (folder / "log.jsonl").write_text(line)
        assert any("log.jsonl has changed" in fault for fault in record.check(folder))
        assert spent(folder, 16, 4) == (0.0, 0.0)


def test_the_ledger_is_checked_and_made_anew(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(place / "results", tmp_path / "results")
    ledger = tmp_path / "results" / "ledger.csv"
    whole = ledger.read_text()
    ledger.write_text(whole.replace("finished", "failed", 1))
    with pytest.raises(UserError, match="ledger.csv is not what the records say: run python -m recipes publish"):
        recipes.main(["check", "--results", str(tmp_path / "results")])
    recipes.main(["check", "--results", str(place / "results")])
    recipes.main(["check", "--results", str(tmp_path / "none")])
    assert capsys.readouterr().out.endswith(f"no record in {tmp_path / 'none'}\n")
    record.write_ledger(tmp_path / "results")
    assert ledger.read_text() == whole


def test_a_chain_that_fails_leaves_a_record_of_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    digits.main(["--out", str(tmp_path / "work" / "data" / "digits")])
    shard = next((tmp_path / "work" / "data" / "digits").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        recipes.main(
            [
                "run",
                "table4/SiT-B-2/plain",
                "--scale",
                "tiny",
                "--work",
                str(tmp_path / "work"),
                "--results",
                str(tmp_path / "results"),
            ]
        )
    (entry,) = record.load(tmp_path / "results")
    assert entry["status"] == "failed" and "truncated" in entry["failure"] and entry["scores"] == []
    assert "failed" in (tmp_path / "results" / "ledger.csv").read_text()
    recipes.main(["table", "4", "--scale", "tiny", "--results", str(tmp_path / "results")])
    assert "not run" in capsys.readouterr().out


def test_verdicts() -> None:
    """By hand: t is 4.303 for three seeds; the margin at 20 is 0.6, at 2 it is 0.1."""
    assert table.verdict(20.0, []) == "not run" and table.verdict(20.0, [20.0, 20.0]) == "undecided"
    assert table.verdict(20.0, [20.1, 20.2, 20.3]) == "reproduced"  # 20.2 ± 0.25
    assert table.verdict(20.0, [20.55, 20.6, 20.65]) == "undecided"  # 20.6 ± 0.12 holds the margin
    assert table.verdict(20.0, [19.0, 20.6, 22.5]) == "undecided"  # three noisy seeds: 20.7 ± 4.35
    assert table.verdict(20.0, [20.75, 20.8, 20.85]) == "differs" == table.verdict(20.0, [19.15, 19.2, 19.25])
    assert table.verdict(2.0, [2.05, 2.06, 2.07]) == "reproduced"  # 2.06 ± 0.025
    assert table.verdict(2.0, [2.14, 2.15, 2.16]) == "differs" and table.verdict(2.0, [2.09] * 3) == "reproduced"


def test_the_interval_is_students_and_verdicts_have_its_error_rates() -> None:
    for values in ([1.0, 2.0], [20.0, 21.5, 19.7], [3.1, 3.0, 2.9, 3.3, 3.2]):
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert table.half_interval(values) == pytest.approx((high - low) / 2, rel=1e-12)
    draws = np.random.default_rng(0).standard_normal((1000, 3))

    def rate(mean: float, sd: float, wanted: str) -> float:
        return float(np.mean([table.verdict(20.0, row) == wanted for row in (mean + sd * draws).tolist()]))

    # at the edge of the margin either verdict is wrong in at most 2.5 % of cases
    assert rate(20.6, 0.05, "reproduced") == pytest.approx(0.025, abs=0.01)
    assert rate(20.6, 0.05, "differs") == pytest.approx(0.025, abs=0.01)
    assert rate(20.0, 0.05, "reproduced") > 0.99 < rate(21.5, 0.05, "differs") and rate(20.0, 2.0, "reproduced") < 0.025


def fake(
    row: str, seed: int, key: str, fid: float, size: str = "paper", preset: str = "fid10k", epochs: float = 80
) -> dict:
    return {
        "row": row,
        "scale": size,
        "seed": seed,
        "status": "finished",
        "images_per_second": 1.0,
        "device_hours": {"training": 8.0, "stage 1": 2.0},
        "scores": [
            {
                "preset": preset,
                "epochs": epochs,
                "step": 1,
                "key": key,
                "metrics": {"fid": fid},
                "flops": 3e18,
                "device_hours": {"training": 8.0, "stage 1": 2.0},
            }
        ],
    }


def test_a_table_never_mixes_protocols_or_scales() -> None:
    chosen = rows.of_table("table4")
    records = [fake("table4/SiT-B-2/full", seed, "aaaa", 22.9 + seed / 10) for seed in range(3)]
    records += [fake("table4/SiT-B-2/full", 0, "bbbb", 30.0), fake("table4/SiT-B-2/full", 0, "cccc", 1.0, "tiny")]
    text = table.render(chosen, records, "paper")
    first, second = text.split("\n\n")
    assert (
        "[aaaa]" in first
        and "23.00 ± 0.10 (3 of 3)" in first
        and "+0.09" in first
        and "reproduced" in first
        and "10" in first
    )
    assert (
        "[bbbb]" in second and "30.00 (1 of 3; missing: 1 2)" in second and "undecided" in second and "cccc" not in text
    )
    tiny = table.render(chosen, records, "tiny")
    assert (
        "1.00 (1 of 3; missing: 1 2)" in tiny and "22.91" not in tiny and "reproduced" not in tiny
    )  # no published number at another scale
    assert first.count("not run") == 3


def test_of_two_ways_of_sampling_one_counts() -> None:
    sampled = {row.name: row.presets for row in rows.of_table("table1")}
    assert sampled["table1/SiT-B-2/none-80"] == sampled["table1/SiT-L-2/layersync-80"] == ("table1-ode", "table1-sde")
    assert sampled["table1/SiT-B-2/repa-80"] == sampled["table1/SiT-B-2/guided-80"] == ("table1-sde", "table1-ode")
    chosen, name = rows.of_table("table1"), "table1/SiT-B-2/guided-80"
    records = [fake(name, seed, "aaaa", 24.0, preset="table1-sde") for seed in range(3)]
    records += [fake(name, seed, "bbbb", 20.5, preset="table1-ode") for seed in range(3)]
    counts, other = table.render(chosen, records, "paper").split("\n\n")
    assert "differs" in counts and "reproduced" not in counts + other and "table1-sde counts" in other


def test_a_row_is_sampled_under_its_authors_guidance_and_gets_no_verdict_where_that_is_not_known() -> None:
    """SiT, arXiv 2401.08740, Table 7: SiT-XL (cfg = 1.5, SDE), FID 2.62 at 512 pixels; models.py guides 3 channels."""
    plain = presets.settings({"preset": rows.find("table3/SiT-XL-2/none-600").presets[0]})
    assert (plain["mode"], plain["cfg_scale"], plain["guidance_channels"]) == ("sde", 1.5, "first3")
    known = {row.name: row.published.comparable for table in ("table2", "table3") for row in rows.of_table(table)}
    assert known["table3/SiT-XL-2/none-600"] and known["table2/SiT-XL-2/guided-400"]
    assert not (known["table3/SiT-XL-2/repa-200"] or known["table2/LightningDiT-XL-1/guided-400"])
    records = [
        fake(f"table3/SiT-XL-2/{key}", seed, "aaaa", fid, preset=preset, epochs=epochs)
        for key, fid, preset, epochs in (("none-600", 2.62, "sit-cfg-sde", 600), ("repa-200", 2.08, "repa-cfg", 200))
        for seed in range(3)
    ]
    lines = table.render(rows.of_table("table3"), records, "paper").splitlines()
    verdicts = {line.split()[0]: line for line in lines if line.startswith("SiT")}
    assert "reproduced" in verdicts["SiT-XL-2/none-600"] and "guidance not known" in verdicts["SiT-XL-2/repa-200"]
    assert "h); guidance not known" in verdicts["SiT-XL-2/guided-100"]


def test_tables_show_all_that_is_published_and_measured() -> None:
    entry = fake("table3/SiT-XL-2/none-600", 0, "aaaa", 2.62, preset="sit-cfg-sde", epochs=600)
    entry["scores"][0]["metrics"] |= {"sfid": 4.3, "is": 250.0, "precision": 0.83, "recall": 0.58}
    ours, alone = table.render(rows.of_table("table3"), [entry], "paper").split("\n\n")
    for cell in ("675 | 674.8 M", "4.18 | 4.30", "252.2 | 250.0", "0.84 | 0.83", "0.57 | 0.58", "286.6 | -"):
        assert cell in ours, cell
    assert alone.startswith("published numbers alone, of systems that are not run here")
    assert [line.split()[0] for line in alone.splitlines()[3:]] == ["VDM++", "MaskDiT", "DiT-XL/2"]
    systems = table.render(rows.of_table("table2"), [], "paper").split("\n\n")[1].splitlines()[3:]
    named = ["LDM-4", "U-ViT-H/2", "MDTv2-XL/2", "MaskDiT", "SD-DiT", "DiT-XL/2"]
    assert [line.split()[0] for line in systems] == named
    assert "| " not in table.render(rows.of_table("table3"), [entry], "tiny")


def test_section_45_has_the_papers_hours_and_its_steps() -> None:
    """29.93, 32.72 and 30.52 hours on 8 GPUs; a million steps, the first 50,000 of stage 2 guided."""
    published = {row.method: row.published.device_hours for row in rows.of_table("section4.5")}
    assert published == {"none": pytest.approx(239.44), "repa": pytest.approx(261.76), "guided": pytest.approx(244.16)}
    plan = chain.build(rows.find("section4.5/SiT-B-2/guided-200"), scale.find("paper"), 0, Path("work"))
    words = next(link.words for link in plan.links if link.name == "train")
    assert plan.step == 1_000_000 and words[words.index("--align-stop-steps") + 1] == "50000"
    text = table.render(rows.of_table("section4.5"), [], "paper")
    assert "239.44 | -" in text and "verdict" in text


def test_methods_of_other_authors_are_rows_where_they_can_be_trained() -> None:
    """RARE's matched table, with guidance and without; what cannot run here is a number alone, said as such."""
    chosen = rows.of_table("peers")
    numbers = {row.name.split("/")[-1]: row.published.metrics["fid"] for row in chosen if row.published}
    assert (
        numbers["rare-80"] == 18.02
        and numbers["rare-80-cfg"] == 4.46
        and numbers["dts-as-80"] == 29.89
        and numbers["dts-as-half-160"] == 24.15
        and numbers["self-flow-800"] == 5.7
    )
    assert numbers["repa-80"] == 22.39 and numbers["irepa-80-cfg"] == 5.48 and numbers["haste-80"] == 18.99
    assert [row.name.split("/")[-1] for row in chosen if not row.published] == ["guided-80", "guided-80-cfg"]
    same = ("peers/SiT-B-2/guided-80", "peers/SiT-B-2/guided-80-cfg", "table1/SiT-B-2/guided-80")
    assert len({chain.build(rows.find(name), scale.find("paper"), 0, Path("work")).run for name in same}) == 1
    alone = table.render(chosen, [], "paper").split("\n\n")[1]
    for system in ("SiT-B/2 + SPARE (RARE)", "SiT-XL/2 + REPI (with REPA)", "SiT-XL/2 + self-flow (cfg)"):
        assert system in alone, system
    assert "SiT-B/2 + repa" not in alone and "10,000 samples" in alone


def test_rows_of_the_digits_are_compared_with_plain_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    few = dataclasses.replace(
        scale.find("digits"),
        epoch_steps={"sit": 0.05},
        checkpointing_steps={"sit": 1},
        sample={"": "--mode ode --num-steps 2 --labels balanced --num-fid-samples 20"},
    )
    monkeypatch.setitem(scale.SCALES, "digits", few)
    places = ["--scale", "digits", "--results", str(tmp_path / "results")]
    recipes.main(["run", "digits/SiT-B-2/plain", "digits/SiT-B-2/guided-internal", *places, "--work", str(tmp_path)])
    plain, ours = sorted(record.load(tmp_path / "results"), key=lambda entry: "guided" in entry["row"])
    config = json.loads((tmp_path / "results" / "records" / ours["folder"] / "config.json").read_text())
    assert set(config["align"]) == {"guided", "internal"} and config["resolved"]["guided"]["teacher"]["step"] == 2
    assert [score["preset"] for score in ours["scores"]] == [
        "digits",
        *(f"digits --internal-scale {value}" for value in (1.2, 1.4, 1.8)),
    ]
    # each scale is a protocol of its own; a scale of 1 is the protocol of records from before there was this option
    assert len({score["key"] for score in ours["scores"]}) == 4
    assert ["internal_scale" in score["protocol"] for score in ours["scores"]] == [False, True, True, True]
    assert plain["scores"][0]["key"] == ours["scores"][0]["key"]
    capsys.readouterr()
    recipes.main(["table", "digits", *places])
    first, *guided = capsys.readouterr().out.split("\n\n")
    difference = table.quality(ours["scores"][0]) - table.quality(plain["scores"][0])  # both after 80 epochs
    line = next(line for line in first.splitlines() if "guided-internal" in line)
    assert "less the first row's" in first and f"  {difference:.2f}  " in line and len(guided) == 3


def test_a_seed_that_was_run_again_is_one_sample() -> None:
    """Else the same run, recorded three times, would be three seeds without spread."""
    chosen = rows.of_table("table4")
    again = [fake("table4/SiT-B-2/full", 0, "aaaa", fid) for fid in (40.0, 22.8, 22.9)]
    text = table.render(chosen, again, "paper")
    assert "22.90 (1 of 3; missing: 1 2)" in text and "undecided" in text and "reproduced" not in text
    assert table.figure_points(chosen, again, "paper")["aaaa"]["table4/SiT-B-2/full"] == {80: [22.9]}


def test_figures_are_drawn_from_records(place: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("4", "8", "table4"):
        recipes.main(["figure", name, "--scale", "tiny", "--results", str(place / "results")])
    written = [Path(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert sorted(path.suffix for path in written) == [*[".png"] * 3, *[".svg"] * 3]
    assert all(path.stat().st_size > 5000 for path in written)
    with pytest.raises(UserError, match="no row of figure4 has a record at scale paper"):
        recipes.main(["figure", "4", "--results", str(place / "results")])


def jobs_of(folder: Path, *words: str) -> dict[str, str]:
    """The scripts that `--slurm` writes, by name without number."""
    recipes.main(["run", *words, "--slurm", str(folder / "jobs"), "--work", str(folder / "w k")])
    return {path.name.partition("-")[2]: path.read_text() for path in sorted((folder / "jobs").glob("[0-9]*.sh"))}


def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Put shell programs in front of those of the system."""
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")


def test_each_job_is_whole_and_has_the_options_of_its_cluster(tmp_path: Path) -> None:
    shape = [
        "--nodes",
        "2",
        "--seeds",
        "0:3",
        "--hours",
        "1.999",
        "--partition",
        "gpu",
        "--account",
        "me",
        "--cpus",
        "6",
    ]
    places = ["--images", "image net", "--vae", "vae", "--reference", "r.npz", "--feature-weights", "i.pth"]
    jobs = jobs_of(tmp_path, RUN[3], *shape, "--environment", "source a.sh", *places, "--decoder", "d")
    assert list(jobs) == [
        "latents-imagenet256.sh",
        next(name for name in jobs if "teacher" in name),
        "table4-SiT-B-2-full.sh",
    ]
    for name, text in jobs.items():
        assert ("#SBATCH --array=0-2" in text) == ('--seeds "$SLURM_ARRAY_TASK_ID"' in text) == ("latents" not in name)
        for word in (
            "nodes=2\n", "cpus-per-task=48\n", "partition=gpu\n", "account=me\n", "time=02:00:00\n",
            "signal=B:USR1@600\n",
            f"output='{tmp_path}/w k/logs/%x-%j.out'\n", "requeue\n",
        ):  # fmt: skip
            assert f"#SBATCH --{word}" in text, word
        assert "\nsource a.sh\n" in text and "--processes 8 --nodes 2" in text and "--images 'image net'" in text
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert (tmp_path / "w k" / "logs").is_dir()
    # the words of a job are those of a chain at these places
    words = shlex.split(next(line for line in jobs["table4-SiT-B-2-full.sh"].splitlines() if "recipes run" in line))
    options = read(recipes.Run, words[5 : words.index("--seeds")], prog="run")
    plan = chain.build(rows.find(RUN[3]), scale.find("paper").at(options.places, []), 0, tmp_path)
    assert plan.links[0].words[3:6] == ("image net", "--vae", "vae")
    assert shlex.join(plan.links[-1].words[-12:-4]) == (
        "--reference r.npz --features inception --vae d --feature-weights i.pth"
    )


def test_jobs_wait_for_those_that_make_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of 40 epochs before the stage-1 row that continues it, two rows of one run in turn, no job for a set
    that is there."""
    names = ["guided-80", "latent-80", "none-120", "none-80"]
    jobs_of(tmp_path, *(f"table1/SiT-B-2/{name}" for name in names), "--seeds", "2:4")
    on_path(tmp_path, monkeypatch, sbatch=f'echo "$*" >> {tmp_path}/log; wc -l < {tmp_path}/log | sed "s/$/;here/"')
    submit = tmp_path / "jobs" / "submit.sh"
    assert (
        subprocess.run(["bash", submit], check=True, capture_output=True, text=True).stdout
        == "submitted: 1 2 3 4 5 6\n"
    )
    calls = [shlex.split(line)[2:] for line in (tmp_path / "log").read_text().splitlines()]
    assert [Path(call[-1]).name.split("-")[1] for call in calls] == ["latents", "teacher", *["table1"] * 4]
    assert [call[0].removeprefix("--dependency=") if len(call) > 1 else "" for call in calls] == [
        "",
        "afterok:1",
        "afterok:1,aftercorr:2",
        "afterok:1,afterany:2",
        "afterok:1",
        "afterok:1,afterany:5",
    ]
    made = tmp_path / "w k" / "data" / "imagenet256" / "manifest.json"
    made.parent.mkdir(parents=True)
    made.touch()
    assert list(jobs_of(tmp_path, "table1/SiT-B-2/none-80")) == ["table1-SiT-B-2-none-80.sh"]


def test_a_job_whose_time_is_over_is_queued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs_of(tmp_path, "photographs/SiT-B-2/plain", "--scale", "photographs")
    on_path(
        tmp_path,
        monkeypatch,
        python="trap 'exit 75' USR1; echo $$ > \"$PIDS\"; kill -USR1 $PPID; while true; do sleep 0.01; done",
        scontrol=f'echo "$*" >> {tmp_path}/log',
    )
    variables = {
        "SLURM_JOB_ID": "17",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_JOB_NODELIST": "n1",
        "PIDS": f"{tmp_path}/pid",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (script,) = (tmp_path / "jobs").glob("*-photographs-*plain*.sh")
    assert subprocess.run(["bash", script], check=False, timeout=60).returncode == 0
    assert (tmp_path / "log").read_text().splitlines() == ["show hostnames n1", "requeue 17"]


def test_chains_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(runner, "LOOK", 0.02)
    work = tmp_path / "work"
    latents, place = (
        chain.build(rows.find(RUN[3]), scale.find("tiny"), 0, work).links[0],
        work / "locks" / "data-digits",
    )
    place.mkdir(parents=True)  # as chains do, so that the lock's end does not remove it
    holds = f"import sys\nfrom runtime import locks\nwith locks.locked({str(place)!r}, 'wait'):"
    holds += "\n print('held', flush=True)\n sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holds], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        argv = ["run", RUN[3], "--scale", "tiny", "--work", str(work), "--results", str(tmp_path / "results")]
        with pytest.raises(UserError, match=f"process {other.pid} on .*give the same command again"):
            recipes.main([*argv, "--wait-hours", "0"])
        assert not (tmp_path / "results" / "records").exists()  # waiting in vain is no failure of the row
        threading.Timer(0.2, other.stdin.close).start()
        recipes.main([*argv, "--until", "latents"])
    assert latents.done and not (tmp_path / "results" / "records").exists()
    printed = capsys.readouterr().out
    assert printed.count(f"latents: waiting for process {other.pid} on ") == 1 and "latents: done" in printed


@pytest.mark.parametrize("ends", [False, True])
def test_a_signal_ends_a_chain_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """At once where nothing listens, and before the next link where training was about to end anyway."""
    begun = []

    def call(words: Sequence[str]) -> None:
        begun.append(words)
        with signals.noted() if ends else nullcontext():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        assert ends
        (tmp_path / "work" / "data" / "digits").mkdir(parents=True)
        (tmp_path / "work" / "data" / "digits" / "manifest.json").touch()

    monkeypatch.setattr(runner, "call", call)
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with pytest.raises(EndedEarly, match="asked to end by SIGUSR1"):
            runner.run(rows.find(RUN[3]), scale.find("tiny"), 0, tmp_path / "work", tmp_path / "results", 1)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(begun) == 1 and not (tmp_path / "results" / "records").exists()


def test_scores_along_training_come_as_checkpoints_come() -> None:
    plan = chain.build(rows.find("figure4/SiT-B-2/none"), scale.find("paper"), 0, Path("work"))
    order = [link.makes.parent.name.split("-")[-1] for link in plan.links[1:]]
    assert order == [f"{step * 50_000:07d}" for step in range(1, 9) for _ in "ab"]
    assert [link.name.split()[0] for link in plan.links[1:]] == ["train", "score"] * 8
    # a branch needs its trunk up to the step where it begins, not to the trunk's own end
    branch = chain.build(rows.find("figure8/SiT-XL-2/guided-stop-100K"), scale.find("paper"), 0, Path("work"))
    assert [link.name.split()[0] for link in branch.links] == ["latents", "teacher", "trunk", "train", "score"]
    assert branch.links[2].makes.parent.name == "0100000" and branch.links[3].makes.parent.name == "0200000"


def test_a_rehearsal_goes_from_pictures_to_metrics_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The tiny scale with images, VAE and reference from outside, as the paper's has them."""
    tiny = scale.find("tiny")
    encode = "-m preprocessing.encode --images {images} --vae {vae} --resolution 16 --workers 0"
    outside = dataclasses.replace(tiny, encode={"sit": encode}, score="--reference {reference} --features pixels")
    monkeypatch.setitem(scale.SCALES, "tiny", outside)
    images, vae, reference = class_folders(tmp_path / "images", 3, 6), tiny_vae(tmp_path / "vae"), tmp_path / "r.npz"
    noise = np.random.default_rng(0).integers(256, size=(8, 16, 16, 3), dtype=np.uint8)
    np.savez(reference, arr_0=noise)
    argv = ["run", "table4/SiT-B-2/plain", "--scale", "tiny", "--work", str(tmp_path / "work"), "--rehearse"]
    monkeypatch.setattr(rehearsal, "ITEMS", 4)  # a batch is more
    argv += ["--images", str(images), "--vae", vae]
    recipes.main([*argv, "--reference", str(reference)])
    printed = capsys.readouterr().out
    commands = [line.split()[1] for line in printed.split("\n$ python ")[1:]]
    assert commands == ["preprocessing.encode", "--recipe", "recipes.rehearsal"]
    assert "16 items in 1 shards" in printed and "batch 16 = 1 process(es)" in printed and "2 steps = " in printed
    assert "64 samples of " in printed and "SDE, 2 steps" in printed and "metrics.json" in printed
    assert "rehearsed table4/SiT-B-2/plain: 3 links in " in printed and not any((tmp_path / "work").iterdir())
    # the batch of trainings is global, that of samples belongs to a process
    few = rehearsal.scale_of(scale.find("paper"), tmp_path, 4, 2)
    branch = chain.build(rows.find("figure8/SiT-XL-2/guided-stop-100K"), few, 0, tmp_path)
    words = [dict(itertools.pairwise(link.words)) for link in branch.links]
    assert [options.get("--batch-size") for options in words] == [None, "4", "4", "4", "2"]
    assert [options.get("--max-train-steps") for options in words] == [None, "2", "2", "4", None]
    # what would have failed after the trainings fails before the first link
    for wrong, culprit in (
        (["--reference", str(tmp_path / "none.npz")], "none.npz"),
        (["--reference", str(reference), "--decoder", str(tmp_path / "no-vae")], "no-vae"),
    ):
        with pytest.raises(UserError, match=culprit):
            recipes.main([*argv, *wrong])
        assert "\n$ " not in capsys.readouterr().out and not any((tmp_path / "work").iterdir())


def link_of(program: str, makes: Path) -> chain.Link:
    return chain.Link("train", ("-c", program), makes.parents[2], makes, many=False)


def test_a_signal_reaches_the_processes_of_a_launcher_and_the_chain_asks_to_be_queued_again(tmp_path: Path) -> None:
    """The launcher's own exit code says nothing: accelerate ends with 1 where its processes ended with 75."""
    makes = tmp_path / "run" / "checkpoints" / "0000001" / "config.json"
    waits = link_of(
        f"import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        f"os.kill({os.getpid()}, signal.SIGUSR1)\ntime.sleep(300)",
        makes,
    )
    with pytest.raises(EndedEarly, match="SIGUSR1"), signals.noted(at_once=True):
        runner._start(waits, waits.command(2), 2, 1)
    fails = link_of("raise SystemExit(1)", makes)
    with pytest.raises(UserError, match="train ended with exit code 1"):
        runner._start(fails, fails.command(2), 2, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ended-early.json").write_text("{}")
    with pytest.raises(EndedEarly):
        runner._start(fails, fails.command(2), 2, 1)


def test_each_node_fills_in_its_own_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text('#!/bin/bash\nSLURM_NODEID=0 "$@" && SLURM_NODEID=1 "$@"\n')
    (tmp_path / "accelerate").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path / "said"}\n')
    for name in ("srun", "accelerate"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("MAIN_ADDRESS", "head")
    link = chain.Link("train", ("train.py", "--exp-name", "a b"), tmp_path / "x", tmp_path / "x" / "y", many=True)
    runner._start(link, link.command(8, 2), 8, 2)
    assert [line.split()[6:10] for line in (tmp_path / "said").read_text().splitlines()] == [
        ["--machine_rank", number, "--main_process_ip", "head"] for number in "01"
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["runn"], "did you mean run"),
        (["run"], "needs a name"),
        (["run", "table4/SiT-B-2/ful"], "did you mean table4/SiT-B-2/full"),
        (["run", "table4", "--scale", "tiny", "--seeds", "7:9"], "no row of table4 has a seed of 7:9"),
        (["list", "table9"], "there is no table9"),
        (["run", RUN[3], "--seeds", "3:"], "neither a seed nor"),
        (["--scale", "tiny"], "has no --scale"),
        (["check", "nowhere"], "nowhere is not a record"),
        (["figure", "3"], "there is no figure3"),
        (["show", RUN[3], "--seeds", "4:2"], "no seed"),
        (["claims", "photographs"], "takes no name: leave out photographs"),
        (["figure", "table1"], "no row of table1 has a record at scale paper"),
        (["cost", "table1", "table99"], "no row is called table99"),
        (["list", "--seeds", "3"], "unknown option --seeds"),
        (["show", RUN[3], "--results", "x"], "unknown option --results"),
        (["table", "4", "--work", "x"], "unknown option --work"),
        (["run", RUN[3], "--until", "encoder"], "the chain of table4/SiT-B-2/full has latents, teacher, train, score"),
        (["run", RUN[3], "--batch-size", "4"], "add --rehearse"),
        (["run", RUN[3], "--partition", "x"], "--partition is an option of jobs: add --slurm"),
        (["run", RUN[3], "--slurm", "x", "--until", "train"], "three uses of run"),
        (["run", RUN[3], "--scale", "tiny", "--vae", "x"], "--vae belongs to --scale paper"),
        (["run", "table1", "--vae", "x"], "rows of lightningdit and sit need a VAE each"),
        (["run", "table1", "table3", "--reference", "x"], "256 and 512 pixels need a reference each"),
        (["run", RUN[3], "--nodes", "0"], r"--nodes 0 must lie in \[1, inf\)"),
        (["run", RUN[3], "--work", "/dev/null"], "--work /dev/null is a file"),
        (["claims", "--scale", "digits"], "no file in .*claims has claims at scale digits"),
    ],
)
def test_mistakes_are_one_line(words: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        recipes.main([*words, *([] if words[0] == "show" else ["--results", str(tmp_path)])])
