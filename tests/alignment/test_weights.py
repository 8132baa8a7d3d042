"""Weights of tokens by residual and of times: formulas, and every alignment that takes or refuses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from alignment import Alignment, AlignOptions, Context, find, weights
from alignment.base import cosine, smooth_l1, squared_error
from alignment.interval import Selection
from models import patchify
from runtime.errors import UserError
from tests.alignment.conftest import SPEC
from tests.helpers import context_of, micro_batch, perturbed

TOKENWISE = sorted(name for name, kind in Alignment.registry.items() if kind.tokenwise)
OTHERS = sorted(Alignment.registry.keys() - set(TOKENWISE))


def distances(shape: tuple[int, int] = (5, 16)) -> Tensor:
    """Positive numbers of very different sizes, so that both limits of the weights are met."""
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).exp()


def reference(values: np.ndarray) -> np.ndarray:
    """RARE's weights of one sample's tokens."""
    clipped = [min(max(value / values.mean(), 0.25), 4.0) for value in values]
    return np.array(clipped) / np.mean(clipped)


def test_weights_by_residual_against_a_loop() -> None:
    values = distances().requires_grad_()
    by_residual = weights.by_residual(values)
    expected = np.stack([reference(row) for row in values.detach().double().numpy()])
    np.testing.assert_allclose(by_residual.numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(by_residual.mean(1), torch.ones(5))
    assert not by_residual.requires_grad
    # renormalised after the clip, so the ratio of the largest to the smallest keeps its bound of 16
    spread = by_residual.amax(1) / by_residual.amin(1)
    assert 15.9 < spread.max() < 16.1
    ones = torch.ones(2, 16)
    assert torch.equal(weights.by_residual(3 * ones), ones) and torch.equal(weights.by_residual(0 * ones), ones)


def test_weights_by_residual_on_a_route_are_those_of_its_tokens_alone() -> None:
    values, present = distances(), torch.arange(16) % 4 == 1
    route = (present * 4.0).expand(5, 16)
    routed = weights.by_residual(values, route)
    torch.testing.assert_close(routed[:, present], 4 * weights.by_residual(values[:, present]))
    assert not routed[:, ~present].any()
    torch.testing.assert_close(routed.mean(1), torch.ones(5))
    torch.testing.assert_close(weights.present_mean(values, route), values[:, present].mean(1))


@pytest.mark.parametrize("distance", [squared_error, smooth_l1, lambda a, b, **more: 1 - cosine(a, b, **more)])
def test_a_mean_over_tokens_calls_its_hook_with_their_distances(distance: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, 6, generator=generator) for _ in range(2))
    chosen = torch.rand(3, 4, generator=generator)
    chosen = chosen / chosen.mean(1, keepdim=True)
    seen: list[Tensor] = []
    weighed = distance(a, b, weigh=lambda values: seen.append(values) or chosen)
    by_token = torch.stack([distance(a[:, [k]], b[:, [k]]) for k in range(4)], 1)
    torch.testing.assert_close(seen[0], by_token)
    torch.testing.assert_close(weighed, (by_token * chosen).mean(1))
    # a hook that only looks changes no bit
    assert torch.equal(distance(a, b, weigh=lambda values: None), distance(a, b))


def test_images_have_tokens_too() -> None:
    a, b = (torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    chosen = distances((3, 16))
    weighed = squared_error(a, b, lambda values: chosen, patch=2)
    torch.testing.assert_close(weighed, squared_error(patchify(a, 2), patchify(b, 2), lambda values: chosen))
    assert torch.equal(squared_error(a, b, lambda values: None, patch=2), squared_error(a, b))


def weighed_by(alignment: Alignment, route: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss per sample and the gradient of each token of the first block that the alignment reads."""
    network, ema = perturbed(SPEC), perturbed(SPEC, seed=5).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in alignment.parameters():  # a last layer may begin at zero, where nothing passes
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    context = context_of(network, micro_batch(alignment), alignment.taps, alignment.name, ema)
    feature = context.features[alignment.taps[0]].detach().requires_grad_()
    features = {**{tap: value.detach() for tap, value in context.features.items()}, alignment.taps[0]: feature}
    loss = alignment(dataclasses.replace(context, features=features, token_weight=route))
    loss.sum().backward()
    return loss.detach(), feature.grad


@pytest.mark.parametrize("name", TOKENWISE)
def test_token_weights_reach_every_loss_per_token(name: str, build: Callable[..., Alignment]) -> None:
    plain, gradient = weighed_by(build(name))
    weighed, other = weighed_by(build(name, token_weights="residual"))
    # tokens that are farther away than the mean weigh more, so the weighted mean of their distances is greater
    assert (weighed > plain).all() and not torch.equal(gradient, other)
    alike = torch.ones(6, SPEC.tokens)
    same, unweighted = weighed_by(build(name), alike)
    torch.testing.assert_close(same, plain)
    torch.testing.assert_close(unweighted, gradient)


