"""Processes, devices and precision: the one place that talks to Accelerate's launcher."""

from __future__ import annotations

import atexit
import os
import platform
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

from runtime.errors import UserError, note, require

T = TypeVar("T")
# Seconds between two checks that the launcher is alive, and seconds a process may go on without it.
WATCH, GRACE = 5.0, 600.0
# Minutes that processes wait while the main one writes and digests: torch gives up after ten, NCCL's default.
WAIT = 720.0


def accelerator(timeout_minutes: float | None = WAIT, **kwargs: Any) -> Accelerator:
    """The Accelerator of this process, with mixed precision off: autocast sits inside the learner.

    `timeout_minutes` is how long a process waits for the others before it gives up; None for torch's own default.

    Raises:
        UserError: the launcher's configuration is not supported, or Accelerate does not see the launched processes.
    """
    for variable, word in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        require(
            os.environ.get(variable, "false").lower() not in ("true", "1"),
            f"the accelerate configuration asks for {word}, which is not supported: run accelerate config, choose DDP",
        )
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    require(dynamo == "no", f"the accelerate configuration asks for dynamo ({dynamo}): use --compile on instead")
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if timeout_minutes is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)))
    launched = world_size()
    _note_unused_gpu()
    try:
        processes = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers, **kwargs
        )
    except (ValueError, ImportError) as error:
        raise UserError(
            f"accelerate cannot start: {error}; correct its configuration, or unset its variables (ACCELERATE_*)"
        ) from error
    _watch_launcher()
    # Unregistered first, so that several Accelerators of one process end the group only once.
    atexit.unregister(end)
    atexit.register(end)
    require(
        processes.num_processes == launched,
        f"WORLD_SIZE is {launched} but only {processes.num_processes} process takes part: launch "
        f"with accelerate launch --multi_gpu --num_processes {launched}, on CPU too",
    )
    return processes


