"""Figures on tiny runs of the digits: what is drawn is what was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from evaluations import drawing, figures, histories
from evaluations.taps import Items, Probed
from runtime import files
from runtime.errors import UserError
from runtime.options import read
from runtime.streams import Stream
from sampling.config import SamplingConfig, SourceOptions
from sampling.source import Source


def drawn(kind: str, *words: object):
    schema, draw = figures.KINDS[kind]
    return draw(read(schema, list(map(str, words)), prog=kind))


def test_every_style_differs_without_colour() -> None:
    assert (
        len({str(style["linestyle"]) for style in drawing.STYLES})
        == len({style["marker"] for style in drawing.STYLES})
        == len(drawing.STYLES)
    )


def test_the_frontier_joins_what_no_other_point_beats_in_both_and_names_stand_apart() -> None:
    points = {
        "cheap": (1.0, [10.0, 12.0]),
        "beaten": (2.0, [11.5]),
        "middle": (2.0, [8.0]),
        "dear": (3.0, [5.0]),
        "dear and beaten": (3.0, [5.01]),
    }
    axes = drawing.canvas(5, 4).subplots()
    drawing.frontier(axes, points)
    steps = next(line for line in axes.lines if line.get_linestyle() == "--")
    np.testing.assert_allclose(steps.get_xydata(), [[1, 11], [2, 8], [3, 5]])
    names = {text.get_text().split(":")[0]: text.xyann[1] for text in axes.texts}
    assert sorted(names, key=lambda name: names[name]) == ["dear", "dear and beaten", "middle", "cheap", "beaten"]
    assert np.diff(sorted(names.values())).min() > 0.049


def test_pca_maps_are_scikit_learns_components_of_f_g(data: Path, teacher: Path) -> None:
    figure = drawn(
        "pca", "--ckpt", teacher, "--data-dir", data, "--items", 5, "--blocks", 2, 4, "--t", 0.4, "--omega", 10
    )
    panels = np.array(figure.axes, dtype=object).reshape(5, 5)  # images, then f_c and f_g of two blocks
    assert [axes.get_ylabel() for axes in panels[:, 0]] == [
        "images",
        *(f"stage1@4, t 0.4, block {block}, {what}" for block in (2, 4) for what in ("f_c", "f_g 10")),
    ]
    items = Items(str(data), 5, 0)
    assert [axes.get_title() for axes in panels[0]] == [str(label) for label in items.labels.tolist()]
    np.testing.assert_array_equal(panels[0, 3].get_images()[0].get_array(), items.data.images(items.index)[3, ..., 0])
    u, c = Probed.open(str(teacher), items, "ema", [4]).pairs(items, np.arange(5), 0.4)[4]
    expected_maps = PCA(3).fit_transform((u + 10 * (c - u)).flatten(0, 1).numpy()).reshape(5, 4, 4, 3)
    ours = np.stack([axes.get_images()[0].get_array() for axes in panels[4]])
    for component in range(3):  # up to sign and stretch: one basis and one stretch for the whole row
        low, high = np.quantile(expected_maps[..., component], [0.01, 0.99])
        expected = ((expected_maps[..., component] - low) / (high - low)).clip(0, 1)
        same = [np.abs(ours[..., component] - values).max() for values in (expected, 1 - expected)]
        assert min(same) < 1e-4 < max(same)


def test_t_sne_has_a_glyph_a_class_and_a_point_an_image(data: Path, guided: Path) -> None:
    figure = drawn(
        "tsne",
        "--ckpt",
        guided,
        "--data-dir",
        data,
        "--items",
        24,
        "--blocks",
        3,
        "--classes",
        3,
        7,
        "--features",
        "u",
        "g",
    )
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title().split("\n")[1] for axes in panels] == ["f_u", "f_g 30"]
    for axes in panels:
        assert [scatter.get_label() for scatter in axes.collections] == ["3", "7"]
        points = np.concatenate([scatter.get_offsets() for scatter in axes.collections])
        assert len(points) == 24 and len(np.unique(points, axis=0)) == 24
        shapes = [scatter.get_paths()[0].vertices for scatter in axes.collections]
        assert shapes[0].shape != shapes[1].shape or not np.allclose(*shapes)
    labels = Items(str(data), 24, 0, classes=(3, 7)).labels
    assert [len(scatter.get_offsets()) for scatter in panels[0].collections] == [
        (labels == 3).sum(),
        (labels == 7).sum(),
    ]


def test_latents_and_an_external_encoder_are_drawn_beside_features(data: Path, teacher: Path, encoder: Path) -> None:
    """Figs. 1 and 2: the maps of the encoder are scikit-learn's components of timm's own patch tokens."""
    look = ("--ckpt", teacher, "--data-dir", data, "--items", 6, "--blocks", 3, "--features", "g", "latents")
    figure = drawn("pca", *look, "--encoder", encoder)
    panels = np.array(figure.axes, dtype=object).reshape(4, 6)
    named = ["images", "clean images, latents", "clean images, encoder", "stage1@4, t 0.5, block 3, f_g 30"]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == named
    items = Items(str(data), 6, 0)
    network = timm.create_model(f"local-dir:{encoder}", pretrained=True).eval()
    pixels = torch.from_numpy(items.data.images(items.index)).permute(0, 3, 1, 2).float() / 255
    tokens = network.forward_features((pixels - 0.5) / 0.5)[:, 1:].detach().double()
    latents = F.unfold(items.clean(np.arange(6)), 2, stride=2).transpose(1, 2).double()
    for row, expected in ((panels[1], latents), (panels[2], tokens)):
        components = PCA(3).fit_transform(expected.flatten(0, 1).numpy())
        ours = np.stack([axes.get_images()[0].get_array() for axes in row]).reshape(-1, 3)
        inside = (ours > 0.05) & (ours < 0.95)  # the stretch clips the ends
        for number in range(3):
            seen = inside[:, number]
            assert abs(np.corrcoef(ours[seen, number], components[seen, number])[0, 1]) > 0.999
    (only,) = [axes for axes in drawn("tsne", *look[:-2], "latents").axes if axes.get_title()]
    assert only.get_title() == "clean images\nlatents"
    with pytest.raises(UserError, match="give --encoder too"):
        drawn("pca", *look, "--encoder-weights", "x")


def history(folder: Path, values: dict[int, float], stop: int = 0, **more: float) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "loss/diffusion": 1.0, "loss/t 0-1/4": 1.0, "eval/is@50": 9.0, "eval/fid@50": value, **more}
        | ({"loss/guided": 0.1} if step <= stop else {})
        for step, value in values.items()
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_scores_against_steps_are_means_over_seeds_with_the_stop_marked(tmp_path: Path) -> None:
    plain = [history(tmp_path / f"plain{seed}", {10: 40 + seed, 20: 30 - seed}) for seed in (0, 2)]
    stopped = history(tmp_path / "stopped", {10: 35, 20: 25, 30: 24}, stop=20)
    never = history(tmp_path / "never", {10: 36, 20: 26}, stop=20)
    figure = drawn("steps", "--runs", *[f"plain={run}" for run in plain], stopped, never)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "fid@50" and [text.get_text() for text in axes.get_legend().get_texts()] == [
        "plain",
        "stopped",
        "never",
    ]
    curves = [container.lines[0] for container in axes.containers]
    assert curves[0].get_xydata().tolist() == [[10, 41], [20, 29]] and curves[1].get_ydata().tolist() == [35, 25, 24]
    bars = axes.containers[0].lines[2][0].get_segments()
    assert bars[0][:, 1].tolist() == pytest.approx([41 - 2**0.5, 41 + 2**0.5])
    upright = [line for line in axes.lines if list(line.get_xdata()) == [20, 20]]
    assert len(upright) == 1 and histories.stops([str(stopped), str(never)]) == {"stopped": 20}
    assert drawn("steps", "--runs", *plain, "--metric", "is@50").axes[0].get_ylabel() == "is@50"
    with pytest.raises(UserError, match="share no score fid@9; shared are fid@50, is@50"):
        drawn("steps", "--runs", *plain, "--metric", "fid@9")
    with pytest.raises(UserError, match="no log.jsonl"):
        drawn("steps", "--runs", tmp_path)


def test_internal_guidance_is_part_of_a_protocol_and_its_absence_is_not() -> None:
    def protocol(**settings: object) -> dict:
        return histories.protocol(
            {
                "metrics": {},
                "samples": {"settings": settings},
                "features": {},
                "reference": {"sha256": "r"},
                "precision_recall": None,
            }
        )

    plain, guided = (
        protocol(cfg_scale=1.0),
        protocol(cfg_scale=1.0, internal_scale=1.5, internal={"block": 2, "low": 0.0, "high": 1.0}),
    )
    assert (
        plain != guided != protocol(cfg_scale=1.0, internal_scale=1.4, internal={"block": 2, "low": 0.0, "high": 1.0})
    )
    assert not {name for name in plain if "internal" in name}  # protocols without it keep their keys


def score(file: Path, step: int, value: float, **more: object) -> str:
    settings = {
        "step": step,
        "cfg_scale": 1.0,
        "mode": "sde",
        "solver": "euler",
        "num_steps": 250,
        "weights": "ema",
        **more,
    }
    content = {
        "metrics": {"fid": value},
        "features": {"name": "pixels"},
        "reference": {"sha256": "r"},
        "precision_recall": None,
        "samples": {"settings": settings},
    }
    files.write_sealed(file, content)
    return f"a={file}"


def test_score_files_make_curves_of_one_protocol(tmp_path: Path) -> None:
    scores = [score(tmp_path / f"{step}.json", step, 100 / step) for step in (4, 2)]
    assert histories.from_scores(scores, None) == ({"a": {4: [25], 2: [50]}}, "fid")
    assert drawn("steps", "--scores", *scores).axes[0].containers[0].lines[0].get_xydata().tolist() == [
        [2, 50],
        [4, 25],
    ]
    with pytest.raises(UserError, match="different cfg_scale .2.0 and 1.0."):
        drawn("steps", "--scores", *scores, score(tmp_path / "guided.json", 6, 1, cfg_scale=2.0))
    with pytest.raises(UserError, match="different labels .balanced and None."):
        drawn("steps", "--scores", *scores, score(tmp_path / "labels.json", 6, 1, labels="balanced"))
    for text, fault in (
        ('{"samples": {"settings": 3}}', "metrics: field required"),
        ("[]", "damaged or from another"),
        ('{"metrics": 3}', "metrics: .* not 3"),
    ):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(UserError, match=f"odd.json .*{fault}.*give metrics.json"):
            drawn("steps", "--scores", f"a={tmp_path / 'odd.json'}")
    (tmp_path / "2.json").write_text((tmp_path / "2.json").read_text().replace("50.0", "5.0"))
    with pytest.raises(UserError, match="2.json was damaged or edited"):
        drawn("steps", "--scores", *scores)
    with pytest.raises(UserError, match="does not say which step"):
        drawn("steps", "--scores", score(tmp_path / "stepless.json", None, 1))
    with pytest.raises(UserError, match="one of them"):
        drawn("steps", "--runs", "a", "--scores", "b")


def test_one_seed_across_checkpoints(teacher: Path, guided: Path) -> None:
    figure = drawn(
        "seeds", "--ckpt", guided, teacher, "--classes", 7, 2, "--num-steps", 3, "--mode", "ode", "--seed", 5
    )
    panels = np.array(figure.axes, dtype=object).reshape(4, 1)
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["stage2, 7", "stage1, 7", "stage2, 2", "stage1, 2"]
    assert panels[0, 0].get_title() == "4"
    sampling = SamplingConfig(num_steps=3, mode="ode", seed=5)
    source = Source.open(SourceOptions(ckpt=str(teacher)), sampling)
    expected = source.sampler(sampling, 2, np.array([7, 2])).images([0, 1])
    for place, image in ((1, expected[0]), (3, expected[1])):
        np.testing.assert_array_equal(panels[place, 0].get_images()[0].get_array(), image[..., 0])
    with pytest.raises(UserError, match="two checkpoints are called stage1@4"):
        drawn("seeds", "--ckpt", teacher, teacher, "--num-steps", 3)


def test_the_time_table_counts_stage_one(
    teacher: Path, guided: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(guided, tmp_path / "run")
    history(tmp_path / "log", {2: 1.0, 4: 1.0}, images_per_second=8.0)
    shutil.copy(tmp_path / "log" / "log.jsonl", run / "log.jsonl")
    lines = [
        line
        for line in map(json.loads, (teacher / "log.jsonl").read_text().splitlines())
        if "images_per_second" in line
    ]
    stage1 = sum(16 / line["images_per_second"] for line in lines) / 3600  # a line a step of 16 images
    figures.main(["time", "--runs", f"ours={run}", "--out", str(tmp_path / "time.json")])
    (record,) = json.loads((tmp_path / "time.json").read_text())
    assert (
        record["hours"] == pytest.approx(4 * 16 / 8 / 3600)
        and record["rate"] == pytest.approx(8)
        and record["steps"] == 4
    )
    assert (
        len(lines) == 4
        and record["stage1"] == pytest.approx(stage1)
        and record["total"] == pytest.approx(record["hours"] + stage1)
    )
    assert capsys.readouterr().out.splitlines()[2].split()[0] == "ours"
    alone = histories.time_of(str(teacher))
    assert alone.stage1 == 0 and alone.total == alone.hours == pytest.approx(stage1)
    assert "?" in histories.time_table([histories.Time("x", 1, 1.0, 1.0, 1.0, None)])


def test_the_steps_before_a_branch_take_its_trunks_time(tmp_path: Path) -> None:
    """By hand: 50,000 steps of 256 at 1,000 images a second and 100,000 at 2,000 are 3.56 hours each."""
    trunk = history(tmp_path / "trunk", dict.fromkeys((25_000, 50_000, 75_000), 1.0), images_per_second=1000.0)
    branch = history(tmp_path / "branch", dict.fromkeys((75_000, 150_000), 1.0), images_per_second=2000.0)
    alone, rate = histories.spent(branch, 256, 150_000)
    assert (alone, rate) == (pytest.approx(150_000 * 256 / 2000 / 3600), pytest.approx(2000))
    for name in (f"{trunk}@50000", trunk, trunk / "checkpoints" / "0050000"):
        (branch / "run.json").write_text(json.dumps({"train": {"branch_from": str(name)}}))
        hours, rate = histories.spent(branch, 256, 150_000)
        assert (hours, rate) == (pytest.approx(7.1111, abs=1e-4), pytest.approx(1500))
    shutil.rmtree(trunk)
    with pytest.raises(UserError, match="branch branches from .*, whose log.jsonl is missing: restore it"):
        histories.spent(branch, 256, 150_000)


def test_files_are_the_same_each_time(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    for folder in ("a", "b"):
        figures.main(
            [
                "pca",
                "--ckpt",
                str(teacher),
                "--data-dir",
                str(data),
                "--items",
                "2",
                "--blocks",
                "1",
                "--out",
                str(tmp_path / folder / "p"),
            ]
        )
        seen.append([(tmp_path / folder / f"p.{kind}").read_bytes() for kind in ("png", "svg")])
    assert seen[0] == seen[1] and seen[0][0][:4] == b"\x89PNG" and b"<svg" in seen[0][1]
    assert "wrote" in capsys.readouterr().out


def test_mistakes_are_answered(data: Path, teacher: Path) -> None:
    with pytest.raises(UserError, match="no figure pcs .did you mean pca"):
        figures.main(["pcs"])
    for more, message in (
        (("--features", "x"), "--features: invalid choice: 'x'"),
        (("--classes", 11), "there are 10 classes"),
        (("--blocks", 9), "blocks 1 to 6"),
    ):
        with pytest.raises(UserError, match=message):
            drawn("pca", "--ckpt", teacher, "--data-dir", data, *more)
    with pytest.raises(UserError, match="at least 5"):
        drawn("tsne", "--ckpt", teacher, "--data-dir", data, "--items", 3)
    for kind in ("pca", "tsne"):
        with pytest.raises(UserError, match="--items -3 must lie in"):
            drawn(kind, "--ckpt", teacher, "--data-dir", data, "--items", -3)


def test_colours_are_stretched_per_component() -> None:
    picture = figures.colours(Stream(0, "tokens").normal((4, 16, 5)))
    assert (
        picture.shape == (4, 4, 4, 3)
        and picture.min((0, 1, 2)).tolist() == [0, 0, 0]
        and picture.max((0, 1, 2)).tolist() == [1, 1, 1]
    )
    flat = figures.colours(
        Stream(0, "tokens").normal((4, 16, 1)) * torch.ones(3)
    )  # a single direction: no colour out of rounding
    assert flat[..., 0].max() == 1 and np.ptp(flat[..., 1:]) < 1e-6
