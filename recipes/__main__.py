"""The experiments of the paper: each row one command, a record for every number, a verdict.

    python -m recipes list [table1]            rows, their published numbers and records
    python -m recipes show ROW                 the exact chain of commands, FLOPs, hours at a measured rate, disk
    python -m recipes run ROW --seeds 0:3      runs what is left of the chain and writes a record
    python -m recipes run photographs --scale photographs --seeds 0:5    every row of a table that has no record yet
    python -m recipes run digits --scale digits --seeds 0:5    every method on the digits
    python -m recipes cost [table1 | ROW ...]  FLOPs and hours that are still to run, shared runs counted once
    python -m recipes table 1                  published | ours | difference | verdict
    python -m recipes table photographs --scale photographs --target 120    ... and the epochs to that distance
    python -m recipes claims --scale photographs     the paper's claims, each with a paired test over seeds
    python -m recipes inside --scale photographs --seeds 0:5    class and silhouette in the networks' features
    python -m recipes publish                  puts the tables into README.md and docs
    python -m recipes figure 4                 the curves of a figure, as PNG and SVG
    python -m recipes figure photographs --scale photographs     a table's distances against the cost of training
    python -m recipes check [RECORD ...]       recomputes and verifies what records state (default: all)
    python -m recipes replay RECORD            trains its first steps again and compares the losses

`--scale photographs` runs the same chain on photographs of clothes, `--scale digits` and `--scale tiny` on digits.
`run ROW --slurm FOLDER [--nodes 2]` writes jobs for Slurm instead. `python -m recipes run --help` lists the options of
`run`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from recipes import chain, claims, costs, figure, inside, publish, recompute, record, rows, runner, scale, slurm, table
from recipes.row import Row
from runtime import errors, files
from runtime.errors import nearest, require
from runtime.options import group, option, read
from runtime.text import aligned, quoted


@dataclass(frozen=True, kw_only=True)
class Results:
    """Options of `list`, `publish` and `check`."""

    results: str = option("results", help="folder of records, ledger, tables and figures")


@dataclass(frozen=True, kw_only=True)
class AtScale:
    """The option of everything that has a size."""

    scale: str = option(
        "paper",
        choices=tuple(scale.SCALES),
        help="the paper's size; photographs or digits: some minutes a row; tiny: digits, a few steps",
    )


@dataclass(frozen=True, kw_only=True)
class Records(AtScale, Results):
    """Options of `claims` and `figure`."""


@dataclass(frozen=True, kw_only=True)
class Table(Records):
    """Options of `table`."""

    target: float | None = option(None, help="a Frechet distance: print the epochs that each row took to it")


@dataclass(frozen=True, kw_only=True)
class Cost(Records):
    """Options of `cost`."""

    teraflops: float = option(
        costs.TERAFLOPS, help="what a GPU sustains, for hours (default: 40 percent of an H100)", within="(0, inf)"
    )


@dataclass(frozen=True, kw_only=True)
class Runs(AtScale):
    """Options of everything that has runs."""

    seeds: str = option("0", help="one seed, or FIRST:END (0:5 is 0 to 4)")
    work: str = option("work", help="folder of data, runs and samples")

    def seed_range(self) -> range:
        """The seeds that --seeds names. Raises UserError if it names none."""
        first, _, end = self.seeds.partition(":")
        require(
            first.isdecimal() and end.isdecimal() == (":" in self.seeds),
            f"--seeds {self.seeds} is neither a seed nor FIRST:END; give one of them",
        )
        start, stop = int(first), int(end) if end else int(first) + 1
        require(
            start < stop <= min(start + 1000, 2**32),
            f"--seeds {self.seeds} holds no seed, more than 1,000, or one beyond 32 bits; "
            f"give FIRST:END with FIRST < END",
        )
        return range(start, stop)


@dataclass(frozen=True, kw_only=True)
class Inside(Runs, Results):
    """Options of `inside`."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Options of `replay`."""

    work: str | None = option(
        None, help="folder of data and teachers, made there if missing (default: a temporary one)"
    )


