"""The contract that every alignment keeps, and each baseline's formula against a literal computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import interpolant
import models
import train
from alignment import Alignment, AlignOptions, Context, find
from alignment.haste import attention_loss
from alignment.interval import Selection
from alignment.sra import SraOptions
from loss import Batch, Learner
from models import QK
from runtime.errors import UserError
from runtime.jsonlines import read
from tests.alignment.conftest import SPEC
from tests.helpers import PARITY_SIT, Words, context_of, micro_batch, parity, perturbed

ALL = sorted(Alignment.registry)


def part(whole: Batch, index: slice) -> Batch:
    """Some samples of a batch, as a rank or a micro-batch gets them."""
    return Batch(
        whole.x0[index],
        whole.eps[index],
        whole.t[index],
        whole.y[index],
        whole.labels[index],
        {key: value[index] for key, value in whole.columns.items()},
        {name: {key: value[index] for key, value in own.items()} for name, own in whole.draws.items()},
        segments=whole.segments and whole.segments.take(index),
        times=None if whole.times is None else whole.times[index],
    )


def gradients(learner: Learner, samples: Batch) -> dict[str, Tensor]:
    learner.zero_grad()
    sum(value.mean() for value in learner(samples).values()).backward()
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


# --- the contract
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_value_gradients_and_what_stays_frozen(name: str, build: Callable[..., Alignment]) -> None:
    alignment, network, ema = build(name), perturbed(SPEC), perturbed(SPEC, seed=5).requires_grad_(False)
    learner = Learner(network, {name: alignment}, ema=ema)
    value = alignment(context_of(network, whole := micro_batch(alignment), alignment.taps, name, ema))
    assert (
        value.shape == (() if alignment.coupled else (6,)) and value.dtype == torch.float32 and value.isfinite().all()
    )
    value.mean().backward()
    heads = list(alignment.parameters())
    assert all(p.grad is not None and p.grad.any() for p in heads)
    first = network.blocks[0].attn.qkv.weight.grad
    assert first is not None and first.any()
    hidden = [p for frozen in [*alignment.frozen, ema] for p in frozen.parameters()]
    assert hidden and all(p.grad is None and not p.requires_grad for p in hidden)
    # neither the optimiser, nor DDP, nor a checkpoint sees a frozen network
    assert {id(p) for p in learner.parameters()} == {id(p) for p in [*network.parameters(), *heads]}
    assert set(alignment.state_dict()) == {key for key, _ in alignment.named_parameters()}
    assert {"diffusion", name} == set(learner(whole))


@pytest.mark.parametrize("name", ALL)
def test_two_ranks_equal_one_except_where_the_batch_couples(name: str, build: Callable[..., Alignment]) -> None:
    alignment = build(name)
    learner = Learner(perturbed(SPEC), {name: alignment}, ema=perturbed(SPEC, seed=5))
    whole = micro_batch(alignment)
    together, left, right = (
        gradients(learner, part(whole, index)) for index in (slice(0, 6), slice(0, 3), slice(3, 6))
    )
    error = max(
        ((left[key] + right[key]) / 2 - value).abs().max() / value.abs().max().clamp(min=1e-3)
        for key, value in together.items()
    )
    assert error > 1e-3 if alignment.coupled else error < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_an_empty_selection_costs_nothing_and_reaches_every_head(name: str, build: Callable[..., Alignment]) -> None:
    """DDP waits for a gradient of every head, even on a rank none of whose samples lies in the interval."""
    alignment = build(name)
    learner = Learner(perturbed(SPEC), {name: alignment}, ema=perturbed(SPEC, seed=5))
    plain = gradients(Learner(learner.network), micro_batch(alignment))
    selected = micro_batch(alignment, selections={name: Selection(torch.arange(0), 0.0)})
    assert learner(selected)[name] == 0
    both = gradients(learner, selected)
    assert {key for key, _ in learner.named_parameters()} == set(both)
    assert all(torch.equal(both[key], value) for key, value in plain.items())


def test_queries_and_keys_are_those_of_the_block_and_change_nothing() -> None:
    network, (x, t, y) = perturbed(SPEC), (torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 10]))
    seen = {}
    network.blocks[2].attn.qkv.register_forward_hook(lambda _, __, out: seen.update(qkv=out))
    plain = network(x, t, y, taps=[3])
    tapped = network(x, t, y, taps={QK(3), 3})
    assert torch.equal(plain.velocity, tapped.velocity) and torch.equal(plain.features[3], tapped.features[3])
    q, k, _ = seen["qkv"].chunk(3, dim=-1)
    for head in range(4):
        slot = slice(32 * head, 32 * head + 32)
        assert torch.equal(tapped.features[QK(3)][:, 0, head], q[..., slot])
        assert torch.equal(tapped.features[QK(3)][:, 1, head], k[..., slot])
    early = network(x, t, y, taps=[QK(3)], exit_early=True)
    assert early.velocity is None and torch.equal(early.features[QK(3)], tapped.features[QK(3)])
    with pytest.raises(UserError, match="block 9"):
        network(x, t, y, taps=[QK(9)])
    for block in network.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(
        network(x, t, y, taps=[QK(3)]).features[QK(3)], tapped.features[QK(3)], rtol=0, atol=1e-6
    )


# --- published settings
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "expected"),
    [
        ("repa", "depth", (4, 8, 8)),
        ("haste", "depth", (8, 8, 8)),
        ("haste", "stop_steps", (100_000, 250_000, 250_000)),
        ("haste", "attention_depths", ((5, 6, 7, 8),) * 3),
        ("haste", "encoder_depths", ((-4, -3, -2, -1),) * 3),
        ("dispersive", "depth", (3, 6, 7)),
        ("layersync", "depth", (4, 8, 8)),
        ("layersync", "target_depth", (8, 18, 16)),
        ("sra", "depth", (3, 6, 8)),
        ("sra", "target_depth", (8, 16, 20)),
    ],
)
def test_blocks_and_stops_as_published(name: str, field: str, expected: tuple) -> None:
    kind = find(name)
    for size, value in zip(("SiT-B/2", "SiT-L/2", "SiT-XL/2"), expected, strict=True):
        spec = models.spec(size, in_channels=4, input_size=32, num_classes=1000)
        assert getattr(kind.resolve(kind.Options(), spec), field) == value, size


@pytest.mark.parametrize("name", ["latent", "guided", "repa", "haste"])
def test_a_head_is_as_wide_as_published_and_follows_a_smaller_network(name: str) -> None:
    kind = find(name)
    own = {"guided": {"guiding_ckpt": "c"}}.get(name, {})

    def hidden(width: int, **given: int) -> int:
        spec = replace(
            models.spec("SiT-B/2", in_channels=4, input_size=32, num_classes=10), hidden_size=width, num_heads=4
        )
        return kind.resolve(kind.Options(**own, **given), spec).hidden

    published = {size[1] for family in models.ARCHITECTURES.values() for size in family.sizes.values()} - {64, 128}
    assert min(published) == 384 and {hidden(width) for width in published} == {2048}
    assert [hidden(width) for width in (96, 128, 192)] == [384, 512, 768] and hidden(128, hidden=2048) == 2048


def test_both_settings_of_dispersive_and_weights_as_published() -> None:
    kind, spec = find("dispersive"), models.spec("SiT-B/2", in_channels=4, input_size=32, num_classes=1000)
    resolved = {name: kind.resolve(kind.Options(**preset["options"]), spec) for name, preset in kind.presets.items()}
    assert [(o.weight, o.temperature, o.depth) for o in resolved.values()] == [(0.5, 0.5, 3), (0.25, 1.0, 12)]
    assert kind.resolve(kind.Options(), spec) == resolved["paper"]
    assert {name: find(name).Options().weight for name in ("repa", "haste", "layersync", "sra")} == {
        "repa": 0.5,
        "haste": 0.5,
        "layersync": 0.2,
        "sra": 0.2,
    }


def test_blocks_that_contradict_each_other_are_refused() -> None:
    sync, haste = find("layersync"), find("haste")
    with pytest.raises(UserError, match="before"):  # the authors' defaults: a block that follows itself
        sync.resolve(sync.Options(depth=4, target_depth=4), SPEC)
    with pytest.raises(UserError, match="pairs"):
        haste.resolve(haste.Options(attention_depths=(1, 2), encoder_depths=(1,)), SPEC)
    with pytest.raises(UserError, match="beyond"):
        haste.resolve(haste.Options(attention_depths=(6, 7)), SPEC)


# --- schedules
# ----------------------------------------------------------------------------------------------------------


def test_the_weight_at_the_corners_of_every_schedule() -> None:
    constant = AlignOptions(stop_steps=100)
    assert [constant.weight_at(step, constant.stop(10), 10) for step in (0, 99, 100, 500)] == [0.5, 0.5, 0.0, 0.0]
    linear, cosine = (AlignOptions(schedule=name, stop_epochs=10) for name in ("linear", "cosine"))
    assert [linear.weight_at(step, linear.stop(10), 10) for step in (0, 25, 50, 100)] == pytest.approx(
        [0.5, 0.375, 0.25, 0.0]
    )
    assert [cosine.weight_at(step, cosine.stop(10), 10) for step in (0, 50, 100)] == pytest.approx([0.5, 0.25, 0.0])
    assert cosine.weight_at(25, cosine.stop(10), 10) == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    assert AlignOptions().weight_at(10**9, AlignOptions().stop(10), 10) == 0.5
    with pytest.raises(UserError, match="stop"):
        AlignOptions(schedule="cosine").stop(10)


def test_the_tail_of_sra_at_its_corners() -> None:
    """Epochs from 0: flat up to and with 149, a tenth after a thousand more; 0.0447 at epoch 800."""
    options, epoch = SraOptions(), 5004
    assert [options.weight_at(step, options.stop(epoch), epoch) for step in (0, 149 * epoch, 150 * epoch - 1)] == [
        0.2,
        0.2,
        0.2,
    ]
    assert options.weight_at(150 * epoch, options.stop(epoch), epoch) == pytest.approx(0.2 * 10**-0.001)
    assert options.weight_at(800 * epoch, options.stop(epoch), epoch) == pytest.approx(0.0447, abs=5e-5)
    assert options.weight_at(1149 * epoch, options.stop(epoch), epoch) == pytest.approx(0.02)
    wide = SraOptions(**find("sra").presets["paper-512"]["options"])
    assert wide.weight_at(100 * epoch - 1, wide.stop(epoch), epoch) == 0.2 and wide.weight_at(
        899 * epoch, wide.stop(epoch), epoch
    ) == pytest.approx(0.02)
    late = SraOptions(**find("sra").presets["token-cosine"]["options"])
    assert late.weight_at(800 * epoch, late.stop(epoch), epoch) == 0.5


def test_haste_stops_hard() -> None:
    kind, spec = find("haste"), models.spec("SiT-XL/2", in_channels=4, input_size=32, num_classes=1000)
    options = kind.resolve(kind.Options(), spec)
    assert [options.weight_at(step, options.stop(5004), 5004) for step in (0, 249_999, 250_000)] == [0.5, 0.5, 0.0]


# --- formulas
# -----------------------------------------------------------------------------------------------------------


def test_repa_gives_the_authors_numbers() -> None:
    """Their network, their projector, their features: denoising loss per sample and projection loss."""
    from alignment.repa import Repa

    weights, _ = parity("repa_sit")
    _, stored = parity("repa_loss")
    names = models.outline(PARITY_SIT).state_dict()
    network = models.build(PARITY_SIT, weights={name: value for name, value in weights.items() if name in names})
    repa = Repa.__new__(Repa)
    Alignment.__init__(repa, Repa.Options(), None)
    repa.taps = (2,)
    head = torch.nn.Sequential(
        torch.nn.Linear(48, 32), torch.nn.SiLU(), torch.nn.Linear(32, 32), torch.nn.SiLU(), torch.nn.Linear(32, 24)
    )
    head.load_state_dict(
        {k.removeprefix("projectors.0."): v for k, v in weights.items() if k.startswith("projectors.0.")}
    )
    repa.head, repa.external = head, lambda _: type("Encoded", (), {"tokens": stored["encoder_features"]})
    samples = Batch(stored["x0"], stored["eps"], stored["t"], stored["y"], stored["y"])
    losses = Learner(network, {"repa": repa})(samples)
    torch.testing.assert_close(losses["diffusion"], stored["denoising_loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses["repa"], stored["projection_loss"], rtol=0, atol=1e-5)


def test_repa_against_a_loop_over_tokens(build: Callable[..., Alignment]) -> None:
    repa, network = build("repa"), perturbed(SPEC)
    seen = context_of(network, micro_batch(repa), repa.taps)
    value = repa(seen)
    for n in range(6):
        tokens = repa.external.encoder.model.forward_features(
            seen.columns["image"][n : n + 1].permute(0, 3, 1, 2) / 127.5 - 1
        )
        total = 0.0
        for i in range(16):
            a, b = (
                repa.head(seen.features[repa.taps[0]][n, i]).detach(),
                tokens[0, 1 + i],
            )  # the class token comes first
            total += float(a @ b / (a.norm() * b.norm()))
        assert float(value[n].detach()) == pytest.approx(-total / 16, abs=1e-5)


@pytest.mark.parametrize(
    ("preset", "lambda_", "share", "reach"), [("irepa", 1.0, 0.6, (0,)), ("irepa-jit", 0.5, 0.8, (-1, 0, 1))]
)
def test_irepa_against_loops(
    preset: str, lambda_: float, share: float, reach: tuple[int, ...], build: Callable[..., Alignment]
) -> None:
    """The convolution and the mean and deviation over space, element by element."""
    network = perturbed(SPEC)
    irepa = build("repa", **find("repa").presets[preset]["options"])
    assert irepa.options.weight == lambda_
    seen = context_of(network, micro_batch(irepa), irepa.taps)
    value, feature = irepa(seen).detach(), seen.features[irepa.taps[0]].detach()
    weight, bias = irepa.head.conv.weight.detach(), irepa.head.conv.bias.detach()
    for n in (0, 5):
        tokens = irepa.external.encoder.model.forward_features(
            seen.columns["image"][n : n + 1].permute(0, 3, 1, 2) / 127.5 - 1
        )[0, 1:]
        centre, spread = tokens.mean(0), ((tokens - tokens.mean(0)) ** 2).sum(0).div(15).sqrt()
        total = 0.0
        for row in range(4):
            for column in range(4):
                a = bias.clone()
                for down, right in ((down, right) for down in reach for right in reach):
                    if 0 <= row + down < 4 and 0 <= column + right < 4:
                        tap = weight[:, :, down - reach[0], right - reach[0]]
                        a += tap @ feature[n, 4 * (row + down) + column + right]
                b = (tokens[4 * row + column] - share * centre) / (spread + 1e-6)
                total += float(a @ b / (a.norm() * b.norm()))
        assert float(value[n]) == pytest.approx(-total / 16, abs=1e-5)
    # PyTorch's initialisation, of which the authors change only that of linear layers
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(128, 32, len(reach), padding=len(reach) // 2)
    for ours, other in zip(irepa.head.conv.parameters(), layer.parameters(), strict=True):
        assert ours.shape == other.shape
        assert ours.std().item() == pytest.approx(other.std().item(), rel=0.2 if ours.ndim == 1 else 0.05)
        assert ours.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.1)


def test_a_label_code_holds_the_true_label_and_nothing_else(build: Callable[..., Alignment]) -> None:
    network, alignment, other = perturbed(SPEC), build("label-code", size=7.0), build("label-code")
    codes = alignment.codes
    assert codes.shape == (10, 128) and codes.square().mean().sqrt() == pytest.approx(7, rel=1e-5)
    torch.testing.assert_close(codes, 7 * other.codes)  # of the seed alone
    assert torch.linalg.matrix_rank(codes) == 10
    whole = micro_batch(alignment)
    context = context_of(network, whole, alignment.taps, "label-code")
    prediction = alignment.head(context.features[3]).detach()
    expected = [float(((prediction[i] - codes[label]) ** 2).mean()) for i, label in enumerate(whole.labels)]
    assert alignment(context).tolist() == pytest.approx(expected, rel=1e-5)
    assert (whole.labels != whole.y).any()  # some labels are dropped for the student


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        # the floor(5 u)-th of the five other samples, in order
        ({}, [1, 3, 5, 2, 1, 4]),
        # the floor(3 u)-th of the three samples of the other class
        ({"negatives": "other-class"}, [2, 3, 5, 1, 1, 4]),
    ],
)
def test_contrastive_against_a_loop_over_pairs(
    options: dict[str, str], pairs: list[int], build: Callable[..., Alignment]
) -> None:
    from alignment.contrastive import others

    network, alignment = perturbed(SPEC), build("contrastive", **options)
    whole = micro_batch(alignment)
    whole = Batch(
        whole.x0,
        whole.eps,
        whole.t,
        whole.y,
        torch.tensor([0, 0, 1, 1, 1, 0]),
        draws={"contrastive": {"choice": torch.tensor([0.0, 0.4, 0.99, 0.5, 0.34, 0.999])}},
    )
    velocity = network(interpolant.corrupt(whole.x0, whole.eps, whole.t), whole.t, whole.y).velocity.detach()
    total = sum(float(((velocity[i] - (whole.eps[j] - whole.x0[j])) ** 2).mean()) for i, j in enumerate(pairs))
    assert float(alignment(context_of(network, whole, alignment.taps, "contrastive")).detach()) == pytest.approx(
        -total / 6, rel=1e-5
    )
    # one class: any other sample; one sample: none
    choice = torch.linspace(0, 0.999, 9).repeat(3)[:25]
    for labels, candidates in ((torch.zeros(25), 24), (torch.arange(25) % 5, 20), (torch.arange(25), 24)):
        index, exists = others(labels, choice)
        assert exists.all() and (index != torch.arange(25)).all()
        assert candidates == 24 or (labels[index] != labels).all()
        for i in range(25):
            allowed = [j for j in range(25) if j != i and (candidates == 24 or labels[j] != labels[i])]
            assert int(index[i]) == allowed[int(choice[i] * candidates)]
    index, exists = others(torch.zeros(1), torch.tensor([0.7]))
    assert not exists.any() and index.tolist() == [0]


def test_haste_attention_against_loops(build: Callable[..., Alignment]) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=generator), torch.randn(2, 2, 3, 4, 7, generator=generator)
    value = attention_loss(student, teacher)
    for n in range(2):
        total = 0.0
        for head in range(3):
            for query in range(4):
                guess, goal = (
                    torch.stack([qk[n, 0, head, query] @ qk[n, 1, head, key] for key in range(4)]) / qk.shape[-1] ** 0.5
                    for qk in (student, teacher)
                )
                p_s, p_t = guess.exp() / guess.exp().sum(), goal.exp() / goal.exp().sum()
                total -= float((p_t * p_s.log()).sum())
        assert float(value[n]) == pytest.approx(total / 12, rel=1e-5)
    extreme = attention_loss(1000 * student, teacher)
    assert extreme.isfinite().all()  # log of softmax would be -inf


def test_haste_is_repa_plus_the_mean_over_its_pairs(build: Callable[..., Alignment]) -> None:
    haste, network = build("haste", attention=0.7), perturbed(SPEC)
    assert haste.pairs == ((1, 1), (2, 2), (3, 3), (4, 4)) and haste.taps[0] == 4
    seen = context_of(network, micro_batch(haste), haste.taps)
    target = haste.external(seen)
    features = -F.cosine_similarity(haste.head(seen.features[4]), target.tokens, dim=-1).mean(1)
    maps = torch.stack([attention_loss(seen.features[QK(n)], target.attention[n]) for n in (1, 2, 3, 4)]).mean(0)
    torch.testing.assert_close(haste(seen), features + 0.7 * maps)


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a convolutional encoder with random weights, whose stage of stride 8 has the student's grid."""
    file = tmp_path_factory.mktemp("mobilenet") / "mobilenet.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("mobilenetv2_100").state_dict(), file)
    return {"encoder": "mobilenetv2_100", "encoder_weights": str(file), "encoder_stage": 3}


