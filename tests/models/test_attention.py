"""Attention: float32 on a CPU, and the kernel that `choose` found fastest elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import attention
from runtime import launch
from tests.helpers import inputs, perturbed

SPEC = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10)
CPU = torch.device("cpu")


class Operators(TorchDispatchMode):
    """Names of the operators that ran, and the types of their first inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            self.seen.append((func.overloadpacket.__name__, args[0].dtype))
        return func(*args, **(kwargs or {}))


def test_on_a_cpu_attention_is_in_float32_forward_and_backward_and_the_products_in_bf16():
    network = perturbed(SPEC).requires_grad_()
    with Operators() as operators:
        with torch.autocast("cpu", torch.bfloat16):
            velocity = network(*inputs(SPEC)).velocity
        velocity.float().square().mean().backward()
    dots = [dtype for name, dtype in operators.seen if name.startswith("_scaled_dot_product")]
    products = [dtype for name, dtype in operators.seen if name in ("mm", "addmm")]
    assert len(dots) == 2 * SPEC.depth and set(dots) == {torch.float32}
    assert products.count(torch.bfloat16) > 6 * SPEC.depth  # what is left in float32 is the MLP of the time


def test_the_fastest_kernel_is_fixed_in_every_block_for_any_batch(monkeypatch: pytest.MonkeyPatch):
    network = perturbed(SPEC)
    expected = network(*inputs(SPEC)).velocity
    asked = []

    def measured(*shape: Any) -> dict[str, float]:
        asked.append(shape)
        return {"flash": 2.0, "cudnn": 1.0, "efficient": 3.0}

    assert (
        attention.choose(network, 32, torch.bfloat16, True, measured)
        == "cudnn (flash 2.00 ms, cudnn 1.00 ms, efficient 3.00 ms)"
    )
    assert asked == [(4, 16, 32, 32, torch.bfloat16, CPU, True)]
    assert all(block.attn.kernels == {torch.bfloat16: "cudnn"} for block in network.blocks)
    assert attention.choose(network, 32, None, True, measured).startswith("cudnn")
    # the name decides the kernel that runs: here the plain one of matrix products
    monkeypatch.setitem(attention.KERNELS, "cudnn", SDPBackend.MATH)
    with Operators() as operators:
        chosen = network(*inputs(SPEC)).velocity
    names = {name for name, _ in operators.seen}
    assert "_scaled_dot_product_flash_attention_for_cpu" not in names and {"bmm", "_softmax"} & names
    torch.testing.assert_close(chosen, expected)
    assert attention.choose(network, 32, None, False, lambda *_: {}) == "PyTorch's choice"


def test_a_kernel_serves_the_type_for_which_it_was_chosen_alone(monkeypatch: pytest.MonkeyPatch):
    """A teacher or a score in float32 beside a run in bf16 must not meet a kernel that refuses float32."""
    network = perturbed(SPEC)
    expected = network(*inputs(SPEC)).velocity
    attention.choose(network, 32, torch.bfloat16, False, lambda *_: {"cudnn": 1.0})  # it runs on CUDA alone
    torch.testing.assert_close(network(*inputs(SPEC)).velocity, expected, rtol=0, atol=0)
    attention.choose(network, 32, None, False, lambda *_: {"cudnn": 1.0})
    with pytest.raises(RuntimeError, match="No (viable|available)"):
        network(*inputs(SPEC))


def test_kernels_that_refuse_the_inputs_are_left_out():
    spent = attention.milliseconds(2, 16, 8, 3, torch.float32, CPU, True, repetitions=1)
    assert set(spent) == {"flash"} and spent["flash"] > 0  # the others are CUDA's


def test_a_chosen_kernel_compiles_without_a_graph_break():
    network = perturbed(SPEC)
    expected = network(*inputs(SPEC)).velocity
    for block in network.blocks:
        block.attn.kernels[torch.float32] = "flash"
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(network(*inputs(SPEC)).velocity, expected)


def test_native_bf16_of_a_cpu_is_what_its_instructions_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    for known, native in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"avx512_f": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert launch.native_bf16(CPU) is native
        assert launch.precision(None, CPU) is None  # float32 unless it is asked for
        assert launch.precision("bf16", CPU) is (torch.bfloat16 if native else None)
        assert ("this CPU does not multiply bf16 natively" in capsys.readouterr().out) != native
