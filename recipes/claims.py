"""Claims as differences between rows, which a paired test over seeds can decide, declared before the first record.

A file `results/claims/NAME.json` holds a set of claims: hypotheses as pairs of rows, seeds, metric, test, the smallest
effect of interest and the power to see it. Every comparison pairs runs of one seed, which share initial weights, data
order and noise. A claim `holds` or is `reversed` if a paired t-test gives p < 0.05 after Holm's correction for the
number of claims in the file; else it is `undecided`. It is `incomplete` until every declared seed has its records.

A set is a `claim` if its file was committed before the first record that it uses and not changed since; `faults`
compares the ages. Any other set is `explored`, and so are its verdicts in tables and on pages.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from recipes import history, rows, table
from runtime import schema
from runtime.schema import Field

LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row, at some number of epochs, has a lower distance than another."""

    hypothesis: str
    # Row and epochs.
    better: tuple[str, float]
    worse: tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class Power:
    """The chance to see the smallest effect of interest if it is real."""

    # Standard deviation of paired differences that was assumed, and where it comes from.
    deviation: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    source: str
    value: float


@dataclass(frozen=True, kw_only=True)
class ClaimSet:
    """The content of a file of claims."""

    status: Literal["claim", "explored"]
    scale: str
    seeds: tuple[int, ...]
    metric: Literal["fd", "fid"]
    test: Literal["paired t-test, two-sided, Holm"]
    # A difference in the metric.
    smallest_effect: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    power: Power
    claims: tuple[Claim, ...]

    @property
    def rows(self) -> list[str]:
        """Every row that a claim compares, once."""
        return list(dict.fromkeys(row for claim in self.claims for row, _ in (claim.better, claim.worse)))


def load(results: Path) -> dict[str, ClaimSet]:
    """Every set of claims by its file's name. Raises UserError for a file of another form."""
    return {file.stem: schema.read(ClaimSet, file) for file in sorted((results / "claims").glob("*.json"))}


def power(effect: float, deviation: float, seeds: int, claims: int) -> float:
    """The chance that a paired two-sided t-test of `seeds` differences sees a mean difference of `effect`.

    Its level is 0.05 over the number of claims: Holm's correction tests the first at this level, and the others at
    higher ones. By the noncentral t distribution.
    """
    from scipy.stats import nct, t

    limit, shift = t.ppf(1 - LEVEL / claims / 2, seeds - 1), effect / deviation * math.sqrt(seeds)
    return float(nct.sf(limit, seeds - 1, shift) + nct.cdf(-limit, seeds - 1, shift))


def of_set(records: Sequence[dict[str, Any]], chosen: ClaimSet) -> list[dict[str, Any]]:
    """The records of a set: the newest of each row and seed. Raises UserError if scores are of several protocols."""
    used = [
        record
        for record in table.declared(records)
        if record["scale"] == chosen.scale and record["row"] in chosen.rows and record["seed"] in chosen.seeds
    ]
    table.require_one_protocol(used, "the records of these claims")
    return used


@dataclass(frozen=True)
class Finding:
    """One claim after its test."""

    claim: Claim
    # Better minus worse, for each seed that both rows have.
    differences: tuple[float, ...]
    # How many of the declared seeds that are, and what became of the others.
    seeds: str
    complete: bool
    # Of the paired t-test, two-sided, uncorrected; NaN below two seeds.
    p: float
    # `p` after Holm's correction.
    corrected: float

    @property
    def verdict(self) -> str:
        """holds, reversed, undecided, incomplete or not run."""
        if not self.complete:
            return "incomplete" if self.differences else "not run"
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


