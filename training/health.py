"""Gradients that are not finite: how many in a row stop a run, where they came from, and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import dataset
from models import checkpoint
from runtime import files
from runtime.errors import UserError

if TYPE_CHECKING:
    from training.log import Meter
    from training.run import Run

# So many steps in a row without a finite gradient stop the run. Fewer are skipped and counted.
MOST = 10

FILE = "not-finite.json"
# Items of the first such step in the message; the file lists all.
SHOWN = 4


def require_healthy(run: Run, meter: Meter, last: bool) -> None:
    """Stop the run, in every process, if too many steps in a row were skipped, or the last ones were.

    Raises:
        UserError: names the steps, latents that are not finite themselves, and the remedy.
    """
    if meter.longest < MOST and not (last and meter.streak):
        return
    # the last steps of the run, else the longest row since the last report
    final, count = (run.step, meter.streak) if last and meter.streak else (run.step - meter.ago, meter.longest)
    first = final - count + 1
    steps = range(first, min(final, first + MOST - 1) + 1)
    # the order of the data is a function of seed and step, so the items need no record
    items = {step: dataset.order(run.config.seed, step - 1, run.config.batch_size, len(run.data)) for step in steps}
    culprits = _not_finite(run, items[first])
    file = run.folder / FILE
    if run.accelerator.is_main_process:
        record = {"steps": [first, final], "items": {step: index.tolist() for step, index in items.items()}}
        files.write_json(file, record)
    some = ", ".join(map(str, items[first][:SHOWN])) + (", ..." if len(items[first]) > SHOWN else "")
    because = (
        f"{run.data.name(culprits[0])} of {run.data.path} is not finite itself (run preprocessing.verify)"
        if culprits
        else f"all latents of step {first} (items {some}) are finite; {file} lists the items of these steps"
    )
    raise UserError(
        f"the gradient of steps {first} to {final} is not finite, so they were skipped: {because}; "
        f"{remedy(run, first, final)}"
    )


def remedy(run: Run, first: int, final: int) -> str:
    """Commands that help and that the run accepts.

    The last checkpoint is older than these steps: while gradients are not finite, none is written (`training.between`).
    A step is a function of weights, seed and number, so the unchanged command would meet the same gradients again.
    """
    newest = checkpoint.latest(run.folder)
    done, skipped = (int(newest.name) if newest else 0), run.config.skip_steps
    if skipped is not None and done < skipped[1]:  # skip these too, as before
        first, final = min(first, skipped[0]), max(final, skipped[1])
    start = (
        f"goes back to {run.folder}@{done}, the last good checkpoint,"
        if newest
        else "begins anew, as there is no checkpoint yet,"
    )
    precise = "with --mixed-precision no, or " if run.dtype is not None else ""
    norm = "" if run.config.qk_norm else "--qk-norm or "
    return (
        f"the same command {start} {precise}with --skip-steps {first} {final} past these steps; if the run has "
        f"diverged, begin another --exp-name with {norm}a lower --learning-rate"
    )


def _not_finite(run: Run, index: np.ndarray) -> list[int]:
    """Those of the items `index` whose stored latents are not finite."""
    rows = run.data.read(index)[0]
    return index[~np.isfinite(rows).reshape(len(index), -1).all(1)].tolist()
