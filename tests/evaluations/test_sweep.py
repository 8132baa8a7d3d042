"""Scoring without samples on disk, and the guidance sweep, on a tiny run of the digits."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import socket
import subprocess
import sys

import numpy as np
import pytest

import generate
import train
from evaluations import evaluate, reference, score, sweep
from evaluations.sweep import SweepConfig, values
from generate import GenerateConfig
from runtime import files, options
from runtime.errors import UserError
from runtime.jsonlines import read
from runtime.locks import LOCK
from sampling.preview import SETTINGS
from sampling.store import DIGESTS
from tests.helpers import ROOT, held_elsewhere

FAST = ["--num-steps", "3", "--features", "pixels"]


@pytest.fixture(scope="module")
def real(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    reference.main(["--images", str(data), "--features", "pixels", "--keep", "300", "--out", str(path)])
    return path


def test_score_while_drawing_equals_score_of_the_files(guided, real, tmp_path, capsys):
    words = [
        "--ckpt",
        str(guided),
        "--num-fid-samples",
        "40",
        "--num-steps",
        "3",
        "--batch-size",
        "16",
        "--cfg-scale",
        "2",
    ]
    folder = generate.main(
        [*words, "--reference", str(real), "--features", "pixels", "--out", str(tmp_path / "scored")]
    )
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "metrics.safetensors"]
    scored = json.loads((folder / "metrics.json").read_text())
    assert "fd" in capsys.readouterr().out
    generate.main([*words, "--out", str(tmp_path / "drawn")])
    evaluate.main(
        [
            "--samples",
            str(tmp_path / "drawn" / "samples.npz"),
            "--reference",
            str(real),
            "--features",
            "pixels",
            "--out",
            str(tmp_path / "m.json"),
        ]
    )
    expected = json.loads((tmp_path / "m.json").read_text())
    assert scored["metrics"] == pytest.approx(expected["metrics"], rel=1e-9)
    assert scored["reference"] == expected["reference"] and scored["num_samples"] == 40
    settings = expected["samples"]["settings"]
    assert scored["samples"]["settings"] == {name: settings[name] for name in settings if name not in DIGESTS}


BOTH = """
import pickle, sys
import generate
from evaluations import collect, evaluate

def small(objects, gather=collect.gather_object):
    # features go through files, not through the devices' memory
    assert len(pickle.dumps(objects)) < 1000
    return gather(objects)

