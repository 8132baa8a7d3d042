"""From a network to images: labels, one random stream per sample index, solver, decoder.

Sample i is a function of (seed, i) and the settings: its label and every noise draw come from its own stream, whatever
the batch size and the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext

import numpy as np
import torch
from torch import Tensor

import interpolant
from models import Backbone
from models.latents import Codec
from models.pixels import to_uint8
from runtime.errors import require
from runtime.streams import Stream
from runtime.transfer import to_device
from sampling import solvers
from sampling.config import SamplingConfig
from sampling.internal import Inner


class Sampler:
    """Draws samples from a network under one `SamplingConfig`.

    Args:
        codec: decodes normalised latents to images in [-1, 1].
        count: how many samples there are in all (balanced labels are a shuffle of that many).
        dtype: bfloat16 for autocast, None for float32. Solver states are float64 either way.
        chosen: (count,) labels, sample by sample, in place of drawn ones.
        inner: the velocity of a shallow block, to guide internally with; needed where `internal_scale` is not 1.

    Raises:
        UserError: guidance for a network without a null label (a single class has one too; label dropout made it).
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
        self.chosen, self.inner = chosen, inner if settings.internal_scale != 1 else None
        self.network, self.codec, self.settings, self.count, self.dtype = network, codec, settings, count, dtype
        self.device = next(network.parameters()).device
        spec = network.spec
        self.shape = (spec.in_channels, spec.input_size, spec.input_size)
        steps = settings.num_steps - (settings.grid == "points")
        self.grid = (
            solvers.sde_grid(steps, settings.last_step)
            if settings.mode == "sde"
            else solvers.ode_grid(steps, settings.timestep_shift)
        )
        self._balanced = np.arange(count)
        if settings.labels == "balanced":
            self._balanced = Stream(settings.seed, "sample/balanced").permutation(count) % spec.num_classes

    @property
    def evaluations(self) -> int | None:
        """Network evaluations per sample (a guided one counts twice); None for the adaptive solver."""
        s = self.settings
        return (
            None
            if s.solver == "dopri5"
            else solvers.evaluations(s.solver, self.grid, s.cfg_scale, s.guidance_low, s.guidance_high)
        )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) of the images, as the decoder makes them."""
        return image_shape(self.codec, self.shape, self.device)

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """(n,) int64 labels of the samples at `indices`."""
        if self.chosen is not None:
            return self.chosen[list(indices)]
        if self.settings.labels == "balanced":
            return self._balanced[list(indices)]
        classes = self.network.spec.num_classes
        return np.array(
            [Stream(self.settings.seed, "sample/label", i).integers(classes, 1)[0] for i in indices], dtype=np.int64
        )

    @torch.no_grad()
    def latents(self, indices: Sequence[int], labels: np.ndarray | None = None) -> Tensor:
        """(n, C, H, W) float64 normalised latents of the samples at `indices`; `labels` (n,) replaces their own."""
        y = to_device(torch.from_numpy(self.labels(indices) if labels is None else labels), self.device)
        velocity, sde = self._velocity(y), self.settings.mode == "sde"
        with closing(self._noise(indices, len(self.grid) - 1 if sde else 1)) as noise:  # an SDE's last step draws none
            start = next(noise)
            if sde:
                return solvers.euler_maruyama(velocity, start, self.grid, lambda _: next(noise))
            return solvers.SOLVERS[self.settings.solver](velocity, start, self.grid)

    def _noise(self, indices: Sequence[int], draws: int) -> Iterator[Tensor]:
        """`draws` times (n, C, H, W) float64 noise, each sample's from its own stream, drawn by a thread one step ahead."""
        streams = [Stream(self.settings.seed, "sample/noise", i) for i in indices]

        def draw() -> Tensor:
            values = torch.empty(len(streams), *self.shape, pin_memory=self.device.type == "cuda")
            for row, stream in zip(values.numpy(), streams, strict=True):
                stream.fill_normal(row)
            return values

        with ThreadPoolExecutor(1, "noise") as thread:
            ahead = thread.submit(draw)
            for left in reversed(range(draws)):
                values = ahead.result()
                ahead = thread.submit(draw) if left else ahead
                yield values.to(self.device, non_blocking=True).double()

    def images(self, indices: Sequence[int], labels: np.ndarray | None = None) -> np.ndarray:
        """(n, H, W, C) uint8 images of the samples at `indices`."""
        return self._drawn(indices, labels)()

    def stream(self, batches: Iterable[Sequence[int]]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """(indices, images) of one batch after another. While the images of one are on their way to the host and in the hands
        of the caller, the device works on the next."""
        waiting: tuple[Sequence[int], Callable[[], np.ndarray]] | None = None
        for indices in batches:
            following = indices, self._drawn(indices)
            if waiting is not None:
                yield waiting[0], waiting[1]()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1]()

    def _drawn(self, indices: Sequence[int], labels: np.ndarray | None = None) -> Callable[[], np.ndarray]:
        """Queue the samples at `indices` on the device; the function returned waits for their images."""
        decoded = self.codec.decode(self.latents(indices, labels).float())
        parts = to_uint8(decoded, self.settings.rounding), decoded.isfinite().flatten(1).all(1)
        if decoded.device.type != "cuda":
            return lambda: _sound(indices, *parts)
        host = [
            torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True) for part in parts
        ]
        copied = torch.cuda.Event()
        copied.record()
        return lambda: (copied.synchronize(), _sound(indices, *host))[1]

    def _velocity(self, y: Tensor) -> solvers.Velocity:
        null = torch.full_like(y, self.network.spec.num_classes)

        def predict(x: Tensor, t: float, labels: Tensor) -> Tensor:
            times = torch.full((len(x),), t, dtype=torch.float32, device=self.device)
            mixed = nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)
            guides = self.inner is not None and self.inner.low <= t <= self.inner.high
            with mixed:
                output = self.network(x.float(), times, labels, taps=self.inner.taps if guides else ())
                shallow = self.inner(output.features).double() if guides else None
            velocity = output.velocity.double()
            return interpolant.guide(shallow, velocity, self.settings.internal_scale) if guides else velocity

        def pair(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            unconditional, conditional = predict(torch.cat([x, x]), t, torch.cat([null, y])).chunk(2)
            return unconditional, conditional

        s = self.settings
        channels = 3 if s.guidance_channels == "first3" else None
        return solvers.guided(
            lambda x, t: predict(x, t, y), pair, s.cfg_scale, s.guidance_low, s.guidance_high, channels
        )


def _sound(indices: Sequence[int], images: Tensor, finite: Tensor) -> np.ndarray:
    """The images (n, H, W, C) on the host. Raises UserError for the first that was not finite before it was rounded."""
    good = finite.tolist()
    require(
        all(good),
        f"sample {0 if all(good) else list(indices)[good.index(False)]} is not finite: use --mixed-precision no, a lower "
        f"--cfg-scale or other weights",
    )
    return images.numpy()


def image_shape(codec: Codec, latent: tuple[int, ...], device: torch.device) -> tuple[int, ...]:
    """(H, W, C) of the images that `codec` makes of latents (C, H, W)."""
    return tuple(to_uint8(codec.decode(torch.zeros(1, *latent, device=device))).shape[1:])


def grid_picture(images: np.ndarray, columns: int, scale: int = 1) -> np.ndarray:
    """(n, H, W, C) uint8 images as one (rows H, columns W, 3) picture, each pixel enlarged `scale` times."""
    from torchvision.utils import make_grid

    tiles = torch.from_numpy(images).permute(0, 3, 1, 2).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(tiles, nrow=columns, padding=max(1, tiles.shape[-1] // 16), pad_value=255).permute(1, 2, 0).numpy()
