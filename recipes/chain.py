"""From a row to the commands that make its numbers: data, teacher, training, samples and scores, each with what it leaves behind.

A link is done when what it makes is there, so that a chain that was cut short goes on where it was; what several rows need
(a latent set, a stage-1 run, a plain run) has one name, a digest of its command, and is made once.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.rows import ENCODED, Row
from recipes.scale import Scale


@dataclass(frozen=True)
class Link:
    """One command."""

    name: str
    words: tuple[str, ...]
    """Without interpreter and launcher: `train.py --data-dir ...` or `-m evaluations.reference ...`."""
    makes: Path
    """A file or folder that is there when it is done."""
    many: bool
    """Whether the launcher starts it on all devices."""

    @property
    def done(self) -> bool:
        return self.makes.exists()

    def command(self, processes: int = 1, nodes: int = 1) -> str:
        """What to type."""
        launcher = ["python"]
        if self.many and processes > 1:
            launcher = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes * nodes)]
            if nodes > 1:
                launcher += [
                    "--num_machines",
                    str(nodes),
                    "--machine_rank",
                    "$SLURM_NODEID",
                    "--main_process_ip",
                    "$MAIN_ADDRESS",
                    "--main_process_port",
                    "29500",
                ]
        return " ".join([*launcher, *(word if word.startswith("$") else shlex.quote(word) for word in self.words)])


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
    teacher: tuple[Path, int] | None
    """The teacher's run and its step."""

    def lines(self, processes: int, nodes: int = 1) -> list[str]:
        """Every link as a comment with its name and the command to type."""
        return [
            f"# {link.name}{' (done)' if link.done else ''}\n{link.command(processes, nodes)}" for link in self.links
        ]


def build(row: Row, scale: Scale, seed: int, work: Path) -> Chain:
    """The chain of `row`; everything lies in the folder `work`."""
    data = work / "data" / scale.data(row)
    links = [Link("latents", scale.data_words(scale.data(row), data), data / "manifest.json", scale.name == "paper")]
    if scale.encoder_command and row.encoded:
        encoder = work / "encoder"
        links.append(Link("encoder", (*scale.encoder_command, "--out", str(encoder)), encoder / "accuracy.json", False))
    teacher = None
    if row.teacher is not None:
        training, run, step = _training(row.of_teacher(), scale, seed, work, data, None)
        training = replace(training, name=f"teacher ({row.teacher.method}, {row.teacher.epochs:g} epochs)")
        links.append(training)
        teacher = (run, step)
    training, run, step = _training(row, scale, seed, work, data, teacher)
    if row.trunk is not None:
        trunk, trunk_run, _ = _training(
            replace(row, trunk=None, stop=0, epochs=max(80, row.epochs)), scale, seed, work, data, teacher
        )
        links.append(trunk)
        at = scale.steps(row, row.trunk)
        training = replace(training, words=(*training.words, "--branch-from", f"{trunk_run}@{at}"))
    links.append(training)
    scores = []
    for epochs in row.at or (row.epochs,):
        for preset, preset_words in scale.presets(row):
            point = scale.steps(row, epochs)
            out = run / "scores" / f"{preset}-{point:07d}"
            words = (
                "generate.py",
                "--ckpt",
                f"{run}@{point}",
                *preset_words,
                *scale.score_words(row, work),
                "--seed",
                str(seed),
                "--out",
                str(out),
            )
            scores.append(
                Score(
                    preset,
                    epochs,
                    point,
                    Link(
                        f"score {preset}" + (f" at step {point}" if row.at else ""), words, out / "metrics.json", True
                    ),
                )
            )
    return Chain(row, [*links, *(score.link for score in scores)], run, step, scores, teacher)


def _training(
    row: Row, scale: Scale, seed: int, work: Path, data: Path, teacher: tuple[Path, int] | None
) -> tuple[Link, Path, int]:
    """The training link of a row, the run's folder, and its last step."""
    steps = scale.steps(row, row.epochs)
    words = [*scale.train_words(row), "--data-dir", str(data), "--seed", str(seed), *scale.row_words(row)]
    if row.method not in ("none", "guided"):
        words += ["--align", row.method, *(scale.encoder_words(work) if row.method in ENCODED else ())]
        words += ["--preset", "paper"] if row.method in ("dispersive", "layersync") else []
    if teacher is not None:
        words += ["--guiding-ckpt", f"{teacher[0]}@{teacher[1]}"]
    if row.stop is not None:
        words += ["--align-stop-steps", str(scale.steps(row, row.stop) if row.stop else 0)]
    else:
        words += scale.stop_words(row)
    program = "train_guide.py" if row.method == "guided" else "train.py"
    # a run is named by all that its first steps depend on, so that rows of other lengths share it
    digest = hashlib.sha256(shlex.join([program, *words, str(row.trunk)]).encode()).hexdigest()[:8]
    name = f"{row.method}-{scale.model(row).replace('/', '-')}-{digest}"
    exps = work / "exps" / f"seed{seed}"
    words += [
        "--output-dir",
        str(exps),
        "--exp-name",
        name,
        "--max-train-steps",
        str(steps),
        "--checkpointing-steps",
        str(scale.checkpointing_steps(row)),
    ]
    run = exps / name
    return Link("train", (program, *words), run / "checkpoints" / f"{steps:07d}" / "config.json", True), run, steps