@dataclass(frozen=True, kw_only=True)
class Launch(Runs):
    """Options of everything that starts processes."""

    processes: int | None = option(
        None, help="processes per node (default: 8 at the paper's scale, else 1)", within="[1, inf)"
    )
    nodes: int = option(1, help="nodes", within="[1, inf)")
    places: scale.Places = group(scale.Places)


@dataclass(frozen=True, kw_only=True)
class Show(Launch):
    """Options of `show`."""

    images_per_second: float | None = option(
        None, help="a measured rate of the training command, for the hours", within="(0, inf)"
    )


@dataclass(frozen=True, kw_only=True)
class Run(Launch, Results):
    """Options of `run`."""

    until: str | None = option(
        None, choices=(*slurm.SHARED, "train"), help="end after this part of the chain, without a record"
    )
    wait_hours: float = option(
        runner.PATIENCE, help="wait so long at most for another chain that makes what this one needs", within="[0, inf)"
    )
    rehearse: bool = option(False, help="open all that the chain reads, run two steps of every link, remove everything")
    batch_size: int | None = option(
        None, within="[1, inf)", help="with --rehearse: global batch of its trainings (default: the row's own)"
    )
    jobs: slurm.Slurm = group(slurm.Slurm)

    def __post_init__(self) -> None:
        require(self.rehearse or self.batch_size is None, "--batch-size changes a rehearsal: add --rehearse")
        require(
            (self.rehearse, self.until is not None, self.jobs.slurm is not None).count(True) < 2,
            "--rehearse, --until and --slurm are three uses of run: give one of them",
        )


def _rows(name: str) -> list[Row]:
    """The rows of a table, or the one row of this name."""
    return rows.of_table(name) if name in rows.TABLES else [rows.find(name)]


def list_rows(names: Sequence[str], options: Results) -> None:
    """List rows with their published number and the count of their records."""
    records = record.load(Path(options.results))
    lines = [["row", "published", "sampling", "records"]]
    for row in [row for name in (names or rows.TABLES) for row in rows.of_table(name)]:
        fid = row.published.metrics.get("fid") if row.published else None
        number = "" if fid is None else f"{fid:.2f}"
        count = sum(entry["row"] == row.name for entry in records)
        lines.append([row.name, number, " ".join(row.presets), str(count or "")])
    print(aligned(lines))


def show(names: Sequence[str], options: Show) -> None:
    """Print the chain of commands of each row and what it costs."""
    chosen = [rows.find(name) for name in names]
    size = scale.find(options.scale).at(options.places, chosen)
    for row in chosen:
        for seed in options.seed_range():
            plan = chain.build(row, size, seed, Path(options.work))
            print(f"# {row.name}, {size.name}, seed {seed}")
            if row.published is not None:
                print(f"# published: {row.published}")
            for link in plan.links:
                print(f"# {link.name}{' (done)' if link.done else ''}")
                print(link.command(options.processes or size.processes, options.nodes))
        print(costs.summary(row, size, options.images_per_second))


def print_costs(names: Sequence[str], options: Cost) -> None:
    """Print what each table or row still takes for one seed. Finished rows are left out, shared runs counted once."""
    size = scale.find(options.scale)
    finished = {entry["row"] for entry in record.finished(record.load(Path(options.results)), scale=size.name)}
    left = {name: [row for row in _rows(name) if row.name not in finished] for name in names or rows.PAPER}
    left["together"] = [row for chosen in left.values() for row in chosen]
    lines = [["", "rows to run", "EFLOP", f"hours at {options.teraflops:g} TFLOP/s"]]
    for name, chosen in left.items():
        flops = costs.outstanding(chosen, size)
        sizes = (flops / 1e18, flops / options.teraflops / 1e12 / 3600)
        lines.append([name, str(len(chosen)), *(f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in sizes)])
    print(aligned(lines))


