"""Everything that only a GPU can show, in one command that is called again until it is done.

    python -m benchmarks.gpu --out benchmarks/results/gpu --minutes 9

It does what is not yet in --out, most important first, within the minutes given; each part is a command of its own, whose
results grow row by row, so that a part that is cut off goes on where it was. Some 40 minutes in all on an H200. At the end of
every call `tables.md` in --out holds all that is there. `--scale tiny` goes through the same parts on a CPU in some minutes.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import measure
from runtime import errors, files
from runtime.errors import require
from runtime.options import option, read

TRAINED = ("SiT-B/2", "SiT-XL/2", "SiT-L/2", "LightningDiT-XL/1")
MAIN_ROWS = ("plain", "stage 1", "stage 2", "stage 2, interval")


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Options of the command."""

    out: str = option(help="folder of the results")
    minutes: float = option(9.0, help="time of this call")
    scale: str = option(
        "full", choices=("full", "tiny"), help="tiny: the same parts in the smallest size, on a CPU too"
    )
    peer: str | None = option(None, help="checkout of REPA, for the rows beside it")


@dataclass(frozen=True)
class Part:
    """One command, whose result lies in `name`.json where it writes one; `minutes` is what its longest row may take."""

    name: str
    words: tuple[str, ...]
    minutes: float


def parts(config: GpuConfig, out: Path) -> list[Part]:
    """All parts, most important first."""
    tiny = config.scale == "tiny"
    small = (
        (
            "--latent-size",
            "8",
            "--batch-size",
            "2",
            "--classes",
            "10",
            "--items",
            "16",
            "--steps",
            "1",
            "--warmup",
            "1",
            "--repetitions",
            "2",
        )
        if tiny
        else ()
    )

    def bench(module: str, name: str, *words: str, minutes: float = 2.0) -> Part:
        return Part(name, ("-m", f"benchmarks.{module}", *words, "--out", str(out / f"{name}.json")), minutes)

    def train(model: str, batch: int, *words: str, name: str = "train") -> Part:
        name = f"{name}-{model.replace('/', '-')}-{batch}"
        if tiny:
            return bench(
                "train_step",
                name,
                "--model",
                "LightningDiT-Tiny/1" if model[0] == "L" else "SiT-Tiny/2",
                *small,
                *words,
            )
        return bench(
            "train_step",
            name,
            "--model",
            model,
            "--batch-size",
            str(batch),
            "--steps",
            "10",
            "--repetitions",
            "3",
            "--warmup",
            "6",
            *words,
        )

    rows, few = (
        ("--rows", *chosen) for chosen in ((MAIN_ROWS[:2], MAIN_ROWS[:1]) if tiny else (MAIN_ROWS, MAIN_ROWS[::3]))
    )
    found = [Part("suite", ("-m", "pytest", "tests/training/test_cuda.py", f"--junitxml={out / 'suite.xml'}"), 5.0)]
    found += [train(model, 256, *rows) for model in TRAINED[:2]]
    sampler = (
        (
            "--model",
            "SiT-Tiny/2",
            "--latent-size",
            "8",
            "--batch-size",
            "2",
            "--num-steps",
            "3",
            "--repetitions",
            "2",
            "--decoder",
            "tiny",
        )
        if tiny
        else ("--model", "SiT-XL/2")
    )
    found += [bench("sample", "sample-SiT-XL-2", *sampler, minutes=2.5)]
    found += [train(model, 256, *rows) for model in TRAINED[2:]]
    found += [train(model, 32, *few) for model in TRAINED]
    if config.peer:
        beside = ("--rows", "plain", "--peer", config.peer)
        # of SiT-XL/2 both networks with 256 images would not fit 141 GB
        found += [
            train(model, batch, *beside, name="peer")
            for model, batch in zip(TRAINED[:2] * 2, (32, 32, 256, 64), strict=True)
        ]
        found += [bench("sample", "peer-sample", *sampler, "--peer", config.peer, minutes=4.0)]
    found += [bench("attention", "attention", *(("--batch-size", "2", "--repetitions", "1") if tiny else ()))]
    found += [
        bench(
            "trace",
            "trace",
            *(("--model", "SiT-Tiny/2", *small[:8], "--warmup", "1") if tiny else ("--model", "SiT-XL/2")),
        )
    ]
    found += [train(TRAINED[0], 256, "--rows", "plain", *(() if tiny else ("--ablation",)), name="ablation")]
    methods = ("dispersive", "layersync", "sra") if tiny else ("repa", "haste", "dispersive", "layersync", "sra")
    found += [train(TRAINED[0], 256, "--rows", *methods, name="methods")]
    found += [
        bench(
            "loader",
            "loader",
            *(
                ("--batch-size", "4", "--items", "8", "--steps", "1", "--repetitions", "1", "--latent-size", "4")
                if tiny
                else ()
            ),
        )
    ]
    real = (
        ("--steps", "8", "--samples", "16", "--seeds", "0")
        if tiny
        else ("--model", "SiT-S/2", "--seeds", "0", "1", "2", "3", "4")
    )
    return [*found, Part("run", ("-m", "recipes.quickstart", "--out", str(out / "run"), *real), 2.0)]


