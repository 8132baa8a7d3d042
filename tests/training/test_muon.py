"""Muon: the step is torch's on matrices that stand alone, and a run under it continues exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
import train
from models.checkpoint import Checkpoint
from runtime.errors import UserError
from tests.helpers import Words, perturbed
from training import command, cost
from training import muon as muon_step
from training.muon import Muon

SIT = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10, qk_norm=True)
LIGHT = models.spec("LightningDiT-Tiny/1", in_channels=1, input_size=4, num_classes=10)
ADAM = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}


def optimiser(network: models.Backbone, **more: object) -> Muon:
    matrices = network.matrices()
    rest = [parameter for name, parameter in network.named_parameters() if name not in matrices]
    return Muon(
        network, torch.optim.AdamW([{"name": "network", "params": rest}], **ADAM, **more), lr=0.02, weight_decay=0.1
    )


def set_gradients(network: models.Backbone, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = {
        name: torch.randn(parameter.shape, generator=generator) for name, parameter in network.named_parameters()
    }
    for name, parameter in network.named_parameters():
        parameter.grad = gradients[name].clone()
    return gradients


@pytest.mark.parametrize(
    ("spec", "split"),
    [(SIT, {"attn.qkv": 3, "adaLN_modulation.1": 6}), (LIGHT, {"attn.qkv": 3, "adaLN_modulation.1": 6, "mlp.w12": 2})],
)
def test_two_steps_are_torchs_on_copies_of_the_matrices(
    spec: models.ModelSpec, split: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, since the products of a batch and of single matrices round differently in bf16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    monkeypatch.setattr(muon_step, "PRECISION", torch.float32)
    network = perturbed(spec, seed=0)
    width = spec.hidden_size
    copies: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        inside = name.startswith("blocks.") and parameter.ndim == 2
        rows = (
            len(parameter) // split.get(name.split(".", 2)[2].removesuffix(".weight"), 1) if inside else len(parameter)
        )
        assert (
            not (inside and name.split(".", 2)[2].removesuffix(".weight") in ("attn.qkv", "adaLN_modulation.1"))
            or rows == width
        )
        copies[name] = [
            nn.Parameter(parameter.detach()[start : start + rows].clone()) for start in range(0, len(parameter), rows)
        ]
    matrices = {name for name in copies if name.startswith("blocks.") and copies[name][0].ndim == 2}
    muon = torch.optim.Muon(
        [part for name in matrices for part in copies[name]],
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW([part for name in copies if name not in matrices for part in copies[name]], **ADAM)
    ours = optimiser(network)
    for seed in (1, 2):
        for name, gradient in set_gradients(network, seed).items():
            for part, own in zip(copies[name], gradient.split(len(copies[name][0])), strict=True):
                part.grad = own.clone()
        muon.step(), adamw.step()
        ours.step()
        assert all(part.grad is None for part in ours.parts)
        ours.zero_grad()
        assert all(parameter.grad is None for parameter in network.parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter, torch.cat(list(copies[name])), rtol=0, atol=1e-6)


def test_a_part_is_orthogonalised_by_itself() -> None:
    """Queries, keys and values with very different gradients move alike; as a single matrix they would not."""
    network = models.build(SIT)
    weight = network.blocks[0].attn.qkv.weight
    before, ours = weight.detach().clone(), optimiser(network)
    set_gradients(network, 1)
    weight.grad.mul_(torch.tensor([1.0, 1e-3, 1e3]).repeat_interleave(SIT.hidden_size)[:, None])
    ours.step()
    moves = (weight.detach() - before * (1 - 0.02 * 0.1)).chunk(3)
    wanted = 0.02 * 0.2 * SIT.hidden_size**0.5
    for move in moves:
        singular = torch.linalg.svdvals(move) / wanted
        assert singular.max() < 1.3 and 0.6 < singular.median() < 1.2


def test_the_products_of_a_step_are_counted(tmp_path: Path, words: Words) -> None:
    network = models.build(SIT)
    ours = optimiser(network)
    set_gradients(network, 1)
    with FlopCounterMode(display=False) as counter:
        ours.step()
    # an iteration has X X^T, its square, and their product with X; the MLP's matrices are four times as wide
    width, depth = SIT.hidden_size, SIT.depth
    square, wide = 6 * width**3, (2 * 4 * 2 + 2) * width**3
    assert counter.get_total_flops() == muon_step.flops(network) == depth * 5 * (10 * square + 2 * wide)

    plain, muon = (
        cost.estimate(*command.resolve(words(tmp_path, name, "--optimizer", name), "train.py", None))
        for name in ("adamw", "muon")
    )
    assert muon.flops(3) - plain.flops(3) == pytest.approx(3 * muon_step.flops(network))


def test_a_step_without_a_finite_gradient_is_not_taken() -> None:
    """The flag is on the device. After a skipped step, even the first, the next one is the same as without it."""
    skipping, expected = perturbed(SIT, seed=0), perturbed(SIT, seed=0)
    ours, clean = optimiser(skipping, fused=True), optimiser(expected, fused=True)
    for seed, good in ((1, False), (2, True), (3, False), (4, True)):
        set_gradients(skipping, seed), set_gradients(expected, seed)
        if not good:
            skipping.blocks[0].attn.qkv.weight.grad[0, 0] = torch.nan
        ours.found_inf = torch.tensor(0.0 if good else 1.0)
        clean.found_inf = torch.tensor(0.0)
        ours.step()
        if good:
            clean.step()
    assert all(torch.equal(a, b) for a, b in zip(skipping.parameters(), expected.parameters(), strict=True))
    states = (
        [state["momentum_buffer"] for state in each.state.values() if "momentum_buffer" in state]
        for each in (ours, clean)
    )
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_run_continues_exactly_under_its_own_optimiser(tmp_path: Path, words: Words) -> None:
    """Across the end of an alignment, at a rate that changes, with the gradient clipped."""
    more = (
        "--optimizer",
        "muon",
        "--align",
        "latent",
        "--align-hidden",
        16,
        "--align-stop-steps",
        3,
        "--lr-warmup-steps",
        3,
    )
    whole = Checkpoint.open(train.main(words(tmp_path / "a", "x", *more, "--max-train-steps", 4)))
    for steps in (2, 4):
        parts = train.main(words(tmp_path / "b", "x", *more, "--max-train-steps", steps))
    for name in ("raw", "ema", "optimizer"):
        expected, actual = whole.tensors(name), Checkpoint.open(parts).tensors(name)
        assert expected.keys() == actual.keys() and all(torch.equal(expected[key], actual[key]) for key in expected), (
            name
        )
    state = whole.tensors("optimizer")
    assert {f"network.blocks.5.attn.qkv.weight[{part}]/momentum_buffer" for part in range(3)} <= state.keys()
    assert state["network.blocks.0.adaLN_modulation.1.weight[5]/momentum_buffer"].shape == (128, 128)
    assert {
        "network.blocks.0.attn.proj.weight/momentum_buffer",
        "network.blocks.0.attn.qkv.bias/exp_avg",
        "network.final_layer.linear.weight/exp_avg_sq",
    } <= state.keys()
    network = models.build(whole.spec)
    named = dict(network.named_parameters())
    slots = {key.rsplit("/", 1)[0].removeprefix("network.").split("[")[0] for key in state}
    assert slots == named.keys()  # each is trained by one of the two optimisers
    assert not {
        key for key in state if "exp_avg" in key and key.split("/")[0].removeprefix("network.") in network.matrices()
    }
    with pytest.raises(UserError, match="its optimizer is muon, not adamw"):
        train.main(words(tmp_path / "b", "x", *more[2:], "--max-train-steps", 5))
    plain = train.main(words(tmp_path / "c", "x", *more[2:], "--max-train-steps", 1))
    assert Checkpoint.open(plain).config["train"]["optimizer"] == "adamw"
    with pytest.raises(UserError, match="its optimizer is adamw, not muon"):
        train.main(words(tmp_path / "c", "x", *more, "--max-train-steps", 2))
