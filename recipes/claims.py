"""The paper's claims as differences between rows, which a paired test over seeds can decide.

Every comparison pairs runs of one seed, which share initial weights, data order and noise. A claim `holds` or is
`reversed` if a paired t-test gives p < 0.05 after Holm's correction for the number of claims; else it is `undecided`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipes import rows, table
from recipes.record import newest
from runtime.errors import require

LEVEL = 0.05


@dataclass(frozen=True)
class Claim:
    """One row of the study, at some number of epochs, has a lower Frechet distance than another."""

    statement: str
    better: tuple[str, float]
    worse: tuple[str, float]


_PLAIN, _STAGE1 = rows.PLAIN_TOTAL, rows.STAGE1_TOTAL
CLAIMS = (
    Claim("stage 1 improves on plain training, at equal steps", ("stage1", 80), ("plain", 80)),
    Claim("stage 2 improves on plain training, at equal steps", ("full", 80), ("plain", 80)),
    Claim("stage 2 improves on plain training, at equal steps, halfway", ("full", 40), ("plain", 40)),
    Claim("stage 2 improves on stage 1, at equal steps", ("full", 80), ("stage1", 80)),
    Claim("stage 2 improves on plain training, at equal compute", ("full", 80), ("plain", _PLAIN)),
    Claim("stage 2 improves on stage 1, at equal compute", ("full", 80), ("stage1", _STAGE1)),
    Claim("stage 1 improves on plain training, at equal compute", ("stage1", _STAGE1), ("plain", _PLAIN)),
    Claim("a stage-1 teacher is better than a plain one", ("full", 80), ("plain-teacher", 80)),
    Claim(
        "stage 2 from a plain teacher improves on plain training, at equal steps", ("plain-teacher", 80), ("plain", 80)
    ),
    Claim("omega 10 is better than 1", ("omega-10", 80), ("omega-1", 80)),
    Claim("omega 30 is better than 1", ("full", 80), ("omega-1", 80)),
    Claim("omega 30 is better than 10", ("full", 80), ("omega-10", 80)),
    Claim("an older teacher is better (40 epochs, 20)", ("full", 80), ("young-teacher", 80)),
    Claim("an early stop is better than a late one (20 epochs, 40)", ("full", 80), ("late-stop", 80)),
    Claim("stage 1 is better at block n/6 than at n/3", ("stage1", 80), ("stage1-block-n-3", 80)),
    Claim("stage 1 is better at block n/6 than at n/2", ("stage1", 80), ("stage1-block-n-2", 80)),
)


def values(records: Sequence[dict[str, Any]], scale: str) -> dict[tuple[str, float], dict[int, float]]:
    """(row without table and model, epochs) -> seed -> Frechet distance, of the study's rows."""
    scores: dict[tuple[str, float], dict[int, float]] = {}
    for record in study_records(records, scale):
        key = record["row"].split("/")[-1]
        for score in record["scores"]:
            scores.setdefault((key, score["epochs"]), {})[record["seed"]] = table.quality(score)
    return scores


def study_records(records: Sequence[dict[str, Any]], scale: str) -> list[dict[str, Any]]:
    """The study's finished records, one for each row and seed. Raises UserError if scores are of several protocols."""
    chosen = [record for record in newest(records) if record["table"] == "study" and record["scale"] == scale]
    keys = {score["key"] for record in chosen for score in record["scores"]}
    require(
        len(keys) < 2,
        f"the study's records are of {len(keys)} protocols, and scores of two are never compared: keep those of one",
    )
    return chosen


@dataclass(frozen=True)
class Finding:
    """One claim after its test."""

    claim: Claim
    # Better minus worse, for each seed that both rows have.
    differences: tuple[float, ...]
    # Of the paired t-test, two-sided, uncorrected; NaN below two seeds.
    p: float
    # `p` after Holm's correction.
    corrected: float

    @property
    def verdict(self) -> str:
        """holds, reversed, undecided or not run."""
        if len(self.differences) < 2:
            return "not run"
        if not self.corrected < LEVEL:
            return "undecided"
        return "holds" if statistics.mean(self.differences) < 0 else "reversed"

    @property
    def interval(self) -> float:
        """Half the width of the mean difference's 95 % confidence interval."""
        return table.half_interval(self.differences)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of m values times m - k + 1, monotone, at most 1. NaN stays."""
    known = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    corrected, largest = list(p), 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        corrected[place] = largest
    return corrected


def test(records: Sequence[dict[str, Any]], scale: str = "study") -> list[Finding]:
    """Every claim with its paired differences over the seeds that both rows have."""
    from scipy.stats import ttest_1samp

    scores, differences, p = values(records, scale), [], []
    for claim in CLAIMS:
        better, worse = scores.get(claim.better, {}), scores.get(claim.worse, {})
        paired = tuple(better[seed] - worse[seed] for seed in sorted(better.keys() & worse.keys()))
        differences.append(paired)
        # the paired t-test is the t-test of the differences
        p.append(float(ttest_1samp(paired, 0).pvalue) if len(paired) > 1 else math.nan)
    return [Finding(*facts) for facts in zip(CLAIMS, differences, p, holm(p), strict=True)]


def cells(findings: Sequence[Finding]) -> list[list[str]]:
    """The findings as lines of cells below their titles."""
    lines = [["claim", "seeds", "difference in Fréchet distance", "p", "p (Holm)", "verdict"]]
    for finding in findings:
        tested = ["", "", ""]
        if len(finding.differences) > 1:
            mean = f"{statistics.mean(finding.differences):+.2f} ± {finding.interval:.2f}"
            tested = [mean, f"{finding.p:.2g}", f"{finding.corrected:.2g}"]
        lines.append([finding.claim.statement, str(len(finding.differences)), *tested, finding.verdict])
    return lines
