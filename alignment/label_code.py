"""A label code: a head on a block regresses a fixed random vector of the sample's class.

    L_code = mean (MLP(f_n) - s e_y)^2,    e_y ~ N(0, I), fixed for each class

The control of stage 2: same head, block, weight and stop, and with `size` s the root mean square of its target f_g (a
run prints it), but a target that holds the label and nothing else. If it gains as much, the label explains the gain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from alignment.base import Alignment, AlignOptions, BuildContext, Context, not_none, squared_error
from models import ModelSpec
from models.backbone import block_number
from models.heads import HIDDEN, hidden_width, mlp
from runtime.options import option
from runtime.streams import Stream


@dataclass(frozen=True, kw_only=True)
class LabelCodeOptions(AlignOptions):
    """Options of the label code."""

    depth: int | None = option(None, help="block, counted from 1 (default: half the depth)")
    size: float = option(1.0, within="(0, inf)", help="root mean square of the code's entries")
    hidden: int | None = option(None, within="[1, inf)", help=HIDDEN)


class LabelCode(Alignment[LabelCodeOptions]):
    """Mean squared error between a head on a block and the code of the true label, one value per sample."""

    name = "label-code"
    Options = LabelCodeOptions
    tokenwise = True
    codes: Tensor

    @classmethod
    def resolve(cls, options: LabelCodeOptions, student: ModelSpec, batch_size: int = 256) -> LabelCodeOptions:
        depth = block_number(student.depth, 1 / 2, options.depth, "--label-code-depth")
        return replace(options, depth=depth, hidden=options.hidden or hidden_width(student.hidden_size))

    def __init__(self, options: LabelCodeOptions, build_context: BuildContext) -> None:
        super().__init__(options, build_context)
        student = build_context.student
        self.taps = (not_none(options.depth),)
        stream = Stream(build_context.seed, "init/label-code")
        self.head = mlp(student.hidden_size, not_none(options.hidden), student.hidden_size, stream)
        codes = stream.normal((student.num_classes, student.hidden_size))
        # a function of the seed, so that checkpoints need not hold it
        self.register_buffer("codes", codes * (options.size / codes.square().mean().sqrt()), persistent=False)

    def forward(self, context: Context) -> Tensor:
        prediction = self.head(context.features[self.taps[0]])
        return squared_error(prediction, self.codes[context.labels][:, None].expand_as(prediction), self.weigh(context))