def test_repa_takes_a_convolutional_encoder(build: Callable[..., Alignment], mobilenet: dict[str, Any]) -> None:
    repa, network = build("repa", **mobilenet), perturbed(SPEC)
    seen = context_of(network, micro_batch(repa), repa.taps)
    assert repa.external.encoder.side == 32
    tokens = repa.external.encoder(seen.columns["image"]).tokens
    assert tokens.shape == (6, 16, 32)
    expected = -F.cosine_similarity(repa.head(seen.features[repa.taps[0]]), tokens, dim=-1).mean(1)
    torch.testing.assert_close(repa(seen), expected)
    repa(seen).mean().backward()
    assert all(parameter.grad is not None for parameter in repa.head.parameters())
    assert all(parameter.grad is None for parameter in repa.external.encoder.parameters())


def test_a_run_with_a_convolutional_encoder_takes_its_steps(
    tmp_path: Path, words: Words, mobilenet: dict[str, Any]
) -> None:
    more = ["--align", "repa", "--align-hidden", 32, "--max-train-steps", 2]
    more += ["--align-encoder", "mobilenetv2_100", "--align-encoder-weights", mobilenet["encoder_weights"]]
    plain, cached = (
        read(train.main(words(tmp_path, name, *more, "--align-encoder-stage", -3, *rest)) / "log.jsonl")
        for name, rest in (("plain", ()), ("cached", ("--align-cache",)))
    )
    assert len(plain) == 2 and -1 <= plain[0]["loss/repa"] <= 1
    for first, second in zip(plain, cached, strict=True):
        assert first["loss/repa"] == pytest.approx(second["loss/repa"], rel=1e-4)


