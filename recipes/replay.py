"""The first steps of a record, trained again: `python -m recipes replay RECORD`.

What the training needs (latents, encoder, teacher) is made by the chain's own commands, unless it lies in --work. Then
the first steps run as the record's command says, in one process, and every logged loss is compared. They are 20 where
a line of the log ends there, else those of its first line. Nothing else of the record is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes import recompute, record, runner
from recipes.chain import Chain
from runtime.errors import require
from runtime.jsonlines import read

if TYPE_CHECKING:
    from training.run import Run

STEPS = 20
# Losses agree if they differ by no more than this share of the recorded ones.
TOLERANCE = 1e-3
# What a loss of the first steps may depend on, beside the command.
MACHINE = ("precision", "device", "cpu", "threads", "torch")


def replay(folder: Path, work: Path) -> str:
    """Train the first steps of a record again, with data and teacher in `work`; returns what came of it, in words.

    Raises:
        UserError: a loss differs on the machine and in the precision of the record; the data are others; the record
            did not finish or does not hold.
    """
    entry = record.open_record(folder)
    require(
        entry["status"] == "finished",
        f"{folder.name} cannot be replayed: it did not finish; choose another",
    )
    faults = record.check(folder)
    require(not faults, f"{folder.name} does not hold: {'; '.join(faults)}; restore it")
    plan = recompute.plan_of(entry, work)
    run = _prepared(plan)
    require(
        run.data.digest == entry["digests"]["data"],
        f"{folder.name} was trained on other data than its chain makes here (digest {run.data.digest[:8]}, not "
        f"{str(entry['digests']['data'])[:8]}): it cannot be replayed here",
    )
    now = _machine(run)
    recorded = {**entry, "torch": entry["versions"]["torch"]}
    others = [f"{name} {now[name]}, not {recorded[name]}" for name in MACHINE if now[name] != recorded[name]]
    lines = [line for line in read(folder / "log.jsonl") if "loss/diffusion" in line]
    end, gap, worst = _largest_gap(run, lines)
    title = f"{folder.name}: losses of steps 1 to {end} differ by at most {gap:.2g} of the recorded ones"
    if gap <= TOLERANCE:
        return title + (f" (here with {'; '.join(others)})" if others else "")
    if others:
        return f"{title} ({worst}), which may come from {'; '.join(others)}"
    require(False, f"{title}, more than {TOLERANCE:g}, on the same machine: {worst}; the log is not of this command")
    return title


def _prepared(plan: Chain) -> Run:
    """The run of the record at step 0, after the links that it needs. It writes nothing and continues nothing."""
    from training import command
    from training.run import Run

    first = next(number for number, link in enumerate(plan.links) if link.name in ("trunk", "train"))
    for link in plan.links[:first]:
        if not link.done:
            print(f"\n$ {link.command()}", flush=True)
            runner.call(link.words)
            require(link.done, f"{link.name} ended without {link.makes}; run it by hand to see why: {link.command()}")
    program, *words = plan.links[first].words
    config, options = command.resolve(words, program, None, ("guided",) if program == "train_guide.py" else ())
    return Run(replace(config, exp_name=f"{config.exp_name}-replay"), options)


def _machine(run: Run) -> dict[str, Any]:
    """The values of `MACHINE` here."""
    import torch

    from runtime import launch

    return {
        **launch.machine(),
        "precision": launch.precision_name(run.dtype, run.tf32),
        "torch": torch.__version__.partition("+")[0],
    }


def _largest_gap(run: Run, lines: Sequence[dict[str, float]]) -> tuple[int, float, str]:
    """The last step, the largest relative gap between a loss and the recorded one up to there, and which it is."""
    from training import loop
    from training.log import Meter

    last = next((int(line["step"]) for line in lines if line["step"] >= STEPS), int(lines[-1]["step"]))
    end = min([last, *(stop for name in run.alignments if (stop := run.setup.stops[name]) is not None)])
    recorded = {line["step"]: line for line in lines if line["step"] <= end}
    meter, gap, worst = Meter(run.accelerator), 0.0, ""
    for step in loop.steps(run, end, meter):
        if step not in recorded:
            continue
        losses = meter.report(run.config.batch_size)
        for name, before in recorded[step].items():
            if not name.startswith("loss/"):
                continue
            now = losses.get(name, math.inf)
            if (share := abs(now - before) / max(abs(before), 1e-12)) > gap:
                gap, worst = share, f"{name} of step {step} is {now:.6g}, not {before:.6g}"
    return end, gap, worst
