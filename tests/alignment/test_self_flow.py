"""Self-Flow and SRA-DTS-AS: the peers' own losses, and laws of two times and routes in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import models
import train
from alignment import BuildContext
from alignment.base import token_cosine
from alignment.latent import Latent, LatentOptions
from alignment.self_flow import SelfFlow, SelfFlowOptions
from loss import Batch, Learner
from models import layouts
from models.checkpoint import Checkpoint
from models.latents import LatentSpace
from models.layers import patchify
from models.routing import Route, Segments
from runtime.errors import UserError
from runtime.jsonlines import read
from runtime.options import build
from tests.helpers import PARITY_SIT, Words, assert_same_bits, build_run, parity, perturbed
from training.batches import arranged
from training.cost import attention_on_cpu

SPACE = LatentSpace(name="x", channels=4, stride=1, shift=(0.0,), scale=(1.0,))


def built(preset: str, **options: object) -> SelfFlow:
    given = build(SelfFlowOptions, SelfFlow.presets[preset]["options"], options, section="self-flow")
    resolved = SelfFlow.resolve(given, PARITY_SIT)
    return SelfFlow(resolved, BuildContext(PARITY_SIT, SPACE, 0, torch.device("cpu"), None, lambda _: None))


def drawn(alignment: SelfFlow, batch: Batch) -> Batch:
    return arranged(batch, {alignment.name: alignment}, None, None)


def batch_of(stored: dict[str, Tensor], draws: dict[str, Tensor], times: Tensor, noise: Tensor) -> Batch:
    """The labels hold the null label already."""
    y, columns = stored["y"], {"time": times[:, 0]}
    return Batch(stored["x0"], noise, times[:, 1], y, y, columns, {"self-flow": draws})


CASES = {
    "sra": ("dts-as", {}),
    "same": ("dts-as", {"offset": 0.0}),
    "sra_full_share": ("dts-as", {"share": 0.5, "full_share": 0.5}),
    "self_flow": ("dts-as", {"separate": False, "teacher_time": "min"}),
}


@pytest.mark.parametrize("distance", ["token-cosine", "cosine"])
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_dts_as(case: str, distance: str) -> None:
    weights, stored = parity("dts_as")
    tensors = layouts.convert_network(weights, "dts_as", num_heads=4).weights
    student = models.build(PARITY_SIT, weights=tensors)
    teacher = models.build(PARITY_SIT, weights={name: 0.9 * value for name, value in tensors.items()})
    preset, options = CASES[case]
    alignment = built(preset, **options, depth=2, target_depth=3, distance=distance)
    with torch.no_grad():
        for layer, name in ((0, "linear1"), (2, "linear2")):
            alignment.head[layer].weight.copy_(weights[f"ap_head.{name}.weight"])
            alignment.head[layer].bias.copy_(weights[f"ap_head.{name}.bias"])
    own = {key.removeprefix(f"{case}."): value for key, value in stored.items() if key.startswith(f"{case}.")}
    draws = {
        "order": own["permutation_uniform"],
        "full": own.get("full_uniform", torch.ones(3)) < alignment.options.full_share,
        "offset": own.get("offset_uniform", torch.zeros(3, 2)) * alignment.options.offset,
    }
    batch = drawn(alignment, batch_of(stored, draws, own["times"], own["noise"]))
    torch.testing.assert_close(batch.segments.per_token(batch.times), own["student_time"], rtol=0, atol=1e-6)
    learner = Learner(student, {"self-flow": alignment}, ema=teacher)
    losses = learner(batch)
    torch.testing.assert_close(losses["diffusion"], own["denoising_loss"], rtol=0, atol=1e-5)
    key = "align_loss_mean" if distance == "token-cosine" else "align_loss_over_channels"
    torch.testing.assert_close(losses["self-flow"], own[key].mean(), rtol=0, atol=1e-5)
    target = alignment.target(batch.context("self-flow", {}, teacher))
    torch.testing.assert_close(target, own["teacher_features"], rtol=0, atol=2e-5)


def made(alignment: SelfFlow, count: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2))
    t, second = (torch.rand(count, generator=generator) for _ in range(2))
    draws = {"order": torch.rand(count, 16, generator=generator), "full": torch.zeros(count, dtype=torch.bool)}
    draws["offset"] = torch.rand(count, 2, generator=generator) * alignment.options.offset
    y = torch.arange(count)
    return drawn(alignment, Batch(x0, eps, t, y, y, {"time": second}, {alignment.name: draws}))


def single(batch: Batch, t: Tensor | None = None) -> Batch:
    """The batch without segments."""
    return Batch(batch.x0, batch.eps, batch.t if t is None else t, batch.y, batch.labels)


@pytest.mark.parametrize("preset", ["self-flow", "dts-as"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_group_is_training_at_a_single_time(preset: str, share: float) -> None:
    alignment = built(preset, share=share)
    batch = made(alignment)
    student = perturbed(PARITY_SIT)
    time = batch.columns["time"] if share else batch.t
    losses = Learner(student, {"self-flow": alignment}, ema=perturbed(PARITY_SIT, seed=5))(batch)
    expected = Learner(student)(single(batch, time))["diffusion"]
    torch.testing.assert_close(losses["diffusion"], expected, rtol=1e-5, atol=1e-5)


def test_equal_times_give_the_loss_of_a_single_time() -> None:
    alignment = built("self-flow")
    batch = made(alignment)
    batch.columns["time"] = batch.t
    batch = drawn(alignment, batch)
    student = perturbed(PARITY_SIT)
    losses = Learner(student, {"self-flow": alignment}, ema=perturbed(PARITY_SIT, seed=5))(batch)
    expected = Learner(student)(single(batch))["diffusion"]
    torch.testing.assert_close(losses["diffusion"], expected, rtol=1e-5, atol=1e-5)


def test_tokens_are_at_their_times() -> None:
    """The noisy latent of each patch is that of its time, a quarter at the second."""
    alignment = built("self-flow")
    batch = made(alignment)
    of_token = batch.segments.per_token(batch.times)
    assert ((of_token == batch.columns["time"][:, None]).sum(1) == 4).all()
    assert ((of_token == batch.t[:, None]).sum(1) == 12).all()
    x0, eps, xt = (patchify(value, 2) for value in (batch.x0, batch.eps, batch.xt))
    torch.testing.assert_close(xt, (1 - of_token[..., None]) * x0 + of_token[..., None] * eps)


def test_the_teacher_sees_the_earlier_time_of_the_two_everywhere() -> None:
    """A network that returns its input's tokens and its time shows both."""
    alignment = built("self-flow")
    batch = made(alignment)
    seen: list[tuple[Tensor, Tensor]] = []

    def teacher(xt: Tensor, t: Tensor, y: Tensor, **more: object) -> models.Output:
        seen.append((xt, t))
        assert more["segments"] is None
        return models.Output(None, {alignment.options.target_depth: torch.zeros(3, 16, 48)})

    alignment.target(batch.context("self-flow", {}, teacher))
    ((xt, t),) = seen
    assert torch.equal(t, torch.minimum(batch.t, batch.columns["time"]))
    torch.testing.assert_close(xt, (1 - t[:, None, None, None]) * batch.x0 + t[:, None, None, None] * batch.eps)


