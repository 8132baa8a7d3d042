"""The experiments of the paper: each row one command, a record for every number, a verdict.

    python -m recipes list [table1]            rows, their published numbers and records
    python -m recipes show ROW                 the exact chain of commands, FLOPs, hours at a measured rate, disk
    python -m recipes run ROW --seeds 0:3      runs what is left of the chain and writes a record
    python -m recipes run study --scale study --seeds 0:5    every row of a table that has no record yet
    python -m recipes cost [table1 | ROW ...]  FLOPs and hours that are still to run, shared runs counted once
    python -m recipes table 1                  published | ours | difference | verdict
    python -m recipes table study --scale study --target 5    ... and the epochs that each row took to that distance
    python -m recipes claims --scale study     what the paper says, each with a paired test over seeds
    python -m recipes inside --scale study --seeds 0:5    class and ink in the features of the study's networks
    python -m recipes publish                  puts the study's tables into README.md and docs/study.md
    python -m recipes figure 4                 the curves of a figure, as PNG and SVG
    python -m recipes check [RECORD ...]       recomputes and verifies what records state (default: all)

`--scale study` runs the same chain on scenes, `--scale tiny` on the embedded digits. `run ROW --slurm [--nodes 2]` prints an
sbatch file instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes import chain, costs, rows, scale
from runtime import errors
from runtime.errors import UserError, nearest, require
from runtime.options import option, read
from runtime.text import aligned


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of all subcommands."""

    scale: str = option(
        "paper",
        choices=tuple(scale.SCALES),
        help="the paper's size; study: scenes, some minutes a row; or tiny: the digits, a few steps",
    )
    seeds: str = option("0", help="one seed, or FIRST:END (0:5 is 0 to 4)")
    work: str = option("work", help="folder of data, runs and samples")
    results: str = option("results", help="folder of records, ledger, tables and figures")
    processes: int | None = option(None, help="processes per node (default: 8 at the paper's scale, else 1)")
    nodes: int = option(1, help="nodes")
    images_per_second: float | None = option(None, help="a measured rate of the training command, for the hours (show)")
    target: float | None = option(None, help="a Frechet distance: print the epochs that each row took to it (table)")
    teraflops: float = option(
        costs.TERAFLOPS, help="what a GPU sustains, for hours (cost; default: 40 percent of an H100)"
    )
    slurm: bool = option(False, help="print an sbatch file instead of running")
    hours: float = option(24.0, help="time limit in the sbatch file")

    def __post_init__(self) -> None:
        require(
            self.nodes > 0 and (self.processes is None or self.processes > 0),
            "--nodes and --processes must be positive",
        )
        require(self.images_per_second is None or self.images_per_second > 0, "--images-per-second must be positive")
        require(self.teraflops > 0, "--teraflops must be positive")
        require(
            1 / 60 <= self.hours <= 8760, f"--hours {self.hours} must lie between a minute (0.02) and a year (8760)"
        )
        for flag, folder in (("--work", self.work), ("--results", self.results)):
            require(not Path(folder).exists() or Path(folder).is_dir(), f"{flag} {folder} is a file: give a folder")
        self.seed_range()

    def seed_range(self) -> range:
        """The seeds that --seeds names. Raises UserError where it names none."""
        first, _, end = self.seeds.partition(":")
        require(
            first.isdecimal()
            and (not end or end.isdecimal())
            and self.seeds.count(":") < 2
            and not self.seeds.endswith(":"),
            f"--seeds {self.seeds} is neither a seed nor FIRST:END; give one of them",
        )
        start, stop = int(first), int(end) if end else int(first) + 1
        require(
            start < stop <= min(start + 1000, 2**32),
            f"--seeds {self.seeds} holds no seed, more than 1,000, or one beyond 32 bits; "
            f"give FIRST:END with FIRST < END",
        )
        return range(start, stop)


def list_rows(names: Sequence[str], options: Options) -> None:
    """Rows with their published number and how many records they have."""
    from recipes import record

    records = record.load(Path(options.results))
    chosen = [row for name in (names or rows.TABLES) for row in rows.of_table(name)]
    lines = [["row", "published", "sampling", "records"]]
    for row in chosen:
        number = row.published.metrics["fid"] if row.published else None
        count = sum(entry["row"] == row.name for entry in records)
        lines.append([row.name, "" if number is None else f"{number:.2f}", " ".join(row.presets), str(count or "")])
    print(aligned(lines))


