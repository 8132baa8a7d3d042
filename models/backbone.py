"""What every diffusion transformer here has in common: SiT, LightningDiT and what derives from them.

    tokens   = patches of x + fixed sin-cos positions
    c        = time embedding + label embedding
    f_n      = Block_n(f_{n-1}, c)                          (blocks count from 1; f_0 = tokens)
    velocity = FinalLayer(f_depth, c), back on the latent grid

Conditioning is adaLN-Zero (DiT, arXiv 2212.09748). An architecture is a subclass that states its name, sizes and guide
scale, its norm, its normalisation of queries and keys, its MLP and, if it has one, its rotation: `sit.py` is the plain
one.
Times run from data (t = 0) to noise (t = 1); the velocity is noise minus data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.layers import (
    Attention,
    LabelEmbedder,
    Lengths,
    PatchEmbedder,
    Rotation,
    TimeEmbedder,
    gate,
    modulate,
    sincos_positions,
    unpatchify,
)
from models.routing import Route, Segments, Way
from runtime import schema
from runtime.errors import UserError, require
from runtime.streams import Stream

# Larger values in a model's description mean that it is damaged.
_LIMITS = {"depth": 1000, "hidden_size": 65_536, "input_size": 4096, "in_channels": 65_536}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that rebuilds a network; a checkpoint stores it as JSON. The null label is `num_classes`."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    name: str  # a registered name, or "custom"
    architecture: str  # a key of ARCHITECTURES
    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    in_channels: int
    input_size: int  # side of the latent
    num_classes: int
    qk_norm: bool = False
    # side of the token grid whose positions are stretched over this one; None: its own
    position_span: int | None = None

    def __post_init__(self) -> None:
        for name in ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "input_size", "num_classes"):
            value, limit = getattr(self, name), _LIMITS.get(name, 1_000_000)
            require(1 <= value <= limit, f"model {self.name}: {name} {value} must lie between 1 and {limit}")
        for whole, part in (("hidden_size", "num_heads"), ("input_size", "patch_size")):
            value, divisor = getattr(self, whole), getattr(self, part)
            require(
                value % divisor == 0,
                f"model {self.name}: {whole} {value} is not a multiple of {part} {divisor}; choose one that divides it",
            )
        require(self.hidden_size % 4 == 0, f"model {self.name}: hidden_size {self.hidden_size} is not a multiple of 4")

    @property
    def side(self) -> int:
        """Tokens along one side of an image."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return self.side**2

    def sized(self, input_size: int) -> ModelSpec:
        """The same network for latents of side `input_size`: positions are stretched to the new grid."""
        span, resized = self.position_span or self.side, dataclasses.replace(self, input_size=input_size)
        return dataclasses.replace(resized, position_span=None if span == resized.side else span)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelSpec:
        """Raises UserError if a field is missing, unknown or of another type."""
        return schema.checked(cls, dict(value), "the model's description")


class QK(NamedTuple):
    """A tap on a block's attention: queries and keys as they enter the dot product, (N, 2, heads, T, head_dim)."""

    block: int


# What a forward pass can return beside the velocity: n is f_n, the raw output of block n, (N, T, D); CONDITION is c,
# (N, 1, D), or (N, T, D) where segments have times of their own; VELOCITY is the velocity itself, (N, C, H, W).
CONDITION, VELOCITY = "condition", "velocity"
Tap = int | QK | str


class Output(NamedTuple):
    """What a forward pass returns: velocity (N, C, H, W), or None after an early exit, and the tapped features."""

    velocity: Tensor | None
    features: dict[Tap, Tensor]


class Block(nn.Module):
    """One transformer block with adaLN-Zero: tokens (N, T, D) and condition (N, S, D) -> tokens (N, T, D).

    The condition has a row for each of S segments of these `lengths`, which attend to themselves alone if `separate`
    (or as `mask` says); S is 1 in plain training. With `tapped`, also its queries and keys, (N, 2, heads, T, head_dim),
    which fused attention does not return.
    """

    def __init__(self, width: int, norm1: nn.Module, attn: Attention, norm2: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.norm2 = norm2
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rotation: Rotation | None = None,
        tapped: bool = False,
        lengths: Lengths = (),
        separate: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        within = lengths if separate and mask is None else ()
        mixed, q, k = self.attn(modulate(self.norm1(x), shift1, scale1, lengths), rotation, within, mask)
        x = x + gate(mixed, gate1, lengths)
        x = x + gate(self.mlp(modulate(self.norm2(x), shift2, scale2, lengths)), gate2, lengths)
        return (x, torch.stack([q, k], dim=1)) if tapped else x


class FinalLayer(nn.Module):
    """Tokens (N, T, D) and condition (N, S, D) of segments of these `lengths` -> patches (N, T, p*p*C)."""

    def __init__(self, width: int, out: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm_final = norm
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor, lengths: Lengths = ()) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale, lengths))


