"""Tables that pages show, made from files: results and claims from the records, measurements from benchmarks/results.

README and the pages of docs/ mark the place: `<!-- results: NAME -->`, the table, `<!-- end -->`. `python -m recipes
publish` rewrites the table; `python -m recipes check` fails if it differs from the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipes import claims, inside, measured, record, rows, table
from recipes.photographs import SETTINGS
from recipes.row import TEN, TUNING
from runtime import files
from runtime.errors import require
from runtime.text import spread

_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

PHOTOGRAPHS = "photographs"  # table and scale
# Columns of the photographs' table.
METRICS = {"precision": "precision", "recall": "recall", "classifier_accuracy": "classifier accuracy"}


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table of a page: the first column to the left, the others to the right."""
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "| --- |" + " ---: |" * (len(lines[0]) - 1), *text[1:]]) + "\n"


def _of_photographs(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest records of the photographs' rows and their declared seeds."""
    here = [record for record in table.declared(records) if (record["table"], record["scale"]) == (PHOTOGRAPHS,) * 2]
    table.require_one_protocol([record for record in here if not rows.find(record["row"]).tunes], "these records")
    return here


def photographs(records: Sequence[dict[str, Any]], seeds: Sequence[int] | None = None) -> str:
    """Every row of the photographs, or those that declare `seeds`, at every number of epochs at which it was scored.

    Raises UserError if the scores are of several protocols.
    """
    chosen = _of_photographs(records)
    titles = [*METRICS.values(), "seeds", "training in TFLOP, teacher and encoder counted"]
    lines = [["network", "epochs", "Fréchet distance", *titles]]
    for row in (row for row in rows.of_table(PHOTOGRAPHS) if not row.tunes and seeds in (None, row.seeds)):
        for epochs, scored in table.by_epochs(chosen, row.name).items():
            scores = [score for _, score in scored]
            lines.append(
                [
                    SETTINGS[row.key].title,
                    f"{epochs:g}",
                    spread([table.quality(score) for score in scores], 1),
                    *(spread([score["metrics"][name] for score in scores]) for name in METRICS),
                    table.counted(
                        {record["seed"] for record, _ in scored},
                        row.seeds,
                        table.failed(records, row.name, PHOTOGRAPHS),
                    ),
                    f"{table.training_flops(*scored[0]) / 1e12:.1f}",
                ]
            )
    return markdown(lines)


def compared(records: Sequence[dict[str, Any]]) -> str:
    """Every row that is sampled without guidance minus plain SiT of the same seeds, at equal steps and at equal FLOPs.

    At equal FLOPs plain SiT is read from its longer curve (`table.at_flops`); a cost beyond it leaves its cell empty.
    """
    chosen = _of_photographs(records)
    plain = {record["seed"]: record["scores"] for record in chosen if rows.find(record["row"]).key == "plain"}
    lines = [["network", "TFLOP", "minus plain SiT, equal steps", "minus plain SiT, equal FLOPs"]]
    for row in rows.of_table(PHOTOGRAPHS):
        if row.tunes or row.key == "plain" or SETTINGS[row.key].sampled:
            continue
        for epochs, scored in table.by_epochs(chosen, row.name).items():
            pairs = [(score, plain[record["seed"]]) for record, score in scored if record["seed"] in plain]
            if not pairs:
                continue
            cost, steps, flops = table.training_flops(*scored[0]), [], []
            for score, others in pairs:
                ours, curve = table.quality(score), {of["flops"]: table.quality(of) for of in others}
                steps += [ours - table.quality(of) for of in others if of["epochs"] == epochs]
                flops.append(ours - table.at_flops(curve, cost))
            gaps = [spread(some, 1, "+") if all(map(math.isfinite, some)) else "" for some in (steps, flops)]
            lines.append([SETTINGS[row.key].title, f"{cost / 1e12:.1f}", *gaps])
    return markdown(lines)


def trials(records: Sequence[dict[str, Any]]) -> str:
    """Every trial of a setting: what was tried, and its distance on each seed of `TUNING`."""
    chosen = _of_photographs(records)
    lines = [["network", "setting", *(f"Fréchet distance, seed {seed}" for seed in TUNING)]]
    for row in (row for row in rows.of_table(PHOTOGRAPHS) if row.tunes):
        here = {record["seed"]: record for record in chosen if record["row"] == row.name}
        distances = [f"{table.quality(here[seed]['scores'][0]):.1f}" if seed in here else "missing" for seed in TUNING]
        key, _, setting = row.key.partition("-trial-")
        lines.append([SETTINGS[key].title, f"{SETTINGS[key].tuned} {setting}", *distances])
    return markdown(lines)


def _claims(results: Path, name: str) -> list[list[str]]:
    """The findings of a set of claims."""
    chosen = claims.load(results)[name]
    return claims.cells(claims.test(record.load(results), chosen), chosen)


# Name of a table -> what makes it from the folder of results. The summary has the rows that ten seeds have.
BLOCKS: dict[str, Callable[[Path], str]] = {
    "photographs": lambda results: photographs(record.load(results)),
    "summary": lambda results: photographs(record.load(results), TEN),
    "compared": lambda results: compared(record.load(results)),
    "trials": lambda results: trials(record.load(results)),
    "claims_ten": lambda results: markdown(_claims(results, "photographs-ten")),
    "claims_five": lambda results: markdown(_claims(results, "photographs-five")),
    "claims_encoders": lambda results: markdown(_claims(results, "photographs-encoders")),
    "inside": lambda results: markdown(inside.summary(inside.load(results))),
    "quickstart": lambda results: markdown(measured.quickstart()),
    "floors": lambda results: markdown(measured.floors()),
    "steps": lambda results: markdown(measured.steps()),
    "muon": lambda results: markdown(measured.muon()),
    "internal": lambda results: markdown(measured.internal()),
}


def page(text: str, results: Path) -> str:
    """A page with its tables made anew from the folder of results. Raises UserError for a block of an unknown name."""

    def block(match: re.Match[str]) -> str:
        require(match[2] in BLOCKS, f"no table is called {match[2]}; there are {', '.join(BLOCKS)}")
        return match[1] + BLOCKS[match[2]](results) + match[4]

    return _BLOCK.sub(block, text)


def publish(root: Path, results: Path) -> list[Path]:
    """Rewrite the pages below `root` whose tables differ from the results; returns them."""
    changed = _renewed(root, results)
    for path, text in changed.items():
        with files.replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*changed]


def stale(root: Path, results: Path) -> list[Path]:
    """The pages below `root` whose tables differ from the results."""
    return [*_renewed(root, results)]


def _renewed(root: Path, results: Path) -> dict[Path, str]:
    """Each of those pages, with what it should be."""
    pages = [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.is_file()]
    texts = {path: path.read_text(encoding="utf-8") for path in pages}
    return {path: new for path, text in texts.items() if (new := page(text, results)) != text}


def require_current(results: Path) -> None:
    """Raise UserError if the ledger, or a page about these results, differs from the records."""
    if not record.folders(results):
        print(f"no record in {results}")
        return
    ledger = results / "ledger.csv"
    require(
        ledger.is_file() and ledger.read_text(encoding="utf-8") == record.ledger(results),
        f"{ledger} is not what the records say: run python -m recipes publish --results {results}",
    )
    if results.resolve() == Path("results").resolve():
        pages = ", ".join(map(str, stale(Path(), results)))
        require(not pages, f"the tables of {pages} are not what the records say: run python -m recipes publish")
