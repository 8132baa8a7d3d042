"""Chains as jobs for Slurm: a script a job, and submit.sh, which submits each after those that make what it needs.

A latent set, an encoder, a teacher and a trunk are jobs of their own, since several rows and seeds share them. The rest
of a row is one job. What differs by seed is an array. Every job continues where it was stopped.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from recipes import chain
from recipes.chain import Link
from recipes.row import Row
from recipes.scale import Scale
from runtime import files
from runtime.errors import require
from runtime.options import option

# The links that become jobs of their own, in the order in which they need each other.
SHARED = ("latents", "encoder", "teacher", "trunk")
SUBMIT = "submit.sh"


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Options of the jobs."""

    slurm: str | None = option(
        None, help="write sbatch files and submit.sh into this folder instead of running", heading="Slurm"
    )
    hours: float = option(24.0, help="time limit of a job: a minute to a year", within="[0.0166, 8760]")
    partition: str | None = option(None, help="partition")
    account: str | None = option(None, help="account")
    cpus: int = option(8, help="CPU cores for each process", within="[1, inf)")
    environment: str = option("", help="shell line that a job runs first, such as 'source .venv/bin/activate'")

    def __post_init__(self) -> None:
        given = [opt.name for opt in fields(self) if getattr(self, opt.name) != opt.default]
        require(self.slurm is not None or not given, f"--{''.join(given[:1])} is an option of jobs: add --slurm FOLDER")


@dataclass
class Job:
    """One script."""

    name: str
    row: str
    # The last link that it makes; None for all, and the record.
    until: str | None
    # Whether it is an array over seeds; else the first seed stands for all.
    array: bool
    # Jobs that must have succeeded, and jobs that write into the same folder and must have ended.
    needs: list[Job] = field(default_factory=list)
    follows: list[Job] = field(default_factory=list)

    def dependency(self, number: dict[str, int]) -> str:
        """The option of sbatch; `number` is that of the variable of each job in submit.sh."""
        conditions = [
            f"{'aftercorr' if self.array and other.array else 'afterok'}:$job{number[other.name]}"
            for other in self.needs
        ]
        conditions += [f"afterany:$job{number[other.name]}" for other in self.follows if other not in self.needs]
        return f"--dependency={','.join(conditions)} " if conditions else ""


def plan(rows: Sequence[Row], size: Scale, seeds: range, work: Path) -> list[Job]:
    """The jobs of `rows` under `seeds`, each after those that it needs. What is done for all seeds gets no job."""
    jobs: dict[Path, Job] = {}  # by what they make
    last: dict[Path, Job] = {}  # that writes into a folder
    shared = [(row, place) for row in rows for place in _shared(row, size, seeds, work)]
    # shorter runs first, since a longer one of the same folder continues them
    for row, (link, array, before) in sorted(shared, key=lambda entry: _order(entry[1][0])):
        if link.makes not in jobs:
            until = link.name.split()[0]
            jobs[link.makes] = job = Job(f"{until}-{link.folder.name}", row.name, until, array)
            job.needs = [jobs[other.makes] for other in before]
            job.follows = [last[link.folder]] if link.folder in last else []
            last[link.folder] = job
    made = list(jobs.values())
    for row in rows:
        run = chain.build(row, size, seeds.start, work).run
        job = Job(row.name.replace("/", "-"), row.name, None, True)
        job.needs = [jobs[link.makes] for link, *_ in _shared(row, size, seeds, work)]
        job.follows = [last[run]] if run in last else []
        last[run] = job
        made.append(job)
    for number, job in enumerate(made, start=1):
        job.name = f"{number:02d}-{job.name}"
    return made


def _shared(row: Row, size: Scale, seeds: range, work: Path) -> Iterator[tuple[Link, bool, list[Link]]]:
    """The shared links that are left of a row, whether they differ by seed, and those before each in the chain."""
    plans = [chain.build(row, size, seed, work) for seed in (*seeds, seeds.stop)]
    before: list[Link] = []
    for links in zip(*(plan.links for plan in plans), strict=True):
        if links[0].name.split()[0] in SHARED and not all(link.done for link in links[:-1]):
            yield links[0], links[0].makes != links[-1].makes, list(before)
            before.append(links[0])


def _order(link: Link) -> tuple[int, str]:
    """Where a shared link stands among the jobs: its kind, then its step."""
    return SHARED.index(link.name.split()[0]), link.makes.parent.name


def script(job: Job, words: Sequence[str], options: Slurm, *, seeds: range, nodes: int, gpus: int, logs: str) -> str:
    """The text of an sbatch file that runs `job`; `words` are further options of `python -m recipes run`.

    Slurm sends SIGUSR1 ten minutes before the time is over. The run then saves and exits with code 75, and the script
    queues it again; the chain continues from there.
    """
    minutes = round(options.hours * 60)
    head = {
        "job-name": job.name,
        "array": f"{seeds.start}-{seeds.stop - 1}" if job.array else None,
        "partition": options.partition,
        "account": options.account,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": gpus,
        "cpus-per-task": gpus * options.cpus,
        "time": f"{minutes // 60:02d}:{minutes % 60:02d}:00",
        "signal": "B:USR1@600",
        "open-mode": "append",
        "output": f"{logs}/%x-%j.out",
    }
    lines = "\n".join(
        f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in head.items() if value is not None
    )
    until = ["--until", job.until] if job.until else []
    command = shlex.join(["python", "-m", "recipes", "run", job.row, *until, *words])
    seed = '"$SLURM_ARRAY_TASK_ID"' if job.array else seeds.start
    return f"""#!/bin/bash
{lines}
#SBATCH --requeue

{options.environment}
set -u
export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

{command} --seeds {seed} &
chain=$!
trap 'kill -USR1 $chain' USR1
wait $chain; code=$?
[ $code -gt 128 ] && {{ wait $chain; code=$?; }}   # the signal cut the first wait short
if [ $code -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $code
"""


def write(jobs: Sequence[Job], scripts: Sequence[str], folder: Path) -> None:
    """Write the `scripts` of `jobs` and submit.sh into `folder`, in place of those that were there."""
    number = {job.name: count for count, job in enumerate(jobs, start=1)}
    with files.replacing(folder, ours=lambda path: (path / SUBMIT).is_file()) as made:
        made.mkdir()
        for job, text in zip(jobs, scripts, strict=True):
            (made / f"{job.name}.sh").write_text(text, encoding="utf-8")
        lines = [
            "#!/bin/bash",
            "# Submits the jobs of this folder, each after those that make what it needs.",
            "set -e",
            f"cd {shlex.quote(str(Path.cwd()))}",
            'submit() { local id; id=$(sbatch --parsable --kill-on-invalid-dep=yes "$@"); echo "${id%%;*}"; }',
            *(
                f"job{number[job.name]}=$(submit {job.dependency(number)}{shlex.quote(f'{folder}/{job.name}.sh')})"
                for job in jobs
            ),
            f"echo submitted: {' '.join(f'$job{count}' for count in number.values())}",
        ]
        (made / SUBMIT).write_text("\n".join(lines) + "\n", encoding="utf-8")
