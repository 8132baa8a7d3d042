"""The options of sampling: what decides a sample, and what it is drawn from.

This file knows nothing of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from config import require_precision, require_weights
from runtime.errors import require
from runtime.options import option
from sampling.solvers import SOLVERS, ode_grid, sde_grid


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """All that decides what a sample looks like, given the weights. Times are in [0, 1], 1 is noise."""

    mode: str = option(
        "sde", choices=("ode", "sde"), help="probability-flow ODE or reverse SDE (Euler-Maruyama)", heading="solver"
    )
    solver: str = option(
        "euler",
        choices=SOLVERS,
        help="solver of the ODE; dopri5 chooses its steps for a whole batch, so its samples depend on --batch-size",
    )
    num_steps: int = option(250, within="[2, 1e6]", help="steps (see --grid)")
    grid: str = option(
        "evaluations",
        choices=("evaluations", "points"),
        help="what --num-steps counts: steps of the ODE, or points of its grid (one step fewer)",
    )
    timestep_shift: float = option(
        1.0, within="[1e-3, 1e3]", help="below 1: more ODE steps near noise (LightningDiT: 0.3)"
    )
    last_step: float = option(
        0.04, within="(0, 1)", help="size of the SDE's last, noise-free step (SiT's and REPA's protocol: 0.04)"
    )
    cfg_scale: float = option(1.0, within="[0, 1000]", help="guidance scale; 1 turns guidance off", heading="guidance")
    guidance_low: float = option(0.0, help="guide while t is at least this")
    guidance_high: float = option(1.0, help="guide while t is at most this")
    guidance_channels: str = option(
        "all", choices=("all", "first3"), help="channels that are guided (SiT, LightningDiT: first3)"
    )
    internal_scale: float = option(
        1.0,
        within="[0, 1000]",
        help="scale of internal guidance, by the velocity head of a shallow block; 1 turns it off",
    )
    internal_low: float | None = option(None, help="guide internally while t is at least this, and")
    internal_high: float | None = option(None, help="at most this (default: the times that the head was trained on)")
    weights: str = option(
        "ema",
        help="which of the checkpoint's weights: ema, raw, or ema-DECAY where it has several averages",
        heading="samples",
    )
    labels: str = option(
        "random", choices=("random", "balanced"), help="drawn for each sample, or equal counts in shuffled order"
    )
    rounding: str = option("round", choices=("round", "truncate"), help="how pixels become integers (REPA truncates)")
    seed: int = option(0, help="seed of noise and labels; sample i depends on (seed, i) alone")

    def __post_init__(self) -> None:
        require_weights("--weights", self.weights)
        require(
            0 <= self.guidance_low <= self.guidance_high <= 1,
            f"--guidance-low {self.guidance_low} and --guidance-high {self.guidance_high} must satisfy "
            f"0 <= low <= high <= 1",
        )
        require(
            self.internal_scale != 1 or (self.internal_low, self.internal_high) == (None, None),
            "--internal-low and --internal-high say when to guide internally: add --internal-scale",
        )
        require(
            not self.adaptive or (self.num_steps, self.grid, self.timestep_shift) == (250, "evaluations", 1.0),
            f"--solver {self.solver} chooses its own steps: leave out --num-steps, --grid and --timestep-shift",
        )
        require(
            self.mode == "ode" or (self.solver, self.grid, self.timestep_shift) == ("euler", "evaluations", 1.0),
            "--solver, --grid and --timestep-shift are options of the ODE: add --mode ode",
        )

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its times itself, for a whole batch together."""
        return SOLVERS[self.solver].times is None

    def times(self) -> list[float]:
        """The grid of times, from 1 to 0, that the solver goes through."""
        steps = self.num_steps - (self.grid == "points")
        return sde_grid(steps, self.last_step) if self.mode == "sde" else ode_grid(steps, self.timestep_shift)

    @property
    def evaluations(self) -> int | None:
        """Network evaluations per sample (a guided one counts twice); None if the solver chooses its times itself."""
        times = SOLVERS[self.solver].times
        return None if times is None else sum(2 if self.guides_at(t) else 1 for t in times(self.times()))

    def guides_at(self, t: float) -> bool:
        """Whether classifier-free guidance acts at time t; elsewhere the unconditional velocity is not evaluated."""
        return self.cfg_scale != 1 and self.guidance_low <= t <= self.guidance_high


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What to sample from, and how fast. Of these, only weights and decoder change samples, and both are recorded."""

    ckpt: str = option(help="checkpoint: a folder, a run (its latest) or RUN@STEP", heading="network")
    vae: str | None = option(None, help="VAE, hub id or folder (default: the one that the checkpoint names)")
    mixed_precision: str | None = option(None, help="no or bf16 (default: bf16 on CUDA hardware that has it)")
    tf32: bool | None = option(None, help="products of float32 tensors in TF32 (with --mixed-precision no)")
    compile: str | None = option(
        None,
        choices=("on", "combined", "off"),
        help="compile each block (default: on with CUDA); combined: small CUDA kernels in one launch",
    )
    batch_size: int = option(64, within="[1, inf)", help="samples per network call in each process")

    def __post_init__(self) -> None:
        require_precision(self.mixed_precision, self.tf32)
