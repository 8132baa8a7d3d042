"""The metrics against ADM's own numbers, scipy, NumPy, brute force and closed forms."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from evaluations import metrics
from evaluations.metrics import Moments, Statistics
from runtime.arithmetic import exact_arithmetic
from runtime.errors import UserError
from tests.helpers import DATA

ADM = json.loads((DATA / "index.json").read_text())["adm_metrics"]


@pytest.fixture(scope="module")
def features():
    with np.load(DATA / "adm_metrics.npz") as arrays:
        return torch.from_numpy(arrays["sample_features"]), torch.from_numpy(arrays["reference_features"])


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape).astype(np.float32))


def statistics(x: torch.Tensor) -> Statistics:
    """Mean and covariance of features (N, D)."""
    moments = Moments()
    moments.add(x)
    return moments.statistics()


def by_sqrtm(a: Statistics, b: Statistics) -> float:
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    difference = (a.mean - b.mean).numpy()
    return float(difference @ difference + np.trace(a.covariance + b.covariance) - 2 * np.trace(root).real)


def test_adm_precision_and_recall_exactly(features):
    half = metrics.precision_recall(*features, mode="adm_fp16")
    exact = metrics.precision_recall(*features, mode="fp32")
    assert half == tuple(ADM["precision_recall_float16"])
    assert exact == tuple(ADM["precision_recall_float32"])
    assert half[1] == 0.57 and exact[1] < 0.5667  # the two modes are two numbers here: neither passes for the other


def test_values_beyond_half_fall_back_to_float32_as_in_adm(features):
    samples, reference = (x * ADM["scale_forcing_float32"] for x in features)
    assert metrics.precision_recall(samples, reference, mode="adm_fp16") == tuple(ADM["precision_recall_float32"])


def test_adm_frechet_distance(features):
    x, r = features
    assert metrics.frechet(statistics(x), statistics(r)) == pytest.approx(ADM["frechet"], rel=1e-6)
    few = ADM["frechet_rank_deficient"]
    x, r = x[: few["sample_rows"]], r[: few["reference_rows"]]
    assert len(x) < x.shape[1]
    assert metrics.frechet(statistics(x), statistics(r)) == pytest.approx(few["value"], rel=1e-6)


def test_adm_inception_score():
    logits = torch.from_numpy((np.random.RandomState(3).randn(11700, 24) * 1.7).astype(np.float32))
    assert metrics.inception_score(logits) == pytest.approx(ADM["inception_score"]["value"], rel=1e-5)


@pytest.mark.parametrize("dimensions", [1, 7, 64, 200])
def test_frechet_against_scipy(dimensions):
    a = statistics(normal(1, 700, dimensions) @ normal(2, dimensions, dimensions))
    b = statistics(normal(3, 500, dimensions) * 2 + 1)
    assert metrics.frechet(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-8)
    assert metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a), rel=1e-8)


def test_frechet_in_closed_form():
    a = Statistics(torch.tensor([1.0, 2, 0]).double(), torch.diag(torch.tensor([4.0, 9, 0])).double())
    b = Statistics(torch.tensor([0.0, 0, 2]).double(), torch.diag(torch.tensor([1.0, 16, 25])).double())
    assert metrics.frechet(a, b) == pytest.approx(9 + 1 + 1 + 25, abs=1e-12)  # |m|^2 + sum (sqrt a - sqrt b)^2
    full = statistics(normal(0, 400, 50))
    assert abs(metrics.frechet(full, full)) < 1e-9


def test_frechet_of_dead_and_doubled_features_is_finite():
    x, r = normal(0, 300, 20), normal(1, 200, 20)
    expected = metrics.frechet(statistics(x), statistics(r))
    dead = [torch.cat([part, torch.zeros(len(part), 10)], 1) for part in (x, r)]
    assert metrics.frechet(*map(statistics, dead)) == pytest.approx(expected, rel=1e-7)
    doubled = [torch.cat([part, part[:, :1]], 1) for part in (x, r)]
    assert np.isfinite(metrics.frechet(*map(statistics, doubled)))


def test_frechet_refuses_what_no_covariance_gives():
    good = statistics(normal(0, 50, 4))
    with pytest.raises(UserError, match="positive semi-definite"):
        metrics.frechet(good, Statistics(good.mean, -good.covariance))
    with pytest.raises(UserError, match="NaN"):
        metrics.frechet(good, Statistics(good.mean, good.covariance * float("nan")))
    with pytest.raises(UserError, match="4 features and the reference 5"):
        metrics.frechet(good, statistics(normal(0, 50, 5)))


@pytest.mark.parametrize("cuts", [[1000], [1, 999], [333, 333, 334], [10] * 100])
def test_statistics_are_those_of_numpy_however_cut(cuts):
    x = normal(0, 1000, 12) * 3 + 100
    moments = Moments()
    for part in x.split(cuts):
        moments.add(part)
    result = moments.statistics()
    np.testing.assert_allclose(result.mean, x.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(result.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_statistics_merge_across_processes():
    x, merged = normal(0, 90, 5), Moments()
    for rank in (x[:0], x[:20], x[20:]):
        part = Moments()
        if len(rank):
            part.add(rank)
        merged.merge(part)
    whole = statistics(x)
    torch.testing.assert_close(merged.statistics().covariance, whole.covariance, rtol=1e-12, atol=1e-14)


def test_statistics_refuse_one_sample_and_nan():
    with pytest.raises(UserError, match="at least 2"):
        statistics(torch.zeros(1, 3))
    with pytest.raises(UserError, match="NaN"):
        statistics(torch.tensor([[0.0], [float("nan")]]))


def score_by_definition(p: np.ndarray, chunk: int) -> float:
    scores = []
    for start in range(0, len(p), chunk):
        part = p[start : start + chunk]
        scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0))), 1))))
    return float(np.mean(scores))


@pytest.mark.parametrize("count", [5, 10, 13])
def test_inception_score_by_its_definition(count):
    logits = normal(0, count, 6) * 2
    expected = score_by_definition(logits.double().softmax(1).numpy(), 5)
    assert metrics.inception_score(logits, chunk=5) == pytest.approx(expected, rel=1e-12)


def test_inception_score_of_known_distributions():
    assert metrics.inception_score(torch.zeros(40, 10)) == pytest.approx(1)
    certain = torch.eye(10).repeat(4, 1) * 1e4  # p is 0 or 1 exactly: 0 log 0 must not give NaN
    assert metrics.inception_score(certain) == pytest.approx(10)
    in_order = certain.argmax(1).argsort()
    assert metrics.inception_score(certain[in_order], chunk=8) == pytest.approx(2)  # sorted by class: the trap


def brute_force(x: np.ndarray, r: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Every distance in float64, every ball tested."""

    def table(u, v):
        return ((u[:, None] - v[None]) ** 2).sum(-1)

    x_radii, r_radii = np.sort(table(x, x), 1)[:, k], np.sort(table(r, r), 1)[:, k]
    cross = table(x, r)
    return float((cross <= r_radii).any(1).mean()), float((cross <= x_radii[:, None]).any(0).mean())


