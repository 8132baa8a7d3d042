"""Tables that pages show, made from files: results and claims from the records, measurements from benchmarks/results.

README and the pages of docs/ mark the place: `<!-- results: NAME -->`, the table, `<!-- end -->`. `python -m recipes
publish` rewrites the table; `python -m recipes check` fails if it differs from the files.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from recipes import claims, inside, measured, record, rows, table
from runtime import files
from runtime.errors import require
from runtime.text import spread

_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

# Rows of the study in words.
TITLES = {
    "plain": "plain SiT",
    "stage1": "stage 1",
    "plain-teacher": "stage 2, plain teacher",
    "full": "stage 2",
    "omega-1": "stage 2, omega 1",
    "omega-10": "stage 2, omega 10",
    "young-teacher": "stage 2, teacher of 20 epochs",
    "late-stop": "stage 2, guided for 40 epochs",
    "stage1-block-n-3": "stage 1 at block n/3",
    "stage1-block-n-2": "stage 1 at block n/2",
}


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table of a page: the first column to the left, the others to the right."""
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "| --- |" + " ---: |" * (len(lines[0]) - 1), *text[1:]]) + "\n"


def study_table(records: Sequence[dict[str, Any]], keys: Collection[str] = tuple(TITLES)) -> str:
    """Every row of the study at every number of epochs at which it was scored.

    Raises UserError if the scores are of several protocols.
    """
    chosen = [record for record in table.declared(records) if (record["table"], record["scale"]) == ("study", "study")]
    table.require_one_protocol(chosen, "the study's records")
    lines = [["network", "epochs", "Fréchet distance", "class accuracy", "seeds", "training in TFLOP, teacher counted"]]
    for row in (row for row in rows.of_table("study") if row.name.split("/")[-1] in keys):
        for epochs, scored in table.by_epochs(chosen, row.name).items():
            scores = [score for _, score in scored]
            metrics = [score["metrics"] for score in scores]
            lines.append(
                [
                    TITLES[row.name.split("/")[-1]],
                    f"{epochs:g}",
                    spread([table.quality(score) for score in scores]),
                    spread([values["class_accuracy"] for values in metrics if "class_accuracy" in values]),
                    table.counted(
                        {record["seed"] for record, _ in scored},
                        row.seeds,
                        table.failed(records, row.name, "study"),
                    ),
                    f"{statistics.mean(score['flops'] for score in scores) / 1e12:.2f}",
                ]
            )
    return markdown(lines)


def _claims(results: Path, name: str) -> list[list[str]]:
    """The findings of a set of claims."""
    chosen = claims.load(results)[name]
    return claims.cells(claims.test(record.load(results), chosen), chosen)


# Name of a table -> what makes it from the folder of results. The summary has the rows of the paper's Table 4.
BLOCKS: dict[str, Callable[[Path], str]] = {
    "study": lambda results: study_table(record.load(results)),
    "summary": lambda results: study_table(record.load(results), ("plain", "stage1", "plain-teacher", "full")),
    "claims": lambda results: markdown(_claims(results, "study")),
    "inside": lambda results: markdown(inside.summary(inside.load(results))),
    "quickstart": lambda results: markdown(measured.quickstart()),
    "scenes": lambda results: markdown(measured.scenes()),
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
    changed = stale(root, results)
    for path in changed:
        text = page(path.read_text(encoding="utf-8"), results)
        with files.replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return changed


def stale(root: Path, results: Path) -> list[Path]:
    """The pages below `root` whose tables differ from the results."""
    pages = [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.is_file()]
    return [path for path in pages if page(text := path.read_text(encoding="utf-8"), results) != text]


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
