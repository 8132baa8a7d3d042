"""Gradients that are not finite: how many in a row end a run, what they came from, and what helps."""

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

MOST = 10
"""Steps in a row whose gradient may be no number. One alone is passed over and counted; so many are no accident."""

FILE = "not-finite.json"
SHOWN = 4
"""Items of the first such step that the message names; the file has them all."""


def require_healthy(run: Run, meter: Meter, last: bool) -> None:
    """Stop the run, in every process, where too many steps in a row could not be taken, or the last ones could not.

    Raises:
        UserError: names the steps, the latents that are no numbers themselves, and what helps.
    """
    if meter.longest < MOST and not (last and meter.streak):
        return
    final, count = (run.step, meter.streak) if last and meter.streak else (run.step - meter.ago, meter.longest)
    first = final - count + 1
    steps = range(first, min(final, first + MOST - 1) + 1)
    items = {step: dataset.order(run.config.seed, step - 1, run.config.batch_size, len(run.data)) for step in steps}
    culprits = _not_finite(run, items[first])
    if run.accelerator.is_main_process:
        files.write_json(
            run.folder / FILE,
            {"steps": [first, final], "items": {step: index.tolist() for step, index in items.items()}},
        )
    some = ", ".join(map(str, items[first][:SHOWN])) + (", ..." if len(items[first]) > SHOWN else "")
    because = (
        f"{run.data.name(culprits[0])} of {run.data.path} is not finite itself (run preprocessing.verify)"
        if culprits
        else f"no latent of step {first} (items {some}) is itself at fault; the items of the steps are in {run.folder / FILE}"
    )
    raise UserError(
        f"the gradient of steps {first} to {final} is not finite, so they were skipped: {because}; "
        f"{remedy(run, first, final)}"
    )


def remedy(run: Run, first: int, final: int) -> str:
    """What may be done about it: each of these is accepted by the run as it is.

    The last checkpoint is from before these steps: while they last, none is written (`training.between`). A step is a function
    of weights, seed and number, so that the same command without more would meet them again.
    """
    newest = checkpoint.latest(run.folder)
    done, skipped = (int(newest.name) if newest else 0), run.config.skip_steps
    if skipped is not None and done < skipped[1]:  # those are still to come as well
        first, final = min(first, skipped[0]), max(final, skipped[1])
    start = (
        f"goes back to {run.folder}@{done}, the last good checkpoint,"
        if newest
        else "begins anew, as there is no checkpoint yet,"
    )
    precise = "with --mixed-precision no, or " if run.dtype is not None else ""
    norm = "" if run.config.qk_norm else "--qk-norm or "
    return (
        f"the same command {start} {precise}with --skip-steps {first} {final} past these steps; where the run has diverged, begin "
        f"another --exp-name with {norm}a lower --learning-rate"
    )


def _not_finite(run: Run, index: np.ndarray) -> list[int]:
    """Those of the items `index` whose latents are not finite as they are stored."""
    rows = run.data.read(index)[0]
    return index[~np.isfinite(rows).reshape(len(index), -1).all(1)].tolist()
