"""Scaled dot-product attention: which kernel computes it, and in which precision.

On a CPU it runs in float32, whatever the precision of the products around it: the backward pass of PyTorch's bf16
kernel takes six to thirteen times as long at 16 tokens, and is slower at 256 too (`benchmarks/results`). On CUDA,
PyTorch uses the first kernel of a fixed order that accepts the inputs; `choose` times the candidates on the run's
shapes instead.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from models.backbone import Backbone, Block

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None) -> Tensor:
    """(N, heads, T, head_dim) each -> the same shape and dtype as v.

    `kernel` is a name in KERNELS; None leaves the choice to PyTorch.
    """
    if v.device.type == "cpu" and v.dtype != torch.float32:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)
    if kernel is None:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(KERNELS[kernel]):
        return F.scaled_dot_product_attention(q, k, v)


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
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def call(kernel: str) -> None:
        mixed = attention(q, k, v, kernel)
        if backward:
            torch.autograd.grad(mixed, (q, k, v), mixed.detach())

    times = {kernel: _timed(functools.partial(call, kernel), repetitions, wait) for kernel in KERNELS}
    return {kernel: time for kernel, time in times.items() if time is not None}


def _timed(call: Callable[[], None], repetitions: int, wait: Callable[[], None]) -> float | None:
    """Milliseconds of one call, None if the kernel refuses the inputs."""
    try:
        # PyTorch warns at length why a kernel is not available, and then raises: the kernel does not support these
        # shapes, this type or this device.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except RuntimeError:
        return None
    wait()
    started = time.perf_counter()
    for _ in range(repetitions):
        call()
    wait()
    return (time.perf_counter() - started) / repetitions * 1e3


def choose(
    network: Backbone,
    images: int,
    dtype: torch.dtype | None,
    backward: bool,
    measure: Callable[..., dict[str, float]] = milliseconds,
) -> str:
    """Set the fastest kernel for batches of `images` in every block of `network`; returns a description for the log.

    The choice stays when batches vary (the samples that an interval selects): another kernel would need another
    compilation.
    """
    spec, device = network.spec, next(network.parameters()).device
    head_dim = spec.hidden_size // spec.num_heads
    times = measure(spec.num_heads, spec.tokens, head_dim, images, dtype or torch.float32, device, backward)
    if not times:
        return "PyTorch's choice"
    fastest = min(times, key=times.__getitem__)
    for block in network.blocks:
        cast("Block", block).attn.kernel = fastest
    return f"{fastest} (" + ", ".join(f"{kernel} {value:.2f} ms" for kernel, value in times.items()) + ")"