def test_haste_needs_attention_maps_unless_their_weight_is_0(
    build: Callable[..., Alignment], mobilenet: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="convolutional and has no attention maps for HASTE: give --haste-attention 0"):
        build("haste", **mobilenet)
    haste, network = build("haste", **mobilenet, attention=0.0), perturbed(SPEC)
    seen = context_of(network, micro_batch(haste), haste.taps)
    target = haste.external(seen)
    features = -F.cosine_similarity(haste.head(seen.features[haste.taps[0]]), target.tokens, dim=-1).mean(1)
    torch.testing.assert_close(haste(seen), features)
    assert haste.pairs == () and haste.taps == (4,)
    with pytest.raises(UserError, match="--haste-attention 0 compares no blocks"):
        build("haste", attention=0.0, attention_depths=(1,))
    # the transformer's maps are not computed either
    assert build("haste", attention=0.0).external.attention == ()


def test_haste_compares_the_first_heads_where_the_student_has_more(
    build: Callable[..., Alignment], encoder: Path
) -> None:
    haste = build("haste")
    haste.heads, network = 2, perturbed(SPEC)
    seen = context_of(network, micro_batch(haste), haste.taps)
    value = haste(seen)
    for n in (1, 2, 3, 4):
        seen.features[QK(n)] = torch.cat([seen.features[QK(n)][:, :, :2], torch.randn(6, 2, 2, 16, 32)], dim=2)
    torch.testing.assert_close(haste(seen), value)


