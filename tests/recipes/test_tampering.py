"""Ways to falsify a record, and what notices each; docs/records.md lists those that nothing can notice."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluations import projection
from evaluations.metrics import Statistics
from recipes import __main__ as recipes
from recipes import claims, history, publish, recompute, record, replay, rows, table
from recipes.row import FIVE, Row, ablation
from runtime import files
from runtime.errors import UserError
from sampling import presets
from tests.helpers import ROOT

STAGE1, FULL = "study/SiT-B-2/stage1", "study/SiT-B-2/full"
CLAIMS = {
    "status": "claim",
    "scale": "tiny",
    "seeds": [0, 1],
    "metric": "fd",
    "test": "paired t-test, two-sided, Holm",
    "smallest_effect": 1.0,
    "power": {"deviation": 0.1, "source": "a guess", "value": 0.733},
    "claims": [{"hypothesis": "late is better", "better": [FULL, 80], "worse": [FULL, 40]}],
}


def study() -> Iterator[Row]:
    """Rows that are scored along the way."""
    made = functools.partial(ablation, "study", seeds=FIVE)
    yield made("plain", "none")
    yield made("stage1", "latent", epochs=130, at=(40, 80, 120, 130))
    yield made("full", "guided", at=(40, 80))


@pytest.fixture(scope="module", autouse=True)
def table_of_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TABLES, "study", study)
        rows.rows.cache_clear()
        yield
    rows.rows.cache_clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Records of stage 1 and of stage 2 under two seeds, of a few steps; samplers take nine."""
    folder = tmp_path_factory.mktemp("tampering")
    preset = presets.PRESETS["table1-sde"]
    few = dataclasses.replace(preset, settings={**preset.settings, "num_steps": 9})
    places = ["--work", str(folder / "work"), "--results", str(folder / "results")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "table1-sde", few)
        recipes.main(["run", STAGE1, "--scale", "tiny", *places])
        recipes.main(["run", FULL, "--scale", "tiny", "--seeds", "0:2", *places])
        yield folder / "results"


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    """A copy to falsify."""
    return Path(shutil.copytree(made, tmp_path / "results"))


def folder_of(results: Path, row: str = FULL, seed: int = 0) -> Path:
    (entry,) = [entry for entry in record.load(results) if (entry["row"], entry["seed"]) == (row, seed)]
    return results / "records" / entry["folder"]


def edit(file: Path, change: Callable[[Any], object], digest: bool = True) -> None:
    """Change a JSON file of a record, and write its new digest into the record as a careful forger would."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
    if digest and file.name != "record.json":
        again(file)


def again(file: Path) -> None:
    """Write a file's new digest into its record."""
    edit(file.parent / "record.json", lambda record: record["files"].update({file.name: files.digest(file)}))


def check(results: Path, capsys: pytest.CaptureFixture) -> str:
    """What the check prints and raises, the ledger made anew before."""
    try:
        record.write_ledger(results)
        recipes.main(["check", "--results", str(results)])
    except UserError as error:
        return f"{capsys.readouterr().out}\n{error}"
    return capsys.readouterr().out


Change = Callable[[Path], None]


def scores(change: Callable[[list[dict[str, Any]]], object]) -> Change:
    return lambda results: edit(folder_of(results) / "metrics.json", lambda value: change(value["scores"]))