def test_published_blocks() -> None:
    spec = models.spec("SiT-XL/2", in_channels=4, input_size=32, num_classes=1000)
    for preset, blocks in {"self-flow": (8, 20), "dts-as": (8, 20)}.items():
        given = build(SelfFlowOptions, SelfFlow.presets[preset]["options"], section="self-flow")
        resolved = SelfFlow.resolve(given, spec)
        assert (resolved.depth, resolved.target_depth) == blocks
    given = build(SelfFlowOptions, SelfFlow.presets["dts-as"]["options"], section="self-flow")
    base = models.spec("SiT-B/2", in_channels=4, input_size=32, num_classes=1000)
    assert [SelfFlow.resolve(given, base).depth, SelfFlow.resolve(given, base).target_depth] == [3, 8]


# --- in runs

SHORT = ("--max-train-steps", 4)
ROUTE = ("--route", 2, 4, 0.5)


@pytest.mark.parametrize(
    "more", [("--align", "self-flow"), ("--align", "self-flow", "--preset", "dts-as", *ROUTE), ROUTE]
)
def test_a_run_continues_bit_for_bit_and_ends_as_plain_training(
    more: tuple[object, ...], tmp_path: Path, words: Words
) -> None:
    whole = train.main(words(tmp_path / "a", "run", *more, *SHORT))
    train.main(words(tmp_path / "b", "run", *more, "--max-train-steps", 2))
    parts = train.main(words(tmp_path / "b", "run", *more, *SHORT))
    assert_same_bits(whole, parts)
    last, plain = (read(run / "log.jsonl")[-1] for run in (whole, train.main(words(tmp_path, "plain", *SHORT))))
    assert last["loss/diffusion"] != plain["loss/diffusion"]