@dataclass
class Pass:
    """What the blocks of one forward pass share."""

    condition: Tensor  # (N, S, D), a row for each segment
    way: Way  # order and segments of the tokens at the current block
    taps: Collection[Tap]
    features: dict[Tap, Tensor] = field(default_factory=dict)
    # what a subclass keeps from one block for another
    memory: dict[Any, Tensor] = field(default_factory=dict)


ARCHITECTURES: dict[str, type[Backbone]] = {}


class Backbone(nn.Module):
    """A diffusion transformer. With `depth`, only its first blocks and no final layer: a teacher read at a block.

    Construct through `models.build`, which fills in the weights. A subclass that has an `architecture` is registered.
    """

    architecture: ClassVar[str]
    # name: (depth, hidden_size, num_heads, patch_size)
    sizes: ClassVar[dict[str, tuple[int, int, int, int]]] = {}
    # omega of the paper (section 4.1); None: nothing is published, so that --guide-scale must be given
    guide_scale: ClassVar[float | None] = None
    # Weights of a block that stack several matrices, and how many: q, k, v; shifts, scales and gates
    PARTS: ClassVar[dict[str, int]] = {"attn.qkv.weight": 3, "adaLN_modulation.1.weight": 6}

    pos_embed: Tensor
    final_layer: FinalLayer  # None with `depth`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "architecture" in cls.__dict__:
            ARCHITECTURES[cls.architecture] = cls

    def __init__(self, spec: ModelSpec, depth: int | None = None) -> None:
        super().__init__()
        require(
            depth is None or 1 <= depth <= spec.depth,
            f"block {depth} does not exist: {spec.name} has blocks 1 to {spec.depth}",
        )
        width, head_dim = spec.hidden_size, spec.hidden_size // spec.num_heads
        self.spec = spec
        self.x_embedder = PatchEmbedder(spec.patch_size, spec.in_channels, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(spec.num_classes, width)
        self.register_buffer("pos_embed", sincos_positions(width, spec.side, spec.position_span), persistent=False)

        def head_norm() -> nn.Module:
            return self.head_norm(head_dim) if spec.qk_norm else nn.Identity()

        self.blocks = nn.ModuleList(
            Block(
                width,
                norm1=self.norm(width),
                attn=Attention(width, spec.num_heads, head_norm(), head_norm()),
                norm2=self.norm(width),
                mlp=self.mlp(width),
            )
            for _ in range(spec.depth if depth is None else depth)
        )
        # a teacher is read at a block: what comes after is not built
        out = spec.patch_size**2 * spec.in_channels
        self.register_module("final_layer", FinalLayer(width, out, self.norm(width)) if depth is None else None)

    def matrices(self) -> dict[str, int]:
        """The blocks' weight matrices by name, and how many each of them holds."""
        return {
            name: self.PARTS.get(name.split(".", 2)[2], 1)
            for name, parameter in self.named_parameters()
            if name.startswith("blocks.") and parameter.ndim == 2
        }

    @staticmethod
    def norm(width: int) -> nn.Module:
        """The norm before attention, MLP and final layer."""
        raise NotImplementedError

    @staticmethod
    def head_norm(head_dim: int) -> nn.Module:
        """The norm of queries and keys, where the spec asks for one."""
        raise NotImplementedError

    @staticmethod
    def mlp(width: int) -> nn.Module:
        raise NotImplementedError

    def rotation(self) -> Rotation | None:
        """Cosines and sines (T, head_dim) that turn queries and keys; None for absolute positions alone."""
        return None

    def initial(self, name: str, shape: torch.Size, stream: Stream) -> Tensor:
        """A fresh parameter; see `initial_weights`. A subclass may know parameters of its own."""
        if name.endswith(".bias") or "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            return torch.zeros(shape)
        if len(shape) == 1:  # the scales of norms
            return torch.ones(shape)
        if name.startswith(("t_embedder", "y_embedder")):
            return 0.02 * stream.normal(shape)
        bound = math.sqrt(6 / (shape[0] + math.prod(shape[1:])))
        return torch.from_numpy(stream.uniform(math.prod(shape))).reshape(shape).mul_(2 * bound).sub_(bound)

    # The three parts of a forward pass. A subclass changes the part in which it differs.

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, E + T, D) and condition (N, S, D) of latents (N, C, H, W), times (N, S) and labels (N,).

        E tokens that are no patches, none here, stand first; they take part in the blocks and are never returned.
        """
        times = self.t_embedder(t.flatten()).unflatten(0, t.shape)
        return self.x_embedder(x) + self.pos_embed, times + self.y_embedder(y)[:, None]

    def block(self, number: int, tokens: Tensor, state: Pass) -> Tensor:
        """The tokens after block `number`, in the order of `state.way`."""
        way = state.way
        run, inputs = self.blocks[number - 1], (tokens, state.condition, way.rotation)
        segments = (way.lengths, way.separate, way.mask)
        if QK(number) not in state.taps:
            return run(*inputs, False, *segments)
        tokens, state.features[QK(number)] = run(*inputs, True, *segments)
        return tokens

    def patches(self, tokens: Tensor, state: Pass) -> Tensor:
        """The velocity's patches (N, E + T, p*p*C) from the tokens after the last block."""
        return self.final_layer(tokens, state.condition, state.way.lengths)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        taps: Collection[Tap] = (),
        exit_early: bool = False,
        segments: Segments | None = None,
        route: Route | None = None,
    ) -> Output:
        """Velocity and block outputs at noisy latents.

        Args:
            x: (N, C, H, W) noisy latents.
            t: (N,) times in [0, 1], 1 is noise; (N, S) of the segments.
            y: (N,) int64 labels, the null label where the class was dropped.
            taps: block numbers, from 1, whose raw outputs f_n (N, T, D) are returned; QK(n), CONDITION, VELOCITY.
                Inside a route, f_n has the tokens that left as they were before it.
            exit_early: stop after the last tap; the velocity is then None.
            segments: the order of the tokens, and where it is cut; None: that of the image, uncut.
            route: blocks that only some of the tokens see.

        Raises:
            UserError: a tap beyond the depth.
        """
        last = self._last_block(taps, exit_early)
        tokens, condition = self.embed(x, t if t.ndim == 2 else t[:, None], y)
        way = Way(segments, route, tokens.shape[1], self.spec.tokens, self.rotation())
        state = Pass(condition, way, taps)
        tokens = way.begin(tokens)
        for number in range(1, last + 1):
            tokens = self.block(number, way.before(number, tokens), state)
            if number in taps:
                state.features[number] = way.restored(tokens)
            tokens = way.after(number, tokens)
        features = {
            tap: way.restored(value, 3) if isinstance(tap, QK) else value for tap, value in state.features.items()
        }
        if CONDITION in taps:
            features[CONDITION] = condition if segments is None else segments.per_token(condition)
        if exit_early:
            return Output(None, features)
        velocity = unpatchify(way.restored(self.patches(tokens, state)), self.spec.patch_size)
        return Output(velocity, features | {VELOCITY: velocity} if VELOCITY in taps else features)

    def _last_block(self, taps: Collection[Tap], exit_early: bool) -> int:
        """The last block that a pass needs. Raises UserError for a tap beyond the depth."""
        depth = len(self.blocks)
        tapped = [tap.block if isinstance(tap, QK) else tap for tap in taps if not isinstance(tap, str)]
        for number in tapped:
            if not 1 <= number <= depth:
                raise UserError(f"block {number} does not exist: this {self.spec.name} has blocks 1 to {depth}")
        if self.final_layer is None and not exit_early:
            raise ValueError("a truncated network predicts no velocity: call it with exit_early=True")
        return max(tapped, default=0) if exit_early else depth