def config(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda results: edit(folder_of(results) / "config.json", change)


def summary(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda results: edit(folder_of(results) / "record.json", change)


def lower(value: list[dict[str, Any]]) -> None:
    """A better score, consistent with itself."""
    value[1]["metrics"]["fd"] *= 0.5
    value[1]["fd64"] *= 0.5


def swap(results: Path) -> None:
    """The scores of two seeds exchanged."""
    first, second = folder_of(results), folder_of(results, seed=1)
    for name in ("metrics.json", "features.safetensors"):
        before, other = (first / name).read_bytes(), (second / name).read_bytes()
        (first / name).write_bytes(other)
        (second / name).write_bytes(before)
        again(first / name)
        again(second / name)


def copy(results: Path) -> None:
    """A seed replaced by a copy of another."""
    first, second = folder_of(results), folder_of(results, seed=1)
    shutil.rmtree(second)
    shutil.copytree(first, second)
    edit(second / "record.json", lambda value: value.update(seed=1))


def same_scores(results: Path) -> None:
    """The scores of a seed written over those of another, under its own checkpoints and hours."""
    first, second = folder_of(results), folder_of(results, seed=1)
    better = json.loads((first / "metrics.json").read_text())["scores"]
    shutil.copy(first / "features.safetensors", second)
    again(second / "features.safetensors")

    def replace(value: dict[str, Any]) -> None:
        for score, other in zip(value["scores"], better, strict=True):
            score.update({key: other[key] for key in ("metrics", "fd64")})

    edit(second / "metrics.json", replace)


def statistics(results: Path) -> None:
    """Statistics that are nearer to the reference."""
    file = folder_of(results) / "features.safetensors"
    tensors = files.load_tensors(file)
    files.save_tensors(file, {name: value * 0.99 for name, value in tensors.items()})
    again(file)


def reference(results: Path) -> None:
    (file,) = (results / "references").iterdir()
    files.save_tensors(file, {name: value * 1.01 for name, value in files.load_tensors(file).items()})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (scores(lambda value: value[1]["metrics"].update(fd=1e-3)), "projected distance .* is above the whole"),
        (scores(lambda value: value[1]["metrics"].update(fd=1e9)), "its 64 features give"),
        (scores(lower), "statistics of step 4 give a projected distance of"),
        (statistics, "statistics of step 2 give a projected distance of"),
        (reference, "safetensors is missing or has changed since"),
        (scores(lambda value: value[1].update(num_samples=50000)), "is of 50000 samples, its command draws 4"),
        (scores(lambda value: value[1]["protocol"].update(cfg_scale=4.0)), "cfg_scale 4.0, its command gives 1.0"),
        (scores(lambda value: value[1].update(flops=1e12)), "FLOPs, not"),
        (scores(lambda value: value.pop()), "its row has 2 scores, not 1"),
        (config(lambda value: value["train"].update(learning_rate=0.02)), "learning_rate is 0.02, its command gives"),
        (config(lambda value: value["train"].update(seed=77)), "seed is 77, its command gives 0"),
        (config(lambda value: value["align"]["guided"].update(guide_scale=300.0)), "align: guided guide_scale is 300"),
        (
            config(lambda value: value["resolved"]["guided"].update(guide_scale=300.0)),
            "resolved: guided guide_scale is 300",
        ),
        (
            config(lambda value: value["model"].update(name="SiT-XL/2")),
            "model: name is SiT-XL/2, its command gives SiT-Tiny/2",
        ),
        (config(lambda value: value.update(precision="bf16")), "its precision is fp32, that of config.json bf16"),
        (summary(lambda value: value["digests"].update(checkpoint="0" * 64)), "of another checkpoint than it names"),
        (summary(lambda value: value["digests"].update(teacher="1" * 64)), "teacher is not that of config.json"),
        (summary(lambda value: value["digests"].update(data="2" * 64)), "compared with another set"),
        (summary(lambda value: value.update(commands=["echo hello"])), "its row gives the command 'python -m prepro"),
        (summary(lambda value: value.pop("commands")), "commands: field required"),
        (swap, "of another checkpoint than it names"),
        (copy, "its row gives the command"),
        (same_scores, "hold the same result"),
    ],
)
def test_what_a_record_says_must_follow_from_its_row_and_its_statistics(
    change: Change, expected: str, results: Path, capsys: pytest.CaptureFixture
) -> None:
    change(results)
    assert re.search(expected, check(results, capsys))


