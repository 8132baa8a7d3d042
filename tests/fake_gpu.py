"""A GPU that is not there: the project's own runs on fake tensors of the device cuda:0.

    with FakeGPU() as gpu:
        run = build_run(argv)        # parameters and buffers lie on cuda:0
        with gpu.watching() as seen:
            next(loop.steps(run, 2))
        assert not seen.waits

Tensors on the CPU are real. Those on cuda:0 have a shape, a type and a place but no values, so what is seen is what
does not depend on values: a tensor in the wrong place, a host that waits for the device, a kernel that refuses its
inputs, and the operators of a step. What comes back to the host is made up.

Not seen: numbers, kernels' own faults, collectives, races, memory. Autograd's engine asks the driver for streams, so
`_backward` walks the graph in its place, node by node: real formulas on fake tensors, without hooks and threads.
"""

from __future__ import annotations

import collections
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import sampling.sampler
import training.batches
from models import latents
from tests.helpers import ROOT

_values = torch.Generator().manual_seed(0)
GPU = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 10**9, multi_processor_count=132)
# Operators whose result the host needs, so that it waits until the device has made it.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
# Operators that launch nothing.
VIEWS = {
    *("t", "view", "_unsafe_view", "reshape", "transpose", "permute", "slice", "split", "split_with_sizes", "unbind"),
    *("unsqueeze", "squeeze", "expand", "detach", "alias", "select", "as_strided", "chunk", "device"),
}


@dataclass
class Seen:
    """What happened on the device while it was watched."""

    # operator -> calls
    operators: collections.Counter[str] = field(default_factory=collections.Counter)
    # why the host waited, and the line of the project
    waits: list[str] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """Calls of operators that are not views."""
        return sum(count for name, count in self.operators.items() if name not in VIEWS)


