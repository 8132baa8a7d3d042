"""What a run takes over from the checkpoint that it starts from, or from its teacher, and what it says of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import train
import train_guide
from config import TrainConfig
from models.checkpoint import Checkpoint
from runtime.errors import UserError
from training import command

Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory, words: Words) -> Path:
    """A stage-1 run with QK-norm, under the recipe of the digits."""
    return train.main(words(tmp_path_factory.mktemp("normed"), "stage1", "--align", "latent", "--align-hidden", 16, "--qk-norm",
                            "--max-train-steps", 1))


def resolved(argv: list[str], program: str) -> TrainConfig:
    return command.resolve(argv, program, None, ("guided",) if program == "train_guide.py" else ())[0]


def without_recipe(argv: list[str]) -> list[str]:
    return argv[2:] if argv[0] == "--recipe" else argv


@pytest.mark.parametrize("program, flag", [("train_guide.py", "--guiding-ckpt"), ("train.py", "--init-ckpt")])
def test_model_norm_and_recipe_are_those_of_the_teacher_unless_told_otherwise(
        tmp_path: Path, words: Words, normed: Path, capsys: pytest.CaptureFixture, program: str, flag: str) -> None:
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


def test_stage_two_without_a_model_continues_though_its_teacher_has_gone(tmp_path: Path, words: Words, normed: Path) -> None:
    shutil.copytree(normed, tmp_path / "teacher")
    argv = without_recipe(words(tmp_path, "run", "--guiding-ckpt", tmp_path / "teacher", "--align-hidden", 16, "--align-stop-steps", 1))
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
    argv = words(tmp_path, "run", "--guiding-ckpt", tmp_path / "custom")
    with pytest.raises(UserError, match="no registered size: say --model"):
        resolved(argv, "train_guide.py")
    assert resolved([*argv, "--model", "SiT-S/2"], "train_guide.py").model == "SiT-S/2"
