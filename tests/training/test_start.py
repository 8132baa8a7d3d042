"""What a run takes over from the checkpoint that it starts from, or from its teacher, and what it prints."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import models
import train
import train_guide
from config import TrainConfig
from models.checkpoint import Checkpoint
from preprocessing import encode
from runtime import seal
from runtime.errors import UserError
from tests.helpers import Words, build_run, class_folders, encoding
from training import command, introduction


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory, words: Words) -> Path:
    """A stage-1 run with QK-norm, under the recipe of the digits."""
    return train.main(
        words(
            tmp_path_factory.mktemp("normed"),
            "stage1",
            "--align",
            "latent",
            "--align-hidden",
            16,
            "--qk-norm",
            "--max-train-steps",
            1,
        )
    )


def resolved(argv: list[str], program: str) -> TrainConfig:
    return command.resolve(argv, program, None, ("guided",) if program == "train_guide.py" else (), command.taken_over)[
        0
    ]


def without_recipe(argv: list[str]) -> list[str]:
    return argv[2:] if argv[0] == "--recipe" else argv


@pytest.mark.parametrize("program, flag", [("train_guide.py", "--guiding-ckpt"), ("train.py", "--init-ckpt")])
def test_model_norm_and_recipe_are_those_of_the_teacher_unless_given(
    tmp_path: Path, words: Words, normed: Path, capsys: pytest.CaptureFixture, program: str, flag: str
) -> None:
    argv = without_recipe(words(tmp_path, "run", flag, normed))
    config = resolved(argv, program)
    assert (config.model, config.qk_norm, config.recipe, config.learning_rate) == ("SiT-Tiny/2", True, "digits", 1e-3)
    path = Checkpoint.open(normed).path
    assert capsys.readouterr().out == f"taken over from {path}: --model SiT-Tiny/2, --qk-norm True, --recipe digits\n"
    config = resolved([*argv, "--model", "SiT-S/2", "--no-qk-norm", "--recipe", "sit"], program)
    assert (config.model, config.qk_norm, config.recipe, config.learning_rate) == ("SiT-S/2", False, "sit", 1e-4)
    assert capsys.readouterr().out == ""
    config = resolved([*argv, "--model", "SiT-S/2"], program)
    assert (config.model, config.qk_norm) == ("SiT-S/2", True) and "--model" not in capsys.readouterr().out


def test_stage_two_without_a_model_continues_though_its_teacher_has_gone(
    tmp_path: Path, words: Words, normed: Path
) -> None:
    shutil.copytree(normed, tmp_path / "teacher")
    argv = without_recipe(
        words(tmp_path, "run", "--guiding-ckpt", tmp_path / "teacher", "--align-hidden", 16, "--align-stop-steps", 1)
    )
    run = train_guide.main([*argv, "--max-train-steps", "1"])
    assert Checkpoint.open(run).spec == Checkpoint.open(normed).spec
    shutil.rmtree(tmp_path / "teacher")
    train_guide.main([*argv, "--max-train-steps", "2"])
    assert Checkpoint.open(run).step == 2


def test_a_preset_wins_over_the_teacher_and_a_size_of_no_name_asks(tmp_path: Path, words: Words, teacher: Path) -> None:
    argv = without_recipe(words(tmp_path, "run", "--guiding-ckpt", teacher))
    assert not resolved(argv, "train_guide.py").qk_norm
    assert resolved([*argv, "--preset", "upstream"], "train_guide.py").qk_norm
    config = Checkpoint.open(teacher).path / "config.json"
    shutil.copytree(config.parent, tmp_path / "custom")
    (tmp_path / "custom" / "config.json").write_text(config.read_text().replace('"SiT-Tiny/2"', '"custom"'))
    seal.main([str(tmp_path / "custom" / "config.json")])
    argv = words(tmp_path, "run", "--guiding-ckpt", tmp_path / "custom")
    with pytest.raises(UserError, match="no registered size: give --model"):
        resolved(argv, "train_guide.py")
    assert resolved([*argv, "--model", "SiT-S/2"], "train_guide.py").model == "SiT-S/2"


def test_weights_are_named_and_selectable(
    tmp_path: Path, words: Words, teacher: Path, capsys: pytest.CaptureFixture
) -> None:
    for which, file in (("ema", "ema"), ("raw", "network")):
        run = build_run(words(tmp_path, which, "--init-ckpt", teacher, init_weights=which))
        tensors = Checkpoint.open(teacher).tensors(file)
        assert all(torch.equal(value, tensors[name]) for name, value in run.network.state_dict().items())
        path = Checkpoint.open(teacher).path
        assert f"starts from the {which} weights of {path} (step 4): as they are" in introduction.introduction(run)


def test_another_size_stretches_positions_and_other_classes_renew_the_label_table(
    tmp_path: Path, words: Words, teacher: Path, capsys: pytest.CaptureFixture
) -> None:
    images = class_folders(tmp_path / "images", classes=3, per_class=6)
    encode.main(encoding(images, "pixels", tmp_path / "set", "--grey", "--dtype", "float32"))
    argv = [*words(tmp_path, "run", "--init-ckpt", teacher), "--data-dir", str(tmp_path / "set"), "--max-train-steps"]
    run = train.main([*argv, "1"])
    output = capsys.readouterr().out
    assert "all 4 rows of the label table are fresh (it had 10 classes)" in output
    assert "positions of its 4x4 tokens are stretched over 8x8" in output
    started, known = Checkpoint.open(run), Checkpoint.open(teacher)
    assert (
        started.spec.position_span == 4
        and known.spec.position_span is None
        and "position_span" in started.config["model"]
    )
    grid, before = (
        checkpoint.network().pos_embed.unflatten(1, (checkpoint.spec.side,) * 2) for checkpoint in (started, known)
    )
    torch.testing.assert_close(grid[:, ::2, ::2], before)  # every second position is an old one, the others lie between
    assert not torch.allclose(grid[:, 1, 1], before[:, 1, 1]) and not torch.allclose(grid[:, 1, 1], before[:, 0, 0])
    train.main([*argv, "2"])  # continues with the same positions
    assert Checkpoint.open(run).step == 2 and Checkpoint.open(run).spec == started.spec
    assert started.spec.sized(8).position_span is None


def test_rotations_are_stretched_too() -> None:
    spec = models.spec("LightningDiT-Tiny/1", in_channels=1, input_size=4, num_classes=3)
    small, large = models.build(spec), models.build(spec.sized(8))
    torch.testing.assert_close(large.rotary_cos.unflatten(0, (8, 8))[::2, ::2], small.rotary_cos.unflatten(0, (4, 4)))


def test_a_weight_file_is_answered_with_the_command_that_converts_it(tmp_path: Path, words: Words) -> None:
    (tmp_path / "SiT-XL.pt").write_bytes(b"weights")
    argv = words(tmp_path, "run", "--init-ckpt", tmp_path / "SiT-XL.pt")
    with pytest.raises(UserError, match=r"python -m models.convert .*SiT-XL.pt --out ckpts/SiT-XL"):
        train.main(argv)


def test_spaces_without_a_digest_are_compared_by_name(tmp_path: Path, words: Words, teacher: Path) -> None:
    shutil.copytree(Checkpoint.open(teacher).path, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"name": "pixels"', '"name": "sd-vae"'))
    seal.main([str(config)])
    run = build_run(words(tmp_path, "run", "--init-ckpt", tmp_path / "other"))
    assert any(
        "warning" in line and "latents of sd-vae against pixels" in line for line in introduction.introduction(run)
    )
    argv = words(tmp_path, "guided", "--guiding-ckpt", tmp_path / "other", "--align-hidden", 16)
    run = build_run(argv, "train_guide")
    assert any("latents of sd-vae against pixels" in line for line in introduction.introduction(run))
    space = Checkpoint.open(teacher).space
    assert space.unverified_match(space) is None
    digests = [dataclasses.replace(space, name=name, digest="a") for name in ("one", "two")]
    assert digests[0].unverified_match(digests[1]) is None  # equal digests decide, whatever the names


def test_a_run_that_is_done_says_finished(tmp_path: Path, words: Words, capsys: pytest.CaptureFixture) -> None:
    argv = words(tmp_path, "run", "--max-train-steps", 1)
    train.main(argv)
    assert "finished" not in capsys.readouterr().out
    train.main(argv)
    output = capsys.readouterr().out
    assert "finished: step 1 is done; to go on, give a larger --max-train-steps" in output
    assert "continuing" not in output


def test_thousands_of_epochs_are_warned_of(tmp_path: Path, words: Words) -> None:
    for steps, warned in ((112 * 3000, False), (112 * 3000 + 1, True)):
        run = build_run(words(tmp_path, "run", "--max-train-steps", steps))
        assert (
            any(
                "the network will memorise a set this small; give --batch-size 32 --max-train-steps 56000" in line
                for line in introduction.introduction(run)
            )
            == warned
        )


def test_the_introduction_shows_choices_and_no_internals(tmp_path: Path, words: Words, teacher: Path) -> None:
    argv = words(tmp_path, "run", "--guiding-ckpt", teacher, "--align-hidden", 32)
    lines = introduction.introduction(build_run(argv, "train_guide"))
    (line,) = (line for line in lines if line.startswith("alignment guided: "))
    assert "guide scale 30" in line and "guiding depth 4" in line and "guided depth 3" in line
    assert not {"{", "[", "_"} & set(line.replace(str(teacher), "")) and "None" not in line
    latent = introduction.introduction(build_run(words(tmp_path, "one", "--align", "latent", "--align-hidden", 32)))
    assert not any("share" in line or "taps" in line for line in latent)


@pytest.mark.parametrize(
    ("more", "omegas", "precision"),
    [
        ((), (1, 3, 10, 30), 1e-2),
        (("--guide-scale", 5, "--align-interval", 0.3, 0.8), (1, 3, 5), 1e-2),
        (("--guide-scale", 1, "--mixed-precision", "bf16"), (1,), 3e-2),
    ],
)
def test_the_introduction_shows_the_size_of_the_guided_target(
    more: tuple, omegas: tuple[float, ...], precision: float, tmp_path: Path, words: Words, teacher: Path
) -> None:
    run = build_run(words(tmp_path, "run", "--guiding-ckpt", teacher, "--align-hidden", 32, *more), "train_guide")
    (line,) = (line for line in introduction.introduction(run) if line.startswith("target f_g"))
    shown = {float(omega): float(root) for root, omega in re.findall(r"(\S+) at omega ([\d.]+)", line)}
    assert tuple(shown) == omegas and "over 4 batches" in line
    network = Checkpoint.open(teacher).network("raw")
    squares: dict[float, list[float]] = {omega: [] for omega in omegas}
    for (batch,) in run.batches(4):
        inside = (batch.t >= 0.3) & (batch.t <= 0.8) if "--align-interval" in more else batch.t >= 0
        xt, t, labels = batch.xt[inside], batch.t[inside], batch.labels[inside]
        with torch.no_grad():
            u, c = (network(xt, t, y, taps=(4,)).features[4] for y in (torch.full_like(labels, 10), labels))
        for omega in omegas:
            squares[omega].append(((1 - omega) * u + omega * c).square().mean().item())
    for omega, values in squares.items():
        assert shown[omega] == pytest.approx(math.sqrt(sum(values) / 4), rel=precision)


@pytest.mark.parametrize("name", ["dispersive", "contrastive"])
def test_a_coupled_loss_at_one_sample_a_process_says_that_it_does_nothing(
    tmp_path: Path, words: Words, name: str
) -> None:
    for batch, warned in ((1, True), (2, False)):
        run = build_run(words(tmp_path, "run", "--align", name, "--batch-size", batch))
        assert any(f"warning: {name} compares" in line for line in introduction.introduction(run)) == warned