class FakeGPU(TorchDispatchMode):
    """Inside the block, torch has one GPU whose tensors are fake."""

    def __init__(self) -> None:
        super().__init__()
        torch._C._ensureCUDADeviceGuardSet()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._seen: Seen | None = None
        self._pinned: list[Tensor] = []
        self._patches = ExitStack()

    def __enter__(self) -> FakeGPU:
        AcceleratorState._reset_state(True)
        for patch in self._all_patches():
            self._patches.enter_context(patch)
        # `torch.tensor` makes its values on the host, then copies them where this mode sees it
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        self._patches.close()
        latents._channelwise.cache_clear()  # its constants lie on the device that is gone
        AcceleratorState._reset_state(True)

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """Record what happens inside the block."""
        self._seen = Seen()
        try:
            yield self._seen
        finally:
            self._seen = None

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function` with fake tensors on the CPU too: a network of any size is built in no time."""
        with self._fakes:
            return function(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [value for value in _flat([*args, *kwargs.values()]) if isinstance(value, Tensor)]
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not fake and to != "cuda":
            return func(*args, **kwargs)
        if self._seen:
            self._seen.operators[name] += 1
        if name in READS:
            self._wait(name)
            if name == "_local_scalar_dense":
                return _some(args[0]).item()
        if name == "copy_":
            target, source = args[:2]
            self._note_copy(source, target.device.type, kwargs.get("non_blocking", len(args) > 2 and args[2]), target)
            if not isinstance(target, FakeTensor):
                return target.copy_(_some(target))
        if name == "_to_copy":
            self._note_copy(args[0], to or args[0].device.type, kwargs.get("non_blocking", False))
            if to == "cpu":
                return _some(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        with self._fakes:
            return func(*args, **kwargs)

    def _note_copy(self, source: Tensor, to: str, non_blocking: bool, target: Tensor | None = None) -> None:
        """Record a copy between host and device for which the host waits."""
        if source.device.type == to:
            return
        on_host = source if to == "cuda" else target
        if not non_blocking or on_host is None or not self._is_pinned(on_host):
            self._wait(f"copy of {tuple(source.shape)} {'from' if to == 'cuda' else 'to'} pageable memory")

    def _wait(self, why: str) -> None:
        if self._seen:
            self._seen.waits.append(f"{why} at {_line()}")

    def _pin(self, tensor: Tensor, *_: Any) -> Tensor:
        """`Tensor.pin_memory`."""
        copy = tensor.clone()
        self._pinned.append(copy)
        return copy

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage()._cdata == pinned.untyped_storage()._cdata for pinned in self._pinned)

    def _synchronize(self, *_: Any) -> None:
        self._wait("synchronize")

    def _all_patches(self) -> Iterator[Any]:
        """What torch, Accelerate and the project's threads must believe."""
        gpu, empty = self, torch.empty

        def pinned_empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            return gpu._pin(empty(*args, **kwargs)) if pin_memory else empty(*args, **kwargs)

        class Event:
            def record(self) -> None: ...

            synchronize = gpu._synchronize

        answers: dict[str, Any] = {
            "is_available": True,
            "is_initialized": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
            "get_device_name": PROPERTIES.name,
            "get_device_properties": PROPERTIES,
            "is_bf16_supported": True,
            "is_current_stream_capturing": False,
            "memory_allocated": 0,
            "max_memory_allocated": 0,
            "set_device": None,
            "empty_cache": None,
            "reset_peak_memory_stats": None,
            "_lazy_init": None,
        }
        for name, answer in answers.items():
            yield mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        for module in (torch.cuda, torch.accelerator):
            yield mock.patch.object(module, "synchronize", self._synchronize)
        yield mock.patch.object(torch.cuda, "Event", Event)
        # a generator of the device would ask the driver; that of the CPU has no part in a fake draw
        yield mock.patch.object(torch, "Generator", HostGenerator)
        yield mock.patch.object(torch, "empty", pinned_empty)
        yield mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: self._pin(tensor))
        yield mock.patch.object(nn.Module, "_apply", _apply)
        yield mock.patch.object(Tensor, "backward", lambda loss: _backward([loss]))
        yield mock.patch.object(torch.autograd, "grad", _grad)
        yield mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention)
        # foreach kernels serve fake tensors too, though torch offers them for plain ones alone
        yield mock.patch.object(nn.utils.clip_grad, "_has_foreach_support", lambda *_: True)
        # a mode acts in its own thread alone
        for module in (training.batches, sampling.sampler):
            yield mock.patch.object(module, "ThreadPoolExecutor", AtOnce)
        yield mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda _: True))
        yield mock.patch.object(fake_tensor, "init_gpu_context", lambda _: None)
        yield mock.patch.object(PartialState, "default_device", property(lambda _: GPU))


class HostGenerator(torch.Generator):
    """A generator of the CPU, whatever the device."""

    def __new__(cls, device: Any = "cpu") -> HostGenerator:
        return super().__new__(cls, "cpu")


class AtOnce:
    """An executor that runs what it is given in the caller's thread."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args))
        return future

    def map(self, call: Callable[..., Any], *items: Sequence[Any]) -> Iterator[Any]:
        return map(call, *items)


def _some(like: Tensor) -> Tensor:
    """Values on the host in place of those that a fake tensor lacks: random numbers in (0, 1), 1 or True."""
    values = 1 - torch.rand(like.shape, generator=_values) if like.dtype.is_floating_point else torch.ones(like.shape)
    return values.to(like.dtype)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _line() -> str:
    """The innermost line of the project, outside this file."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if frame.filename.startswith(str(ROOT)) and "site-packages" not in frame.filename and frame.filename != __file__
    ]
    return f"{frames[-1].filename.removeprefix(str(ROOT) + '/')}:{frames[-1].lineno}" if frames else "?"


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module.to` and its like, with new parameters: a real parameter cannot take the data of a fake one."""
    with torch.no_grad():
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or (changed := change(tensor)) is tensor:
                        continue
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(changed, tensor.requires_grad) if is_parameter else changed
    return module


_passes = itertools.count()
_sdpa = nn.functional.scaled_dot_product_attention


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **more: Any) -> Tensor:
    """The operator that torch runs on this device, by the rules of its kernels for half precision."""
    if q.device.type != "cuda":
        return _sdpa(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, **more)
    aten, half = torch.ops.aten, q.dtype in (torch.bfloat16, torch.float16)
    assert q.dtype == k.dtype == v.dtype
    allowed = set(torch.nn.attention._cur_sdpa_kernel_backends())
    bias = None
    if attn_mask is not None:
        # flash refuses a mask; the others take it as a sum
        allowed -= {SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION}
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(*q.shape[:3], k.shape[2])
    if half and SDPBackend.FLASH_ATTENTION in allowed:
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]
    if half and SDPBackend.CUDNN_ATTENTION in allowed:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, q.requires_grad)[0]
    if SDPBackend.EFFICIENT_ATTENTION in allowed:
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, q.requires_grad)[0]
    if SDPBackend.MATH in allowed:
        return aten._scaled_dot_product_attention_math(q, k, v, bias)[0]
    raise RuntimeError("No available kernel. Aborting execution.")


def _grad(outputs: Any, inputs: Any, grad_outputs: Any = None, allow_unused: bool = False, **_: Any) -> Any:
    """`torch.autograd.grad`."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in inputs]
    captured = _backward(outputs, grad_outputs, {(edge.node, edge.output_nr) for edge in edges})
    result = tuple(captured.get((edge.node, edge.output_nr)) for edge in edges)
    assert allow_unused or all(gradient is not None for gradient in result)
    return result