def test(records: Sequence[dict[str, Any]], chosen: ClaimSet) -> list[Finding]:
    """Every claim with its paired differences over those of the declared seeds that both rows have."""
    from scipy.stats import ttest_1samp

    scores: dict[tuple[str, float], dict[int, float]] = {}
    for record in of_set(records, chosen):
        for score in record["scores"]:
            place = scores.setdefault((record["row"], score["epochs"]), {})
            place[record["seed"]] = score["metrics"][chosen.metric]
    facts: list[tuple[Claim, tuple[float, ...], str, bool]] = []
    p = []
    for claim in chosen.claims:
        better, worse = scores.get(claim.better, {}), scores.get(claim.worse, {})
        both = sorted(better.keys() & worse.keys())
        failed = {seed for row, _ in (claim.better, claim.worse) for seed in table.failed(records, row, chosen.scale)}
        paired = tuple(better[seed] - worse[seed] for seed in both)
        facts.append((claim, paired, table.counted(both, chosen.seeds, failed), len(both) == len(chosen.seeds)))
        # the paired t-test is the t-test of the differences
        p.append(float(ttest_1samp(paired, 0).pvalue) if len(paired) > 1 else math.nan)
    return [Finding(*fact, *values) for fact, values in zip(facts, zip(p, holm(p), strict=True), strict=True)]


def cells(findings: Sequence[Finding], chosen: ClaimSet) -> list[list[str]]:
    """The findings as lines of cells below their titles; a set that is not a claim is called explored."""
    explored = chosen.status != "claim"
    title = "hypothesis (explored)" if explored else "claim"
    lines = [[title, "seeds", "difference in Fréchet distance", "p", "p (Holm)", "verdict"]]
    for finding in findings:
        tested = ["", "", ""]
        if len(finding.differences) > 1:
            mean = f"{statistics.mean(finding.differences):+.2f} ± {finding.interval:.2f}"
            tested = [mean, f"{finding.p:.2g}", f"{finding.corrected:.2g}"]
        verdict = f"explored: {finding.verdict}" if explored else finding.verdict
        lines.append([finding.claim.hypothesis, finding.seeds, *tested, verdict])
    return lines


def summary(name: str, chosen: ClaimSet) -> str:
    """A set in one line: status, seeds, metric, test, smallest effect and power."""
    seeds = " ".join(map(str, chosen.seeds))
    return (
        f"{name} ({chosen.status}): seeds {seeds}; {chosen.metric}; {chosen.test}; smallest effect of interest "
        f"{chosen.smallest_effect:g}, seen with power {chosen.power.value:.2f} if paired differences deviate by "
        f"{chosen.power.deviation:g} ({chosen.power.source})"
    )


def faults(results: Path, records: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the sets of claims, in words: rows, seeds, power, and their age beside the records'."""
    wrong = []
    for name, chosen in load(results).items():
        wrong += [f"claims {name}: {fault}" for fault in _faults_of(chosen)]
        if chosen.status != "claim":
            continue
        used = [record for record in records if record["row"] in chosen.rows and record["scale"] == chosen.scale]
        folders = [results / "records" / record["folder"] for record in used if record["seed"] in chosen.seeds]
        if not history.known(results / "claims"):
            print(f"claims {name}: their age is not compared, since the history of git is not here")
        elif younger := history.not_older(results / "claims" / f"{name}.json", folders):
            wrong.append(
                f"claims {name} are not older than {len(younger)} of their records ({younger[0].name}): their status "
                f"is explored"
            )
    return wrong


def _faults_of(chosen: ClaimSet) -> list[str]:
    """What is wrong with a set by itself."""
    wrong = []
    for claim in chosen.claims:
        for name, epochs in (claim.better, claim.worse):
            row = rows.rows().get(name)
            if row is None or epochs not in (row.at or (row.epochs,)):
                wrong.append(f"{name} is no row that is scored after {epochs:g} epochs")
            elif row.tunes or {*chosen.seeds} & {*rows.TUNING} or not {*chosen.seeds} <= {*row.seeds}:
                wrong.append(f"{name} is a trial, or does not declare the seeds {chosen.seeds}")
    if len({claim.hypothesis for claim in chosen.claims}) < len(chosen.claims):
        wrong.append("a hypothesis stands there twice")
    expected = power(chosen.smallest_effect, chosen.power.deviation, len(chosen.seeds), len(chosen.claims))
    if abs(expected - chosen.power.value) > 0.005:
        wrong.append(f"their power is {expected:.3f}, not {chosen.power.value:g}")
    return wrong
