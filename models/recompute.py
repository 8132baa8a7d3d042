"""Activation checkpointing: what the backward pass computes again in place of keeping it.

none        everything that it needs is kept
selective   outputs of matrix products and attention are kept; norms, modulation and activations are computed again
full        only the input of each block is kept, and its whole forward pass is repeated: a third more work
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
    """Set how the blocks of `network` meet their backward pass; numbers and names of parameters stay as they are.

    It happens inside what is compiled, and all blocks still share one graph: the block is an argument of one function.
    Blocks draw nothing, so that no generator's state has to be kept and restored.
    """
    for block in network.blocks:
        block.__dict__.pop("forward", None)
        if mode != "none":
            block.forward = types.MethodType(_full if mode == "full" else _selective, block)
