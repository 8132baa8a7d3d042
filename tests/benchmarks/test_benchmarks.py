"""The benchmarks in their smallest sizes: they run, go on where they were cut off, and time what they say."""

from __future__ import annotations

import collections
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch

from alignment import Alignment
from benchmarks import floors, gpu, measure, peer, sample, trace, train_step
from preprocessing import fashion
from runtime.errors import UserError
from runtime.options import option, read
from tests.helpers import ROOT

CPU = torch.device("cpu")
SMALL = ["--model", "SiT-Tiny/2", "--latent-size", "8", "--batch-size", "2"]
GENERATED = [*SMALL, "--classes", "10", "--items", "16", "--warmup", "1"]
BRIEF = ["--steps", "1", "--repetitions", "2"]


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = option("a", help="network")
    fail: bool = option(False, help="end after a row")
    out: str | None = option(None, help="result file")


def test_what_is_compared_is_measured_in_turns_and_the_ratio_is_right():
    order = []

    def spend(name: str, seconds: float) -> None:
        order.append(name)
        ends = time.process_time() + seconds
        while time.process_time() < ends:
            pass

    rows = measure.alternate(
        {"a": lambda: spend("a", 0.01), "b": lambda: spend("b", 0.03)}, 8, CPU, steps=2, warmup=1, repetitions=3
    )
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 3
    assert rows["a"]["images_per_second"]["median"] == pytest.approx(800, rel=0.2)
    assert rows["b"]["a, times faster"]["median"] == pytest.approx(3, rel=0.2)


def test_mfu_is_a_share_of_the_stated_peak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure.launch, "device_name", lambda: "NVIDIA H200")
    assert measure.mfu(3000.0, 138e9) == pytest.approx(0.4182, abs=1e-4)
    monkeypatch.setattr(measure.launch, "device_name", lambda: "something else")
    assert measure.mfu(3000.0, 138e9) is None


def test_a_result_keeps_its_rows_and_goes_on_unless_the_settings_differ(tmp_path: Path):
    out = tmp_path / "r.json"
    known = []

    def rows(config: Options, folder: Path, earlier: dict) -> measure.Rows:
        known.append(list(earlier))
        for name in ("plain", "guided"):
            if name not in earlier:
                yield name, {"images_per_second": measure.spread([1.0, 3.0, 2.0])}
                if config.fail:
                    raise RuntimeError("cut off")

    def run(*words: str) -> dict:
        return measure.run("x", Options, ["--out", str(out), *words], None, rows, lambda rows: "")

    with pytest.raises(RuntimeError):
        run("--fail")
    saved = json.loads(out.read_text())
    assert saved["rows"] == {"plain": {"images_per_second": {"median": 2.0, "low": 1.0, "high": 3.0}}}
    assert {"date", "command", "device", "commit", "versions", "load", "settings"} <= saved.keys()
    with pytest.raises(RuntimeError):
        run("--fail")
    assert run("--fail") == json.loads(out.read_text()) and known == [[], ["plain"], ["plain", "guided"]]
    run("--model", "b")
    assert known[-1] == []


def test_the_step_of_every_kind_is_timed_and_a_second_call_measures_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = [*GENERATED, *BRIEF, "--out", str(tmp_path / "r.json"), "--rows"]
    train_step.main([*words, "plain", "batches"])
    measured = []
    row = train_step.Bench.row
    monkeypatch.setattr(
        train_step.Bench, "row", lambda self, name, more: (measured.append(name), row(self, name, more))[1]
    )
    result = train_step.main([*words, "plain", "batches", "stage 2, interval"])
    assert measured == ["stage 2, interval"] and set(result["rows"]) == {"plain", "batches", "stage 2, interval"}
    rates = {name: row["images_per_second"]["median"] for name, row in result["rows"].items()}
    assert rates["batches"] > rates["plain"]
    assert result["rows"]["plain"]["operators"] < result["rows"]["stage 2, interval"]["operators"]
    with pytest.raises(UserError, match="invalid choice: .nothing."):
        train_step.main([*words, "nothing"])


