"""Scaled dot-product attention: which kernel computes it, and in which precision.

On a CPU it runs in float32, whatever the precision of the products around it: the backward pass of PyTorch's bf16 kernel
takes six to thirteen times as long at 16 tokens, and is behind at 256 too (`benchmarks/results`). On CUDA, PyTorch takes
the first kernel of a fixed order that accepts the inputs; `choose` times the candidates on the shapes of the run instead.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None) -> Tensor:
    """(N, heads, T, head_dim) each -> the same shape and dtype as v; `kernel` is a name of KERNELS, None for PyTorch's order."""
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
    """Time of one attention, with its backward pass or without, by each kernel that takes these shapes."""
    # the layout that Attention makes: one product's output, seen as three
    parts = torch.zeros(images, tokens, 3, heads, head_dim, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)
    q, k, v = (part.detach().requires_grad_(backward) for part in parts.unbind())
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def call(kernel: str) -> None:
        mixed = attention(q, k, v, kernel)
        if backward:
            torch.autograd.grad(mixed, (q, k, v), mixed.detach())

    return {
        kernel: spent
        for kernel in KERNELS
        if (spent := _timed(lambda kernel=kernel: call(kernel), repetitions, wait)) is not None
    }


def _timed(call: Callable[[], None], repetitions: int, wait: Callable[[], None]) -> float | None:
    """Milliseconds of one call, None where the kernel refuses the inputs."""
    try:
        with warnings.catch_warnings(action="ignore"):  # PyTorch explains at length why a kernel is not to be had
            call()
    except RuntimeError:  # "no available kernel": this one is not for these shapes, this type or this device
        return None
    wait()
    started = time.perf_counter()
    for _ in range(repetitions):
        call()
    wait()
    return (time.perf_counter() - started) / repetitions * 1e3


def choose(
    network: nn.Module,
    images: int,
    dtype: torch.dtype | None,
    backward: bool,
    measure: Callable[..., dict[str, float]] = milliseconds,
) -> str:
    """Fix the fastest kernel for every block of `network` at batches of `images`; returns what to say of it.

    The choice stays when batches vary (the samples that an interval selects): another kernel would be another compilation.
    """
    spec, device = network.spec, next(network.parameters()).device
    head_dim = spec.hidden_size // spec.num_heads
    spent = measure(spec.num_heads, spec.tokens, head_dim, images, dtype or torch.float32, device, backward)
    if not spent:
        return "PyTorch's choice"
    fastest = min(spent, key=spent.__getitem__)
    for block in network.blocks:
        block.attn.kernel = fastest
    return f"{fastest} (" + ", ".join(f"{kernel} {value:.2f} ms" for kernel, value in spent.items()) + ")"
