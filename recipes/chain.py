"""From a row to the commands that make its numbers: data, teacher, training, samples and scores, each with its output.

A link is done when its output exists, so that an interrupted chain continues where it was. Whatever several rows need
(a latent set, a stage-1 run, a plain run) has one name, a digest of its command, and is made once.
"""

from __future__ import annotations

import hashlib
import itertools
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.row import ENCODED, PRESET, Row
from recipes.scale import Scale
from runtime.errors import require

# The work folder in what is written down.
WORK = Path("work")


@dataclass(frozen=True)
class Link:
    """One command."""

    name: str
    # Without interpreter and launcher: `train.py --data-dir ...` or `-m evaluations.reference ...`.
    words: tuple[str, ...]
    # What it writes into: one chain at a time.
    folder: Path
    # A file there that exists once it is done.
    makes: Path
    # Whether the launcher starts it on all devices.
    many: bool

    @property
    def done(self) -> bool:
        return self.makes.exists()

    def command(self, processes: int = 1, nodes: int = 1) -> str:
        """What a user types."""
        launcher = "python"
        if self.many and processes > 1:
            launcher = f"accelerate launch --multi_gpu --num_processes {processes * nodes}"
            if nodes > 1:
                launcher += (
                    f" --num_machines {nodes} --machine_rank $SLURM_NODEID"
                    " --main_process_ip $MAIN_ADDRESS --main_process_port 29500"
                )
        return f"{launcher} {shlex.join(self.words)}"


@dataclass(frozen=True)
class Score:
    """Where one number of a row comes from."""

    preset: str
    epochs: float
    step: int
    link: Link


@dataclass(frozen=True)
class Chain:
    """The links of a row under one seed, in order, and the scores among them."""

    row: Row
    links: list[Link]
    run: Path
    step: int
    scores: list[Score]
    # The teacher's run and its step.
    teacher: tuple[Path, int] | None

    def up_to(self, until: str | None) -> list[Link]:
        """The links up to the last whose name begins with `until`, or all. Raises UserError if no name does."""
        last = [number for number, link in enumerate(self.links, 1) if link.name.startswith(until or "")]
        names = ", ".join(dict.fromkeys(link.name.split()[0] for link in self.links))
        require(bool(last), f"--until {until}: the chain of {self.row.name} has {names}; choose among them")
        return self.links[: last[-1]]


def in_place(text: str, work: Path) -> str:
    """A path in the folder `work` as if that were `WORK`; any other text unchanged."""
    return str(WORK) + text.removeprefix(str(work)) if text.startswith(f"{work}/") else text


def build(row: Row, scale: Scale, seed: int, work: Path) -> Chain:
    """The chain of `row`; everything lies in the folder `work`."""
    data = work / "data" / scale.data(row)
    options = " ".join(scale.extras[extra] for extra in row.extras if extra in scale.extras)
    encode = scale.fill(f"{scale.encode[row.family]} {options}", row, work)
    links = [
        Link(name, (*scale.fill(words, row, work), "--out", str(work / out)), work / out, work / makes, False)
        for name, words, out, makes in scale.first
    ]
    links.append(Link("latents", (*encode, "--out", str(data)), data, data / "manifest.json", scale.processes > 1))
    if scale.encoder_command and row.encoded:
        encoder = work / "encoder"
        words = (*scale.encoder_command.split(), "--out", str(encoder))
        links.append(Link("encoder", words, encoder, encoder / "accuracy.json", False))
    teacher = None
    if row.teacher is not None:
        guiding = row.of_teacher()
        link = _training(guiding, scale, seed, work)
        links.append(replace(link, name=f"teacher ({row.teacher.method}, {row.teacher.epochs:g} epochs)"))
        teacher = (link.folder, scale.steps(guiding, guiding.epochs))
    # a run that stops its alignment early branches from one that many rows share
    branch: tuple[str, ...] = ()
    if row.trunk is not None:
        link = _training(replace(row, trunk=None, stop=0, epochs=row.trunk), scale, seed, work, teacher)
        links.append(replace(link, name="trunk"))
        branch = ("--branch-from", f"{link.folder}@{scale.steps(row, row.trunk)}")
    run = _training(row, scale, seed, work, teacher).folder
    scores = _scores(row, scale, seed, work, run)
    # training pauses at each step that is scored, so that the curve grows with the run
    for epochs in sorted({*row.at, row.epochs}):
        link = _training(replace(row, epochs=epochs), scale, seed, work, teacher)
        links.append(replace(link, words=(*link.words, *branch)))
        links += [score.link for score in scores if score.epochs == epochs]
    return Chain(row, links, run, scale.steps(row, row.epochs), scores, teacher)