def test_after_its_stop_tokens_have_one_time_again(tmp_path: Path, words: Words) -> None:
    argv = words(tmp_path, "run", "--align", "self-flow", "--align-stop-steps", 2, *SHORT)
    run = build_run(argv)
    ((before,),) = run.batches(1)
    run.step = 2
    run.end_alignments()
    ((after,),) = run.batches(3)
    assert before.segments is not None and after.segments is None and after.times is None


def test_a_full_route_with_no_token_leaving_is_no_route(tmp_path: Path, words: Words) -> None:
    """To rounding: attention adds the tokens in another order."""
    plain = read(train.main(words(tmp_path, "plain", *SHORT)) / "log.jsonl")
    routed = read(train.main(words(tmp_path, "routed", "--route", 2, 4, 0, *SHORT)) / "log.jsonl")
    values = [[line["loss/diffusion"] for line in lines] for lines in (plain, routed)]
    np.testing.assert_allclose(*values, rtol=1e-4)


def test_samples_take_no_route(tmp_path: Path, words: Words) -> None:
    """A route stands in the options of training alone: the network of a routed run is that of any other."""
    run = train.main(words(tmp_path, "routed", *ROUTE, *SHORT))
    checkpoint = Checkpoint.open(run)
    assert "route" not in checkpoint.spec.to_json() and checkpoint.config["train"]["route"] == [2.0, 4.0, 0.5]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--align", "self-flow", "sra"), "--align self-flow gives tokens times of their own, and sra needs a single"),
        (
            ("--align", "self-flow", "--align-interval", 0.2, 0.5),
            "choose samples by their time, and self-flow has two",
        ),
        (("--route", 0, 4, 0.5), "--route 0 4 0.5: give blocks from 1 to 6"),
        (("--route", 4, 2, 0.5), "the first before the last"),
        (("--route", 2, 7, 0.5), "give blocks from 1 to 6"),
        (("--route", 2, 4, 1.0), "the share of tokens that leave must lie in"),
        (("--route", 2.5, 4, 0.5), "--route 2.5 4 0.5: blocks are whole numbers"),
    ],
)
def test_what_cannot_go_together_is_refused(
    more: tuple[object, ...], message: str, tmp_path: Path, words: Words
) -> None:
    with pytest.raises(UserError, match=message) as error:
        train.main(words(tmp_path, "run", *more, *SHORT))
    assert "\n" not in str(error.value)