@torch.no_grad()
def _backward(
    outputs: Sequence[Tensor], grad_outputs: Any = None, wanted: set[tuple[Any, int]] | None = None
) -> dict[tuple[Any, int], Tensor]:
    """Gradients of `outputs` along the graph: those at the edges `wanted`, else added to the leaves' `.grad`."""
    given = [torch.ones_like(o) for o in outputs] if grad_outputs is None else list(_flat([grad_outputs]))
    gradients: dict[Any, dict[int, Tensor]] = collections.defaultdict(dict)
    for output, gradient in zip(outputs, given, strict=True):
        gradients[output.grad_fn][output.output_nr] = gradient
    # checkpointing computes a block again once for each pass of the engine, which it knows by a number
    number_of_pass = next(_passes)
    with mock.patch.object(torch._C, "_current_graph_task_id", lambda: number_of_pass):
        return _walk(gradients, [output.grad_fn for output in outputs], wanted)


def _walk(gradients: Any, roots: Sequence[Any], wanted: set[tuple[Any, int]] | None) -> dict[tuple[Any, int], Tensor]:
    captured: dict[tuple[Any, int], Tensor] = {}
    for node in _ordered(roots):
        into = gradients.pop(node, {})
        if wanted is None and hasattr(node, "variable") and into:
            leaf = node.variable
            assert into[0].device == leaf.device
            leaf.grad = into[0] if leaf.grad is None else leaf.grad + into[0]
        captured |= {(node, number): value for number, value in into.items() if wanted and (node, number) in wanted}
        if not node.next_functions or not into:
            continue
        slots = [into.get(number) for number in range(len(node._input_metadata))]
        made = (node.apply if hasattr(node, "apply") else node)(*slots)
        for (following, number), gradient in zip(node.next_functions, made if isinstance(made, tuple) else (made,)):
            if following is not None and gradient is not None:
                expected = following._input_metadata[number]  # undoes broadcasting and promotion, as the engine does
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                before = gradients[following].get(number)
                gradients[following][number] = gradient if before is None else before + gradient
    return captured


def _ordered(roots: Sequence[Any]) -> list[Any]:
    """The nodes of a graph, each before those that its gradients go to."""
    order, visited, stack = [], set(), [(root, False) for root in roots]
    while stack:
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node not in visited:
            visited.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return order[::-1]
