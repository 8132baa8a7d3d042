"""Stage 2, self-guided representation (paper section 3.3, equations 3 and 4).

The stage-1 network, frozen, sees the same (x_t, t) with and without its label. Its features at the guiding block are
extrapolated far beyond the conditional ones, and a head on the student's guided block regresses the result:

    f_g     = f_u + omega (f_c - f_u)
    L_guide = mean (MLP(f_n) - f_g)^2

The loss ends after 20 epochs for base models and 10 for larger ones (section 4.1). omega is the student's
`Backbone.guide_scale`. Both passes of the teacher are one doubled batch, cut after the guiding block; blocks beyond it
are not loaded, and a pass that omega does not need is not made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import interpolant
from alignment.base import Alignment, AlignOptions, BuildContext, Context, Frozen, not_none, squared_error
from models import ARCHITECTURES, ModelSpec, architecture
from models.backbone import block_number
from models.heads import HIDDEN, hidden_width, mlp
from runtime import launch
from runtime.errors import require
from runtime.options import option
from runtime.streams import Stream

PUBLISHED = ", ".join(
    f"{kind.guide_scale:g} for {kind.__name__}" for kind in ARCHITECTURES.values() if kind.guide_scale is not None
)
SMALLER = (1.0, 3.0, 10.0, 30.0)  # omegas at which a run prints the size of f_g, besides its own
EPOCHS = 40  # the age of the paper's teacher (section 4.1)


@dataclass(frozen=True, kw_only=True)
class GuidedOptions(AlignOptions):
    """Options of the stage-2 alignment; `guiding` is the teacher, `guided` the student."""

    guiding_ckpt: str = option(
        help="the stage-1 checkpoint: a folder, a run (its latest) or RUN@STEP", flag="guiding-ckpt"
    )
    guiding_weights: str = option(
        "raw", help="which of the teacher's weights: raw, ema, or ema-DECAY", flag="guiding-weights"
    )
    guiding_labels: str = option(
        "true",
        choices=("true", "dropped", "skip"),
        flag="guiding-labels",
        help="labels the teacher sees: the true ones, those after the student's dropout, or (skip) the true "
        "ones without a guide loss on samples whose label was dropped",
    )
    guiding_precision: str = option(
        "run",
        choices=("run", "fp32", "tf32"),
        flag="guiding-precision",
        help="the teacher's precision: the run's, float32 without autocast, or that with TF32 products (the authors' "
        "code; on a CPU float32)",
    )
    guiding_depth: int | None = option(None, help="teacher's block (default: 2/3 of its depth)", flag="guiding-depth")
    guided_depth: int | None = option(None, help="student's block (default: half its depth)", flag="guided-depth")
    guide_scale: float | None = option(
        None, within="[0, inf)", help=f"omega (default: {PUBLISHED})", flag="guide-scale"
    )
    hidden: int | None = option(None, within="[1, inf)", help=HIDDEN)


class Guided(Alignment[GuidedOptions]):
    """Mean squared error between a head on the guided block and the guided feature, one value per sample."""

    name = "guided"
    Options = GuidedOptions
    whole_time = True
    tokenwise = True
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "paper": {"options": {}},
        # the authors' --stop-epoch is compared with the optimiser step, whatever the size
        "upstream": {
            "options": {"interval": (0.4, 0.7), "mask": "upstream", "stop_steps": 100_000, "guiding_precision": "tf32"},
            "train": {"qk_norm": True},
        },
        "efficient": {"options": {"interval": (0.4, 0.7), "mask": "select", "guiding_weights": "ema"}},
    }

    @classmethod
    def resolve(cls, options: GuidedOptions, student: ModelSpec, batch_size: int = 256) -> GuidedOptions:
        scale = architecture(student).guide_scale if options.guide_scale is None else options.guide_scale
        require(scale is not None, f"no guide scale is published for {student.name} ({PUBLISHED}): give --guide-scale")
        return replace(
            options,
            guided_depth=block_number(student.depth, 1 / 2, options.guided_depth, "--guided-depth"),
            guide_scale=scale,
            hidden=options.hidden or hidden_width(student.hidden_size),
            stop_epochs=options.stop_epochs if options.ends else 20 if student.hidden_size <= 768 else 10,
        )

    def __init__(self, options: GuidedOptions, build_context: BuildContext) -> None:
        super().__init__(options, build_context)
        checkpoint = build_context.load(options.guiding_ckpt)
        teacher, student = checkpoint.spec, build_context.student
        _require_compatible(checkpoint, build_context, options)
        self.taps = (not_none(options.guided_depth),)
        self.guiding = block_number(teacher.depth, 2 / 3, options.guiding_depth, "--guiding-depth")
        self.null = teacher.num_classes
        self.labelled_only = options.guiding_labels == "skip"
        stream = Stream(build_context.seed, "init/guided")
        self.head = mlp(student.hidden_size, not_none(options.hidden), teacher.hidden_size, stream)
        # blocks beyond the guiding one are never run, so they are not loaded
        self.teacher = Frozen(
            checkpoint.network(options.guiding_weights, depth=self.guiding),
            build_context.device,
            build_context.dtype if options.guiding_precision == "run" else None,
        )
        self.origin = {
            "path": str(checkpoint.path),
            "digest": checkpoint.digest,
            "step": checkpoint.step,
            "model": teacher.name,
            "weights": options.guiding_weights,
            "epochs": checkpoint.epochs,
        }
        self.lacks_tf32 = options.guiding_precision == "tf32" and not launch.has_tf32(build_context.device)
        self.unverified = checkpoint.space.unverified_match(build_context.space)

    def forward(self, context: Context) -> Tensor:
        return squared_error(self.head(context.features[self.taps[0]]), self.target(context), self.weigh(context))

    def target(self, context: Context) -> Tensor:
        """f_g, (N, T, D of the teacher), float32 (equation 3)."""
        return interpolant.guide(*self.features(context), not_none(self.options.guide_scale))

    def features(self, context: Context) -> tuple[Tensor, Tensor]:
        """f_u and f_c, both (N, T, D of the teacher), float32; the same tensor if omega needs a single pass."""
        labels = context.y if self.options.guiding_labels == "dropped" else context.labels
        null = torch.full_like(labels, self.null)
        # f_g is f_c at omega 1 and f_u at omega 0: the other pass is left out
        passes = {0.0: [null], 1.0: [labels]}.get(not_none(self.options.guide_scale), [null, labels])
        with self._precision(labels.device):
            output = self.teacher(
                torch.cat([context.xt] * len(passes)),
                torch.cat([context.t] * len(passes)),
                torch.cat(passes),
                taps=(self.guiding,),
                exit_early=True,
            )
        features = output.features[self.guiding].float().chunk(len(passes))
        return features[0], features[-1]

    def sizes(self, contexts: Iterable[Context]) -> list[str]:
        """The root mean square of f_g at omega and at smaller ones; its square is about the first loss."""
        omega = not_none(self.options.guide_scale)
        omegas = sorted({omega, *(smaller for smaller in SMALLER if smaller < omega)})
        squares = []
        for context in contexts:
            pair = self.features(context)
            squares.append(torch.stack([interpolant.guide(*pair, scale).square().mean() for scale in omegas]))
        roots = torch.stack(squares).mean(0).sqrt().tolist() if squares else []
        values = [f"{root:.3g} at omega {scale:g}" for root, scale in zip(roots, omegas)]
        return [f"target f_g, root mean square over {len(squares)} batches: {', '.join(values)}"] if values else []

    @contextmanager
    def _precision(self, device: torch.device) -> Iterator[None]:
        """The arithmetic of the teacher's pass, whatever the student's."""
        precision = self.options.guiding_precision
        if precision == "run":
            yield
        else:
            with torch.autocast(device.type, enabled=False), launch.tf32_inside(device, precision == "tf32"):
                yield

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "guiding_depth": self.guiding, "teacher": self.origin}

    def notes(self) -> list[str]:
        """The teacher's identity, and a warning if it was not trained for as long as the paper's."""
        step, epochs = self.origin["step"], self.origin["epochs"]
        age = f"step {step}" + ("" if epochs is None else f" = {epochs:.1f} epochs")
        lines = [
            f"teacher: {self.origin['path']} at {age}, {self.origin['model']}, {self.origin['weights']} weights, "
            f"block {self.guiding}"
        ]
        if epochs is not None and abs(epochs - EPOCHS) > 0.5:
            lines.append(
                f"warning: the paper's teacher has trained for {EPOCHS} epochs, this one for {epochs:.1f}: choose its "
                f"checkpoint with --guiding-ckpt RUN@STEP"
            )
        if self.lacks_tf32:
            lines.append("note: --guiding-precision tf32: this device has no TF32, the teacher runs in float32")
        return lines + ([f"warning: the teacher {self.origin['path']}: {self.unverified}"] if self.unverified else [])

    @property
    def frozen(self) -> list[nn.Module]:
        return [self.teacher.network]


def _require_compatible(checkpoint: Any, build_context: BuildContext, options: GuidedOptions) -> None:
    """Refuse a teacher whose inputs or tokens differ; another width or depth is allowed."""
    teacher, student, source = checkpoint.spec, build_context.student, options.guiding_ckpt
    space = build_context.space
    grids = [spec.input_size // spec.patch_size for spec in (teacher, student)]
    require(
        grids[0] == grids[1],
        f"the teacher {source} has {grids[0]}x{grids[0]} tokens, the student {grids[1]}x{grids[1]}: "
        f"use a teacher with the student's patch and latent size",
    )
    difference = checkpoint.space.difference(space)
    require(
        teacher.input_size == student.input_size and difference is None,
        f"the teacher {source} was trained on {teacher.input_size}x{teacher.input_size} latents of "
        f"{checkpoint.space.name}, the data is {student.input_size}x{student.input_size} of {space.name}"
        f"{f' ({difference})' if difference else ''}: they must agree",
    )
    require(
        checkpoint.has_null or options.guide_scale == 1,
        f"the teacher {source} was trained without label dropout (--cfg-prob 0), so it has no null class for "
        f"--guide-scale {options.guide_scale:g}: use another teacher, or scale 1",
    )
    require(
        teacher.num_classes == student.num_classes,
        f"the teacher {source} has {teacher.num_classes} classes, the data has {student.num_classes}: they must agree",
    )