def show(names: Sequence[str], options: Options) -> None:
    """The chain of commands of each row and what it costs."""
    size = scale.find(options.scale)
    for row in [rows.find(name) for name in names]:
        for seed in options.seed_range():
            plan = chain.build(row, size, seed, Path(options.work))
            print(
                f"# {row.name}, {size.name}, seed {seed}",
                *plan.lines(options.processes or size.processes, options.nodes),
                sep="\n",
            )
        account, data = costs.training_cost(row, size), costs.sketch(row, size)
        total = costs.flops(row, size)
        print(
            f"# {total:.3g} FLOPs in all, {account.mean_ratio():.3f} of plain training per step"
            f"{', the teacher counted' if row.teacher else ''}; latents {data.bytes / 2**30:.1f} GiB on disk, each checkpoint "
            f"{16 * sum(part.parameters for part in account.parts if part.trained) / 2**30:.1f} GiB"
        )
        if options.images_per_second:
            slow, fast = account.hours(options.images_per_second)
            print(
                f"# {slow:.1f} hours of training at {options.images_per_second:g} images per second, or {fast:.1f} if the rate grows as "
                f"the FLOPs fall"
            )
        else:
            print("# hours: unmeasured here; give --images-per-second as printed by such a run")


def print_costs(names: Sequence[str], options: Options) -> None:
    """What each table, or each row, still takes for one seed: rows without a finished record, what they share counted once."""
    from recipes import record

    size = scale.find(options.scale)
    finished = {
        one["row"]
        for one in record.load(Path(options.results))
        if (one["scale"], one["status"]) == (size.name, "finished")
    }
    lines, everything = [["", "rows to run", "EFLOP", f"hours at {options.teraflops:g} TFLOP/s"]], []
    every = {name: rows.of_table(name) if name in rows.TABLES else [rows.find(name)] for name in names or rows.TABLES}
    for name, chosen in every.items():
        left = [row for row in chosen if row.name not in finished]
        everything += left
        lines.append([name, str(len(left)), *_sizes(costs.outstanding(left, size), options.teraflops)])
    lines.append(["together", str(len(everything)), *_sizes(costs.outstanding(everything, size), options.teraflops)])
    print(aligned(lines))


def _sizes(flops: float, teraflops: float) -> list[str]:
    return [
        f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in (flops / 1e18, flops / teraflops / 1e12 / 3600)
    ]


def run(names: Sequence[str], options: Options) -> None:
    """Run each row under each seed, or print the job that would; the rows of a whole table that have a record are left out."""
    from recipes import record, runner, slurm

    size, results = scale.find(options.scale), Path(options.results)
    chosen = [row for name in names for row in (rows.of_table(name) if name in rows.TABLES else [rows.find(name)])]
    if options.slurm:
        for row in chosen:
            print(
                slurm.script(
                    row.name,
                    size.name,
                    options.seed_range(),
                    options.nodes,
                    options.processes or size.processes,
                    options.hours,
                    options.work,
                    options.results,
                ),
                end="",
            )
        return
    for seed in options.seed_range():  # seeds outermost, so that what is finished can be compared
        for row in chosen:
            finished = [
                one["folder"]
                for one in record.load(results)
                if (one["row"], one["scale"], one["seed"], one["status"]) == (row.name, size.name, seed, "finished")
            ]
            if finished and row.name not in names:
                print(f"recorded already: {results / 'records' / finished[-1]}", flush=True)
                continue
            folder = runner.run(
                row, size, seed, Path(options.work), results, options.processes or size.processes, options.nodes
            )
            print(f"record: {folder}", flush=True)


def print_table(names: Sequence[str], options: Options) -> None:
    """Tables of the paper with verdicts."""
    from recipes import record, table

    for chosen in [rows.of_table(f"table{name}" if name.isdecimal() else name) for name in names]:
        records = record.load(Path(options.results))
        print(table.render(chosen, records, options.scale))
        if options.target is not None:
            print("\n" + table.epochs_to(chosen, records, options.scale, options.target))


