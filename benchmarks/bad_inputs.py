"""Bad inputs as one table: every command, its options and the files that it reads, each wrong in one way.

A row is answered with exit code 2 and one line that names the culprit and a remedy, and nothing is written. The rows of
options are made from the commands' own schemas, so that a new option has its rows at once.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment import find
from benchmarks import bad_files
from benchmarks.bad_world import MAINS, World
from config import TrainConfig
from evaluations import evaluate, fdr, figures, probe, reference, sweep
from generate import GenerateConfig
from models import convert, export, hub
from preprocessing import import_latents, job, scenes, verify
from recipes import __main__ as recipes
from runtime import errors
from runtime.options import flags_of, kind_of, options_of

SCHEMAS: dict[str, type] = {
    "train.py": TrainConfig,
    "generate.py": GenerateConfig,
    "encode": job.Options,
    "verify": verify.Options,
    "import_latents": import_latents.Options,
    "convert": convert.Options,
    "evaluate": evaluate.Options,
    "reference": reference.Options,
    "sweep": sweep.SweepConfig,
    "scenes": scenes.Options,
    "probe": probe.ProbeConfig,
    "fdr": fdr.Options,
    "hub": hub.Options,
    "export": export.Options,
    **{kind: schema for kind, (schema, _) in figures.KINDS.items()},
    "recipes run": recipes.Options,
}
REMEDY = re.compile(
    r"\b(use|give|choose|add|must|run|write|encode|restore|see|make|needs?|between|lie|drop|free|correct|remove|repair|"
    r"copy|get|build|did you mean|there are|at least|at most|count from|positive|pass|fetch|name|save|leave|wait|unpack|"
    r"known|convert|expected|install|raise|lower|takes|go together|accept|check|knows?|nothing to set|belong)\b"
)


BAR = re.compile(r"\d+%\||/s\]")  # of progress


@dataclass(frozen=True)
class Row:
    """One bad input: a command, words after those that work, and what its answer must name."""

    command: str
    name: str
    words: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    damage: Callable[[World, Path], tuple[list[str], list[str]]] | None = None
    """Makes damaged files below a folder; returns further words, and further names that the answer must hold."""


@dataclass(frozen=True)
class Answer:
    """What a command made of a row."""

    code: object
    lines: list[str]
    written: list[str]

    def fault(self, said: tuple[str, ...]) -> str | None:
        """What is wrong with it, None where nothing is."""
        text = " | ".join(self.lines)
        if self.code != 2 or len(self.lines) != 1:
            return f"exit {self.code}, {len(self.lines)} lines: {text[-300:]}"
        if missing := [word for word in said if word not in text]:
            return f"does not name {missing}: {text}"
        if not REMEDY.search(text):
            return f"no remedy: {text}"
        return f"wrote {self.written}" if self.written else None


def answer(row: Row, world: World, scratch: Path) -> tuple[Answer, tuple[str, ...]]:
    """Run a row in this process, through the one place that catches user errors."""
    more, names = row.damage(world, scratch) if row.damage else ([], [])
    argv = [*world.words(row.command), *row.words, *more]
    before, said = listing(world.root), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), ThreadPoolExecutor(1) as runner:
        end = runner.submit(
            errors.run, lambda: MAINS[row.command](argv)
        ).exception()  # whatever it is: that is the question
    code = end.code if isinstance(end, SystemExit) else end and f"{type(end).__name__}: {end}"
    return judged(code, said.getvalue(), before, world), (*row.said, *names)


def judged(code: object, said: str, before: set[str], world: World) -> Answer:
    """What a command that has ended made of a row; clears away what it wrote."""
    written = sorted(name for name in listing(world.root) - before if Path(name.split(" (")[0]).name not in BEGUN)
    if world.out.exists():
        shutil.rmtree(world.out)
    return Answer(code, [line for line in re.split(r"[\r\n]+", said) if line.strip() and not BAR.search(line)], written)


def listing(root: Path) -> set[str]:
    """Every file below `root` with its size."""
    return {f"{path.relative_to(root)} ({path.stat().st_size} bytes)" for path in root.rglob("*") if path.is_file()}


def rows() -> list[Row]:
    """The table."""
    table = [*_of_options(), *_by_hand(), *bad_files.rows(Row)]
    return list({(row.command, row.name): row for row in table}.values())


def _of_options() -> Iterator[Row]:
    """A value of the wrong kind for every option of every command, a number that is none, a misspelt flag."""
    schemas = [(command, "", opt) for command, schema in SCHEMAS.items() for opt in options_of(schema)]
    schemas += [("train_guide.py", "guided", opt) for opt in options_of(find("guided").Options)]
    for command, section, opt in schemas:
        flag = flags_of(opt.field, section)[0]
        kind, count = kind_of(opt.hint)
        for value in ["nonesuch"] if opt.field.metadata["choices"] else WRONG[kind]:
            words = (
                *(() if section in ("", "guided") else ("--align", section)),
                flag,
                *[value] * (count if type(count) is int else 1),
            )
            yield Row(command, f"{flag} {value!r}", words, (flag, value.encode("unicode_escape").decode()))
        if kind is not bool:
            yield Row(command, f"{flag} without a value", (flag,), (flag,))
        misspelt = f"{flag[:-1]}{'q' if flag[-1] != 'q' else 'x'}"
        yield Row(command, misspelt, (misspelt, "1"), (misspelt,))


WRONG = {int: ("many", "1.5", str(2**64)), float: ("much", "nan", "1e300"), str: ("", "\x07", "\udcff"), bool: ()}
"""Words that are no value of an option, by its kind."""


HAND: dict[str, list[tuple[str, ...]]] = {
    # flag, value(s); the answer names the flag
    "train.py": [
        ("--batch-size", "0"),
        ("--batch-size", "-4"),
        ("--batch-size", "4096"),
        ("--gradient-accumulation-steps", "0"),
        ("--gradient-accumulation-steps", "3"),
        ("--max-train-steps", "0"),
        ("--learning-rate", "0"),
        ("--learning-rate", "-1"),
        ("--adam-beta1", "1"),
        ("--adam-beta2", "-0.1"),
        ("--adam-epsilon", "0"),
        ("--adam-weight-decay", "-1"),
        ("--max-grad-norm", "-1"),
        ("--ema-decay", "1"),
        ("--ema-decay", "-1"),
        ("--cfg-prob", "1.5"),
        ("--cfg-prob", "-0.5"),
        ("--mixed-precision", "fp16"),
        ("--mixed-precision", "fp8"),
        ("--exp-name", ""),
        ("--exp-name", ".."),
        ("--exp-name", "../x"),
        ("--exp-name", "a/b"),
        ("--exp-name", "/abs"),
        ("--checkpointing-steps", "0"),
        ("--checkpointing-minutes", "-1"),
        ("--max-hours", "0"),
        ("--max-hours", "-2"),
        ("--timeout-minutes", "0"),
        ("--skip-steps", "5", "2"),
        ("--skip-steps", "0", "2"),
        ("--timeout-minutes", "1e9"),
        ("--skip-steps", "2", "3"),
        ("--ema-extra-decays", "1e-9"),
        ("--ema-extra-decays", "1"),
        ("--ema-extra-decays", "0.5", "0.5"),
        ("--features", "pixels"),
        ("--mind",),
        ("--eval-weights", "raw"),
        ("--eval-preset", "sit"),
        ("--time-sampling", "logit-normal", "--uniform-from-epoch", "-1"),
        ("--lr-scheduler", "cosine", "--lr-warmup-steps", "1"),
        ("--optimizer", "muon", "--adam-beta1", "1"),
        ("--grad-ratio-steps", "-1"),
        ("--lr-warmup-steps", "-1"),
        ("--align", "internal", "--align-depth", "99"),
        ("--align", "contrastive", "--align-weight", "-1"),
        ("--log-steps", "0"),
        ("--sampling-steps", "-1"),
        ("--eval-steps", "5"),
        ("--eval-steps", "-1"),
        ("--num-fid-samples", "2"),
        ("--images-per-second", "5"),
        ("--uniform-from-epoch", "3"),
        ("--model", "SiT-B/3"),
        ("--model", ""),
        ("--align", "latnt"),
        ("--align", "none", "latent"),
        ("--align", "latent", "latent"),
        ("--preset", "paper"),
        ("--recipe", "sitt"),
        ("--init-ckpt", "/nowhere"),
        ("--data-dir", "/nowhere"),
        ("--data-dir", "/dev/null"),
        ("--vae", "/nowhere", "--sampling-steps", "1"),
        ("--reference", "/nowhere", "--eval-steps", "1", "--features", "pixels"),
        ("--align-weight", "1"),
        ("--guide-scale", "30"),
        ("--align", "latent", "--align-interval", "0.5", "0.5"),
        ("--align", "latent", "--align-interval", "0.7", "0.4"),
        ("--align", "latent", "--align-interval", "-0.1", "0.4"),
        ("--align", "latent", "--align-weight", "-0.5"),
        ("--align", "latent", "--align-depth", "0"),
        ("--align", "latent", "--align-depth", "99"),
        ("--align", "latent", "--align-hidden", "0"),
        ("--align", "latent", "--latent-depth", "2", "--align-depth", "3"),
        ("--align", "latent", "--align-stop-steps", "-1"),
        ("--align", "latent", "--align-stop-epochs", "-1"),
        ("--align", "latent", "--align-stop-steps", "4", "--align-stop-epochs", "1"),
        ("--align", "latent", "--align-schedule", "cosine"),
        ("--align", "latent", "--align-mask", "upstream"),
        ("--align", "latent", "--preset", "papr"),
        ("--align", "sra", "--sra-tail-length", "0"),
        ("--align", "sra", "--align-depth", "0"),
        ("--align", "repa", "--align-encoder", "dinov9"),
        ("--align", "layersync", "--align-depth", "99"),
    ],
    "train_guide.py": [
        ("--guiding-ckpt", "/nowhere"),
        ("--guiding-depth", "0"),
        ("--guiding-depth", "7"),
        ("--guided-depth", "99"),
        ("--guide-scale", "-1"),
        ("--align-hidden", "-1"),
        ("--align-interval", "0.5", "0.5"),
        ("--guiding-ckpt", "/dev/null"),
    ],
    "generate.py": [
        ("--ckpt", "/nowhere"),
        ("--ckpt", "/dev/null"),
        ("--num-fid-samples", "0"),
        ("--num-fid-samples", "-1"),
        ("--num-steps", "1"),
        ("--num-steps", "-5"),
        ("--batch-size", "0"),
        ("--cfg-scale", "-1"),
        ("--guidance-low", "0.9", "--guidance-high", "0.1"),
        ("--guidance-high", "1.5"),
        ("--guidance-low", "-0.5"),
        ("--timestep-shift", "0"),
        ("--last-step", "0"),
        ("--last-step", "1"),
        ("--solver", "dopri5"),
        ("--mode", "sde", "--solver", "heun"),
        ("--mode", "sde", "--grid", "points"),
        ("--preset", "repa-cgf"),
        ("--preset", "repa-cfg"),
        ("--features", "pixels"),
        ("--mixed-precision", "fp16"),
        ("--vae", "/nowhere"),
        ("--reference", "/nowhere", "--features", "pixels"),
        ("--cfg-scale", "1e9"),
        ("--internal-scale", "-1"),
        ("--internal-scale", "2"),
        ("--internal-scale", "1e9"),
        ("--internal-low", "0.5"),
        ("--num-fid-samples", "9" * 18),
        ("--mind",),
        ("--num-steps", "9" * 18),
        ("--timestep-shift", "1e-9"),
        ("--weights", "best"),
        ("--per-class", "2"),
        ("--compare", "x"),
        ("--model", "SiT-B/2"),
        ("--out", "/dev/null/x"),
        ("--out", "a" * 300),
        ("--num-classes", "3"),
        ("--per-proc-batch-size", "3"),
    ],
    "encode": [
        ("--images", "/nowhere"),
        ("--images", "/dev/null"),
        ("--vae", "/nowhere"),
        ("--vae", "pixels", "--statistics", "x"),
        ("--grey",),
        ("--resolution", "0"),
        ("--resolution", "-16"),
        ("--resolution", "17"),
        ("--batch-size", "0"),
        ("--shard-size", "0"),
        ("--workers", "-1"),
        ("--skip-bad", "-1"),
        ("--out", "/dev/null/x"),
        ("--out", "b" * 300),
        ("--statistics", "/nowhere"),
    ],
    "import_latents": [
        ("--vae", "/nowhere"),
        ("--shard-size", "0"),
        ("--num-classes", "0"),
        ("--num-classes", "1"),
        ("--keep-images",),
        ("--num-classes", "9" * 18),
        ("--statistics", "x"),
        ("--out", "/dev/null/x"),
        ("--source", "/nowhere"),
        ("--source", "/dev/null"),
    ],
    "verify": [("--data-dir", "/nowhere"), ("--num-images", "-1"), ("--vae", "/nowhere", "--num-images", "2")],
    "convert": [
        ("--num-heads", "0"),
        ("--num-heads", "-2"),
        ("--num-heads", "7"),
        ("--source", "/nowhere"),
        ("--source", "/dev"),
        ("--vae", "/nowhere"),
        ("--vae", "pixels", "--statistics", "some"),
        ("--out", "/dev/null/x"),
        ("--out", "/"),
    ],
    "evaluate": [
        ("--samples", "/nowhere"),
        ("--reference", "/nowhere"),
        ("--features", "incepton"),
        ("--batch-size", "0"),
        ("--features", "timm:"),
        ("--inception-weights", "/nowhere", "--features", "inception"),
        ("--feature-weights", "/nowhere"),
        ("--samples", "/dev/null"),
        ("--out", "/dev/null/x"),
    ],
    "reference": [
        ("--images", "/nowhere"),
        ("--keep", "0"),
        ("--batch-size", "0"),
        ("--resolution", "0"),
        ("--workers", "-1"),
        ("--num-images", "0"),
        ("--out", "/dev/null/x.npz"),
        ("--features", "nothing"),
    ],
    "sweep": [
        ("--ckpt", "/nowhere"),
        ("--cfg-scale", "2:1:0.1"),
        ("--cfg-scale", "1:2:0"),
        ("--cfg-scale", "x"),
        ("--cfg-scale", "-1:1:0.5"),
        ("--cfg-scale", "1:2"),
        ("--guidance-high", "2"),
        ("--num-fid-samples", "2"),
        ("--num-steps", "1"),
        ("--reference", "/nowhere"),
        ("--cfg-scale", "nan"),
        ("--guidance-low", "0.9", "--guidance-high", "0.5"),
        ("--batch-size", "0"),
    ],
    "seal": [("--file", "/nowhere"), ("--file", "/dev/null"), ("--file", "/")],
    "digits": [("--out", "/dev/null/x")],
    "scenes": [
        ("--out", "/dev/null/x"),
        ("--count", "0"),
        ("--count", "9"),
        ("--resolution", "15"),
        ("--resolution", "6"),
        ("--digits", "3"),
        ("--classes", "1"),
        ("--classes", "11"),
        ("--colours", "2"),
        ("--gradient", "-1"),
        ("--jitter", "99"),
        ("--clutter", "9" * 18),
        ("--count", "9" * 18),
        ("--resolution", "9" * 18),
        ("--size", "1", "99"),
        ("--jitter", "-1"),
        ("--clutter", "-1"),
        ("--size", "1"),
        ("--size", "1", "0.5"),
        ("--size", "0", "1"),
    ],
    "probe": [
        *(
            LOOKED := [
                ("--ckpt", "/nowhere"),
                ("--data-dir", "/nowhere"),
                ("--blocks", "7"),
                ("--blocks", "0"),
                ("--t", "1.5"),
                ("--items", "0"),
                ("--items", "-3"),
                ("--batch-size", "0"),
                ("--features", "f"),
                ("--out", "/dev/null/x"),
            ]
        ),
        ("--items", "4"),
        ("--masks", "/nowhere"),
        ("--masks", "/dev/null"),
        ("--encoder", "dinov9"),
        ("--encoder-weights", "x"),
        ("--labels", "none"),
        ("--omega", "-1"),
        ("--weights", "best"),
    ],
    "pca": [
        *(DRAWN := [*LOOKED, ("--classes", "10"), ("--classes", "cat"), ("--omega", "-1")]),
        ("--items", "101"),
        ("--out", "."),
    ],
    "tsne": [*DRAWN, ("--items", "50001"), ("--items", "4"), ("--out", "..")],
    "steps": [
        ("--scores", "/nowhere"),
        ("--scores", "/dev/null"),
        ("--scores", "/dev"),
        ("--metric", "fid"),
        ("--out", "/dev/null/x"),
        ("--out", "/"),
    ],
    "seeds": [
        ("--ckpt", "/nowhere"),
        ("--classes", "10"),
        ("--num-steps", "1"),
        ("--cfg-scale", "-1"),
        ("--out", "/dev/null/x"),
        ("--internal-scale", "2"),
        ("--out", "x/.."),
    ],
    "time": [("--runs", "/nowhere"), ("--runs", "/dev/null"), ("--out", "/dev/null/x")],
    "fdr": [
        ("--samples", "/nowhere"),
        ("--train", "/nowhere"),
        ("--train", "/dev/null"),
        ("--val", "/dev"),
        ("--batch-size", "0"),
        ("--out", "/"),
        ("--out", "/dev/null/x.json"),
        ("--inception-weights", "w.pth"),
    ],
    "hub": [
        ("--ckpt", "/nowhere"),
        ("--to", "/dev/null"),
        ("--to", "/dev/null/x"),
        ("--metrics", "/nowhere"),
        ("--metrics", "/dev/null"),
        ("--private",),
    ],
    "export": [("--ckpt", "/nowhere"), ("--out", "/dev/null/x.pt"), ("--out", "/"), ("--layout", "sitt")],
    "recipes list": [("--results", "/dev/null"), ("--seeds", "nan")],
    "recipes run": [
        ("--seeds", ":"),
        ("--seeds", "1:2:3"),
        ("--seeds", "2:1"),
        ("--seeds", "-1"),
        ("--seeds", "9" * 30),
        ("--processes", "0"),
        ("--nodes", "0"),
        ("--hours", "0"),
        ("--hours", "1e9"),
        ("--teraflops", "-1"),
        ("--images-per-second", "0"),
        ("--scale", "medium"),
        ("--work", "/dev/null"),
        ("--results", "/dev/null"),
    ],
    "recipes table": [("--target", "inf"), ("--seeds", "0:9999")],
    "recipes check": [("--results", "/dev/null")],
}


def _by_hand() -> Iterator[Row]:
    """Values of the right kind that mean nothing, places that are not there."""
    for command, given in HAND.items():
        for words in given:
            yield Row(command, " ".join(word[:40] for word in words), words, (_culprit(words),))


def _culprit(words: tuple[str, ...]) -> str:
    """What the answer must name: the place where a place is wrong, else the last flag, or what stands in for it."""
    place = next((word for word in words if word.startswith("/") or len(word) > 200), None)
    flag = [word for word in words if word.startswith("--")][-1].lstrip("-")
    return (
        {
            "align-depth": "-depth",
            "encoder": "dinov9",
            "align-encoder": "dinov9",
            "keep-images": "--keep-images",
            "num-heads": "heads",
            "feature-weights": "--feature-weights",
        }.get(flag)
        or place
        or flag
    )


BEGUN = ("log.jsonl", "run.json", "job.json", ".stopped")
"""What a command that has begun its work leaves where it is stopped: the same command goes on from there."""


def only(command: str | None = None, name: str | None = None) -> list[Row]:
    """Rows of one command or whose name holds `name`, for looking at one."""
    return [row for row in rows() if command in (None, row.command) and (name is None or name in row.name)]


def check(table: list[Row], world: World, scratch: Path, progress: Callable[[Any], Any] = iter) -> dict[str, str]:
    """Every row whose answer is not as it should be, and why."""
    faults = {}
    for number, row in enumerate(progress(table)):
        place = scratch / str(number)
        place.mkdir(parents=True)
        found, said = answer(row, world, place)
        if fault := found.fault(said):
            faults[f"{row.command}: {row.name}"] = fault
        shutil.rmtree(place)
    return faults