def run(names: Sequence[str], options: Run) -> None:
    """Run each row under each seed, or write the jobs that would.

    Of a whole table, rows with a record are left out, and seeds that a row does not declare.
    """
    chosen = list(dict.fromkeys(row for name in names for row in _rows(name)))
    size = scale.find(options.scale).at(options.places, chosen)
    work, results = Path(options.work), Path(options.results)
    seeds, processes = options.seed_range(), options.processes or size.processes
    if options.jobs.slurm is not None:
        _write_jobs(chosen, size, options, processes)
        return
    if options.rehearse:
        for row in chosen:
            from recipes import rehearsal

            rehearsal.rehearse(row, size, seeds.start, work, processes, options.nodes, options.batch_size)
        return
    # seeds are the outer loop, so that finished rows can be compared early
    wanted = [(seed, row) for seed in seeds for row in chosen if row.name in names or seed in row.seeds]
    require(
        bool(wanted), f"no row of {', '.join(names)} has a seed of {options.seeds}: name a row to run it all the same"
    )
    for seed, row in wanted:
        done = record.finished(record.load(results), row=row.name, scale=size.name, seed=seed)
        if done and row.name not in names:
            print(f"recorded already: {quoted(results / 'records' / done[-1]['folder'])}", flush=True)
        else:
            folder = runner.run(
                row,
                size,
                seed,
                work,
                results,
                processes,
                options.nodes,
                until=options.until,
                patience=options.wait_hours,
            )
            print(f"record: {quoted(folder)}" if folder else f"{options.until}: done", flush=True)


def _write_jobs(chosen: Sequence[Row], size: scale.Scale, options: Run, processes: int) -> None:
    """Write the jobs of the rows, and the folder of their logs."""
    seeds, folder, logs = options.seed_range(), Path(str(options.jobs.slurm)), Path(options.work) / "logs"
    words = ["--scale", size.name, "--processes", str(processes), "--nodes", str(options.nodes)]
    words += ["--wait-hours", f"{options.wait_hours:g}", "--work", options.work, "--results", options.results]
    jobs = slurm.plan(chosen, size, seeds, Path(options.work))
    with files.writing(logs):
        logs.mkdir(parents=True, exist_ok=True)
    words += options.places.words()
    texts = [
        slurm.script(job, words, options.jobs, seeds=seeds, nodes=options.nodes, gpus=processes, logs=str(logs))
        for job in jobs
    ]
    slurm.write(jobs, texts, folder)
    print(f"wrote {len(jobs)} jobs into {quoted(folder)}: submit them with bash {quoted(folder / slurm.SUBMIT)}")


def print_table(names: Sequence[str], options: Table) -> None:
    """Print tables of the paper with verdicts."""
    records = record.load(Path(options.results))
    for chosen in [rows.of_table(f"table{name}" if name.isdecimal() else name) for name in names]:
        print(table.render(chosen, records, options.scale))
        if options.target is not None:
            print("\n" + table.epochs_to(chosen, records, options.scale, options.target))


def print_claims(names: Sequence[str], options: Records) -> None:
    """Test the claims at this scale on the records of their rows."""
    results = Path(options.results)
    records = record.load(results)
    sets = {name: chosen for name, chosen in claims.load(results).items() if chosen.scale == options.scale}
    require(
        bool(sets),
        f"no file in {results / 'claims'} has claims at scale {options.scale}: write one before the first run",
    )
    for name, chosen in sets.items():
        print(claims.summary(name, chosen))
        print(aligned(claims.cells(claims.test(records, chosen), chosen)))


def look_inside(names: Sequence[str], options: Inside) -> None:
    """Probe the photographs' networks under each seed."""
    size, results = scale.find(options.scale), Path(options.results)
    for seed in options.seed_range():
        print(f"probed: {inside.probe(size, seed, Path(options.work), results)}", flush=True)
    print(aligned(inside.summary(inside.load(results, size.name))))


