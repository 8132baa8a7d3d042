"""Tokens in segments with times of their own, and routes around blocks: laws, and the peers' own numbers."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import models
from models import CONDITION, QK, layouts
from models.layers import patchify, unpatchify
from models.routing import Route, Segments, split
from runtime.errors import UserError
from tests.helpers import PARITY_SIT, inputs, parity, perturbed
from training.cost import attention_on_cpu, empty_network

ALL = (1, 2, 3, 4)


def near(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return bool((a - b).abs().max() < tolerance)


def peer(name: str) -> tuple[models.Backbone, dict[str, Tensor]]:
    """A peer's network, through the converter, and what else is in its parity file."""
    weights, stored = parity(name)
    converted = layouts.convert_network(weights, name, num_heads=4)
    return models.build(converted.spec, weights=converted.weights), stored


def grouped(group: Tensor) -> Tensor:
    """(N, T) an order in which tokens of group 0 come first."""
    return group.argsort(dim=1, stable=True)


def at_times(pictures: Tensor, group: Tensor) -> Tensor:
    """Patches of the pictures (2N, C, H, W) at two times, the first N for the tokens of group 0, as one picture."""
    first, second = (patchify(part, 2) for part in pictures.chunk(2))
    return unpatchify(torch.where((group == 0)[..., None], first, second), 2)


def random_segments(count: int, lengths: tuple[int, ...], separate: bool = False) -> Segments:
    uniform = torch.rand(count, sum(lengths), generator=torch.Generator().manual_seed(3))
    return Segments.shuffled(uniform, lengths, separate)


@pytest.mark.parametrize("separate", [True, False])
def test_two_times_are_those_of_dts_as(separate: bool) -> None:
    network, stored = peer("dts_as")
    group = stored["net.group"]
    segments = Segments(grouped(group), (4, 12), separate)
    x = at_times(stored["net.x"], group)
    output = network(x, stored["net.times"], stored["y"], ALL, segments=segments)
    case = "separated" if separate else "full"
    assert near(output.velocity, stored[f"net.{case}.velocity"])
    assert all(near(output.features[block], stored[f"net.{case}.block{block}"]) for block in ALL)


def test_a_time_for_each_token_is_that_of_dts_as_and_of_self_flow() -> None:
    network, stored = peer("dts_as")
    order = torch.arange(16).expand(3, 16)
    output = network(stored["pertoken.x"], stored["pertoken.t"], stored["y"], segments=Segments(order, (1,) * 16))
    assert near(output.velocity, stored["pertoken.velocity"])
    plain = network(stored["net.x"][:3], stored["plain.t"], stored["y"]).velocity
    assert near(plain, stored["plain.velocity"])

    network, stored = peer("self_flow")
    order = torch.arange(16).expand(2, 16)
    output = network(stored["x"], stored["t"], stored["y"], ALL, segments=Segments(order, (1,) * 16))
    assert near(output.velocity, stored["velocity"])
    assert all(near(output.features[block], stored[f"block{block}"]) for block in ALL)
    assert near(network(stored["x"], stored["uniform.t"], stored["y"]).velocity, stored["uniform.velocity"])


@pytest.mark.parametrize(("case", "share"), [("half", 0.5), ("quarter", 0.25)])
def test_a_route_is_that_of_tread(case: str, share: float) -> None:
    """Inside the route the peer holds the kept tokens alone, in their drawn order."""
    network, stored = peer("tread")
    # its rectified flow has noise at t = 1 and no reversed weights
    x, t, y = (stored[name] for name in ("x", "t", "y"))
    segments = Segments.shuffled(stored[f"{case}.uniform"], (16,))
    inside = stored[f"{case}.kept"]
    assert torch.equal(segments.order[:, : inside.shape[1]], inside)
    blocks = (1, 2, 3, 4, 5)
    output = network(x, t, y, blocks, segments=segments, route=Route(2, 4, share))
    assert near(output.velocity, stored[f"{case}.velocity"])
    rows = torch.arange(2)[:, None]
    for block in (2, 3, 4):
        assert near(output.features[block][rows, inside], stored[f"{case}.block{block}"])
    assert near(output.features[1], stored[f"{case}.block1"]) and near(output.features[5], stored[f"{case}.block5"])
    assert near(output.features[4], stored[f"{case}.merged"])
    dense = network(x, t, y, blocks)
    assert near(dense.velocity, stored["dense.velocity"])
    assert all(near(dense.features[block], stored[f"dense.block{block}"]) for block in blocks)


