"""Laws of the losses of both stages: formulas, intervals, what is trained and what is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import interpolant
import models
from alignment import Alignment, BuildContext, Context, find
from alignment.interval import Selection
from loss import Learner, flow_matching
from models.checkpoint import Checkpoint
from models.pixels import pixels
from runtime.errors import UserError
from tests.helpers import context_of, micro_batch, perturbed

SPEC = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10)


def build_context(load: object = Checkpoint.open, **more: object) -> BuildContext:
    return BuildContext(
        **{"student": SPEC, "space": pixels(1), "seed": 0, "device": torch.device("cpu"), "dtype": None, "load": load}
        | more
    )


def make(name: str, **options: object) -> Alignment:
    kind = find(name)
    return kind(kind.resolve(kind.Options(hidden=32, **options), SPEC), build_context())


def test_flow_matching_against_literal_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, 5, 5, generator=generator) for _ in range(2))
    expected = torch.stack([((x - y) ** 2).sum() / x.numel() for x, y in zip(a, b)])
    torch.testing.assert_close(flow_matching(a, b), expected)
    for n in range(3):
        cosines = [F.cosine_similarity(a[n, :, i, j], b[n, :, i, j], dim=0) for i in range(5) for j in range(5)]
        expected[n] += 1 - sum(cosines) / 25
    torch.testing.assert_close(flow_matching(a, b, "mse+cosine"), expected)


def test_plain_learner_is_the_flow_matching_loss() -> None:
    network, samples = perturbed(SPEC), micro_batch()
    losses = Learner(network)(samples)
    xt = (1 - samples.t)[:, None, None, None] * samples.x0 + samples.t[:, None, None, None] * samples.eps
    prediction = network(xt, samples.t, samples.y).velocity
    assert list(losses) == ["diffusion"]
    torch.testing.assert_close(
        losses["diffusion"], ((prediction - (samples.eps - samples.x0)) ** 2).mean(dim=(1, 2, 3))
    )


def test_latent_loss_regresses_the_clean_latent_in_token_layout() -> None:
    network, samples, alignment = perturbed(SPEC), micro_batch(), make("latent")
    value = alignment(context_of(network, samples, alignment.taps))
    feature = context_of(network, samples, (1,)).features[1]
    # preset `paper`: n = depth/6, and the latent of token (row, column) is its 2x2 patch
    assert alignment.taps == (1,) and make("latent", depth=3).taps == (3,)
    head = alignment.head(feature)
    for n in range(len(samples.t)):
        total = 0.0
        for row in range(4):
            for column in range(4):
                patch = samples.x0[n, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
                total = total + ((head[n, 4 * row + column] - patch) ** 2).sum()
        torch.testing.assert_close(value[n], total / (16 * 4))


def test_upstream_preset_of_stage_1() -> None:
    kind = find("latent")
    options = kind.resolve(kind.Options(**kind.presets["upstream"]["options"], hidden=32), SPEC)
    assert (options.depth, options.target, options.mask, options.interval) == (1, "velocity", "upstream", (0.4, 0.7))
    assert kind.presets["upstream"]["train"] == {"qk_norm": True}
    alignment, samples = kind(options, build_context()), micro_batch()
    context = context_of(perturbed(SPEC), samples, alignment.taps)
    mlp, norm, last = alignment.head
    assert not list(norm.parameters())
    predicted = models.unpatchify(last(F.layer_norm(mlp(context.features[1]), (128,), eps=1e-6)), 2)
    torch.testing.assert_close(alignment(context), ((predicted - (samples.eps - samples.x0)) ** 2).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("name", "block", "thirds", "sixth"), [("SiT-B/2", 6, 8, 2), ("SiT-L/2", 12, 16, 4), ("SiT-XL/2", 14, 19, 5)]
)
def test_layers_of_the_published_sizes(name: str, block: int, thirds: int, sixth: int) -> None:
    from models.backbone import block_number

    spec = models.spec(name, in_channels=4, input_size=32, num_classes=1000)
    guided = find("guided")
    options = guided.resolve(guided.Options(guiding_ckpt="x"), spec)
    shares = [block_number(spec.depth, share, None, "") for share in (2 / 3, 1 / 6)]
    assert (options.guided_depth, *shares) == (block, thirds, sixth)
    assert options.guide_scale == 30 and options.stop_epochs == (20 if name == "SiT-B/2" else 10)
    assert options.stop(5004) == (100_080 if name == "SiT-B/2" else 50_040)
    assert guided.resolve(guided.Options(guiding_ckpt="x", stop_steps=0), spec).stop(5004) is None  # 0 is never


def test_guided_target_is_the_guided_feature_of_the_whole_teacher(teacher: Path) -> None:
    samples = micro_batch()
    xt = interpolant.corrupt(samples.x0, samples.eps, samples.t)
    full = Checkpoint.open(teacher).network("raw")
    with torch.no_grad():
        conditional = full(xt, samples.t, samples.labels, taps=(4,)).features[4]
        unconditional = full(xt, samples.t, torch.full_like(samples.labels, 10), taps=(4,)).features[4]
        dropped = full(xt, samples.t, samples.y, taps=(4,)).features[4]
    context = Context(samples.x0, samples.eps, xt, samples.t, samples.y, samples.labels, {}, {}, {})

    rows: list[int] = []

    def target(**options: object) -> Tensor:
        alignment = make("guided", guiding_ckpt=str(teacher), **options)
        alignment.teacher.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        return alignment.target(context)

    alignment = make("guided", guiding_ckpt=str(teacher))
    assert len(alignment.teacher.network.blocks) == 4 and alignment.teacher.network.final_layer is None
    torch.testing.assert_close(
        alignment.target(context), unconditional + 30 * (conditional - unconditional), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(target(guide_scale=1.0), conditional)
    torch.testing.assert_close(target(guide_scale=0.0), unconditional)
    assert rows == [6, 6]  # one pass of the six samples, where both would be twelve rows
    # labels after dropout: a dropped sample has f_c = f_u, so its target is the unconditional feature at any scale
    with_dropped = target(guiding_labels="dropped")
    torch.testing.assert_close(with_dropped, unconditional + 30 * (dropped - unconditional), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(with_dropped[2], unconditional[2])
    assert not torch.allclose(target(guiding_weights="ema"), target())
    assert not torch.allclose(target(guiding_depth=2), target())


def test_guided_loss_against_the_formula(teacher: Path) -> None:
    network, samples = perturbed(SPEC), micro_batch()
    alignment = make("guided", guiding_ckpt=str(teacher))
    context = context_of(network, samples, alignment.taps)
    feature, target = alignment.head(context.features[3]), alignment.target(context)
    torch.testing.assert_close(alignment(context), ((feature - target) ** 2).sum(dim=(1, 2)) / (16 * 128))


def test_gradients_reach_student_and_head_and_never_the_teacher(teacher: Path) -> None:
    network, samples = perturbed(SPEC), micro_batch()
    alignment = make("guided", guiding_ckpt=str(teacher))
    learner = Learner(network, {"guided": alignment})
    learner(samples)["guided"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in alignment.head.parameters())
    for number, block in enumerate(network.blocks, start=1):
        reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
        assert reached == (number <= 3)
    frozen = list(alignment.teacher.network.parameters())
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
    held = {p.data_ptr() for p in learner.parameters()}
    assert not held & {p.data_ptr() for p in frozen} and not any("teacher" in name for name in learner.state_dict())


@pytest.mark.parametrize("low, high", [(0.4, 0.7), (0.0, 1.0), (0.96, 0.99)])
def test_interval_masks(low: float, high: float) -> None:
    """`select` is (1/N) sum m_i l_i, gradients included; `upstream` is mean(m) mean(l); an empty range gives zero."""
    network, alignment, samples = perturbed(SPEC), make("latent"), micro_batch()
    each = alignment(context_of(network, samples, alignment.taps))
    inside = ((samples.t >= low) & (samples.t <= high)).float()
    learner = Learner(network, {"latent": alignment})
    expected = torch.autograd.grad(
        (inside * each).sum() / len(samples.t), list(alignment.parameters()), retain_graph=True
    )
    some = Selection.of((low, high), "select", samples.t.numpy(), slice(None), samples.t.device)
    selected = learner(dataclasses.replace(samples, selections={"latent": some}))["latent"]
    torch.testing.assert_close(selected, (inside * each).sum() / len(samples.t))
    for gradient, wanted in zip(torch.autograd.grad(selected, list(alignment.parameters())), expected):
        torch.testing.assert_close(gradient, wanted, atol=1e-7, rtol=1e-5)  # zeros, not None, where nothing is in range
    weighed = Selection.of((low, high), "upstream", samples.t.numpy(), slice(None), samples.t.device)
    upstream = learner(dataclasses.replace(samples, selections={"latent": weighed}))["latent"]
    torch.testing.assert_close(upstream, inside.mean() * each.mean())


def test_upstream_mask_is_the_authors_broadcast() -> None:
    """(B,) * (B,1,1,1) broadcasts to (B,1,1,B), whose mean is mean(m) mean(l): nothing is selected."""
    losses, mask = torch.rand(5, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 0], dtype=torch.float64)
    product = losses * mask.view(5, 1, 1, 1)
    assert product.shape == (5, 1, 1, 5)
    torch.testing.assert_close(product.mean(), mask.mean() * losses.mean())


@pytest.mark.parametrize(
    "change, word",
    [({"num_classes": 7}, "classes"), ({"patch_size": 1}, "tokens"), ({"input_size": 4, "patch_size": 1}, "latents")],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher: Path, change: dict, word: str) -> None:
    kind = find("guided")
    student = dataclasses.replace(SPEC, **change)
    options = kind.resolve(kind.Options(guiding_ckpt=str(teacher), hidden=8), student)
    with pytest.raises(UserError, match=word):
        kind(options, build_context(student=student))


def test_a_teacher_of_another_scale_is_refused_and_of_another_width_welcome(teacher: Path) -> None:
    kind = find("guided")
    options = kind.resolve(kind.Options(guiding_ckpt=str(teacher), hidden=8), SPEC)
    with pytest.raises(UserError, match="scale"):
        kind(options, build_context(space=pixels(1, scale=(2.0,))))
    student = dataclasses.replace(SPEC, hidden_size=64, depth=4)
    options = kind.resolve(kind.Options(guiding_ckpt=str(teacher), hidden=8), student)
    alignment = kind(options, build_context(student=student))
    assert alignment(context_of(perturbed(student), micro_batch(), alignment.taps)).shape == (6,)


def test_layers_beyond_the_depth_are_refused(teacher: Path) -> None:
    with pytest.raises(UserError, match="7 is beyond"):
        make("latent", depth=7)
    with pytest.raises(UserError, match="9 is beyond"):
        make("guided", guiding_ckpt=str(teacher), guiding_depth=9)
    with pytest.raises(UserError, match="0 is beyond"):
        make("guided", guiding_ckpt=str(teacher), guided_depth=0)
