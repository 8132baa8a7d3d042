"""Claims of the paper: paired tests, their correction, and pages whose tables are what the records say."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from recipes import claims, costs, inside, publish, rows, scale
from recipes.claims import holm
from recipes.photographs import PLAIN_EPOCHS, SETTINGS
from runtime.errors import UserError
from tests.helpers import ROOT


def record(row: str, seed: int, scores: dict[float, float], key: str = "aaaa", scale: str = "photographs") -> dict:
    return {
        "row": f"photographs/SiT-B-2/{row}",
        "table": "photographs",
        "scale": scale,
        "seed": seed,
        "status": "finished",
        "scores": [
            {
                "epochs": epochs,
                "key": key,
                "protocol": {"of": key},
                "metrics": {"fd": value, **dict.fromkeys(publish.METRICS, 0.5)},
                "flops": 2e12,
            }
            for epochs, value in scores.items()
        ],
    }


def study(full: tuple[float, ...], plain: tuple[float, ...]) -> list[dict]:
    return [record("guided", seed, {80: value}) for seed, value in enumerate(full)] + [
        record("plain", seed, {80: value, PLAIN_EPOCHS: 1.0}) for seed, value in enumerate(plain)
    ]


STUDY = claims.load(ROOT / "results")["photographs-ten"]
EQUAL_STEPS = "stage 2 improves on plain training, at equal steps"


def finding(records: list[dict], seeds: int) -> claims.Finding:
    """The claim at equal steps over the first `seeds` seeds."""
    chosen = dataclasses.replace(STUDY, seeds=tuple(range(seeds)))
    return next(entry for entry in claims.test(records, chosen) if entry.claim.hypothesis == EQUAL_STEPS)


def test_the_committed_claims_hold_by_themselves_and_their_rows_have_titles() -> None:
    assert claims.faults(ROOT / "results", []) == []
    assert {row.split("/")[-1] for row in STUDY.rows} <= SETTINGS.keys()


def test_power_is_the_share_of_drawn_studies_that_see_the_effect() -> None:
    """Against simulation, and at no effect the level itself."""
    draws = np.random.default_rng(0).standard_normal((20_000, 5))
    for effect, deviation, count in ((0.5, 0.3, 1), (0.5, 0.3, 16), (1.0, 0.5, 4)):
        p = stats.ttest_1samp(effect + deviation * draws, 0, axis=1).pvalue
        expected = float((p < 0.05 / count).mean())
        assert claims.power(effect, deviation, 5, count) == pytest.approx(expected, abs=0.01)
    assert claims.power(0.0, 1.0, 5, 2) == pytest.approx(0.025)


def test_a_paired_test_is_the_t_test_of_the_differences() -> None:
    full, plain = (2.0, 2.3, 1.9, 2.2, 2.1), (3.1, 3.2, 2.9, 3.5, 3.0)
    tested = finding(study(full, plain), 5)
    gaps = [a - b for a, b in zip(full, plain)]
    mean = sum(gaps) / 5
    error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 4 / 5)
    assert tested.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, 4), rel=1e-9)
    assert tested.interval == pytest.approx(2.7764451 * error, rel=1e-6)  # the table's t for 4 degrees of freedom
    assert tested.verdict == "holds"
    assert finding(study(plain, full), 5).verdict == "reversed"
    assert finding(study((2.0, 3.0, 2.5), (2.4, 2.5, 2.6)), 3).verdict == "undecided"
    assert finding([], 5).verdict == "not run"
    # a seed that is declared and missing leaves no verdict; one that is not declared does not count
    incomplete = finding(study(full, plain[:3]), 5)
    assert incomplete.differences == pytest.approx(gaps[:3]) and incomplete.verdict == "incomplete"
    assert incomplete.seeds == "3 of 5; missing: 3 4" and finding(study(full, plain), 3).seeds == "3 of 3"
    failed = {**record("plain", 4, {}), "status": "failed"}
    assert finding([*study(full, plain[:3]), failed], 5).seeds == "3 of 5; failed: 4; missing: 3"
    more = [record("guided", 7, {80: 1.0}), record("plain", 7, {80: 9.0})]
    assert finding([*study(full, plain), *more], 5).differences == pytest.approx(gaps)


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []
    corrected = holm([math.nan, 0.01, 0.02])
    assert math.isnan(corrected[0]) and corrected[1:] == pytest.approx([0.02, 0.02])


def test_scores_of_two_protocols_are_never_paired() -> None:
    with pytest.raises(UserError, match="2 protocols"):
        claims.test([record("guided", 0, {80: 1.0}), record("plain", 0, {80: 1.0}, key="bbbb")], STUDY)
    scaled = record("plain", 0, {80: 1.0}, key="cccc")
    scaled["scores"][0]["protocol"] = {"of": "aaaa", "cfg_scale": 2.0, "evaluations": 30}
    assert claims.test([record("guided", 0, {80: 1.0}), scaled], STUDY)  # guidance is a setting of the row
    with pytest.raises(UserError, match="2 protocols"):
        publish.photographs([record("guided", 0, {80: 1.0}), record("plain", 0, {80: 1.0}, key="bbbb")])
    assert "| stage 2 | 80 | 1.0 | 0.50 | 0.50 | 0.50 | 1 of 10; missing: 1 2 3 4 5 6 7 8 9 |" in publish.photographs(
        [record("guided", 0, {80: 9.0}), record("guided", 0, {80: 1.0})]
    )
    assert all(
        tested.verdict == "not run"
        for tested in claims.test([record("guided", seed, {80: 1.0}, scale="tiny") for seed in range(5)], STUDY)
    )


def test_a_row_beside_plain_of_its_seeds_at_equal_steps_and_equal_flops() -> None:
    """Distances that fall as a power of the FLOPs are read from the curve exactly; beyond it nothing is."""

    def costing(records: list[dict], flops: float) -> list[dict]:
        for entry in records:
            for score in entry["scores"]:
                score["flops"] = flops * score["epochs"] / 80
        return records

    law = {seed: {epochs: (8 + seed) * (epochs / 80) ** -0.5 for epochs in (80, PLAIN_EPOCHS)} for seed in (0, 1)}
    plain = costing([record("plain", seed, scores) for seed, scores in law.items()], 8e12)
    dear = costing([record("guided", seed, {80: 7.0 + 3 * seed}) for seed in (0, 1, 2)], 8e12 * 1.44)
    line = "| stage 2 | 11.5 | +0.0 ± 1.4 | +1.4 ± 1.5 |"  # 7 - 8 and 10 - 9; 7 - 8 / 1.2 and 10 - 9 / 1.2
    assert line in publish.compared(plain + dear)
    beyond = costing([record("guided", 0, {80: 7.0})], 8e12 * 2)
    assert "| stage 2 | 16.0 | -1.0 |  |" in publish.compared(plain + beyond)
    # an encoder's pass over the images comes before the first step
    encoding = costs.encoding(rows.find("photographs/SiT-B-2/repa"), scale.find("photographs"))
    dear = costing([record("repa", seed, {80: 7.0 + 3 * seed}) for seed in (0, 1)], 8e12 * 1.44 - encoding)
    assert encoding > 1e12 and line.replace("stage 2", "REPA, MobileNetV2") in publish.compared(plain + dear)


def test_pages_are_rewritten_from_records_and_stale_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = study((2.0, 2.2), (3.0, 3.4))
    monkeypatch.setattr("recipes.record.load", lambda results: records)
    (tmp_path / "README.md").write_text("head\n<!-- results: summary -->\nold\n<!-- end -->\ntail\n")
    assert publish.stale(tmp_path, tmp_path) == [tmp_path / "README.md"] == publish.publish(tmp_path, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("head\n") and text.endswith("<!-- end -->\ntail\n") and "old" not in text
    assert (
        "| stage 2 | 80 | 2.1 ± 0.1 | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.50 ± 0.00 | 2 of 10; missing: 2 3" in text
        and "| plain SiT | 146 | 1.0 ± 0.0" in text
    )
    assert publish.stale(tmp_path, tmp_path) == []
    records[0]["scores"][0]["metrics"]["fd"] = 2.1
    assert publish.stale(tmp_path, tmp_path) == [tmp_path / "README.md"]
    with pytest.raises(UserError, match="no table is called"):
        publish.page("<!-- results: other -->\n<!-- end -->", tmp_path)


def test_probes_are_averaged_over_times_and_then_over_seeds(tmp_path: Path) -> None:
    def row(
        t: float | None, accuracy: float, block: int | None = 4, network: str | None = "teacher", features: str = "g"
    ) -> dict:
        return {
            "checkpoint": network,
            "t": t,
            "features": features,
            "omega": 3.0 if features == "g" else None,
            "block": block,
            "accuracy": accuracy,
            "knn": 0.5,
            "miou": 0.25,
        }

    probes = [
        {"rows": [row(0.3, 0.2), row(0.7, 0.4), row(0.3, 0.9, block=5), row(None, 0.1, None, None, "latents")]},
        {"rows": [row(0.3, 0.4), row(0.7, 0.6)]},
    ]
    lines = inside.summary(probes)
    assert lines[1] == ["teacher: f_g, omega 3", "0.400 ± 0.141", "0.500 ± 0.000", "0.250 ± 0.000"]
    assert lines[2][:2] == ["latents", "0.100"]
    with pytest.raises(
        UserError, match="is missing: python -m recipes run photographs/SiT-B-2/plain --scale photographs --seeds 3"
    ):
        inside.probe(scale.find("photographs"), 3, tmp_path, tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"rows": [{}]}', '{"rows": 3}'])
def test_probes_of_another_shape_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "photographs-s0.json").write_text(text)
    with pytest.raises(UserError, match="photographs-s0.json is damaged or from another version.*restore it"):
        inside.load(tmp_path)