# --- laws, on both architectures


@pytest.fixture(scope="module", params=["sit", "lightningdit"])
def network(request: pytest.FixtureRequest) -> models.Backbone:
    return perturbed(dataclasses.replace(PARITY_SIT, architecture=request.param))


def test_equal_times_give_the_single_time(network: models.Backbone) -> None:
    x, t, y = inputs(PARITY_SIT)
    plain = network(x, t, y, (2, CONDITION, QK(3)))
    cut = network(x, t[:, None].expand(-1, 2), y, (2, CONDITION, QK(3)), segments=random_segments(3, (5, 11)))
    assert near(cut.velocity, plain.velocity) and near(cut.features[2], plain.features[2])
    assert near(cut.features[QK(3)], plain.features[QK(3)])
    assert near(cut.features[CONDITION], plain.features[CONDITION].expand(-1, 16, -1))


def test_a_single_segment_is_the_plain_pass(network: models.Backbone) -> None:
    x, t, y = inputs(PARITY_SIT)
    order = torch.arange(16).expand(3, 16)
    plain = network(x, t, y, (2,))
    for separate in (False, True):
        whole = network(x, t, y, (2,), segments=Segments(order, (16,), separate))
        assert torch.equal(whole.velocity, plain.velocity) and torch.equal(whole.features[2], plain.features[2])


def test_separate_segments_are_separate_calls(network: models.Backbone) -> None:
    """Each segment's tokens are what the blocks make of that segment alone."""
    x, _, y = inputs(PARITY_SIT)
    times = torch.rand(3, 2, generator=torch.Generator().manual_seed(5))
    segments = random_segments(3, (6, 10), separate=True)
    together = network(x, times, y, (4,), segments=segments).features[4]
    tokens = network.x_embedder(x) + network.pos_embed
    rotation = network.rotation()
    for place, time in zip((slice(0, 6), slice(6, 16)), times.T, strict=True):
        for sample in range(3):
            index = segments.order[sample, place]
            alone = tokens[sample : sample + 1, index]
            c = network.t_embedder(time[sample : sample + 1]) + network.y_embedder(y[sample : sample + 1])
            turned = None if rotation is None else (rotation[0][index], rotation[1][index])
            for block in network.blocks:
                alone = block(alone, c[:, None], turned)
            assert near(together[sample, index], alone[0])


def test_joined_samples_attend_to_all_tokens(network: models.Backbone) -> None:
    x, _, y = inputs(PARITY_SIT)
    times = torch.rand(3, 2, generator=torch.Generator().manual_seed(5))
    mixed = random_segments(3, (6, 10), separate=True)
    joined = Segments(mixed.order, mixed.lengths, True, torch.tensor([True, False, True]))
    outputs = {
        name: network(x, times, y, segments=segments).velocity
        for name, segments in {
            "joined": joined,
            "open": Segments(mixed.order, mixed.lengths),
            "separate": mixed,
        }.items()
    }
    assert near(outputs["joined"][[0, 2]], outputs["open"][[0, 2]])
    assert near(outputs["joined"][1], outputs["separate"][1])
    assert not near(outputs["open"][1], outputs["separate"][1], 1e-3)


def test_values_of_segments_by_token() -> None:
    segments = Segments(torch.tensor([[3, 0, 1, 2], [1, 2, 3, 0]]), (1, 3))
    rows = torch.tensor([[0.1, 0.7], [0.2, 0.8]])
    assert segments.per_token(rows).tolist() == torch.tensor([[0.7, 0.7, 0.7, 0.1], [0.8, 0.2, 0.8, 0.8]]).tolist()
    assert segments.take(torch.tensor([1])).order.tolist() == [[1, 2, 3, 0]]


