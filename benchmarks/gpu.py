"""Everything that only a GPU can show, in one command that is called again until it is done.

    python -m benchmarks.gpu --out benchmarks/results/gpu --minutes 9

It does the parts that --out lacks within the given minutes, the most important first: two training steps of every
method and the published network's numbers, then rates of SiT-B/2 and SiT-XL/2. A part that failed or was cut off goes
behind all others. Each is a command of its own whose results grow row by row, so that it continues where it was cut
off. Every call ends with a new `tables.md` in --out, which shows all results. `--scale tiny` runs the same parts on a
CPU in minutes.

A rented machine needs torch, numpy, safetensors, timm, accelerate, torchdiffeq, scikit-learn, matplotlib and pytest.
Only the rows of decoded images need diffusers too; without it they are left out.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import measure, sample, train_step
from runtime import errors, files
from runtime.errors import require
from runtime.options import option, read


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    out: str = option(help="folder of the results")
    minutes: float = option(9.0, help="time of this call")
    scale: str = option("full", choices=("full", "tiny"), help="tiny: the smallest sizes, also on a CPU")
    peer: str | None = option(None, help="checkout of REPA, for the rows beside it")


@dataclass(frozen=True)
class Part:
    """One command. Its result, if it writes one, is `name`.json; `minutes` is the longest time that a row may take."""

    name: str
    words: tuple[str, ...]
    minutes: float


# Words of the parts at each size. Later words replace earlier ones.
SCALES = {
    "full": {
        "train": "--steps 10 --repetitions 3 --warmup 6",
        "first": "--steps 1 --repetitions 1 --warmup 1 --compile off",
        "rows": "--rows plain 'stage 1' 'stage 2' 'stage 2, interval'",
        "few": "--rows plain 'stage 2, interval'",
        "ablation": "--rows plain --ablation",
        "methods": "--rows repa haste dispersive layersync sra",
        "loader": "--rows batches 'batches, images'",
        "sample": "--model SiT-XL/2",
        "trace": "--model SiT-XL/2",
        "run": "--scale digits --seeds 0:5",
    },
    "tiny": {
        "train": "--batch-size 2 --latent-size 8 --classes 10 --items 16 --steps 1 --warmup 1 --repetitions 2",
        "first": "--repetitions 1",
        "rows": "--rows plain 'stage 1'",
        "few": "--rows plain",
        "ablation": "--rows plain",
        "methods": "--rows dispersive layersync sra",
        "loader": "--rows batches",
        "sample": "--model SiT-Tiny/2 --latent-size 8 --batch-size 2 --num-steps 3 --repetitions 2 --decoder tiny",
        "trace": "--model SiT-Tiny/2 --latent-size 8 --batch-size 2 --classes 10 --items 16 --warmup 1",
        "run": "--scale tiny --seeds 0",
    },
}
# Networks that stand for others at --scale tiny.
TINY = {
    **dict.fromkeys(("SiT-B/2", "SiT-L/2", "SiT-XL/2"), "SiT-Tiny/2"),
    "LightningDiT-XL/1": "LightningDiT-Tiny/1",
}
# Tests that need a GPU, and the one of them that compares a published network.
SUITE = Path("tests/training/test_cuda.py")
PARITY = "test_the_published_network_has_its_published_numbers"


def parts(config: GpuConfig, out: Path) -> list[Part]:
    """All parts, the most important first."""
    scale = SCALES[config.scale]

    def bench(module: str, name: str, words: str, minutes: float = 2.0) -> Part:
        result = str(out / f"{name}.json")
        return Part(name, ("-m", f"benchmarks.{module}", *shlex.split(words), "--out", result), minutes)

    def train(name: str, model: str, batch: int, words: str) -> Part:
        network = TINY.get(model, model) if config.scale == "tiny" else model
        words = f"--model {network} --batch-size {batch} {scale['train']} {words}"
        return bench("train_step", f"{name}-{model.replace('/', '-')}-{batch}", words)

    def first(row: str) -> Part:
        name = re.sub(r"\W+", "-", f"first-{row}")
        return train(name, "SiT-B/2", 32, f"{scale['first']} --rows {shlex.quote(row)}")

    methods = [row for row in train_step.ROWS if not row.startswith("batches")]
    suite = {
        node.name: Part(node.name, ("-m", "pytest", f"{SUITE}::{node.name}"), 1.0)
        for node in ast.parse(SUITE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    beside = []
    if config.peer:
        words = f"--peer {shlex.quote(config.peer)}"
        # of SiT-XL/2, both networks with 256 images would not fit into 141 GB
        for model, batch in (("SiT-B/2", 32), ("SiT-XL/2", 32), ("SiT-B/2", 256), ("SiT-XL/2", 64)):
            beside.append(train("peer", model, batch, f"--rows plain {words}"))
        beside.append(bench("sample", "peer-sample", f"{scale['sample']} {words}", minutes=4.0))
    places = ("--work", str(out / "work"), "--results", str(out / "results"))
    return [
        *map(first, methods),
        suite.pop(PARITY),
        *(train("train", model, 256, scale["rows"]) for model in ("SiT-B/2", "SiT-XL/2")),
        *suite.values(),
        bench("sample", "sample-SiT-XL-2", scale["sample"], minutes=2.5),
        *(train("train", model, 256, scale["rows"]) for model in ("SiT-L/2", "LightningDiT-XL/1")),
        *(train("train", model, 32, scale["few"]) for model in ("SiT-B/2", "SiT-XL/2", "SiT-L/2", "LightningDiT-XL/1")),
        *beside,
        bench("trace", "trace", scale["trace"]),
        train("ablation", "SiT-B/2", 256, scale["ablation"]),
        train("methods", "SiT-B/2", 256, scale["methods"]),
        train("loader", "SiT-B/2", 256, scale["loader"]),
        Part("run", ("-m", "recipes", "run", "digits/SiT-B-2/guided", *places, *scale["run"].split()), 2.0),
    ]


def main(argv: Sequence[str] | None = None) -> bool:
    """Run the command; returns whether everything is done."""
    config = read(GpuConfig, argv, prog="python -m benchmarks.gpu", description=__doc__)
    require(
        config.scale == "tiny" or torch.cuda.is_available(),
        "--scale full measures a GPU, and torch sees none here; --scale tiny goes through the same parts on a CPU",
    )
    out, started = Path(config.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "state.json"
    state = files.read_json(state_file) if state_file.is_file() else {}
    everything = parts(config, out)
    # those that failed or were cut off come last, those tried most often behind the others: none can starve the rest
    for part in sorted(everything, key=lambda part: state.get(part.name, {}).get("tries", 0)):
        left = 60 * config.minutes - (time.monotonic() - started)
        if state.get(part.name, {}).get("exit") == 0:
            continue
        if left < 60 * min(part.minutes, config.minutes / 2):
            break
        tries = state.get(part.name, {}).get("tries", 0) + 1
        state[part.name] = run(part, left) | {"tries": tries}
        files.write_json(state_file, state)
    with files.replacing(out / "tables.md") as temporary:
        temporary.write_text(tables(config, everything, state), encoding="utf-8")
    missing = [part.name for part in everything if state.get(part.name, {}).get("exit") != 0]
    next_call = f"call again for {', '.join(missing)}" if missing else f"see {out}/tables.md"
    print(f"{len(everything) - len(missing)} of {len(everything)} parts are done; {next_call}")
    return not missing


def run(part: Part, seconds: float) -> dict[str, object]:
    """Run a part for at most `seconds`; returns its exit code or that it was cut off, and the end of its output."""
    print(f"\n== {part.name}: python {shlex.join(part.words)}", flush=True)
    began = time.monotonic()
    command = [sys.executable, *part.words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            end: dict[str, object] = {"exit": process.returncode}
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            end = {"cut_off": True}
    print(output[-1500:] if "exit" in end else "   cut off: the minutes are over", flush=True)
    return {**end, "seconds": round(time.monotonic() - began, 1), "output": output[-3000:]}


def tables(config: GpuConfig, everything: Sequence[Part], state: Mapping[str, dict]) -> str:
    """All results as one page."""
    here = measure.environment("")
    lines = [f"# {here['device']}, {here['date']}, torch {here['versions']['torch']}, commit {here['commit']}", ""]
    if config.scale == "tiny":
        lines += ["Of the smallest sizes: a test of the command, not a measurement.", ""]
    for part in everything:
        status = "unmeasured"
        if part.name in state:
            status = {0: "done", None: "cut off, not complete"}.get(state[part.name].get("exit"), "failed")
        lines += [f"## {part.name}: {status}", "", f"`python {shlex.join(part.words)}`", ""]
        if body := _body(part, Path(config.out) / f"{part.name}.json", state):
            lines += ["```", body, "```", ""]
    return "\n".join(lines)


def _body(part: Part, result: Path, state: Mapping[str, dict]) -> str:
    """The table of a part's rows if it has one, else the last lines that it printed."""
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"] if result.is_file() else {}
    for bench in (train_step, sample):
        if rows and bench.__name__ in part.words:
            return bench.report(rows)
    # torch's profiler prints lines about itself
    output = state.get(part.name, {}).get("output", "").splitlines()
    return "\n".join([line for line in output if not re.match(r"[A-Z]+:\d{4}-\d\d-\d\d ", line)][-24:])


if __name__ == "__main__":
    errors.run(main)