def test_dispersive_against_the_whole_matrix_with_its_diagonal(build: Callable[..., Alignment]) -> None:
    for temperature in (0.5, 1.0):
        loss, network = build("dispersive", temperature=temperature), perturbed(SPEC)
        seen = context_of(network, micro_batch(loss), loss.taps)
        z = seen.features[loss.taps[0]].detach().double().flatten(1)
        matrix = [
            [math.exp(-float(((z[i] - z[j]) ** 2).sum()) / (16 * 128) / temperature) for j in range(6)]
            for i in range(6)
        ]
        assert float(loss(seen).detach()) == pytest.approx(math.log(np.mean(matrix)), abs=1e-5)
        assert all(matrix[i][i] == 1 for i in range(6))
    same = {loss.taps[0]: torch.ones(5, 16, 128, requires_grad=True)}
    flat = loss(Context(*[torch.zeros(5)] * 6, same, {}, {}))
    flat.backward()
    assert float(flat.detach()) == 0 and same[loss.taps[0]].grad.isfinite().all()
    apart = {loss.taps[0]: 1e3 * torch.arange(5.0)[:, None, None].expand(5, 16, 128)}
    assert float(loss(Context(*[torch.zeros(5)] * 6, apart, {}, {}))) == pytest.approx(-math.log(5))
    alone = {loss.taps[0]: torch.randn(1, 16, 128)}
    assert float(loss(Context(*[torch.zeros(1)] * 6, alone, {}, {}))) == 0