def test_attention_inside_a_route_is_not_compared(tmp_path: Path, words: Words, encoder: Path) -> None:
    haste = ("--align", "haste", "--align-encoder", encoder, "--align-hidden", 32)
    with pytest.raises(UserError, match="--route: haste compares the attention of block 4"):
        train.main(words(tmp_path, "run", *haste, *ROUTE, *SHORT))


def test_the_meter_counts_a_sample_at_its_first_time(tmp_path: Path, words: Words) -> None:
    run = build_run(words(tmp_path, "run", "--align", "self-flow"))
    ((batch,),) = run.batches(1)
    assert batch.t.shape == (16,) and batch.times.shape == (16, 2) and torch.equal(batch.times[:, 1], batch.t)
    assert not torch.equal(batch.times[:, 0], batch.t)


def test_a_route_costs_what_its_blocks_save() -> None:
    """Half of the tokens leave out 3 of 4 blocks: a little more than 3/8 of the blocks' products are gone."""
    network, x = models.build(PARITY_SIT), torch.zeros(2, 4, 8, 8)
    t, y = torch.zeros(2), torch.zeros(2, dtype=torch.long)

    def flops(**more: object) -> float:
        with FlopCounterMode(display=False, custom_mapping=attention_on_cpu()) as counter:
            network(x, t, y, (4,), exit_early=True, **more)
        return counter.get_total_flops()

    segments = Segments.shuffled(torch.rand(2, 16), (16,))
    ratio = flops(segments=segments, route=Route(2, 4, 0.5)) / flops()
    assert 0.6 < ratio < 0.7


@pytest.mark.parametrize(("depth", "inside"), [(2, True), (3, True), (1, False), (4, False)])
def test_inside_a_route_an_alignment_compares_the_tokens_that_took_it(depth: int, inside: bool) -> None:
    """Stage 1's loss over those tokens alone; over all where the block is outside."""
    generator = torch.Generator().manual_seed(3)
    x0, eps = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    t, y, uniform = torch.rand(3, generator=generator), torch.arange(3), torch.rand(3, 16, generator=generator)
    context = BuildContext(PARITY_SIT, SPACE, 0, torch.device("cpu"), None, lambda _: None)
    alignment = Latent(LatentOptions(depth=depth, hidden=32), context)
    network = perturbed(PARITY_SIT)
    batch = arranged(Batch(x0, eps, t, y, y), {}, Route(2, 3, 0.5), uniform)
    loss = Learner(network, {"latent": alignment})(batch)["latent"]
    segments = batch.segments
    feature = network(batch.xt, t, y, (depth,), segments=segments, route=batch.route).features[depth]
    error = (alignment.head(feature) - patchify(x0, 2)).square().mean(2)
    expected = error.gather(1, segments.order[:, :8]).mean() if inside else error.mean()
    torch.testing.assert_close(loss, expected)
    assert segments.on_route(batch.route).mean(1).tolist() == [1.0] * 3


def test_a_cosine_along_the_tokens_runs_along_those_of_the_route() -> None:
    a, b = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(4))
    segments, route = Segments.shuffled(torch.rand(3, 16), (4, 12)), Route(1, 2, 0.5)
    index = torch.cat([segments.order[:, :2], segments.order[:, 4:10]], dim=1)[..., None].expand(-1, -1, 8)
    expected = torch.nn.functional.cosine_similarity(a.gather(1, index), b.gather(1, index), dim=1).mean(1)
    torch.testing.assert_close(token_cosine(a, b, segments.on_route(route)), expected)


@pytest.mark.parametrize("option", ["token_weights", "schedule"])
def test_a_cosine_along_the_tokens_has_no_distance_per_token(option: str, tmp_path: Path, words: Words) -> None:
    value = {"token_weights": "residual", "schedule": "plateau"}[option]
    more = ("--align", "self-flow", "--preset", "dts-as", f"--align-{option.replace('_', '-')}", value)
    with pytest.raises(UserError, match="the distance token-cosine has no value per token"):
        train.main(words(tmp_path, "run", *more, *SHORT))