collect.gather_object = small
cut = sys.argv.index("--then")
evaluate.main(sys.argv[1:cut])
generate.main(sys.argv[cut + 1:])
"""


def test_two_processes_score_as_one(guided, real, tmp_path):
    """Files and fresh samples, in one launch of two processes."""
    files = [
        "--samples",
        random_images(tmp_path / "samples.npz", 31),
        "--reference",
        random_images(tmp_path / "real.npz", 41),
        "--features",
        "pixels",
        "--batch-size",
        "4",
        "--out",
    ]
    fresh = [
        "--ckpt",
        str(guided),
        "--num-fid-samples",
        "25",
        "--batch-size",
        "8",
        "--reference",
        str(real),
        *FAST,
        "--out",
    ]
    (tmp_path / "both.py").write_text(BOTH)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            str(port),
            tmp_path / "both.py",
            *files,
            tmp_path / "two.json",
            "--then",
            *fresh,
            tmp_path / "two",
        ],
        check=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert not list(tmp_path.rglob(".*.tmp"))
    evaluate.main([*files, str(tmp_path / "one.json")])
    generate.main([*fresh, str(tmp_path / "one")])
    for single, double in (("one.json", "two.json"), ("one/metrics.json", "two/metrics.json")):
        alone, together = (json.loads((tmp_path / name).read_text()) for name in (single, double))
        assert (alone["processes"], together["processes"]) == (1, 2)
        assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)


def random_images(path, count):
    """Labelled images to compare, or to compare with."""
    rng = np.random.RandomState(count)
    np.savez(path, arr_0=rng.randint(0, 256, (count, 8, 8, 1)).astype(np.uint8), labels=rng.randint(0, 10, count))
    return str(path)


def test_scores_during_training(data, real, words, tmp_path, capsys):
    more = ["--max-train-steps", "3", "--checkpointing-steps", "2", "--log-steps", "2", "--vae", "pixels"]
    scored = train.main(
        words(
            tmp_path,
            "scored",
            *more,
            "--eval-steps",
            "2",
            "--reference",
            real,
            "--features",
            "pixels",
            "--num-fid-samples",
            "16",
        )
    )
    lines = read(scored / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 3]  # losses and scores of a step share its line
    assert {"eval/fd@16", "eval/precision@16", "eval/mind@16"} <= lines[0].keys() and "eval/fd@16" not in lines[1]
    assert "eval/fd@16" in capsys.readouterr().out
    plain = train.main(words(tmp_path, "plain", *more))
    assert [line["loss/diffusion"] for line in read(plain / "log.jsonl")] == [line["loss/diffusion"] for line in lines]

    checkpoint = scored / "checkpoints" / "0000002"  # the same, from the checkpoint's EMA weights afterwards
    how = {field.name: getattr(SETTINGS, field.name) for field in dataclasses.fields(SETTINGS)}
    flags = [
        word for name, value in how.items() if value is not None for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    out = generate.main(
        [
            "--ckpt",
            str(checkpoint),
            *flags,
            "--num-fid-samples",
            "16",
            "--reference",
            str(real),
            "--features",
            "pixels",
            "--mind",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    after = json.loads((out / "metrics.json").read_text())["metrics"]
    assert lines[0]["eval/fd@16"] == pytest.approx(after["fd"], rel=1e-5)
    assert lines[0]["eval/mind@16"] == pytest.approx(after["mind"], rel=1e-4)


def test_scores_during_training_need_a_sound_reference(data, words, tmp_path):
    for extra in (["--eval-steps", "2"], ["--reference", "x.npz"]):
        with pytest.raises(UserError, match="--eval-steps and --reference go together"):
            train.main(words(tmp_path, "a", *extra))
    with pytest.raises(UserError, match="must lie in"):
        train.main(words(tmp_path, "a", "--num-fid-samples", "2"))
    with pytest.raises(UserError, match="cannot read absent.npz"):
        train.main(words(tmp_path, "a", "--eval-steps", "2", "--reference", "absent.npz", "--features", "pixels"))


def test_how_to_score_without_score_is_refused():
    for words in (["--features", "pixels"], ["--feature-weights", "w.pth"]):
        with pytest.raises(UserError, match="add --reference REFERENCE"):
            options.read(GenerateConfig, ["--ckpt", "x", *words], prog="generate.py")


def test_score_refuses_images_of_another_size(guided, tmp_path):
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((9, 16, 16, 1), np.uint8))
    with pytest.raises(UserError, match="8 x 8 x 1, those of other.npz are 16 x 16 x 1"):
        generate.main(
            [
                "--ckpt",
                str(guided),
                "--num-fid-samples",
                "8",
                *FAST,
                "--reference",
                str(tmp_path / "other.npz"),
                "--out",
                str(tmp_path / "out"),
            ]
        )


def test_ranges():
    assert values("--x", "1.0:2.5:0.1") == [
        1.0,
        1.1,
        1.2,
        1.3,
        1.4,
        1.5,
        1.6,
        1.7,
        1.8,
        1.9,
        2.0,
        2.1,
        2.2,
        2.3,
        2.4,
        2.5,
    ]
    assert values("--x", "0.6:1.0:0.05")[-1] == 1.0 and len(values("--x", "0.6:1.0:0.05")) == 9
    assert values("--x", "1.5") == [1.5] and values("--x", "1:2:0.75") == [1, 1.75]
    for text in ("a", "1:2", "1:2:0", "2:1:0.1", "1:2:-1"):
        with pytest.raises(UserError, match="--x"):
            values("--x", text)
    with pytest.raises(UserError, match="must satisfy 0 <= low <= high <= 1"):
        options.build(SweepConfig, {"ckpt": "x", "reference": "r"}, {"guidance_high": "0.5:1.5:0.5"})


def test_a_sweep_has_no_presets():
    with pytest.raises(UserError, match="unknown option --preset"):
        sweep.main(["--ckpt", "x", "--reference", "r", "--preset", "sit-xl-2"])


def test_scale_one_is_one_point():
    config = options.build(
        SweepConfig, {"ckpt": "x", "reference": "r"}, {"cfg_scale": "1:2:0.5", "guidance_high": "0.5:1:0.5"}
    )
    assert config.points() == [(1, 1), (1.5, 0.5), (1.5, 1), (2, 0.5), (2, 1)]


def run(guided, real, out, *words):
    return sweep.main(
        [
            "--ckpt",
            str(guided),
            "--reference",
            str(real),
            *FAST,
            "--num-fid-samples",
            "24",
            "--batch-size",
            "24",
            "--out",
            str(out),
            *words,
        ]
    )


def test_a_sweep_costs_scores_resumes_and_ends_in_a_command(guided, real, tmp_path, capsys, monkeypatch):
    out = tmp_path / "sweep"
    run(guided, real, out, "--cfg-scale", "1:3:2", "--guidance-high", "1.0")
    text = capsys.readouterr().out
    # 3 SDE steps: 3 evaluations without guidance, 6 with it
    assert text.startswith("2 of 2 points to do, 24 samples each: 48 images, 216 network evaluations")
    result = json.loads((out / "sweep.json").read_text())
    assert [(point["cfg_scale"], point["guidance_high"]) for point in result["points"]] == [(1, 1), (3, 1)]
    generate.main(
        [
            "--ckpt",
            str(guided),
            "--num-fid-samples",
            "24",
            *FAST,
            "--cfg-scale",
            "3",
            "--reference",
            str(real),
            "--out",
            str(tmp_path / "one"),
        ]
    )
    alone = json.loads((tmp_path / "one" / "metrics.json").read_text())["metrics"]
    assert result["points"][1]["metrics"] == pytest.approx(alone, rel=1e-9)
    capsys.readouterr()

    drawn = []
    add = score.add_drawn
    monkeypatch.setattr(score, "add_drawn", lambda *words: drawn.append(words) or add(*words))
    run(guided, real, out, "--cfg-scale", "1:3:1", "--guidance-high", "0.5:1:0.5")  # wider: what is done is kept
    text = capsys.readouterr().out
    assert len(drawn) == 3 and text.startswith("3 of 5 points to do")
    points = files.read_sealed(out / "sweep.json")["points"]
    best = min(points, key=lambda point: point["metrics"]["fd"])
    words = shlex.split(text.strip().splitlines()[-1])
    assert words[:2] == ["python", "generate.py"]
    parsed = options.read(GenerateConfig, words[2:], prog="generate.py")
    assert (parsed.sampling.cfg_scale, parsed.sampling.guidance_high) == (best["cfg_scale"], best["guidance_high"])
    assert (parsed.sampling.num_steps, parsed.num_fid_samples) == (3, 50_000)
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    lines = text[text.index("high \\ scale") :].splitlines()[:3]
    assert [line.split()[0] for line in lines] == ["high", "0.5", "1"] and len({len(line) for line in lines}) == 1
    assert lines[1].split()[1] == lines[2].split()[1]  # scale 1 is the same whatever the interval

    whole = (out / "sweep.json").read_text()
    (out / "sweep.json").write_text(whole.replace('"fd": ', '"fd": 1', 1))
    with pytest.raises(UserError, match="sweep.json was damaged or edited"):
        run(guided, real, out, "--cfg-scale", "1:3:1", "--guidance-high", "0.5:1:0.5")
    (out / "sweep.json").write_text(whole)
    capsys.readouterr()
    run(guided, real, out, "--cfg-scale", "1:3:1", "--guidance-high", "0.5:1:0.5")
    assert capsys.readouterr().out.startswith("0 of 5 points")
    with pytest.raises(UserError, match="another seed .0, not 1."):
        run(guided, real, out, "--seed", "1")
    with held_elsewhere(out / LOCK), pytest.raises(UserError, match="another process is writing"):
        run(guided, real, out, "--cfg-scale", "1:3:1")


def test_the_heat_map_has_its_numbers_and_the_tables_order():
    points = {(scale, high): {"fd": scale + 10 * high} for scale in (1.5, 2.0) for high in (0.5, 1.0)}
    axes = sweep.heat_map(points, "fd", "title").axes[0]
    assert [text.get_text() for text in axes.texts] == ["6.5", "7", "11.5", "12"]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # 0.5 above 1, as in the table
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.5", "1"]


def test_a_reference_of_another_size_is_refused_before_training(tmp_path, words):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((8, 16, 16, 1), np.uint8))
    with pytest.raises(UserError, match="16"):
        train.main(
            words(
                tmp_path,
                "x",
                "--eval-steps",
                50,
                "--reference",
                tmp_path / "large.npz",
                "--num-fid-samples",
                8,
                "--features",
                "pixels",
            )
        )
    assert not (tmp_path / "x").exists()


def test_grids_that_are_no_numbers_are_refused():
    from evaluations.sweep import values

    for text in ("nan", "nan:2:1", "1:inf:1", "1:2:0", "x"):
        with pytest.raises(UserError, match="--cfg-scale"):
            values("--cfg-scale", text)