def world_size() -> int:
    """The number of processes that the launcher started.

    Raises:
        UserError: a variable of the launcher is missing, or is not a number.
    """
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(variable, "0")
        require(
            value.removeprefix("-").isdecimal(),
            f"{variable} is {value!r}, not a number: unset it, or start with accelerate launch",
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [variable for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT") if variable not in os.environ]
    require(
        world < 2 or not missing,
        f"WORLD_SIZE is {world} but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start with "
        f"accelerate launch --multi_gpu --num_processes {world}, on CPU too, or unset WORLD_SIZE",
    )
    return world


def cores() -> int:
    """The processor cores of this process's share of the machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def end() -> None:
    """End the process group, if there is one: its threads must not outlive the interpreter. Registered with atexit."""
    if PartialState._shared_state:
        PartialState().destroy_process_group()


def _note_unused_gpu() -> None:
    """Print a note if the machine has a GPU that the installed torch cannot use."""
    if (
        not torch.cuda.is_available()
        and os.path.exists("/proc/driver/nvidia/version")
        and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")
    ):
        note(
            f"this machine has an NVIDIA driver, but torch {torch.__version__} cannot use it (built for CUDA "
            f"{torch.version.cuda or 'none'}): install the torch that fits the driver, see https://pytorch.org"
        )


def on_main(processes: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on the main process; every process gets its result, or the UserError that it raises."""
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
    """If a launcher started this process, end the process GRACE seconds after its launcher has ended.

    Training saves and ends by itself long before that. Other commands do not, nor does a process that waits for another
    process that has ended.
    """
    launcher = os.getppid()

    def watch() -> None:
        while not orphaned(launcher):
            time.sleep(WATCH)
        time.sleep(GRACE)
        print("error: the launcher of this process is gone; the same command continues", file=sys.stderr, flush=True)
        os._exit(1)  # sys.exit would end only this thread

    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=watch, daemon=True, name="launcher").start()


def orphaned(launcher: int) -> bool:
    """Whether `launcher`, the parent under which this process started, has ended; False without a launcher."""
    return "LOCAL_RANK" in os.environ and os.getppid() != launcher


def precision(wanted: str | None, device: torch.device) -> torch.dtype | None:
    """torch.bfloat16 or None (float32).

    The flag wins, then the launcher's bf16; otherwise bf16 on CUDA hardware that has it, float32 elsewhere. A CPU that
    does not multiply bf16 natively takes many times as long with it as with float32: there a note says that float32 is
    used.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    require(
        wanted is not None or launcher in ("no", "bf16"),
        f"the accelerate configuration asks for {launcher}: use bf16, or pass --mixed-precision no",
    )
    if wanted is None:
        wanted = "bf16" if launcher == "bf16" or (device.type == "cuda" and native_bf16(device)) else "no"
    if wanted == "bf16" and device.type == "cpu" and not native_bf16(device):
        note("this CPU does not multiply bf16 natively, which makes it many times as slow: running in float32")
        wanted = "no"
    return torch.bfloat16 if wanted == "bf16" else None


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware: CUDA from Ampere on, a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # older versions of PyTorch lack this function
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def has_tf32(device: torch.device) -> bool:
    """Whether `device` multiplies float32 matrices in TF32 if asked to: CUDA from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def tf32(wanted: bool | None, dtype: torch.dtype | None, device: torch.device) -> tuple[bool, str]:
    """Turn TF32 on or off for matrix products and convolutions of float32 tensors.

    `wanted` None leaves torch's own choice (products in float32). A preset may ask for TF32 on a device without it.

    Returns:
        Whether TF32 is on, and a note if it was wanted but the device lacks it ('' otherwise).
    """
    able = has_tf32(device)
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
def tf32_inside(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """TF32 is on inside the block if `wanted` and if the device has it; the block's end restores the earlier state."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    tf32(wanted, None, device)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def require_tf32() -> None:
    """Raise UserError unless the GPU has TF32."""
    able = torch.cuda.is_available() and has_tf32(torch.device("cuda"))
    require(able, "--tf32 needs a CUDA device of compute capability 8 or above; leave it out to run in float32")


# Names of precisions as they are printed and saved, and the options that ask for them.
PRECISIONS = {
    "bf16": "--mixed-precision bf16",
    "fp32": "--mixed-precision no --no-tf32",
    "tf32": "--mixed-precision no --tf32",
}


def precision_name(dtype: torch.dtype | None, tf32: bool = False) -> str:
    """The precision as it is printed and saved: bf16, fp32, or tf32 (float32 with TF32 products)."""
    return "bf16" if dtype else "tf32" if tf32 else "fp32"


def compiles(wanted: str | None, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and how the printout describes it. Without a C++ compiler, a CPU run is eager."""
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
    """Compile each block in place: parameter names stay, and all blocks of one shape share one compiled graph.

    On CUDA, also compile the final layer and `heads`. "combined" lets Inductor put small independent kernels into one
    launch: a block's forward and backward pass then take 23 launches instead of 39.
    """
    # DDP's splitter would cut each block into three graphs at the bounds of its buckets, with more kernels in all
    torch._dynamo.config.optimize_ddp = False
    ends = [network.final_layer] if getattr(network, "final_layer", None) is not None else []
    for module in [*network.blocks, *([*ends, *heads] if device.type == "cuda" else [])]:
        module.compile(options={"combo_kernels": True} if wanted == "combined" and device.type == "cuda" else None)


def cpu_name() -> str:
    """The processor's model, or its architecture where the system does not tell."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_name() -> str:
    """Name of the GPU, or of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def machine() -> dict[str, Any]:
    """What a rate and the last bits of a number depend on: device, processor, threads."""
    return {"device": device_name(), "cpu": cpu_name(), "threads": torch.get_num_threads()}


def commit() -> str | None:
    """The commit of this code, with -dirty if files differ from it; None if git does not know it.

    What lies under results/ is written by the runs themselves, and is not code.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()

    try:
        changed = git("diff", "--name-only", "HEAD", "--", ":/", ":(top,exclude)results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def deterministic() -> None:
    """Choose kernels that are bitwise reproducible, on CUDA too."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
