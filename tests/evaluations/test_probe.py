"""Probes, mIoU and CKNNA against closed forms and scikit-learn; the command on a tiny run of the digits."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import jaccard_score, log_loss
from sklearn.preprocessing import StandardScaler

import train
from dataset import LatentSet
from evaluations import probe, reading, representation
from evaluations.representation import PENALTIES, TokenSums
from evaluations.taps import Items, Probed, split
from models.checkpoint import Checkpoint
from runtime.errors import UserError
from runtime.jsonlines import read as read_lines
from runtime.streams import Stream
from runtime.text import aligned
from training import command

WORDS = ["--items", "90", "--t", "0.5", "--blocks", "1", "3"]


def normal(name: str, *shape: int) -> torch.Tensor:
    return Stream(0, name).normal(shape).double()


def blobs(
    count: int = 150, width: int = 12, classes: int = 4, spread: float = 1.6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in dimensions of very different scale, one of which never varies."""
    labels = torch.arange(count) % classes
    x = (normal("centres", classes, width)[labels] + spread * normal("blobs", count, width)) * torch.logspace(
        -2, 2, width
    ) + 5
    x[:, 3] = 7.25
    return x, labels


def thirds(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.arange(count)[start::3] for start in range(3))


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_minimises_its_loss(classes: int) -> None:
    """mean cross-entropy + penalty/2 |W|^2: its gradient vanishes, for two classes at columns -w/2 and w/2."""
    x, labels = blobs(classes=classes)
    x = representation.standardise(x, x)
    for penalty in (1e-3, 1e-1):
        model = representation.logistic(x, labels, penalty)
        weight, bias = (torch.from_numpy(value.T.copy()) for value in (model.coef_, model.intercept_))
        if classes == 2:
            weight, bias = torch.cat([-weight, weight], 1) / 2, torch.cat([-bias, bias]) / 2
        weight.requires_grad_(), bias.requires_grad_()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        assert weight.grad.abs().max() < 2e-5 and bias.grad.abs().max() < 2e-5 and weight.abs().max() > 0.1


def test_the_class_probe_is_a_grid_over_a_validation_part() -> None:
    x, labels = blobs()
    parts = thirds(len(x))
    fit, validate, test = (part.numpy() for part in parts)
    scaled = StandardScaler().fit(x[fit])
    losses = {}
    for penalty in PENALTIES:
        model = LogisticRegression(C=1 / (penalty * len(fit)), max_iter=5000).fit(scaled.transform(x[fit]), labels[fit])
        losses[penalty] = log_loss(labels[validate], model.predict_proba(scaled.transform(x[validate])))
    both = np.concatenate([fit, validate])
    scaled, chosen = StandardScaler().fit(x[both]), min(losses, key=losses.get)
    assert PENALTIES[0] < chosen < PENALTIES[-1]
    model = LogisticRegression(C=1 / (chosen * len(both)), max_iter=5000).fit(scaled.transform(x[both]), labels[both])
    expected = model.score(scaled.transform(x[test]), labels[test])
    assert representation.class_accuracy(x, labels, parts) == pytest.approx(expected) and 0.4 < expected < 0.95


def test_the_class_probe_reads_what_features_encode_and_nothing_else() -> None:
    labels = torch.arange(300) % 5
    parts, noise = thirds(300), normal("noise", 300, 20)
    labelled = noise.clone()
    labelled[:, 0] += 20 * labels  # each class its own value along one axis
    assert representation.class_accuracy(noise, labels, parts) < 0.4
    assert representation.class_accuracy(torch.nn.functional.one_hot(labels).double(), labels, parts) == 1
    assert representation.class_accuracy(labelled, labels, parts) > 0.95
    assert representation.class_accuracy(noise, torch.zeros(300, dtype=torch.long), parts) == 1  # a single class


