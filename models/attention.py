"""The choice of an attention kernel.

On CUDA, PyTorch uses the first kernel of a fixed order that accepts the inputs. `choose` times the candidates on the
shapes of the run instead.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

from models.backbone import Backbone
from models.layers import KERNELS, Attention, attention


def milliseconds(
    heads: int,
    tokens: int,
    head_dim: int,
    images: int,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    repetitions: int = 10,
) -> dict[str, float]:
    """Time of one attention, with or without its backward pass, by each kernel that accepts these shapes."""
    # The layout that Attention makes: the output of one product, seen as q, k and v.
    parts = torch.zeros(images, tokens, 3, heads, head_dim, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)
    q, k, v = (part.detach().requires_grad_(backward) for part in parts.unbind())

    def call(kernel: str) -> None:
        mixed = attention(q, k, v, kernel)
        if backward:
            torch.autograd.grad(mixed, (q, k, v), mixed.detach())

    times = {kernel: _timed(functools.partial(call, kernel), repetitions) for kernel in KERNELS}
    return {kernel: time for kernel, time in times.items() if time is not None}


def _timed(call: Callable[[], None], repetitions: int) -> float | None:
    """Milliseconds of one call, None if the kernel refuses the inputs."""
    try:
        # PyTorch warns at length why a kernel is not available, and then raises: the kernel does not support these
        # shapes, this type or this device.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except RuntimeError:
        return None
    # imported here: it looks for CUDA's compiler at once, and warns if there is no compiler
    from torch.utils.benchmark import Timer

    # torch's timer waits for the GPU before it reads the clock.
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.timeit(repetitions).mean * 1e3


def choose(
    network: Backbone,
    images: int,
    dtype: torch.dtype | None,
    backward: bool,
    measure: Callable[..., dict[str, float]] = milliseconds,
) -> str:
    """Set the fastest kernel for batches of `images` in every block of `network`; returns a description for the log.

    It serves inputs of `dtype` (None: float32) alone. The choice stays when batches vary (the samples that an interval
    selects): another kernel would need another compilation.
    """
    spec, device = network.spec, next(network.parameters()).device
    head_dim = spec.hidden_size // spec.num_heads
    dtype = dtype or torch.float32
    times = measure(spec.num_heads, spec.tokens, head_dim, images, dtype, device, backward)
    if not times:
        return "PyTorch's choice"
    # one kernel for all blocks, as all have the same shapes
    fastest = min(times, key=times.__getitem__)
    for module in network.modules():
        if isinstance(module, Attention):
            module.kernels[dtype] = fastest
    return f"{fastest} (" + ", ".join(f"{kernel} {value:.2f} ms" for kernel, value in times.items()) + ")"