def write_pages(names: Sequence[str], options: Results) -> None:
    """Put the tables of the records into README and docs, and their numbers into the ledger."""
    results = Path(options.results)
    if record.folders(results):
        record.write_ledger(results)
    for path in publish.publish(Path(), results):
        print(f"wrote {quoted(path)}")


def draw_figure(names: Sequence[str], options: Records) -> None:
    """Draw figures of the paper, or any table's distances against cost, from records."""
    for name in names:
        for path in figure.draw(f"figure{name}" if name.isdecimal() else name, options.scale, Path(options.results)):
            print(f"wrote {quoted(path)}")


def check(names: Sequence[str], options: Results) -> None:
    """Recompute what records say of themselves. Without names, compare records, ledger, claims and pages too."""
    results, wrong = Path(options.results), []
    folders = [Path(name) for name in names] or record.folders(results)
    for folder in folders:
        faults = record.check(folder)
        print(f"{folder.name}: {'; '.join(faults) or 'holds'}")
        wrong += [folder.name] if faults else []
    require(
        not wrong,
        f"{len(wrong)} of {len(folders)} records failed the check: {', '.join(wrong[:3])}; "
        "restore them, or remove them",
    )
    if not names:
        _check_together(results)


def _check_together(results: Path) -> None:
    """Compare the records with each other, with the claims about them, and with ledger and pages."""
    records = record.load(results)
    faults = [
        *recompute.between(record.finished(records), results),
        *rows.tuning_faults([*rows.rows().values()]),
        *claims.faults(results, records),
    ]
    require(not faults, f"the records contradict each other: {'; '.join(faults)}; restore them, or remove them")
    for line in table.not_complete(records):
        print(line)
    publish.require_current(results)


def replay_records(names: Sequence[str], options: Replay) -> None:
    """Train the first steps of records again."""
    from recipes import replay

    with ExitStack() as held:
        work = Path(options.work or held.enter_context(tempfile.TemporaryDirectory(prefix="replay-")))
        for name in names:
            print(replay.replay(Path(name), work), flush=True)


class Command(NamedTuple):
    """A subcommand."""

    action: Callable[[Sequence[str], Any], None]
    options: type[Any]
    # How many names it takes; some is at least one.
    names: Literal["none", "any", "some"] = "some"


COMMANDS = {
    "list": Command(list_rows, Results, "any"),
    "show": Command(show, Show),
    "run": Command(run, Run),
    "table": Command(print_table, Table),
    "figure": Command(draw_figure, Records),
    "cost": Command(print_costs, Cost, "any"),
    "claims": Command(print_claims, Records, "none"),
    "inside": Command(look_inside, Inside, "none"),
    "publish": Command(write_pages, Results, "none"),
    "check": Command(check, Results, "any"),
    "replay": Command(replay_records, Replay),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    require(
        words[0] in COMMANDS,
        f"python -m recipes has no {words[0]}{nearest(words[0], COMMANDS)}; there are {', '.join(COMMANDS)}",
    )
    command, prog = COMMANDS[words[0]], f"python -m recipes {words[0]}"
    # names come before the first flag, since a flag may take several values
    flags = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    names = words[1:flags]
    options = read(command.options, words[flags:], prog=prog, description=command.action.__doc__)
    for flag in ("work", "results"):
        folder = Path(getattr(options, flag, None) or "")
        require(not folder.exists() or folder.is_dir(), f"--{flag} {folder} is a file: give a folder")
    require(
        bool(names) or command.names != "some", f"{prog} needs a name; choose one that python -m recipes list shows"
    )
    require(not names or command.names != "none", f"{prog} takes no name: leave out {' '.join(names)}")
    command.action(names, options)


if __name__ == "__main__":
    errors.run(main)
