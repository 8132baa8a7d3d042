"""Shared fixtures: the embedded digits as a latent set, short runs of both stages, and a tiny image encoder."""

from __future__ import annotations

import gc
import json
import os

# The two-process runs use one thread each, and the number of threads changes the last bits of a result.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import train
import train_guide
from preprocessing import digits
from runtime import launch

torch.set_num_threads(1)

SLOW = ("test_recipes", "test_training", "test_long_runs", "test_refusals", "test_presets", "test_clusters")
"""Files of tests that take longest, in this order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: otherwise one worker runs a slow file at the end while the others wait."""
    items.sort(key=lambda item: (*SLOW, item.path.stem).index(item.path.stem))


@pytest.fixture(scope="module", autouse=True)
def exempt_libraries_from_collection() -> None:
    """Each training run collects garbage once; without this, every collection scans all the imported libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def bf16() -> Iterator[None]:
    """Tests of bf16 on a CPU without it would run in float32."""
    with pytest.MonkeyPatch.context() as patch:
        if not launch.native_bf16(torch.device("cpu")):
            patch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as a latent set in pixel space."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    digits.main(["--out", str(folder)])
    return folder


@pytest.fixture(scope="session")
def words(data: Path) -> Callable[..., list[str]]:
    """Command-line words of a tiny run: words(output_dir, name, *more, **settings without a flag)."""

    def build(output: Path, name: str, *more: object, **rare: object) -> list[str]:
        if rare:
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{name}.json").write_text(json.dumps({"train": rare}))
            more = (*more, "--config", output / f"{name}.json")
        tiny = ["--recipe", "digits", "--batch-size", "16", "--log-steps", "1"]
        return [*tiny, "--data-dir", str(data), "--output-dir", str(output), "--exp-name", name, *map(str, more)]

    return build


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, words: Callable[..., list[str]]) -> Path:
    """A stage-1 run of 4 steps."""
    folder = tmp_path_factory.mktemp("teacher")
    return train.main(words(folder, "stage1", "--align", "latent", "--align-hidden", 32, "--max-train-steps", 4))


@pytest.fixture(scope="session")
def guided(tmp_path_factory: pytest.TempPathFactory, words: Callable[..., list[str]], teacher: Path) -> Path:
    """A stage-2 run of 4 steps whose guidance ends after 2."""
    folder = tmp_path_factory.mktemp("guided")
    steps = ["--align-stop-steps", 2, "--max-train-steps", 4]
    return train_guide.main(words(folder, "stage2", "--guiding-ckpt", teacher, "--align-hidden", 32, *steps))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer with random weights for images of the digits' size, written by timm's `save_for_hf`."""
    import timm

    folder = tmp_path_factory.mktemp("encoder") / "vit"
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5,), "std": (0.5,)}
    timm.models.save_for_hf(model, folder, model_args=shape, safe_serialization=True)
    return folder