@pytest.mark.parametrize("block", [10_000, 150, 7])
def test_precision_recall_against_brute_force_for_any_block(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    x, r = normal(0, 300, 16) * 0.9, normal(1, 400, 16)
    expected = brute_force(x.double().numpy(), r.double().numpy())
    assert 0.2 < expected[1] < expected[0] < 1
    assert metrics.precision_recall(x, r, mode="fp32") == expected
    assert metrics.precision_recall(r, x, mode="fp32") == expected[::-1]  # swapping the sets swaps the numbers


def test_points_on_the_rim_are_inside():
    grid = torch.arange(12.0)[:, None]  # on whole numbers every distance is exact, and the third neighbour is at 2 or 3
    shifted = grid + 14
    assert metrics.precision_recall(shifted, grid, mode="fp32") == brute_force(shifted.numpy(), grid.numpy())
    assert metrics.precision_recall(shifted, grid, mode="fp32")[0] == pytest.approx(1 / 12)
    same = torch.ones(6, 3)
    assert metrics.precision_recall(same, same, mode="adm_fp16") == (1, 1)


def test_collapsed_samples_have_precision_without_recall():
    reference = normal(0, 500, 8)
    collapsed = reference[:1] + 1e-3 * normal(1, 100, 8)
    precision, recall = metrics.precision_recall(collapsed, reference, mode="fp32")
    assert precision == 1 and recall < 0.05


def test_precision_recall_refuses_too_few_and_an_unknown_mode():
    with pytest.raises(UserError, match="at least 4 samples, got 3"):
        metrics.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(UserError, match="fp16.*adm_fp16"):
        metrics.precision_recall(torch.zeros(9, 2), torch.zeros(9, 2), mode="fp16")


def test_class_accuracy_against_brute_force():
    x, r = normal(0, 1500, 5), normal(1, 40, 5)
    labels, reference_labels = torch.arange(1500) % 4, torch.arange(40) % 4
    closest = ((x[:, None] - r[None]) ** 2).sum(-1).argmin(1)
    expected = (reference_labels[closest] == labels).double().mean().item()
    assert 0.1 < expected < 0.9
    assert metrics.class_accuracy(x, labels, r, reference_labels) == expected
    assert metrics.class_accuracy(r, reference_labels, r, reference_labels) == 1


def test_exact_arithmetic_switches_tf32_and_autocast_off_and_restores():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_mind_by_optimal_assignment_along_every_direction():
    """Along each direction, the distance of the best of all pairings; sets of equal and of unequal sizes."""
    x, r = normal(1, 40, 6), normal(2, 55, 6) * 1.5 + 0.3
    for count, samples, reference in ((40, x, r[:40]), (40, x, r), (40, r, x)):
        generator = torch.Generator().manual_seed(
            2020
        )  # the recipe of torch-fidelity: subset of the larger, then directions
        sets = [
            s if len(s) == count else s[torch.randperm(len(s), generator=generator)[:count]]
            for s in (samples, reference)
        ]
        directions = torch.randn(1000, 6, generator=generator).double()
        costs = []
        for u in directions / directions.norm(dim=1, keepdim=True):
            a, b = (s.double() @ u for s in sets)
            table = (a[:, None] - b).square().numpy()
            costs.append(table[scipy.optimize.linear_sum_assignment(table)].mean())
        assert metrics.mind(samples, reference) == pytest.approx(18 * np.mean(costs), rel=1e-5)


def test_mind_of_gaussians_in_closed_form():
    """N(0, I) against N(m, s^2 I): direction u sees N(0, 1) and N(u.m, s^2), whose W2^2 is (u.m)^2 + (s - 1)^2.

    The mean of (u.m)^2 over directions is |m|^2 / D.
    """
    x = normal(1, 4_000, 12)
    shift = normal(2, 12)
    assert metrics.mind(x, x[torch.randperm(4_000, generator=torch.Generator().manual_seed(1))]) == pytest.approx(
        0, abs=1e-9
    )
    assert metrics.mind(x, 3 * x + shift) == pytest.approx(3 * 12 * (float(shift @ shift) / 12 + 4), rel=0.05)
    assert metrics.mind(2 * x, 6 * x + 2 * shift) == pytest.approx(4 * metrics.mind(x, 3 * x + shift), rel=1e-6)
    with pytest.raises(UserError, match="12 features and the reference 5"):
        metrics.mind(x, normal(3, 10, 5))


def test_scores_hold_mind_where_it_is_asked_for_and_the_reference_can(tmp_path):
    from config import FeatureOptions
    from evaluations import evaluate
    from evaluations.extractors import open_extractor

    images = [np.random.RandomState(seed).randint(0, 256, (24, 4, 4, 1)).astype(np.uint8) for seed in (1, 2)]
    for name, value in zip(("samples", "real"), images, strict=True):
        np.savez(tmp_path / f"{name}.npz", arr_0=value)
    words = [str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "real.npz"), "--features", "pixels", "--out"]
    results = []
    for more in ((), ("--mind",)):
        evaluate.main(["--samples", *words, str(tmp_path / "m.json"), *more])
        results.append(json.loads((tmp_path / "m.json").read_text())["metrics"])
    pixels = [torch.from_numpy(value).flatten(1).float() / 127.5 - 1 for value in images]
    assert results[1].pop("mind") == pytest.approx(metrics.mind(*pixels), rel=1e-6) and results[0] == results[1]
    from evaluations.reference import Reference
    from evaluations.score import Scorer

    extractor = open_extractor(FeatureOptions(features="pixels"))
    whole = Reference.open(tmp_path / "real.npz", extractor)
    with pytest.raises(UserError, match="--mind compares single images"):
        Scorer(dataclasses.replace(whole, pool=None), extractor, mind=True)