def _training(row: Row, scale: Scale, seed: int, work: Path, teacher: tuple[Path, int] | None = None) -> Link:
    """The training of a row; its folder is the run's.

    Rows that differ in length alone share a run, named by a digest of all other options.
    """
    steps = scale.steps(row, row.epochs)
    method = scale.methods.get(row.method, "")
    words = scale.fill(f"{scale.train[row.family]} {method}", row, work)
    words += ["--data-dir", str(work / "data" / scale.data(row)), "--seed", str(seed), *scale.row_words(row)]
    if row.method not in ("none", "guided"):
        words += ["--align", row.method]
    if row.method in ENCODED:
        words += scale.fill(scale.encoder, row, work)
    if row.method in PRESET:
        words += ["--preset", "paper"]
    if teacher is not None:
        words += ["--guiding-ckpt", f"{teacher[0]}@{teacher[1]}"]
    stop = row.stop if row.stop is not None or row.method != "guided" else scale.guided_epochs
    if stop is not None:
        # beside a second alignment the short flag would name both
        flag = "--guided-stop-steps" if row.method == "guided" and "--align" in row.words else "--align-stop-steps"
        words += [flag, str(scale.steps(row, stop) if stop else 0)]
    program = "train_guide.py" if row.method == "guided" else "train.py"
    # a run has the same name in every work folder, so that the commands of a record can be rebuilt anywhere
    normal = [in_place(word, work) for word in words]
    digest = hashlib.sha256(shlex.join([program, *normal, str(row.trunk)]).encode()).hexdigest()[:8]
    name = f"{row.method}-{scale.model(row).replace('/', '-')}-{digest}"
    runs = work / "exps" / f"seed{seed}"
    words += ["--output-dir", str(runs), "--exp-name", name, "--max-train-steps", str(steps)]
    words += ["--checkpointing-steps", str(scale.checkpointing_steps[row.family])]
    last = runs / name / "checkpoints" / f"{steps:07d}" / "config.json"
    return Link("train", (program, *words), runs / name, last, True)


def _scores(row: Row, scale: Scale, seed: int, work: Path, run: Path) -> list[Score]:
    """One score for each combination of epochs, sampling preset and further options of sampling.

    Raises UserError if a preset takes no further options, so that no combination is left.
    """
    scores = []
    for epochs, preset, more in itertools.product(
        row.at or (row.epochs,), [scale.preset] if scale.preset else row.presets, row.sampling
    ):
        sampler = scale.sample.get(preset, scale.sample[""])
        if more and "--preset" in sampler:  # a preset allows no further options
            continue
        name, step = f"{preset} {more}".strip(), scale.steps(row, epochs)
        out = run / "scores" / f"{name.replace(' --', '-').replace(' ', '-')}-{step:07d}"
        options = scale.fill(f"{sampler} {more} {scale.score}", row, work, preset) + scale.extra_words()
        words = (*scale.sampler.split(), "--ckpt", f"{run}@{step}", *options, "--seed", str(seed), "--out", str(out))
        title = f"score {name}" + (f" at step {step}" if row.at else "")
        scores.append(Score(name, epochs, step, Link(title, words, out, out / "metrics.json", True)))
    require(
        bool(scores),
        f"{row.name} is sampled with {' '.join(row.sampling)}, and no preset of --scale {scale.name} takes further "
        f"options; choose another --scale",
    )
    return scores