def test_layersync_follows_and_is_not_followed(build: Callable[..., Alignment]) -> None:
    sync, network = build("layersync"), perturbed(SPEC)
    assert sync.taps == (2, 4)
    seen = context_of(network, micro_batch(sync), sync.taps)
    value = sync(seen)
    for n in range(6):
        pairs = zip(seen.features[2][n], seen.features[4][n], strict=True)
        assert value[n].item() == pytest.approx(
            -np.mean([(a @ b / (a.norm() * b.norm())).item() for a, b in pairs]), abs=1e-5
        )
    value.sum().backward()
    assert network.blocks[1].mlp.fc1.weight.grad.any()
    assert all(block.mlp.fc1.weight.grad is None for block in network.blocks[2:])


@pytest.mark.parametrize("distance", ["smooth-l1", "cosine", "token-cosine"])
def test_sra_against_its_formula(distance: str, build: Callable[..., Alignment]) -> None:
    sra, network, ema = build("sra", distance=distance), perturbed(SPEC), perturbed(SPEC, seed=5)
    assert sra.taps == (2,) and sra.options.target_depth == 4
    samples = micro_batch(sra)
    value = sra(context_of(network, samples, sra.taps, "sra", ema))
    offset = samples.draws["sra"]["offset"]
    assert offset.min() >= 0 and offset.max() < 0.2 and offset.std() > 0
    earlier = torch.maximum(samples.t - offset, torch.zeros(6))
    assert (samples.t < offset).any()  # the clamp acts
    xt = (1 - earlier)[:, None, None, None] * samples.x0 + earlier[:, None, None, None] * samples.eps
    goal = ema(xt, earlier, samples.y, taps=[4]).features[4].detach()  # labels after dropout, block 4 of the average
    guess = sra.head(
        network(interpolant.corrupt(samples.x0, samples.eps, samples.t), samples.t, samples.y, taps=[2]).features[2]
    )
    for n in range(6):
        a, b = guess[n].double(), goal[n].double()
        if distance == "smooth-l1":
            d = (a - b).abs()
            expected = torch.where(d < 0.05, d**2 / 0.1, d - 0.025).mean()
        else:
            axis = 1 if distance == "cosine" else 0  # of (tokens, channels)
            expected = 1 - ((a * b).sum(axis) / (a.norm(dim=axis) * b.norm(dim=axis))).mean()
        assert value[n].item() == pytest.approx(expected.item(), rel=1e-4)
    value.sum().backward()
    assert all(p.grad is None for p in ema.parameters())


