"""Processes, devices and precision: the one place that talks to Accelerate's launcher."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list

from runtime.errors import UserError, require

T = TypeVar("T")
WATCH, GRACE = 5.0, 600.0
"""Seconds between two looks at the launcher, and those that a process has left to end by itself once it is gone."""


def accelerator(timeout_minutes: float | None = None, **kwargs: Any) -> Accelerator:
    """The Accelerator of this process, with mixed precision off: autocast sits inside the learner.

    `timeout_minutes` is how long a process waits for the others before it gives up; None for torch's own default.

    Raises:
        UserError: a launcher configuration that these programs do not support, or processes that Accelerate does not see.
    """
    for variable, word in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        require(
            os.environ.get(variable, "false").lower() not in ("true", "1"),
            f"the accelerate configuration asks for {word}, which is not supported: run accelerate config for plain DDP",
        )
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    require(dynamo == "no", f"the accelerate configuration asks for dynamo ({dynamo}): use --compile on instead")
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if timeout_minutes is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)))
    wanted = world_size()
    _note_unused_gpu()
    try:
        processes = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers, **kwargs
        )
    except (ValueError, ImportError) as error:
        raise UserError(
            f"accelerate cannot start: {error}; correct its configuration, or drop the variables of its name"
        ) from error
    _watch_launcher()
    atexit.unregister(end)
    atexit.register(end)
    require(
        processes.num_processes == wanted,
        f"WORLD_SIZE is {wanted} but only {processes.num_processes} process takes part: launch "
        f"with accelerate launch --multi_gpu --num_processes {wanted}, on CPU too",
    )
    return processes


def world_size() -> int:
    """How many processes the launcher says there are. Raises UserError where its variables are no numbers, or some are missing."""
    numbered = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    for variable in numbered:
        value = os.environ.get(variable, "0")
        require(
            value.removeprefix("-").isdecimal(),
            f"{variable} is {value!r}, not a number: drop it, or start with accelerate launch",
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [variable for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT") if variable not in os.environ]
    require(
        world < 2 or not missing,
        f"WORLD_SIZE is {world} but there is no {' and no '.join(missing)}: start with accelerate launch "
        f"--multi_gpu --num_processes {world}, on CPU too, or drop WORLD_SIZE",
    )
    return world


def end() -> None:
    """End the process group, if there is one: its threads must not outlive the interpreter. Runs on every way out."""
    if PartialState._shared_state:
        PartialState().destroy_process_group()


def _note_unused_gpu() -> None:
    """One line where a GPU is there but the installed torch cannot use it."""
    if (
        not torch.cuda.is_available()
        and os.path.exists("/proc/driver/nvidia/version")
        and os.environ.get("RANK", "0") == "0"
        and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")
    ):
        print(
            f"note: this machine has an NVIDIA driver, but torch {torch.__version__} cannot use it (built for CUDA "
            f"{torch.version.cuda or 'none'}): install the torch that fits the driver, see https://pytorch.org",
            flush=True,
        )


def on_main(processes: Accelerator, action: Callable[[], T]) -> T:
    """What `action` returns on the main process, in every process; so is a UserError that it raises."""
    outcome: list[Any] = [None, None]
    if processes.is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    result, message = broadcast_object_list(outcome)
    if message is not None:
        raise UserError(message)
    return result


def _watch_launcher() -> None:
    """Where a launcher started this process: end it some minutes after the launcher has gone, whatever it waits for.

    Training saves and ends by itself long before that; other commands, and a process that waits for one that is gone, do not.
    """
    launcher = os.getppid()

    def watch() -> None:
        while not orphaned(launcher):
            time.sleep(WATCH)
        time.sleep(GRACE)
        print("error: the launcher of this process is gone; the same command continues", file=sys.stderr, flush=True)
        os._exit(1)

    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=watch, daemon=True, name="launcher").start()


def orphaned(launcher: int) -> bool:
    """Whether `launcher`, the parent that this process began under, is gone; never where nothing launched it."""
    return "LOCAL_RANK" in os.environ and os.getppid() != launcher


def precision(wanted: str | None, device: torch.device) -> torch.dtype | None:
    """torch.bfloat16 or None (float32).

    The flag wins; else the launcher's bf16; else bf16 on CUDA hardware that has it, float32 elsewhere.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted is None and launcher not in ("no", "bf16"):
        raise UserError(f"the accelerate configuration asks for {launcher}: use bf16, or pass --mixed-precision no")
    if wanted is None:
        wanted = "bf16" if launcher == "bf16" or (device.type == "cuda" and native_bf16(device)) else "no"
    return torch.bfloat16 if wanted == "bf16" else None


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware: CUDA from Ampere on, a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch cannot say
    return device.type == "cpu" and any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def tf32(wanted: bool | None, dtype: torch.dtype | None, device: torch.device) -> tuple[bool, str]:
    """Turn TF32 on or off for products and convolutions of float32 tensors; whether it is on, and what to say where it cannot be.

    A preset may bring `wanted` to a device that has none: that is said in one line. None leaves torch's own choice (products
    in float32).
    """
    able = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    on = bool(wanted) and dtype is None and able
    if wanted is not None and device.type == "cuda":
        torch.set_float32_matmul_precision("high" if on else "highest")
        torch.backends.cudnn.allow_tf32 = on
    return (
        on,
        f"note: TF32, which the published setting uses, is not available on this {device.type}: running in float32"
        if wanted and not able
        else "",
    )


@contextmanager
def tf32_inside(device: torch.device) -> Iterator[None]:
    """TF32 on inside the block, where the device has it; as it was afterwards."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    tf32(True, None, device)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def require_tf32() -> None:
    """Raise UserError where TF32 was asked for and no device has it."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    require(able, "--tf32 needs a CUDA device of compute capability 8 or above; leave it out to run in float32")


PRECISIONS = {
    "bf16": "--mixed-precision bf16",
    "fp32": "--mixed-precision no --no-tf32",
    "tf32": "--mixed-precision no --tf32",
}
"""Names of precisions as they are printed and saved, and the options that ask for them."""


def precision_name(dtype: torch.dtype | None, tf32: bool = False) -> str:
    """What was decided, as it is printed and saved: bf16, fp32, or tf32 (float32 with TF32 products)."""
    return "bf16" if dtype else "tf32" if tf32 else "fp32"


def compiles(wanted: str | None, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and a note for the printout. Without a C++ compiler a CPU run is eager, and says so."""
    if wanted is None:
        wanted = "on" if device.type == "cuda" else "off"
    if (
        wanted != "off"
        and device.type == "cpu"
        and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++")))
    ):
        return False, "off (no C++ compiler found, running eagerly)"
    return wanted != "off", wanted


def compile_network(network: Any, heads: Iterable[Any], wanted: str | None, device: torch.device) -> None:
    """Compile each block in place: names stay as they are, and all blocks of a shape share one compiled graph.

    On CUDA also the final layer and `heads`. "combined" lets Inductor put small kernels that need not wait for each other into
    one launch: of the 39 that a block's forward and backward take, 23 are left.
    """
    ends = [network.final_layer] if getattr(network, "final_layer", None) is not None else []
    for module in [*network.blocks, *([*ends, *heads] if device.type == "cuda" else [])]:
        module.compile(options={"combo_kernels": True} if wanted == "combined" and device.type == "cuda" else None)


def commit() -> str | None:
    """The commit of this code, with -dirty where files differ from it; None where git does not know."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def deterministic() -> None:
    """Bitwise reproducible kernels, on CUDA too."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