def test_records_that_were_not_touched_hold_and_name_the_seeds_that_are_missing(
    results: Path, capsys: pytest.CaptureFixture
) -> None:
    printed = check(results, capsys)
    assert printed.count(": holds\n") == 3
    assert f"seeds of {FULL} at scale tiny: 2 of 5; missing: 2 3 4" in printed
    shutil.rmtree(folder_of(results, seed=1))  # a bad seed removed
    assert f"seeds of {FULL} at scale tiny: 1 of 5; missing: 1 2 3 4" in check(results, capsys)


def test_a_bad_seed_that_is_called_failed_is_named(results: Path, capsys: pytest.CaptureFixture) -> None:
    edit(folder_of(results, seed=1) / "record.json", lambda value: value.update(status="failed", failure="x"))
    assert f"seeds of {FULL} at scale tiny: 1 of 5; failed: 1; missing: 2 3 4" in check(results, capsys)
    assert "(1 of 5; failed: 1; missing: 2 3 4)" in table.render([rows.find(FULL)], record.load(results), "tiny")


def test_a_checkpoint_has_one_digest_in_all_records(made: Path) -> None:
    def forged(change: Callable[[dict[str, dict[str, Any]]], None]) -> str:
        entries = {f"{entry['row'].split('/')[-1]}{entry['seed']}": entry for entry in record.load(made)}
        change(entries)
        return "; ".join(recompute.between([*entries.values()], made))

    assert forged(lambda entries: None) == ""
    # the teacher of stage 2 is the checkpoint that stage 1's record has scored
    teacher = "latent-.*@2 is another checkpoint in .*full.* than in .*stage1"
    assert re.search(teacher, forged(lambda entries: entries["full0"]["digests"].update(teacher="1" * 64)))

    def copied(entries: dict[str, dict[str, Any]]) -> None:
        entries["full1"]["scores"] = entries["full0"]["scores"]

    assert re.search("the checkpoint .* is called .*seed0/guided.* and .*seed1/guided", forged(copied))