def test_the_peers_loop_body_is_its_own_and_what_does_not_belong_to_a_step_is_left_out(tmp_path: Path):
    """A checkout in small, laid out as REPA's: the body between data and logs is executed as it stands there."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sit.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        class SiT(nn.Module):
            def __init__(self, input_size, num_classes, **_):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(1))
            def forward(self, x, t, y):
                return self.scale * x, []
        SiT_models = {"SiT-B/2": SiT}
        """)
    )
    (tmp_path / "loss.py").write_text(
        textwrap.dedent("""
        class SILoss:
            def __init__(self, **_): pass
            def __call__(self, model, x, words, zs):
                return (model(x, None, words["y"])[0] ** 2).flatten(1).mean(1), 0.0
        """)
    )
    (tmp_path / "train.py").write_text(
        textwrap.dedent("""
        import no_such_module
        def sample_posterior(x, latents_scale, latents_bias): return x[:, :4]
        @torch.no_grad()
        def update_ema(ema, model): ema.updates = getattr(ema, "updates", 0) + 1
        def main(args):
            for epoch in range(args.epochs):
                for raw_image, x, y in train_dataloader:
                    x = sample_posterior(x.squeeze(dim=1).to(device), latents_scale, latents_bias)
                    with accelerator.accumulate(model):
                        loss, proj_loss = loss_fn(model, x, dict(y=y), zs=[x])
                        accelerator.backward(loss.mean() + proj_loss.mean())
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                        update_ema(ema, model)
                    global_step += 1
                    if global_step % args.checkpointing_steps == 0:
                        raise RuntimeError("a checkpoint is no part of a step")
                    if global_step >= args.max_train_steps:
                        break
        """)
    )
    batches = [(torch.ones(2, 1, 8, 4, 4), torch.zeros(2, dtype=torch.long))]
    step = peer.TrainingStep(tmp_path, "SiT-B/2", batches, 10, CPU, "no")
    for _ in range(3):
        step()
    assert step.names["global_step"] == 3 and step.names["ema"].updates == 3
    assert 0.99 < float(next(step.names["model"].parameters()).detach()) < 1
    with pytest.raises(UserError, match="must be a checkout of"):
        peer.load(tmp_path / "models", "samplers.py")


def test_sampling_is_timed_with_and_without_its_decoder_and_a_step_is_traced(tmp_path: Path):
    words = [*SMALL, "--num-steps", "3", "--repetitions", "1"]
    result = sample.main([*words, "--decoder", "tiny", "--out", str(tmp_path / "s.json")])
    assert set(result["rows"]) == {"latents", "images"} and result["rows"]["images"]["evaluations"] == 5
    assert result["rows"]["latents"]["images_per_second"]["median"] > 0
    traced = trace.main([*GENERATED, "--top", "3", "--chrome", str(tmp_path / "chrome.json")])
    shares = [row["share"] for row in traced["rows"].values()]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and sum(shares) < 1
    assert json.loads((tmp_path / "chrome.json").read_text())["traceEvents"]


def test_the_gpu_command_has_every_part_once_at_both_scales(tmp_path: Path):
    names = {}
    for scale in gpu.SCALES:
        parts = gpu.parts(gpu.GpuConfig(out=str(tmp_path), scale=scale, peer="../REPA"), tmp_path)
        names[scale] = [part.name for part in parts]
        for part in parts:
            if "benchmarks.train_step" in part.words:
                read(train_step.TrainStepConfig, part.words[2:], prog="train_step")
    assert names["full"] == names["tiny"] and len(set(names["full"])) == len(names["full"])
    methods = len(train_step.ROWS) - 2
    assert all(name.startswith("first-") for name in names["full"][:methods])
    assert names["full"][methods : methods + 3] == [gpu.PARITY, "train-SiT-B-2-256", "train-SiT-XL-2-256"]
    rows = " ".join(train_step.ROWS.values())
    assert all(f"--align {name}" in rows for name in Alignment.registry.keys() - {"guided"})
    assert names["full"][-2].startswith("loader") and names["full"][-1] == "run"
    suite = [name for name in names["full"] if name.startswith("test_")]
    assert "bf16_and_compiled" in suite[-1] and "test_memory_stays_flat" in names["full"]
    assert {"sample-SiT-XL-2", "peer-SiT-B-2-32", "peer-sample", "trace", "loader-SiT-B-2-256"} <= set(names["full"])


def test_the_gpu_command_is_called_again_until_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    every = {part.name: part for part in gpu.parts(gpu.GpuConfig(out=str(tmp_path), scale="tiny"), tmp_path)}
    loader = every["loader-SiT-B-2-256"]
    quick = gpu.Part("quick", ("-c", "print('all is well')"), 0.1)
    failing = gpu.Part("failing", ("-c", "print('why'); raise SystemExit(3)"), 0.1)
    slow = gpu.Part("slow", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 0.1)
    words = ["--out", str(tmp_path), "--scale", "tiny", "--minutes"]
    monkeypatch.setattr(gpu, "parts", lambda *_: [failing, quick])
    assert not gpu.main([*words, "5"])
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["failing"]["exit"] == 3 and state["quick"]["exit"] == 0
    done = []
    run = gpu.run
    monkeypatch.setattr(gpu, "run", lambda part, seconds: (done.append(part.name), run(part, seconds))[1])
    monkeypatch.setattr(gpu, "parts", lambda *_: [failing, quick, loader])
    gpu.main([*words, "5"])
    assert done == [loader.name, "failing"]  # what is done is not done again, what failed comes last
    monkeypatch.setattr(gpu, "parts", lambda *_: [slow, quick, loader])
    assert not gpu.main([*words, "0.02"])
    page = (tmp_path / "tables.md").read_text()
    for text in ("slow: cut off", "loader-SiT-B-2-256: done", "batches ", "all is well", "a test of the command"):
        assert text in page, text
    assert "begun" in json.loads((tmp_path / "state.json").read_text())["slow"]["output"]


