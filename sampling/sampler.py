"""From a network to images: labels, one random stream per sample index, solver, decoder.

Sample i is a function of (seed, i) and the settings: its label and every noise draw come from its own stream, whatever
the batch size and the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext

import numpy as np
import torch
from torch import Tensor

import interpolant
from models import Backbone
from models.latents import Codec
from models.pixels import to_uint8
from runtime import launch
from runtime.errors import UserError
from runtime.streams import Stream
from runtime.transfer import to_device
from sampling.config import SamplingConfig
from sampling.internal import Inner
from sampling.solvers import SOLVERS, Velocity, euler_maruyama

# Threads that draw an SDE's noise, each for samples of its own: one alone draws for about 70 images/s.
NOISE_THREADS = 4

# Indices (n,), labels (n,) and uint8 images (n, H, W, C) of a batch of samples.
Drawn = tuple[Sequence[int], np.ndarray, np.ndarray]


class Sampler:
    """Draws samples from a network under one `SamplingConfig`.

    Args:
        codec: decodes normalised latents to images in [-1, 1].
        count: how many samples there are in all (balanced labels are a shuffle of that many).
        dtype: bfloat16 for autocast, None for float32. Solver states are float64 either way.
        chosen: (count,) labels, sample by sample, in place of drawn ones.
        inner: the velocity of a shallow block, to guide internally with; needed where `internal_scale` is not 1.

    Guidance needs a network with a null label, which label dropout trains; the caller checks that.
    """

    def __init__(
        self,
        network: Backbone,
        codec: Codec,
        settings: SamplingConfig,
        count: int,
        dtype: torch.dtype | None = None,
        chosen: np.ndarray | None = None,
        inner: Inner | None = None,
    ) -> None:
        self.network, self.codec, self.settings, self.count, self.dtype = network, codec, settings, count, dtype
        self.inner = inner if settings.internal_scale != 1 else None
        self.device = next(network.parameters()).device
        spec = network.spec
        self.shape = (spec.in_channels, spec.input_size, spec.input_size)
        self.grid = settings.times()
        if chosen is None and settings.labels == "balanced":
            chosen = Stream(settings.seed, "sample/balanced").permutation(count) % spec.num_classes
        self.chosen = chosen

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) of the images, as the decoder makes them."""
        return image_shape(self.codec, self.shape, self.device)

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """(n,) int64 labels of the samples at `indices`."""
        if self.chosen is not None:
            return self.chosen[list(indices)]
        streams = (Stream(self.settings.seed, "sample/label", i) for i in indices)
        classes = self.network.spec.num_classes
        return np.array([stream.integers(classes, 1)[0] for stream in streams], dtype=np.int64)

    @torch.no_grad()
    def latents(self, indices: Sequence[int], labels: np.ndarray | None = None) -> Tensor:
        """(n, C, H, W) float64 normalised latents of the samples at `indices`; `labels` (n,) replaces their own."""
        y = to_device(torch.from_numpy(self.labels(indices) if labels is None else labels), self.device)
        velocity, sde = self._velocity(y), self.settings.mode == "sde"
        # An SDE draws noise at its start and for every step but the last; an ODE at its start alone.
        with closing(self._noise(indices, len(self.grid) - 1 if sde else 1)) as noise:
            start = next(noise)
            if sde:
                return euler_maruyama(velocity, start, self.grid, lambda _: next(noise))
            return SOLVERS[self.settings.solver].integrate(velocity, start, self.grid)

    def _noise(self, indices: Sequence[int], draws: int) -> Generator[Tensor, None, None]:
        """`draws` times (n, C, H, W) float64 noise, a stream for each sample; threads draw one step ahead."""
        streams = [Stream(self.settings.seed, "sample/noise", i) for i in indices]
        parts = [slice(first, None, NOISE_THREADS) for first in range(min(NOISE_THREADS, len(streams)))]

        def fill(values: np.ndarray, part: slice) -> None:
            for row, stream in zip(values[part], streams[part], strict=True):
                stream.fill_normal(row)

        def draw() -> tuple[Tensor, list[Future[None]]]:
            # a new buffer for each step: the copy of the last step to the device may still run
            values = torch.empty(len(streams), *self.shape, pin_memory=self.device.type == "cuda")
            return values, [threads.submit(fill, values.numpy(), part) for part in parts]

        with ThreadPoolExecutor(min(NOISE_THREADS, launch.cores()), "noise") as threads:
            ahead = draw()
            for left in reversed(range(draws)):
                values, filling = ahead
                for future in filling:
                    future.result()
                ahead = draw() if left else ahead
                yield values.to(self.device, non_blocking=True).double()

    def images(self, indices: Sequence[int], labels: np.ndarray | None = None) -> np.ndarray:
        """(n, H, W, C) uint8 images of the samples at `indices`; `labels` (n,) replaces their own."""
        return self._drawn(indices, labels)()

    def stream(self, batches: Iterable[Sequence[int]]) -> Iterator[Drawn]:
        """The samples of `batches`, one by one. While the caller handles a batch, the device works on the next."""
        waiting: tuple[Sequence[int], np.ndarray, Callable[[], np.ndarray]] | None = None
        for indices in batches:
            labels = self.labels(indices)
            following = indices, labels, self._drawn(indices, labels)
            if waiting is not None:
                yield waiting[0], waiting[1], waiting[2]()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1], waiting[2]()

    def _drawn(self, indices: Sequence[int], labels: np.ndarray | None = None) -> Callable[[], np.ndarray]:
        """Queue the samples at `indices` on the device; the function returned waits for their images."""
        decoded = self.codec.decode(self.latents(indices, labels).float())
        parts = to_uint8(decoded, self.settings.rounding), decoded.isfinite().flatten(1).all(1)
        if decoded.device.type != "cuda":
            return lambda: _on_host(indices, *parts)
        # Copies into pinned memory run beside the kernels of the next batch; the event marks their end.
        host = [
            torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True) for part in parts
        ]
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> np.ndarray:
            copied.synchronize()
            return _on_host(indices, *host)

        return wait

    def _velocity(self, y: Tensor) -> Velocity:
        """The velocity v(x, t) of samples of the labels `y` (n,), under classifier-free guidance where it acts.

        `guidance_channels` "first3" guides three channels, the others stay conditional: SiT's and LightningDiT's
        published scales mean something under that rule only.
        """
        null = torch.full_like(y, self.network.spec.num_classes)

        def velocity(x: Tensor, t: float) -> Tensor:
            if not self.settings.guides_at(t):
                return self._predicted(x, t, y)
            # One doubled batch, the unconditional half first.
            unconditional, conditional = self._predicted(torch.cat([x, x]), t, torch.cat([null, y])).chunk(2)
            guided = interpolant.guide(unconditional, conditional, self.settings.cfg_scale)
            if self.settings.guidance_channels == "first3":
                guided = torch.cat([guided[:, :3], conditional[:, 3:]], dim=1)
            return guided

        return velocity

    def _predicted(self, x: Tensor, t: float, labels: Tensor) -> Tensor:
        """(n, C, H, W) float64 velocity of the network at time t, guided internally where that acts."""
        times = torch.full((len(x),), t, dtype=torch.float32, device=self.device)
        inner = self.inner if self.inner is not None and self.inner.low <= t <= self.inner.high else None
        with nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype):
            output = self.network(x.float(), times, labels, taps=inner.spec.taps if inner else ())
            shallow = inner(output.features) if inner else output.velocity
        velocity = output.velocity.double()
        return interpolant.guide(shallow.double(), velocity, self.settings.internal_scale) if inner else velocity


def _on_host(indices: Sequence[int], images: Tensor, finite: Tensor) -> np.ndarray:
    """The images (n, H, W, C) as an array. Raises UserError for the first that was not finite before it was rounded."""
    wrong = [index for index, sound in zip(indices, finite.tolist(), strict=True) if not sound]
    if wrong:
        raise UserError(
            f"sample {wrong[0]} is not finite: use --mixed-precision no, a lower --cfg-scale or other weights"
        )
    return images.numpy()


def image_shape(codec: Codec, latent: tuple[int, ...], device: torch.device) -> tuple[int, ...]:
    """(H, W, C) of the images that `codec` makes of latents (C, H, W)."""
    return tuple(to_uint8(codec.decode(torch.zeros(1, *latent, device=device))).shape[1:])