def test_losses_of_the_log_are_trained_again(results: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    folder, work = folder_of(results, STAGE1), str(tmp_path / "work")
    recipes.main(["replay", str(folder), "--work", work])
    printed = capsys.readouterr().out
    gap = re.search(r"losses of steps 1 to 6 differ by at most (\S+) of the recorded ones\n", printed)
    assert gap is not None and float(gap[1]) < 1e-5
    assert not (tmp_path / "work" / "exps").exists()
    recipes.main(["replay", str(folder)])  # in a folder that is removed
    assert f"losses of steps 1 to 6 differ by at most {gap[1]} of" in capsys.readouterr().out
    log = folder / "log.jsonl"
    whole = log.read_text()
    log.write_text(re.sub(r'("step": 3, "loss/diffusion": )[0-9.]+', r"\g<1>0.01", whole))
    again(log)
    with pytest.raises(UserError, match="loss/diffusion of step 3 is .*, not 0.01; the log is not of this command"):
        replay.replay(folder, Path(work))
    # what may come from another machine is no fault
    edit(folder / "record.json", lambda value: value.update(cpu="another"))
    recipes.main(["replay", str(folder), "--work", work])
    assert "which may come from cpu " in capsys.readouterr().out
    edit(folder / "record.json", lambda value: value.update(status="failed"))
    with pytest.raises(UserError, match="cannot be replayed: it did not finish"):
        replay.replay(folder, Path(work))


def test_stage_2_is_replayed_from_its_own_teacher(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipes.main(["replay", str(folder_of(made)), "--work", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "--align latent" in printed and "losses of steps 1 to 1 differ by at most" in printed
    assert [run.name.split("-")[0] for run in (tmp_path / "exps" / "seed0").iterdir()] == ["latent"]


@pytest.mark.parametrize(
    ("page", "old", "new"),
    [
        ("docs/photographs.md", "| 20.438 |", "| 18.438 |"),
        ("docs/methods.md", "0.495 ± 0.020", "0.395 ± 0.020"),
        ("docs/sampling.md", "1.038 ± 0.076", "0.038 ± 0.076"),
    ],
)
def test_a_table_of_a_page_that_was_edited_is_noticed(page: str, old: str, new: str) -> None:
    text = (ROOT / page).read_text()
    edited = text.replace(old, new, 1)
    assert edited != text and publish.page(edited, ROOT / "results") == text


def commit(place: Path, *paths: str) -> None:
    for words in (["add", *paths], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=place, check=True)


def test_claims_are_older_than_their_records_or_explored(results: Path, capsys: pytest.CaptureFixture) -> None:
    place, file = results.parent, results / "claims" / "late.json"
    files.write_json(file, CLAIMS)
    assert "their age is not compared, since the history of git is not here" in check(results, capsys)
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    commit(place, "results/claims")
    assert "claims" not in check(results, capsys)  # records that are not committed yet are younger
    commit(place, "results/records")
    assert history.known(file.parent) and "claims" not in check(results, capsys)
    files.write_json(file, {**CLAIMS, "smallest_effect": 2.0, "power": {**CLAIMS["power"], "value": 1.0}})
    younger = "claims late are not older than 2 of their records .*: their status is explored"
    assert re.search(younger, check(results, capsys))
    commit(place, "results/claims")
    assert re.search(younger, check(results, capsys))
    files.write_json(file, {**CLAIMS, "status": "explored"})
    assert "not older" not in check(results, capsys)
    shallow = place / "shallow"
    subprocess.run(["git", "clone", "-q", "--depth", "1", place.as_uri(), str(shallow)], check=True)
    assert not history.known(shallow / "results" / "claims")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"power": {**CLAIMS["power"], "value": 0.99}}, r"their power is 0.733, not 0.99"),
        ({"seeds": [100, 101]}, "is a trial, or does not declare the seeds"),
        ({"claims": [{**CLAIMS["claims"][0], "better": [FULL, 70]}]}, "no row that is scored after 70 epochs"),
        ({"claims": CLAIMS["claims"] * 2}, "a hypothesis stands there twice"),
    ],
)
def test_claims_that_do_not_hold_by_themselves_are_named(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    files.write_json(tmp_path / "claims" / "late.json", {**CLAIMS, "status": "explored", **change})
    assert re.search(expected, "; ".join(claims.faults(tmp_path, [])))


def test_trials_are_equal_in_number_and_on_seeds_of_their_own() -> None:
    row = rows.find(FULL)
    first, second = (
        dataclasses.replace(row, name=f"{row.name}-{word}", seeds=rows.TUNING, tunes=row.name) for word in ("a", "b")
    )
    plain = rows.find("study/SiT-B-2/plain")
    other = dataclasses.replace(first, name="c", tunes=plain.name)
    assert rows.tuning_faults([*rows.rows().values()]) == [] == rows.tuning_faults([row, plain, first, other])
    assert "unequal numbers of trials" in rows.tuning_faults([row, plain, first, second, other])[0]
    assert "tunes " in rows.tuning_faults([first])[0]
    for wrong in (
        dataclasses.replace(first, seeds=(0, 1)),
        dataclasses.replace(row, seeds=(0, 100)),
    ):
        assert "trials, and they alone" in rows.tuning_faults([row, plain, wrong])[0]


def test_statistics_of_another_shape_are_no_statistics(results: Path, capsys: pytest.CaptureFixture) -> None:
    import torch

    whole = Statistics(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    for tensors in ({}, {"0.mean": torch.zeros(64)}, projection.pack(whole, "0.")):
        file = folder_of(results) / "features.safetensors"
        files.save_tensors(file, tensors)
        again(file)
        printed = check(results, capsys)
        assert "give no distance" in printed and "Traceback" not in printed
