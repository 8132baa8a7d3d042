"""Scenes: a function of dials, seed and index; their masks, groups and classes; the committed classifier."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from config import FeatureOptions
from dataset import LatentSet
from evaluations import metrics
from evaluations.extractors import open_extractor
from models.encoders import open_encoder
from preprocessing import scenes
from preprocessing.scenes import GROUPS, MASKS, Dials, Scenes
from recipes import encoder
from runtime import files
from runtime.errors import UserError
from runtime.options import read
from tests.helpers import ROOT

BARE = {"colours": 0.0, "gradient": 0.0, "clutter": 0}


def test_a_scene_depends_on_dials_seed_and_index_alone() -> None:
    few, many, other = Scenes(Dials(), 20), Scenes(Dials(), 500), Scenes(Dials(), 20, seed=1)
    for index in (0, 7, 19):
        assert (few.draw(index)[0] == many.draw(index)[0]).all() and (few.draw(index)[0] != other.draw(index)[0]).any()
    assert few.fingerprint != many.fingerprint != other.fingerprint


def test_ink_is_dark_where_the_mask_says_so() -> None:
    """Without colour, gradient and clutter a pixel is white minus its ink: the mask is a threshold of the picture."""
    plain = Scenes(Dials(**BARE), 50)
    for index in range(50):
        picture, mask, _ = plain.draw(index)
        assert ((picture < 127.5).all(-1) == mask.astype(bool)).all() and 8 <= mask.sum() <= 128
    coloured = Scenes(Dials(colours=1.0, gradient=0.0, clutter=0), 50)
    for index in range(50):
        picture, mask, _ = coloured.draw(index)
        ink, paper = picture[mask > 0].mean(), np.median(picture.mean(-1)[mask == 0])
        assert paper - ink > 40  # colours that differ enough in brightness


def test_each_dial_does_what_it_says() -> None:
    def spread(of: str, **dials: object) -> float:
        drawn = [
            Scenes(Dials(**{**BARE, "jitter": 0.0, "size": (1.0, 1.0), **dials}), 200).draw(index)
            for index in range(0, 200, 10)
        ]
        masks = np.stack([mask for _, mask, _ in drawn]).astype(float)  # all of class 0
        if of == "place":
            rows = masks.sum(2) @ np.arange(masks.shape[1]) / masks.sum((1, 2))
            return float(rows.std())
        if of == "area":
            return float(masks.sum((1, 2)).mean())
        edges = [
            np.concatenate([picture[:, :2], picture[:, -2:]], 1).astype(float) for picture, *_ in drawn
        ]  # no ink comes so far
        return float(np.mean([values.mean(-1).std() if of == "slope" else values.std(-1).mean() for values in edges]))

    assert spread("place", jitter=3.0) > 2 * spread("place") and spread("area", size=(0.6, 0.6)) < 0.5 * spread("area")
    assert spread("colour", colours=1.0) > 10 and spread("colour") == 0
    assert spread("slope", gradient=1.0) > 10 and spread("slope") < 10 and spread("slope", clutter=4) > spread("slope")


def test_pairs_need_both_digits_and_classes_differ() -> None:
    dials = Dials(digits=2, classes=60)
    pairs = [dials.pair(label) for label in range(60)]
    assert len(set(pairs)) == 60
    assert all(len({pair for pair in pairs if pair[side] == digit}) > 1 for side in (0, 1) for digit in range(10))
    picture, mask, _ = Scenes(dials, 60).draw(3)
    assert picture.shape == (16, 16, 3) and mask[:, :8].any() and mask[:, 8:].any()


def test_groups_share_no_handwriting() -> None:
    pools = Scenes(Dials(), 10)._pools
    whole = np.concatenate(list(pools.values()))
    assert len(whole) == len(set(whole.tolist())) == 1797 and all(len(pool) > 20 for pool in pools.values())
    held = Scenes(Dials(), 50, groups=(GROUPS - 1,))
    assert {held.draw(index)[2] for index in range(50)} == {GROUPS - 1}
    assert {Scenes(Dials(), 50).draw(index)[2] for index in range(50)} == set(range(GROUPS))


def test_the_set_on_disk_is_the_scenes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["--out", str(tmp_path / "set"), "--count", "30", "--digits", "1", "--classes", "5"]
    scenes.main(argv)
    made, drawn = LatentSet(tmp_path / "set"), Scenes(Dials(classes=5), 30)
    assert len(made) == 30 and made.num_classes == 5 and (made.labels == np.arange(30) % 5).all()
    assert (made.images(np.array([4, 17])) == np.stack([drawn.draw(4)[0], drawn.draw(17)[0]])).all()
    with np.load(tmp_path / "set" / MASKS) as stored:
        assert stored["masks"].shape == (30, 16, 16) and (stored["masks"][17] == drawn.draw(17)[1]).all()
        assert stored["groups"].tolist() == [drawn.draw(index)[2] for index in range(30)]
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").iterdir()}
    scenes.main(argv)
    assert "is finished already" in capsys.readouterr().out
    assert {name: time for name, time in before.items() if not name.startswith(".")}.items() <= {
        file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").iterdir()
    }.items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--digits", "3"], "must be 1 or 2"),
        (["--classes", "11"], "between 2 and 10"),
        (["--colours", "2"], "must lie in"),
        (["--size", "0", "1"], "the smallest and the largest"),
        (["--count", "3"], "at least --classes"),
        (["--resolution", "9"], "must be even"),
    ],
)
def test_dials_that_cannot_be_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(scenes.Options, words, prog="scenes", description="")


def test_the_committed_classifier_knows_unseen_handwriting_as_well_as_it_says() -> None:
    import timm

    folder = ROOT / "evaluations" / "scenes"
    record = json.loads((folder / "accuracy.json").read_text())
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000 and record["accuracy"] > 0.95
    dials = Dials(**{**record["scenes"], "size": tuple(record["scenes"]["size"])})
    assert dials == Dials()  # what --features scenes is for
    held = Scenes(dials, record["held_out"], 2, (GROUPS - 1,))
    images = torch.from_numpy(np.stack([held.draw(index)[0] for index in range(record["held_out"])]))
    with torch.no_grad():
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        answers = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x).argmax(1).numpy()
    assert (answers == held.labels).mean() == pytest.approx(record["accuracy"], abs=0.002)
    extractor = open_extractor(FeatureOptions(features="scenes"))
    assert extractor.weights == files.digest(folder / "model.safetensors")
    features, labels = extractor(images[:800]).pool, torch.from_numpy(held.labels[:800])
    assert metrics.class_accuracy(features[:200], labels[:200], features[200:], labels[200:]) > 0.9


def test_an_encoder_of_scenes_is_what_timm_and_the_scores_can_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "SCENES", 60)
    dials = Dials(resolution=8, classes=2, **BARE)
    encoder.train_encoder(tmp_path / "made", 1, dials)
    record = json.loads((tmp_path / "made" / "accuracy.json").read_text())
    assert record["held_out"] == 10 and record["scenes"] == json.loads(json.dumps(dataclasses.asdict(dials)))
    extractor = open_extractor(FeatureOptions(features=f"timm:{tmp_path / 'made'}"))
    assert extractor(torch.zeros(2, 8, 8, 3, dtype=torch.uint8)).pool.shape == (2, 64) and extractor.weights
    with pytest.raises(UserError, match="leave out --feature-weights"):
        open_extractor(
            FeatureOptions(
                features=f"timm:{tmp_path / 'made'}", feature_weights=str(tmp_path / "made" / "model.safetensors")
            )
        )
    with pytest.raises(UserError, match=r"holds an encoder of other .*1 epochs"):
        encoder.train_encoder(tmp_path / "made", 2, dials)
    assert encoder.train_encoder(tmp_path / "made", 1, dials) == record["accuracy"]
    for name, content in (("model.safetensors", b"x" * 100), ("config.json", b"[]"), ("config.json", b"{}")):
        (tmp_path / "made" / name).write_bytes(content)
        for attempt in (
            lambda: open_extractor(FeatureOptions(features=f"timm:{tmp_path / 'made'}")),
            lambda: open_encoder(str(tmp_path / "made"), grid=4),
        ):
            with pytest.raises(UserError, match="is damaged, or not a folder that timm's save_for_hf wrote"):
                attempt()