def test_a_route_that_none_leaves_is_no_route(network: models.Backbone) -> None:
    x, t, y = inputs(PARITY_SIT)
    segments = random_segments(3, (16,))
    plain = network(x, t, y, (2, 4))
    routed = network(x, t, y, (2, 4), segments=segments, route=Route(2, 3, 0.0))
    assert near(routed.velocity, plain.velocity) and near(routed.features[2], plain.features[2])


def test_tokens_that_leave_the_route_come_back_unchanged(network: models.Backbone) -> None:
    x, t, y = inputs(PARITY_SIT)
    segments = random_segments(3, (16,))
    features = network(x, t, y, (1, 2, 3), segments=segments, route=Route(2, 3, 0.5)).features
    rows, away = torch.arange(3)[:, None], segments.order[:, 8:]
    assert torch.equal(features[1][rows, away], features[3][rows, away])
    assert torch.equal(features[1][rows, away], features[2][rows, away])
    assert not near(features[1], features[3], 1e-3)


@pytest.mark.parametrize("separate", [False, True])
def test_a_route_takes_its_share_of_each_segment(network: models.Backbone, separate: bool) -> None:
    """With every sample joined, a mask says the same as open attention."""
    x, _, y = inputs(PARITY_SIT)
    times = torch.rand(3, 2, generator=torch.Generator().manual_seed(5))
    segments, route = random_segments(3, (6, 10), separate), Route(1, 4, 0.5)
    assert route.inside(segments.lengths) == (3, 5)
    features = network(x, times, y, (1, 4), segments=segments, route=route).features
    rows, away = torch.arange(3)[:, None], torch.cat([segments.order[:, 3:6], segments.order[:, 11:]], dim=1)
    start = network.x_embedder(x) + network.pos_embed
    assert torch.equal(features[4][rows, away], start[rows, away])
    masked = Segments(segments.order, segments.lengths, True, torch.full((3,), not separate))
    assert near(network(x, times, y, (4,), segments=masked, route=route).features[4], features[4])


def test_a_route_inside_its_network(capsys: pytest.CaptureFixture[str]) -> None:
    Route(1, 4, 0.5).check(4)
    for route in (Route(0, 3, 0.5), Route(3, 2, 0.5), Route(2, 5, 0.5), Route(1, 2, 1.0), Route(1, 2, -0.1)):
        with pytest.raises(UserError, match=f"--route {route.first} {route.last} {route.share:g}: "):
            route.check(4)


def test_parts_by_the_largest_remainder() -> None:
    assert split(36, (0.3, 0.7)) == (11, 25)  # SRA-DTS-AS rounds so
    assert split(256, (0.25, 0.75)) == (64, 192)
    for tokens, share in itertools.product((1, 7, 16, 255), (0.0, 0.1, 0.5, 1.0)):
        parts = split(tokens, (share, 1 - share))
        assert sum(parts) == tokens and abs(parts[0] - tokens * share) <= 0.5


def test_two_rows_cost_a_block_less_than_three_percent() -> None:
    """SiT-B/2: products of a pass with two open segments, over those of the plain pass."""
    spec = models.spec("SiT-B/2", in_channels=4, input_size=32, num_classes=10)
    with FakeTensorMode():
        network = empty_network(spec)
        x, times, y = torch.zeros(2, 4, 32, 32), torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)

        def flops(t: Tensor, segments: Segments | None) -> float:
            with FlopCounterMode(display=False, custom_mapping=attention_on_cpu()) as counter:
                network(x, t, y, (12,), exit_early=True, segments=segments)
            return counter.get_total_flops()

        plain = flops(times[:, 0], None)
        two = flops(times, Segments(torch.zeros(2, 256, dtype=torch.long), (64, 192)))
    assert 1 < two / plain < 1.03