def block_number(depth: int, share: float, chosen: int | None, flag: str, published: int | None = None) -> int:
    """The number of a block: `chosen`, else `published`, else `share` of the depth, rounded (halves up), at least 1.

    Raises UserError, naming the option `flag`, if it lies beyond the depth.
    """
    rounded = max(1, math.floor(depth * share + 0.5))
    number = next(value for value in (chosen, published, rounded) if value is not None)
    require(1 <= number <= depth, f"{flag} {number} is beyond the network's depth: blocks count from 1 to {depth}")
    return number


def initial_weights(network: Backbone, seed: int) -> dict[str, Tensor]:
    """Fresh weights for `network`, by name, each from its own stream: independent of order, depth and heads.

    Xavier-uniform linear layers and patch embedding (seen as a linear layer), N(0, 0.02) time MLP and label table,
    zero biases, and zeros in all of adaLN and the last layer, so that each block is the identity and the velocity 0.
    """
    return {
        name: network.initial(name, parameter.shape, Stream(seed, f"init/{name}"))
        for name, parameter in network.named_parameters()
    }


def check_weights(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError, naming the tensors, unless `weights` has the names and shapes of `module`, which is `what`."""
    needed = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    problems = [
        f"{name} is {given.get(name, 'missing')} where {needed.get(name, 'nothing')} is needed"
        for name in needed | given
        if needed.get(name) != given.get(name)
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"the weights do not fit {what}: {', '.join(problems[:3])}{more}")


def parameter_count(network: Backbone) -> int:
    """Parameters as the published tables count them: with the fixed position table."""
    return sum(parameter.numel() for parameter in network.parameters()) + network.pos_embed.numel()