def test_the_neighbour_probe_weighs_cosine_similarities() -> None:
    """Against the vote written out: each of the 20 nearest adds exp(s / 0.07) to its class."""
    x, labels = blobs()
    parts = thirds(len(x))
    train_part = torch.cat(parts[:2])
    scaled = StandardScaler().fit(x[train_part])
    known, queries = (scaled.transform(x[part]) for part in (train_part, parts[2]))
    right = 0
    for query, label in zip(queries, labels[parts[2]]):
        similarity = known @ query / np.linalg.norm(known, axis=1) / np.linalg.norm(query)
        votes = np.zeros(4)
        for neighbour in np.argsort(-similarity)[:20]:
            votes[labels[train_part][neighbour]] += np.exp(similarity[neighbour] / 0.07)
        right += int(votes.argmax() == label)
    assert representation.neighbour_accuracy(x, labels, parts) == right / len(queries) and 0 < right < len(queries)


def test_ridge_from_moments_is_scikit_learns_and_maps_are_explicit_features() -> None:
    x, _ = blobs()
    u, c = x, x + normal("conditional", *x.shape)
    y = (normal("patch", 150, 4) + x[:, :4] > 4).double()
    by = torch.cat([torch.eye(12), 30 * torch.eye(12)]).double()  # u + 30 (c - u)
    moments = TokenSums.of(torch.cat([u, c - u], 1)[:80], y[:80]) + TokenSums.of(torch.cat([u, c - u], 1)[80:], y[80:])
    guided = (u + 30 * (c - u)).numpy()
    scaled = StandardScaler().fit_transform(guided)
    for penalty, ours in zip((1e-3, 1.0), representation.ridge(moments.mapped(by), (1e-3, 1.0))):
        expected = Ridge(alpha=penalty * 150).fit(scaled, y).predict(scaled)
        np.testing.assert_allclose(ours(torch.from_numpy(guided)), expected, atol=1e-8)
        assert representation.squared_error(ours, moments.mapped(by)) == pytest.approx(
            ((expected - y.numpy()) ** 2).sum(), rel=1e-9
        )


def test_the_mask_probe_takes_the_penalty_that_errs_least_on_the_validation_part() -> None:
    x, noise = normal("tokens", 60, 30), normal("targets", 60, 2)
    parts = [TokenSums.of(x[:40], x[:40, :2] + noise[:40]), TokenSums.of(x[40:], x[40:, :2] + noise[40:])]
    errors = {
        penalty: (
            (
                Ridge(alpha=penalty * 40)
                .fit(StandardScaler().fit(x[:40]).transform(x[:40]), x[:40, :2] + noise[:40])
                .predict(StandardScaler().fit(x[:40]).transform(x[40:]))
                - (x[40:, :2] + noise[40:]).numpy()
            )
            ** 2
        ).sum()
        for penalty in PENALTIES
    }
    expected = representation.ridge(parts[0] + parts[1], [min(errors, key=errors.get)])[0]
    torch.testing.assert_close(representation.mask_probe(*parts).weight, expected.weight)
    assert min(errors, key=errors.get) != PENALTIES[0]


def test_miou_is_scikit_learns_jaccard_of_both_classes() -> None:
    mask, predicted = (Stream(0, name).uniform(500) > share for name, share in (("mask", 0.8), ("predicted", 0.6)))
    halves = [
        representation.confusion(torch.from_numpy(predicted[part]), torch.from_numpy(mask[part]))
        for part in (slice(0, 200), slice(200, 500))
    ]
    assert representation.iou(halves[0] + halves[1]) == pytest.approx(jaccard_score(mask, predicted, average="macro"))
    empty = torch.zeros(9, dtype=torch.bool)
    assert representation.iou(representation.confusion(empty, empty)) == 1