def test_the_gpu_command_needs_a_gpu_unless_it_is_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees none here; --scale tiny"):
        gpu.main(["--out", str(tmp_path / "full")])


def test_the_page_of_the_gpu_command_has_words_that_can_be_pasted_and_no_noise(tmp_path: Path):
    config = gpu.GpuConfig(out=str(tmp_path), scale="tiny")
    output = "USDT:2026-11-21 19:06:03 1:1 Handler.cpp:39] profiler_start\nERROR: something of ours\naten::mm 26.1%\n"
    every = gpu.parts(config, tmp_path)
    page = gpu.tables(config, every, {"trace": {"exit": 0, "output": output}})
    assert "ERROR: something of ours\naten::mm 26.1%" in page and "USDT" not in page
    lines = [line for line in page.splitlines() if line.startswith("`python ")]
    assert [tuple(shlex.split(line.strip("`"))[1:]) for line in lines] == [part.words for part in every]


# What a rented machine has; what these packages require comes with them.
BARE = ("torch", "numpy", "safetensors", "timm", "accelerate", "torchdiffeq", "scikit-learn", "matplotlib", "pytest")

ON_A_BARE_MACHINE = """
import importlib, sys
from importlib.machinery import PathFinder
import pytest

missing, folder = set(sys.argv[1].split()), sys.argv[2]

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
from alignment import Alignment
from benchmarks import gpu, sample, train_step

small = sys.argv[3:]
generated = ["--classes", "10", "--items", "16", "--warmup", "1", "--steps", "1", "--repetitions", "1"]
train_step.main([*small, *generated, "--rows", "plain"])
sample.main([*small, "--num-steps", "2", "--repetitions", "1"])
# what the commands of a row import
for name in "preprocessing.encoding sampling.source sampling.store evaluations.collect evaluations.score".split():
    importlib.import_module(name)
raise SystemExit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(gpu.SUITE)]))
"""


def normal(name: str) -> str:
    """The name of a distribution as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_requirements(names: Sequence[str]) -> set[str]:
    """These distributions and all that they require, as far as they are installed."""
    known, todo = set(), [*names]
    while todo:
        name = normal(todo.pop())
        if name not in known:
            known.add(name)
            with suppress(metadata.PackageNotFoundError):
                needs = [line for line in metadata.requires(name) or [] if "extra ==" not in line]
                todo += [re.match(r"[\w.-]+", line)[0] for line in needs]
    return known


def top_level_names() -> dict[str, set[str]]:
    """Top-level module -> the distributions that have it; before Python 3.11 metadata reads top_level.txt alone."""
    names = collections.defaultdict(set)
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            names[file.parts[0].removesuffix(".py")].add(distribution.metadata["Name"])
    return {name: of for name, of in names.items() if name.isidentifier()}


def test_the_gpu_command_needs_no_more_than_a_rented_machine_has(tmp_path: Path):
    there, modules = with_requirements(BARE), top_level_names()
    # a package ships a folder called tests
    missing = [name for name, of in modules.items() if not there & set(map(normal, of)) and not (ROOT / name).exists()]
    assert {"pydantic", "diffusers", "wandb"} <= set(missing) and not set(missing) & {"torch", "tqdm", "PIL"}
    result = subprocess.run(
        [sys.executable, "-c", ON_A_BARE_MACHINE, " ".join(missing), str(tmp_path), *SMALL],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for text in ("pydantic is not installed", "its decoder needs diffusers", "latents: ", "plain: ", str(gpu.SUITE)):
        assert text in result.stdout, text


def test_a_part_that_never_ends_starves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    endless = gpu.Part("endless", ("-c", "import time; time.sleep(60)"), 0.01)
    others = [gpu.Part(name, ("-c", "print('done')"), 0.01) for name in ("second", "third")]
    monkeypatch.setattr(gpu, "parts", lambda *_: [endless, *others])
    words = ["--out", str(tmp_path), "--scale", "tiny", "--minutes", "0.02"]
    assert not gpu.main(words) and not gpu.main(words)
    state = json.loads((tmp_path / "state.json").read_text())
    assert [state[part.name].get("exit") for part in (endless, *others)] == [None, 0, 0]
    assert state["endless"]["cut_off"] and state["endless"]["tries"] == 2


def test_floors_of_the_embedded_photographs(tmp_path: Path):
    words = ["--features", "pixels", "--source", str(fashion.EMBEDDED), "--fitted", "500", "--counts", "200"]
    floors.main([*words, "--out", str(tmp_path / "floors.json")])
    rows = json.loads((tmp_path / "floors.json").read_text())["rows"]
    same, images, decoded = rows.values()
    assert list(rows)[1:] == ["200 training images, pixels", "200 training images through the autoencoder, pixels"]
    assert same["fd"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1
    assert images["mind"] > 0 and 0 < images["fd"] != decoded["fd"] > 0
    assert min(images["classifier_accuracy"], decoded["classifier_accuracy"]) > 0.6
