"""The quickstart: its proportions at any length, its verdict and its pictures."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate
from models.checkpoint import Checkpoint
from preprocessing import fashion
from recipes import quickstart
from runtime import files
from runtime.errors import UserError
from tests.helpers import ROOT


def recorded(called: list[list[str]], *words: object) -> None:
    """In place of a command: note it, and write the score that it would."""
    argv = [str(word) for word in words]
    called.append(argv)
    if "evaluations.evaluate" in argv:
        out = Path(argv[argv.index("--out") + 1])
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_sealed(out, {"metrics": {key: float(len(called)) for key in quickstart.METRICS}})


def test_the_quickstart_keeps_its_proportions_at_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    called: list[list[str]] = []
    monkeypatch.setattr(quickstart, "_call", functools.partial(recorded, called))
    config = quickstart.QuickstartConfig(out=str(tmp_path), steps=80, model="SiT-S/2", mixed_precision="bf16")
    for part in (quickstart.GUIDED, quickstart.PLAIN):
        quickstart.run_chain(part, config, 3)
    training = [argv for argv in called if argv[0] in ("train.py", "train_guide.py")]
    assert [argv[argv.index("--max-train-steps") + 1] for argv in training] == ["40", "80", "120"]
    for argv in training:
        for flag, value in (
            ("--model", "SiT-S/2"),
            ("--mixed-precision", "bf16"),
            ("--checkpointing-steps", "40"),
            ("--seed", "3"),
        ):
            assert argv[argv.index(flag) + 1] == value
    assert training[1][training[1].index("--align-stop-steps") + 1] == "20"
    rows = quickstart.scores(tmp_path / "seed3", config)
    assert [(row["name"], row["step"], row["total"]) for row in rows][-1] == ("self-guided SiT", 80, 120)
    verdict = quickstart.verdict({3: rows})
    assert "at 40 of its own steps" in verdict and "at 120 total steps, stage 1 counted," in verdict
    assert "self-guided SiT" in quickstart.table({3: rows})
    default = quickstart.QuickstartConfig(out=str(tmp_path))
    assert default.rows == list(quickstart.ROWS)
    with pytest.raises(UserError, match="multiple of 4"):
        quickstart.QuickstartConfig(steps=10)


def test_the_plain_chain_runs_beside_the_guided_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its failure ends the command with the place of its words, and it never outlives the guided chain."""
    called: list[list[str]] = []
    monkeypatch.setattr(quickstart, "_call", functools.partial(recorded, called))
    config = quickstart.QuickstartConfig(out=str(tmp_path), steps=80)
    (tmp_path / "images").write_text("")  # where a folder should be
    with pytest.raises(UserError, match=r"plain SiT ended with exit code \d; .*plain.log says why"):
        quickstart.side_by_side(config, 5)
    assert str(tmp_path / "images") in (tmp_path / "seed5" / "plain.log").read_text()
    assert {argv[argv.index("--exp-name") + 1] for argv in called if "--exp-name" in argv} == {"stage1", "guided"}

    def fails(*words: object) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(quickstart, "_call", fails)
    began = time.monotonic()
    with pytest.raises(UserError, match="no space left"):
        quickstart.side_by_side(config, 5)
    assert time.monotonic() - began < 20


def test_the_verdict_compares_the_networks_seed_by_seed() -> None:
    def rows(*distances: float) -> list[dict]:
        return [
            {"name": row.name, "step": row.step, "total": row.total, "fd": value}
            for row, value in zip(quickstart.ROWS, distances, strict=True)
        ]

    # plain at 600, 1,200 and 1,800 steps; the teacher; self-guided at 600 and 1,200 steps
    results = {0: rows(3.0, 1.0, 0.5, 4.0, 2.0, 1.1), 1: rows(3.2, 1.2, 0.4, 4.0, 2.1, 1.1)}
    one_seed = quickstart.verdict({0: results[0]})
    assert one_seed.startswith(
        "Over one seed (0; other seeds differ): at 600 of its own steps the self-guided network is ahead"
    )
    assert "at 1200 the self-guided network is behind plain SiT (Frechet 1.10 against 1.00)" in one_seed
    both = quickstart.verdict(results)
    assert "ahead of plain SiT (Frechet 2.05 against 3.10); at 1200 the self-guided network is level with" in both
    assert both.endswith("behind plain SiT (Frechet 1.10 against 0.45).")


def test_pictures_show_every_row(tmp_path: Path) -> None:
    config = quickstart.QuickstartConfig(steps=8, samples=16)
    for row in config.rows:
        folder = tmp_path / "samples" / f"{row.run}-{row.step}"
        folder.mkdir(parents=True)
        np.savez(folder / "samples.npz", arr_0=np.full((16, 8, 8, 1), 9, np.uint8), labels=np.arange(16) % 10)
    quickstart.sample_picture(tmp_path, tmp_path / "samples.png", config)
    pixels = np.asarray(Image.open(tmp_path / "samples.png").convert("L"))[:, -16 * 66 :]  # right of the names
    assert (pixels == 9).sum() == 6 * 16 * 64 * 64  # two of each of six digits, one of each of the others
    for run, steps in (("stage1", (1, 4)), ("plain", (1, 12)), ("guided", (1, 8))):
        (tmp_path / "exps" / run).mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss/diffusion": 1.0 / step}) for step in steps]
        lines.insert(1, json.dumps({"step": 2, "grad_norm_ratio/guided": 1.5}))
        (tmp_path / "exps" / run / "log.jsonl").write_text("\n".join(lines) + "\n")
    quickstart.loss_figure(tmp_path, tmp_path / "losses", config)
    assert (tmp_path / "losses.png").stat().st_size > 5000
    with pytest.raises(UserError, match="--samples 9"):
        quickstart.main(["--samples", "9", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_committed_networks_draw_clothes_of_the_class_that_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the nearest mean image of each class, which is right for two thirds of the test images."""
    monkeypatch.chdir(ROOT)  # where the checkpoint names its autoencoder
    checkpoint = Checkpoint.open(f"pretrained/quickstart-{name}")
    checkpoint.require_whole()
    assert checkpoint.config["space"]["vae"] == quickstart.VAE and checkpoint.spec.name == quickstart.MODEL
    few = ["--labels", "balanced", "--num-fid-samples", "40", "--mode", "ode", "--solver", "heun", "--num-steps", "8"]
    out = generate.main(["--ckpt", str(checkpoint.path), *few, "--out", str(tmp_path / "out")])
    with np.load(out / "samples.npz") as drawn:
        images, labels = drawn["arr_0"][..., 0].astype(float), drawn["labels"]
    train, classes, _ = fashion.load(fashion.EMBEDDED, "train")
    means = np.stack([train[classes == label].mean(0) for label in range(10)])
    nearest = np.square(images[:, None] - means).mean((2, 3)).argmin(1)
    assert (nearest == labels).mean() > 0.5
