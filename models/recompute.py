"""Activation checkpointing: what the backward pass computes again instead of storing it.

none        everything that it needs is stored
selective   outputs of matrix products and attention are stored; norms, modulation and activations are computed again
full        only the input of each block is stored, and its whole forward pass is repeated: a third more work
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)


def _selective(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(
        type(self).forward, self, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts, **kwargs
    )


def _full(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(type(self).forward, self, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def recompute(network: nn.Module, mode: str) -> None:
    """Set what the blocks of `network` store for their backward pass; numbers and parameter names do not change.

    It acts inside the compiled region, and all blocks still share one graph, because the block is an argument of one
    function. Blocks draw no random numbers, so that no generator state has to be saved and restored.
    """
    for block in network.get_submodule("blocks").children():
        block.__dict__.pop("forward", None)
        if mode != "none":
            block.forward = types.MethodType(_full if mode == "full" else _selective, block)