def main(argv: Sequence[str] | None = None) -> bool:
    """Run the command; returns whether everything is done."""
    config = read(
        GpuConfig, sys.argv[1:] if argv is None else argv, prog="python -m benchmarks.gpu", description=__doc__
    )
    require(
        config.scale == "tiny" or torch.cuda.is_available(),
        "--scale full measures a GPU, and torch sees none here; --scale tiny goes through the same parts on a CPU",
    )
    out, started = Path(config.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "state.json"
    state = files.read_json(state_file) if state_file.is_file() else {}
    wanted = parts(config, out)
    for part in sorted(wanted, key=lambda part: "exit" in state.get(part.name, {})):  # one that failed comes last
        left = 60 * config.minutes - (time.monotonic() - started)
        if state.get(part.name, {}).get("exit") == 0:
            continue
        if left < 60 * min(part.minutes, config.minutes / 2):
            break
        state[part.name] = run(part, left)
        files.write_json(state_file, state)
    with files.replacing(out / "tables.md") as temporary:
        temporary.write_text(tables(config, wanted, state), encoding="utf-8")
    missing = [part.name for part in wanted if state.get(part.name, {}).get("exit") != 0]
    print(
        f"{len(wanted) - len(missing)} of {len(wanted)} parts are done; "
        + (f"call again for {', '.join(missing)}" if missing else f"see {out}/tables.md")
    )
    return not missing


def run(part: Part, seconds: float) -> dict[str, object]:
    """Run a part for so many seconds at most; what it printed last is kept."""
    print(f"\n== {part.name}: python {shlex.join(part.words)}", flush=True)
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *part.words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            print("   cut off: the minutes are over", flush=True)
            return {"cut_off": True, "seconds": round(time.monotonic() - began, 1), "output": text[-3000:]}
    print(text[-1500:], flush=True)
    return {"exit": process.returncode, "seconds": round(time.monotonic() - began, 1), "output": text[-3000:]}


def tables(config: GpuConfig, wanted: Sequence[Part], state: dict[str, dict]) -> str:
    """All results as one page."""
    from benchmarks import sample, train_step

    where = measure.environment("")
    lines = [f"# {where['device']}, {where['date']}, torch {where['versions']['torch']}, commit {where['commit']}", ""]
    if config.scale == "tiny":
        lines += ["Of the smallest sizes: a test of the command, not a measurement.", ""]
    for part in wanted:
        known, file = state.get(part.name), Path(config.out) / f"{part.name}.json"
        status = (
            "unmeasured"
            if known is None
            else {0: "done", None: "cut off, not complete"}.get(known.get("exit"), "failed")
        )
        lines += [f"## {part.name}: {status}", "", f"`python {shlex.join(part.words)}`", ""]
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}
        if rows and "benchmarks.train_step" in part.words:
            lines += ["```", train_step.report(rows), "```", ""]
        elif rows and "benchmarks.sample" in part.words:
            lines += ["```", sample.report(rows), "```", ""]
        elif known is not None:
            lines += ["```", "\n".join(_said(known["output"])[-24:]), "```", ""]
    return "\n".join(lines)


def _said(output: str) -> list[str]:
    """The lines of what a part printed, without those that torch's profiler prints of itself."""
    return [line for line in output.splitlines() if not re.match(r"[A-Z]+:\d{4}-\d\d-\d\d ", line)]


if __name__ == "__main__":
    errors.run(main)