@pytest.mark.parametrize("token_weights", ["none", "residual"])
@pytest.mark.parametrize("name", TOKENWISE)
def test_tokens_of_weight_zero_have_no_gradient(name: str, token_weights: str, build: Callable[..., Alignment]) -> None:
    present = torch.arange(SPEC.tokens) % 2 == 0
    _, gradient = weighed_by(build(name, token_weights=token_weights), (2.0 * present).expand(6, -1))
    assert gradient[:, present].abs().amin(0).amax(1).all() and not gradient[:, ~present].any()


@pytest.mark.parametrize("name", TOKENWISE)
def test_a_measured_alignment_notes_the_plain_mean_of_its_distances(name: str, build: Callable[..., Alignment]) -> None:
    plain, _ = weighed_by(build(name))
    measured = build(name, schedule="plateau", plateau_steps=50)
    loss, _ = weighed_by(measured)
    assert torch.equal(loss, plain) and not measured.residual.requires_grad
    if name in ("repa", "layersync"):
        torch.testing.assert_close(measured.residual, 1 + plain)
    elif name == "haste":  # of its features alone
        torch.testing.assert_close(measured.residual, 1 + weighed_by(build(name, attention=0.0))[0])
    else:
        torch.testing.assert_close(measured.residual, plain)
    weighed = build(name, schedule="plateau", plateau_steps=50, token_weights="residual")
    weighed_by(weighed)
    torch.testing.assert_close(weighed.residual, measured.residual)


def test_losses_without_tokens_or_samples_refuse_their_weights() -> None:
    assert OTHERS == ["contrastive", "dispersive"]
    for name in OTHERS:
        for options, message in (
            ({"token_weights": "residual"}, "no distance per token"),
            ({"schedule": "plateau"}, "zero at perfect agreement"),
            ({"time_weights": "smooth"}, "not a mean over samples"),
        ):
            with pytest.raises(UserError, match=f"--{name}-.*{message}"):
                find(name).check(find(name).Options(**options))
    sra = find("sra")
    with pytest.raises(UserError, match="token-cosine has no value per token"):
        sra.check(sra.Options(distance="token-cosine", token_weights="residual"))
    sra.check(sra.Options(distance="cosine", token_weights="residual", time_weights="smooth", schedule="plateau"))


def test_the_smooth_weight_at_known_times() -> None:
    times = np.array([0.0, 0.6, 0.7, 0.8, 1.0], np.float32)
    expected = [0.99999917, 0.88079708, 0.5, 0.11920292, 0.00247262]
    np.testing.assert_allclose(weights.smooth(times), expected, rtol=1e-5)


@pytest.mark.parametrize("mask", ["select", "upstream"])
@pytest.mark.parametrize("interval", [None, (0.2, 0.8)])
def test_times_weigh_as_in_the_global_batch_however_it_is_cut(interval: tuple[float, float] | None, mask: str) -> None:
    if interval is None and mask == "upstream":
        return
    generator = np.random.default_rng(0)
    times, labelled = generator.random(24).astype(np.float32), generator.random(24) < 0.8
    losses = torch.from_numpy(generator.random(24))
    inside = np.ones(24, bool) if interval is None else (times >= 0.2) & (times <= 0.8)
    acting = labelled & (inside if mask == "select" else True)
    smooth = 1 / (1 + np.exp(-20 * (0.7 - times.astype(np.float64))))
    # the weighted mean over the samples that act, times the share of them as without weights
    expected = (smooth * losses.numpy())[acting].sum() / smooth[acting].sum() * acting.mean()
    expected *= inside.mean() if mask == "upstream" else 1

    def context(values: Tensor) -> Context:
        return Context(*[values] * 6, {}, {}, {})

    for few_sizes in (False, True):
        for parts in (1, 4, 24):
            size = 24 // parts
            means = []
            for start in range(0, 24, size):
                part = slice(start, start + size)
                selection = Selection.of(
                    interval, mask, times, part, torch.device("cpu"), few_sizes, labelled, time_weights="smooth"
                )
                means.append(selection.mean(lambda seen: seen.t, context(losses[part])))
            assert float(torch.stack(means).mean()) == pytest.approx(expected, rel=1e-6)


def test_weights_are_options_of_every_alignment() -> None:
    assert AlignOptions().token_weights == AlignOptions().time_weights == "none"
    for kind in Alignment.registry.values():
        assert {"token_weights", "time_weights", "plateau_steps"} <= set(kind.Options.__dataclass_fields__)