def neighbours(x: np.ndarray, k: int) -> tuple[np.ndarray, list[set[int]]]:
    """Inner products of unit vectors, and the k nearest of each point."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    products = np.array([[p @ q for q in x] for p in x])
    near = [set(sorted((j for j in range(len(x)) if j != i), key=lambda j: -products[i, j])[:k]) for i in range(len(x))]
    return products, near


def cknna_by_hand(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """arXiv 2405.07987, written out as sums over pairs."""

    def align(p: tuple, q: tuple) -> float:
        return sum(
            (p[0][i, j] - p[0][i].mean()) * (q[0][i, j] - q[0][i].mean())
            for i in range(len(a))
            for j in p[1][i] & q[1][i]
        )

    p, q = neighbours(a, k), neighbours(b, k)
    return align(p, q) / math.sqrt(align(p, p) * align(q, q))


def cknna_hsic_by_hand(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """The unbiased HSIC of Song et al. (2012), of kernels that are zero beyond the mutual neighbours."""
    m, ones = len(a), np.ones(len(a))

    def hsic(p: tuple, q: tuple) -> float:
        mask = np.array([[float(j in p[1][i] & q[1][i]) for j in range(m)] for i in range(m)])
        k_, l_ = p[0] * mask, q[0] * mask
        pairs = ones @ k_ @ ones * (ones @ l_ @ ones) / ((m - 1) * (m - 2))
        return (np.trace(k_ @ l_) + pairs - 2 / (m - 2) * ones @ k_ @ l_ @ ones) / (m * (m - 3))

    p, q = neighbours(a, k), neighbours(b, k)
    return hsic(p, q) / (math.sqrt(hsic(p, p) * hsic(q, q)) + 1e-6)


@pytest.mark.parametrize(
    ("measure", "by_hand"),
    [(representation.cknna, cknna_by_hand), (representation.cknna_hsic, cknna_hsic_by_hand)],
)
def test_cknna_is_its_definition(measure: Callable[..., float], by_hand: Callable[..., float]) -> None:
    a = normal("a", 40, 6)
    b = torch.cat([a[:, :3], normal("b", 40, 4)], 1) + 2  # an offset, which the two treat differently
    value = measure(representation.kernel(a), representation.kernel(b))
    assert value == pytest.approx(by_hand(a.numpy(), b.numpy(), 10)) and 0.05 < value < 0.95
    turn = torch.linalg.qr(normal("turn", 6, 6)).Q
    turned = measure(representation.kernel(a), representation.kernel(3 * a @ turn))
    assert turned == pytest.approx(1, abs=1e-4)  # 1e-6 in a denominator


def test_the_neighbours_of_cknna_include_all_ties_and_an_undefined_score_is_zero() -> None:
    classes = representation.kernel(torch.nn.functional.one_hot(torch.arange(40) % 2).double())
    assert classes.near.sum(1).tolist() == [19] * 40
    nothing = representation.kernel(torch.zeros(40, 3, dtype=torch.float64))
    assert representation.cknna(classes, nothing) == representation.cknna_hsic(classes, nothing) == 0


def test_principal_components_are_projections_on_the_axes_of_largest_variance() -> None:
    x, _ = blobs()
    centred = x - x.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # the largest loading is positive
    torch.testing.assert_close(representation.principal(x), centred @ axes, rtol=1e-6, atol=1e-6)


def test_groups_are_never_on_both_sides_of_a_split() -> None:
    groups = Stream(0, "groups").integers(60, 400)
    parts = split(groups, 3)
    assert sorted(np.concatenate(parts)) == list(range(400))
    seen = [set(groups[part]) for part in parts]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert [len(groups) for groups in seen] == [39, 9, 12]
    assert all((part == again).all() for part, again in zip(parts, split(groups, 3)))
    assert set(split(groups, 4).test) != set(parts.test)
    five = split(np.arange(50) % 5, 0)  # items of five groups
    assert [len(set(part % 5)) for part in five] == [3, 1, 1] and [len(part) for part in five] == [30, 10, 10]
    with pytest.raises(UserError, match="4 images .* too few"):
        split(np.arange(4), 0)


@pytest.fixture(scope="module")
def masks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ink of the digits, and the pairs of neighbours as groups."""
    latents = LatentSet(data)
    images = latents.images(np.arange(len(latents)))
    file = tmp_path_factory.mktemp("masks") / "masks.npz"
    np.savez(file, masks=(images[..., 0] > 127).astype(np.uint8), groups=np.arange(len(latents)) // 2)
    return file


def test_both_passes_are_those_of_the_network_alone(data: Path, teacher: Path) -> None:
    items = Items(str(data), 40, 0)
    probed = Probed.open(str(teacher), items, "ema", (2, 4))
    places = np.array([5, 0, 31])
    pairs = probed.pairs(items, places, 0.3)
    network = Checkpoint.open(teacher).network("ema")
    x0, eps = items.clean(places), items.noise(places)
    raw, labels = LatentSet(data).read(items.index[places])
    np.testing.assert_allclose(x0, Checkpoint.open(teacher).space.normalise(torch.from_numpy(raw[:, 0])))
    xt, t = 0.7 * x0 + 0.3 * eps, torch.full((3,), 0.3)
    for block in (2, 4):
        for value, y in zip(pairs[block], (torch.full((3,), 10), torch.from_numpy(labels))):
            torch.testing.assert_close(
                value.float(), network(xt, t, y, taps=[block]).features[block], atol=1e-5, rtol=1e-4
            )
    alone = probed.pairs(items, places, 0.3, unconditional=False)[4]
    torch.testing.assert_close(alone[1], pairs[4][1], atol=1e-5, rtol=1e-4)
    assert not alone[0].any()


def test_weights_seed_and_count_act(data: Path, teacher: Path) -> None:
    items, other = Items(str(data), 40, 0), Items(str(data), 40, 1)
    assert (
        len(items) == 40
        and set(items.index) != set(other.index)
        and set(items.index) < set(Items(str(data), 60, 0).index)
    )
    all_of_them = [Items(str(data), 1797, seed) for seed in (0, 1)]
    assert (all_of_them[0].index == all_of_them[1].index).all()
    assert not all_of_them[0].noise(np.arange(2)).equal(all_of_them[1].noise(np.arange(2)))
    assert (
        all_of_them[0].noise(items.index[:2]).equal(items.noise(np.arange(2)))
    )  # an image's own, whichever are drawn with it
    raw, ema = (
        Probed.open(str(teacher), items, weights, None).pairs(items, np.arange(3), 0.5)[6][1]
        for weights in ("raw", "ema")
    )
    assert (raw - ema).abs().max() > 1e-4
    shuffled = Items(str(data), 40, 0, shuffled=True)
    true, other = (
        Probed.open(str(teacher), items, "raw", [6]).pairs(labelled, np.arange(40), 0.5)[6]
        for labelled in (items, shuffled)
    )
    assert true[0].equal(other[0]) and not true[1].equal(other[1])  # f_u has no label as input


def test_rows_are_those_of_explicit_features(data: Path, teacher: Path, masks: Path) -> None:
    items = Items(str(data), 60, 0, str(masks))
    probed = Probed.open(str(teacher), items, "ema", (3,))
    kinds = [("u", None), ("c", None), ("g", 10.0)]
    with probe.progress.bar(total=60, main=False) as bar:
        rows = reading.measure(reading.of_blocks(probed, items, 0.5, kinds), items, 4, {}, 7, bar)
    u, c = probed.pairs(items, np.arange(60), 0.5)[3]
    patches = items.patches(np.arange(60), 4)
    fit, validate, test = (torch.from_numpy(part) for part in items.parts)
    for row, feature in zip(rows, (u, c, u + 10 * (c - u)), strict=True):
        assert row["accuracy"] == representation.class_accuracy(feature.mean(1), items.labels, (fit, validate, test))
        sums = [TokenSums.of(feature[part].flatten(0, 1), patches[part].flatten(0, 1)) for part in (fit, validate)]
        mask_probe = representation.mask_probe(*sums)
        counts = representation.confusion(mask_probe(feature[test]) > 0.5, patches[test] > 0.5)
        assert row["miou"] == pytest.approx(representation.iou(counts), abs=0.01)


def test_cknna_compares_the_images_drawn_first_and_not_those_first_on_disk(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets are often stored class after class: the first on disk would be of few classes."""
    monkeypatch.setattr(reading, "ALIGNED", 60)
    items = Items(str(data), 300, 0)
    places = items.first(60)
    assert (
        set(items.index[places]) == set(Items(str(data), 60, 0).index)
        and places.max() > 200
        and list(places) == sorted(places)
    )
    latents = items.clean(np.arange(300)).flatten(1).double()
    with probe.progress.bar(total=300, main=False) as bar:
        (measured,) = reading.measure(
            reading.unmapped("latents", lambda some: latents[some, None]),
            items,
            4,
            reading.compared(items, None, 64, torch.device("cpu")),
            64,
            bar,
        )
    x, classes = latents[places], torch.nn.functional.one_hot(items.labels[places]).double()
    wanted = representation.cknna(
        representation.kernel(representation.standardise(x, x)), representation.kernel(classes)
    )
    assert measured["cknna class"] == pytest.approx(wanted) and measured["cknna latents"] == pytest.approx(1)
    # the code of CKNNA's authors sees the features as they are
    plain = representation.cknna_hsic(representation.kernel(x), representation.kernel(classes))
    assert measured["cknna-hsic class"] == pytest.approx(plain) != pytest.approx(wanted)


def test_patches_of_masks_are_the_pixels_of_their_tokens(data: Path, masks: Path) -> None:
    items = Items(str(data), 5, 0, str(masks))
    whole, patches = items.masks[items.index[1]], items.patches(np.arange(5), 4)[1]
    for token in range(16):
        row, column = divmod(token, 4)
        assert patches[token].tolist() == whole[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten().tolist()


@pytest.fixture(scope="module")
def probed(data: Path, teacher: Path, masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return probe.main(
        [
            "--ckpt",
            str(teacher),
            "--data-dir",
            str(data),
            "--masks",
            str(masks),
            *WORDS,
            "--out",
            str(tmp_path_factory.mktemp("probe") / "out"),
        ]
    )


def test_the_command_writes_numbers_picture_and_flags(
    probed: Path, data: Path, teacher: Path, masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((probed / "probe.json").read_text())
    assert [(row["features"], row["omega"], row["block"]) for row in result["rows"]] == [("latents", None, None)] + [
        (kind, omega, block)
        for block in (1, 3)
        for kind, omega in (("u", None), ("c", None), ("g", 3), ("g", 10), ("g", 30))
    ]
    assert all(0 <= row[name] <= 1 for row in result["rows"] for name in ("accuracy", "knn", "miou"))
    assert (
        result["rows"][0]["miou"] > 0.9 and result["rows"][0]["cknna latents"] < 1
    )  # ink is brightness: linear in the pixels
    protocol = result["protocol"]
    assert protocol["data"] == LatentSet(data).digest
    assert protocol["items"] == 90 and protocol["held_out"] in (17, 18, 19)
    assert result["checkpoints"]["stage1@4"]["digest"] == Checkpoint.open(teacher).digest
    for kind, head in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (probed / f"probe.{kind}").read_bytes().startswith(head)
    capsys.readouterr()
    out = probe.main(
        [
            "--ckpt",
            str(teacher),
            "--data-dir",
            str(data),
            "--masks",
            str(masks),
            *WORDS,
            "--batch-size",
            "31",
            "--out",
            str(tmp_path / "again"),
        ]
    )
    repeated = json.loads((out / "probe.json").read_text())
    assert repeated["protocol"] == protocol
    for row, again in zip(result["rows"], repeated["rows"], strict=True):
        assert row == pytest.approx(again, abs=0.03)  # a border case may fall to the other side of a threshold
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == repeated["recommended"]
    _config, options = command.resolve(
        ["--data-dir", str(data), "--exp-name", "e", "--guiding-ckpt", str(teacher), *shlex.split(lines[-1])],
        "train_guide.py",
        None,
        ("guided",),
    )
    assert options["guided"].guiding_depth in (1, 3) and options["guided"].guide_scale in (3, 10, 30)
    assert len({len(line) for line in lines[:2]}) == 1 and lines[2].split()[:2] == ["-", "latents"]


def test_without_masks_and_with_an_encoder(
    data: Path, teacher: Path, guided: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = probe.main(
        [
            "--ckpt",
            str(teacher),
            str(guided),
            "--data-dir",
            str(data),
            *WORDS,
            "--encoder",
            str(encoder),
            "--omega",
            "5",
            "--features",
            "g",
            "--out",
            str(tmp_path),
        ]
    )
    rows = json.loads((out / "probe.json").read_text())["rows"]
    assert [(row["checkpoint"], row["features"]) for row in rows] == [
        (None, "encoder"),
        *[("stage1@4", "g")] * 2,
        *[("stage2@4", "g")] * 2,
    ]
    assert rows[0]["cknna encoder"] == pytest.approx(1) and "miou" not in rows[0] and rows[1]["cknna encoder"] < 1
    # without masks
    assert capsys.readouterr().out.splitlines()[-1] == "cannot tell: keep the defaults"
    probe.main(
        [
            "--ckpt",
            str(teacher),
            "--data-dir",
            str(data),
            *WORDS,
            "--features",
            "latents",
            "--out",
            str(tmp_path / "plain"),
        ]
    )
    assert capsys.readouterr().out.splitlines()[-1] == "no recommendation: it needs --features g"


def test_shuffled_labels_are_those_of_other_images(data: Path) -> None:
    true, shuffled = Items(str(data), 200, 0), Items(str(data), 200, 0, shuffled=True)
    assert true.conditions.equal(true.labels) and shuffled.labels.equal(true.labels)
    assert shuffled.conditions.sort().values.equal(true.labels.sort().values)
    assert 0 < (shuffled.conditions == shuffled.labels).double().mean() < 0.3


def row(name: str, block: int, omega: float, knn: float, miou: float, t: float = 0.5) -> dict:
    return {
        "checkpoint": name,
        "features": "g",
        "block": block,
        "omega": omega,
        "t": t,
        "accuracy": 1.0,
        "knn": knn,
        "miou": miou,
    }


def test_the_recommendation_follows_its_rule() -> None:
    rows = [
        row("a", 4, 10, 0.9, 0.8),
        row("a", 5, 10, 1.0, 0.9, t=0.3),
        row("a", 5, 10, 0.8, 0.6),
        row("a", 2, 30, 0.95, 0.7),
    ]
    given = {"a": "exps/a", "b": "my exps/b@9"}
    assert probe.recommend(
        rows, {"a": 6}, given
    ) == "--guiding-depth 4 --guided-depth 3 --guide-scale 10" and not probe.caveats(rows)
    rows.append(row("a", 3, 3, 0.9, 0.795))  # level with the best, and cheaper
    assert probe.recommend(rows, {"a": 6}, given) == "--guiding-depth 3 --guided-depth 2 --guide-scale 3"
    assert "widen --omega" in probe.caveats([*rows, row("a", 6, 30, 1.0, 1.0)])[0]
    rows.append(row("b", 1, 3, 1.0, 0.9))
    assert (
        probe.recommend(rows, {"a": 6, "b": 12}, given)
        == "--guiding-ckpt 'my exps/b@9' --guiding-depth 1 --guided-depth 1 --guide-scale 3"
    )
    unguided = [{**rows[0], "features": "u"}]
    assert probe.recommend(unguided, {"a": 6}, given) is None and probe.caveats(unguided) == []
    blind = [{key: value for key, value in line.items() if key != "miou"} for line in rows[:4]]
    assert probe.recommend(blind, {"a": 12}, given) == probe.CANNOT_TELL == "cannot tell: keep the defaults"
    assert "without --masks" in probe.caveats(blind)[0]


def test_a_saturated_score_recommends_nothing() -> None:
    """Four classes of photographs: f_g of every block separates them at omega 3 already, so only ties could choose."""
    photos = [row("a", block, omega, 1.0, 0.8 - omega / 300) for block in (1, 2, 3, 4) for omega in (3, 10, 30)]
    assert probe.recommend(photos, {"a": 4}, {"a": "a"}) == probe.CANNOT_TELL
    assert "saturated at omega 3" in probe.caveats(photos)[0] and "--" not in probe.CANNOT_TELL
    # half of the blocks are not saturated there
    apart = [{**line, "knn": 0.7} if line["block"] < 3 and line["omega"] == 3 else line for line in photos]
    assert probe.recommend(apart, {"a": 4}, {"a": "a"}) == "--guiding-depth 3 --guided-depth 2 --guide-scale 3"
    assert drawn_bars(photos) == 0 and drawn_bars(apart) == 1


def drawn_bars(rows: list[dict]) -> int:
    """Grey bars of the plot: axvline draws a line from 0 to 1 of the axes' height."""
    return sum(line.get_color() == "0.85" for axes in probe.plot(rows).axes[:1] for line in axes.get_lines())


def test_the_plot_marks_the_recommended_block_of_its_checkpoint() -> None:
    rows = [row(name, block, 10, 0.5 + 0.1 * (name == "b" and block == 3), 0.5) for name in "ab" for block in (2, 3)]
    axes = probe.plot(rows).axes
    assert [
        (panel.get_ylabel(), [line.get_xdata()[0] for line in panel.lines if line.get_zorder() == 0]) for panel in axes
    ] == [
        *((metric, []) for metric in ("accuracy", "knn", "mIoU")),
        *((metric, [3]) for metric in ("accuracy", "knn", "mIoU")),
    ]


def test_mistakes_are_answered(data: Path, teacher: Path, masks: Path, tmp_path: Path, words) -> None:
    def run(*more: object, ckpt: Path = teacher) -> None:
        probe.main(
            ["--ckpt", str(ckpt), "--data-dir", str(data), *WORDS, "--out", str(tmp_path / "out"), *map(str, more)]
        )

    np.savez(tmp_path / "few.npz", masks=np.zeros((3, 8, 8), np.uint8))
    np.savez(tmp_path / "odd.npz", masks=np.zeros((1797, 6, 6), np.uint8))
    np.savez(tmp_path / "grey.npz", masks=np.full((1797, 8, 8), 128, np.uint8))
    for more, message in (
        (("--features", "f"), "--features: invalid choice: 'f'"),
        (("--t", 1.5), r"--t 1.5 must lie in \[0, 1\]"),
        (("--blocks", 7), "blocks 1 to 6"),
        (("--masks", tmp_path / "absent.npz"), "cannot read"),
        (("--masks", tmp_path / "few.npz"), "3 masks, the data set 1797 items"),
        (("--masks", tmp_path / "odd.npz"), "6 pixels a side"),
        (("--masks", tmp_path / "grey.npz"), "0 and 1 in it"),
        (("--items", 3), "too few"),
        (("--encoder-weights", "x"), "give --encoder too"),
        (("--ckpt", teacher, teacher), "two checkpoints are called stage1@4"),
    ):
        with pytest.raises(UserError, match=message):
            run(*more)
    no_null = train.main(words(tmp_path, "no-null", "--cfg-prob", 0, "--max-train-steps", 1))
    with pytest.raises(UserError, match="use --features c"):
        run(ckpt=no_null)
    run("--features", "c", ckpt=no_null)


def test_text_tables_and_json_lines(tmp_path: Path) -> None:
    assert aligned([["a", "bb"], ["cccc", "d"]]) == "a     bb\n--------\ncccc   d"
    assert aligned([["a", "bb"], ["cccc", "d"]], left=(), rule=False) == "   a  bb\ncccc   d"
    (tmp_path / "log.jsonl").write_text('{"step": 1, "x": 2}\nnot json\n{"step": 3}\n{"ste')
    assert [line["step"] for line in read_lines(tmp_path / "log.jsonl")] == [1, 3] and read_lines(
        tmp_path / "absent"
    ) == []


def test_a_latent_that_is_not_finite_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = Items(str(data), 20, seed=0)
    raw, labels = items.data.read(items.index)
    raw[3, 0, 0, 2, 2] = np.nan
    monkeypatch.setattr(LatentSet, "read", lambda *_: (raw, labels))
    with pytest.raises(UserError, match=rf"the latent of item {items.index[3]} is not finite; encode the set again"):
        items.clean(np.arange(20))