def print_claims(names: Sequence[str], options: Options) -> None:
    """The paper's claims, tested on the records of the study's rows."""
    from recipes import claims, record

    findings = claims.test(record.load(Path(options.results)), options.scale)
    require(
        any(one.differences for one in findings),
        f"no two rows of the study have records of one seed at scale {options.scale}: "
        f"python -m recipes run study --scale study --seeds 0:5, then claims --scale study",
    )
    print(claims.report(findings))


def look_inside(names: Sequence[str], options: Options) -> None:
    """Probe the study's networks under each seed."""
    from recipes import inside

    for seed in options.seed_range():
        print(
            f"probed: {inside.probe(scale.find(options.scale), seed, Path(options.work), Path(options.results))}",
            flush=True,
        )
    print(aligned(inside.summary(inside.load(Path(options.results), options.scale))))


def write_pages(names: Sequence[str], options: Options) -> None:
    """Put the tables of the records into README and docs, and their numbers into the ledger."""
    from recipes import publish, record

    if record.folders(Path(options.results)):
        record.write_ledger(Path(options.results))
    for path in publish.publish(Path(), Path(options.results)) or ["nothing: the pages here are what the records say"]:
        print(f"wrote {path}")


def draw_figure(names: Sequence[str], options: Options) -> None:
    """Figures of the paper from records."""
    from recipes import figure

    for name in names:
        for path in figure.draw(f"figure{name}" if name.isdecimal() else name, options.scale, Path(options.results)):
            print(f"wrote {path}")


def check(names: Sequence[str], options: Options) -> None:
    """Recompute what records say of themselves; the first fault of each is named."""
    from recipes import publish, record

    results = Path(options.results)
    folders = [Path(name) for name in names] or record.folders(results)
    faults = {folder: record.check(folder) for folder in folders}
    for folder, found in faults.items():
        print(f"{folder.name}: {'; '.join(found) or 'holds'}")
    wrong = [folder.name for folder, found in faults.items() if found]
    require(
        not wrong,
        f"{len(wrong)} of {len(folders)} records failed the check: {', '.join(wrong[:3])}; restore them, or remove them",
    )
    if names:
        return
    if not folders:
        print(f"no record in {results}")
    else:
        ledger = results / "ledger.csv"
        require(
            ledger.is_file() and ledger.read_text(encoding="utf-8") == record.ledger(results),
            f"{ledger} is not what the records say: run python -m recipes publish --results {results}",
        )
    if results.resolve() == Path("results").resolve():  # the records that the pages are about
        stale = publish.stale(Path(), results)
        require(
            not stale,
            f"the tables of {', '.join(map(str, stale))} are not what the records say: run python -m recipes publish",
        )


NONE, ANY, SOME = range(3)
COMMANDS: dict[str, tuple[Callable[[Sequence[str], Options], None], int]] = {
    "list": (list_rows, ANY),
    "show": (show, SOME),
    "run": (run, SOME),
    "table": (print_table, SOME),
    "figure": (draw_figure, SOME),
    "cost": (print_costs, ANY),
    "claims": (print_claims, NONE),
    "inside": (look_inside, NONE),
    "publish": (write_pages, NONE),
    "check": (check, ANY),
}
"""Subcommand -> what it does, and whether it takes names: none, any number of them, or at least one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-"):
        read(Options, words or ["--help"], prog="python -m recipes", description=__doc__)
        raise UserError(f"say what to do: {', '.join(COMMANDS)}")
    if words[0] not in COMMANDS:
        raise UserError(
            f"python -m recipes has no {words[0]}{nearest(words[0], COMMANDS)}; there are {', '.join(COMMANDS)}"
        )
    action, takes = COMMANDS[words[0]]
    flags = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    names = words[1:flags]
    options = read(Options, words[flags:], prog=f"python -m recipes {words[0]}", description=__doc__)
    require(
        bool(names) or takes != SOME,
        f"python -m recipes {words[0]} needs a name; choose one that python -m recipes list shows",
    )
    require(not names or takes != NONE, f"python -m recipes {words[0]} takes no name: leave out {' '.join(names)}")
    action(names, options)


if __name__ == "__main__":
    errors.run(main)
