"""What only a GPU can show: exact resume, losses of bf16 and of compiled code, no waiting, no late compilation.

`python -m benchmarks.gpu` runs each test as a part of its own, in this order: the long ones last.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

import models
import train
import train_guide
from models import layouts
from runtime.arithmetic import exact_arithmetic
from runtime.jsonlines import read
from tests.helpers import Words, assert_same_bits, build_run, parity
from training import loop
from training.log import Meter

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def guided_words(words: Words, folder: Path, name: str, teacher: Path, *more: object) -> list[str]:
    return words(folder, name, "--guiding-ckpt", teacher, "--align-hidden", 32, "--align-interval", 0.3, 0.7, *more)


def test_the_published_network_has_its_published_numbers():
    """REPA's SiT on this device: velocity and blocks are those of its authors' code, in float32."""
    weights, stored = parity("repa_sit")
    converted = layouts.convert_network(weights, "repa_sit", num_heads=4)
    network = models.build(converted.spec, weights=converted.weights).to(DEVICE).eval()
    x, t, y = (stored[name].to(DEVICE) for name in "xty")
    blocks = {int(name.removeprefix("block")): value for name, value in stored.items() if name.startswith("block")}
    with exact_arithmetic():
        output = network(x, t, y, taps=list(blocks))
    torch.testing.assert_close(output.velocity.cpu(), stored["velocity"], rtol=1e-4, atol=1e-4)
    for number, expected in blocks.items():
        torch.testing.assert_close(output.features[number].cpu(), expected, rtol=1e-4, atol=1e-4)


def test_the_chosen_attention_kernel_is_the_fastest_and_agrees_with_the_plain_one():
    from models import attention

    spent = attention.milliseconds(16, 256, 72, 32, torch.bfloat16, DEVICE, backward=True)
    assert set(spent) >= {"flash", "efficient"} and all(value > 0 for value in spent.values())
    q, k, v = torch.randn(3, 2, 16, 256, 72, device=DEVICE, dtype=torch.bfloat16)
    expected = (q.float() @ k.float().mT * 72**-0.5).softmax(-1) @ v.float()
    for kernel in spent:
        torch.testing.assert_close(attention.attention(q, k, v, kernel).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("method", ["none", "guided", "sra", "dispersive"])
def test_no_step_waits_for_the_device(tmp_path: Path, words: Words, teacher: Path, method: str):
    more = ["--max-train-steps", 12, "--mixed-precision", "bf16"]
    if method == "guided":
        run = build_run(guided_words(words, tmp_path, "run", teacher, *more, grad_ratio_steps=2), "train_guide")
    else:
        run = build_run(words(tmp_path, "run", "--align", method, *more))
    stepping = loop.steps(run, 12, Meter(run.accelerator))
    for _ in range(6):  # compilation and first allocations may wait
        next(stepping)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(stepping)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_compiled_after_the_third_step_however_many_samples_are_selected(
    tmp_path: Path, words: Words, teacher: Path
):
    run = build_run(
        guided_words(words, tmp_path, "run", teacher, "--batch-size", 64, "--max-train-steps", 24), "train_guide"
    )
    torch._dynamo.utils.counters.clear()
    counted = [torch._dynamo.utils.counters["stats"]["unique_graphs"] for _ in loop.steps(run, 24)]
    assert counted[0] > 0 and counted[-1] == counted[3] and not torch._dynamo.utils.counters["graph_break"]


def test_memory_stays_flat(tmp_path: Path, words: Words, teacher: Path):
    run = build_run(
        guided_words(words, tmp_path, "run", teacher, "--batch-size", 64, "--max-train-steps", 60), "train_guide"
    )
    held = [torch.cuda.memory_allocated() for _ in loop.steps(run, 60, Meter(run.accelerator))]
    assert max(held[30:]) <= 1.02 * max(held[10:30])


def test_a_deterministic_run_resumes_bit_for_bit(tmp_path: Path, words: Words, teacher: Path):
    from tests.training.test_training import losses

    try:
        more = ["--deterministic", "--align-stop-steps", 8]
        whole = train_guide.main(guided_words(words, tmp_path / "a", "run", teacher, *more, "--max-train-steps", 12))
        for steps in (6, 12):
            train_guide.main(guided_words(words, tmp_path / "b", "run", teacher, *more, "--max-train-steps", steps))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(whole, tmp_path / "b" / "run")
    assert losses(whole) == losses(tmp_path / "b" / "run")


def test_bf16_and_compiled_losses_lie_within_the_spread_of_seeds(tmp_path: Path, words: Words):
    """The mean of the last 100 of 300 steps is at most as far from float32 eager as another seed is."""

    def last(name: str, *more: object) -> float:
        run = train.main(words(tmp_path, name, "--max-train-steps", 300, "--log-steps", 100, *more))
        return read(run / "log.jsonl")[-1]["loss/diffusion"]

    eager = [last(f"seed{seed}", "--seed", seed, "--mixed-precision", "no", "--compile", "off") for seed in range(4)]
    spread = 3 * statistics.stdev(eager)
    for name, more in {
        "bf16": ("--mixed-precision", "bf16", "--compile", "off"),
        "compiled": ("--mixed-precision", "no"),
        "both": ("--mixed-precision", "bf16"),
        "selective": ("--activation-checkpointing", "selective"),
        "full": ("--activation-checkpointing", "full"),
    }.items():
        assert abs(last(name, *more) - eager[0]) < spread, name