def test_sra_without_offset_sees_the_same_noise(build: Callable[..., Alignment]) -> None:
    sra, network = build("sra", offset=0.0), perturbed(SPEC)
    samples = micro_batch(sra)
    seen = context_of(network, samples, (4,), "sra", network)
    torch.testing.assert_close(sra.target(seen), seen.features[4])


def test_the_distances_of_dispersive_and_their_gradient_are_those_of_pdist_without_its_memory() -> None:
    """Rows far from the origin and close together: there |a|^2 + |b|^2 - 2ab without centring keeps no digit."""
    from alignment.dispersive import SquaredDistances

    z = (100 + 0.1 * torch.randn(24, 512, generator=torch.Generator().manual_seed(0))).requires_grad_()
    weights = torch.rand(24, 24, generator=torch.Generator().manual_seed(1))
    upper = torch.triu_indices(24, 24, 1)
    pairs = torch.pdist(z.double()).square()
    with torch.autocast("cpu", torch.bfloat16):
        matrix = SquaredDistances.apply(z)
    torch.testing.assert_close(matrix[upper[0], upper[1]].double(), pairs, rtol=1e-4, atol=0)
    assert torch.equal(matrix, matrix.T) and not matrix.diagonal().any()
    (expected,) = torch.autograd.grad((pairs * (weights + weights.T)[upper[0], upper[1]]).sum(), z)
    (gradient,) = torch.autograd.grad((matrix * weights).sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        value.numel()
                        for value in (result if isinstance(result, tuple) else (result,))
                        if isinstance(value, torch.Tensor)
                    ),
                ]
            )
            return result

    with Largest():
        SquaredDistances.apply(z).sum().backward()
    assert largest == z.numel()  # pdist's backward makes 24 x 23 / 2 rows of differences
