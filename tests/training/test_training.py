"""Laws of a run: exact resume, independence of processes and micro-batches, and what the end of an alignment means.

Two real processes are started once, through `accelerate launch`; their results are compared with one process here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
import train_guide
from alignment.guided import Guided
from models.checkpoint import Checkpoint
from runtime import files
from runtime.errors import UserError
from runtime.jsonlines import read
from tests.helpers import ROOT, Words, assert_same_bits, build_run, killed_writer, saved_tensors
from training import loop


def losses(run: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: {k: v for k, v in line.items() if k.startswith("loss/")} for line in read(run / "log.jsonl")}


def launch(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def test_resume_is_exact_in_fresh_processes(tmp_path: Path, words: Words, teacher: Path) -> None:
    """3 + 3 steps in two processes equal 6 here, bit for bit, across the end of the guidance at step 4."""
    more = ["--guiding-ckpt", teacher, "--align-hidden", 32, "--align-stop-steps", 4, "--align-interval", 0.2, 0.8]
    whole = train_guide.main(words(tmp_path / "a", "run", *more, "--max-train-steps", 6))
    for steps in (3, 6):
        done = launch("train_guide.py", *words(tmp_path / "b", "run", *more, "--max-train-steps", steps))
        assert done.returncode == 0, done.stderr
    assert "continuing from step 3" in done.stdout
    assert_same_bits(whole, tmp_path / "b" / "run")
    assert losses(whole) == losses(tmp_path / "b" / "run")


def test_resume_after_a_kill_repeats_only_the_steps_since_the_checkpoint(tmp_path: Path, words: Words) -> None:
    """A run cut off between checkpoints: its stale log lines go, its numbers are those of the whole run."""
    whole = train.main(words(tmp_path / "a", "run", "--max-train-steps", 6))
    more = ["--checkpointing-steps", 2]
    run = train.main(words(tmp_path / "b", "run", *more, "--max-train-steps", 4))
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 5, "loss/diffusion": 99}\n{"step": 6, "loss/diff')
    left = killed_writer(run / "checkpoints" / "0000006")
    train.main(words(tmp_path / "b", "run", *more, "--max-train-steps", 6))
    assert not left.exists()
    assert losses(whole) == losses(run)
    assert_same_bits(whole, run)


def sgd_steps(argv: list[str], steps: int, program: str = "train_guide") -> dict[str, torch.Tensor]:
    """First gradients, losses and parameters of a run under SGD; Adam moves key biases, whose gradient is zero."""
    run = build_run(argv, program)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    run.optimizer = torch.optim.SGD(run.optimizer.param_groups, lr=0.05)
    results: dict[str, torch.Tensor] = {}

    def first_gradients(optimizer: Any, *_: Any) -> None:
        if not results:
            results.update({f"gradient/{i}": p.grad.clone() for i, p in enumerate(parameters)})

    run.optimizer.register_step_pre_hook(first_gradients)
    loop.train(run)
    logged = losses(run.folder)
    results["losses"] = torch.tensor(
        [logged[step]["loss/diffusion"] for step in range(1, steps + 1)], dtype=torch.float64
    )
    ratios = [value for line in read(run.folder / "log.jsonl") for key, value in line.items() if "ratio/" in key]
    results["ratios"] = torch.tensor(ratios, dtype=torch.float64)
    results |= {f"weight/{name}": value for name, value in run.network.state_dict().items()}
    results |= {f"weight/ema/{name}": value for name, value in run.ema.network.state_dict().items()}
    return results


def two_processes(folder: Path, argv: list[str], timed: list[str], sampling: list[str]) -> None:
    """Runs inside each of two processes: the checks that need them, and the numbers to compare with one process."""
    import generate

    run = build_run(argv, "train_guide")
    assert run.accelerator.num_processes == 2
    results, others = sgd_steps(argv, 20), sgd_steps(timed, 8, "train")
    if run.accelerator.is_main_process:
        save_file(results, folder / "found.safetensors")
        save_file(others, folder / "timed.safetensors")
    generate.main(sampling)


def timed(folder: Path, words: Words, name: str, *more: object) -> list[str]:
    """Two times a sample, and a route, until step 4 of 8."""
    align = ("--align", "self-flow", "--preset", "dts-as", "--align-full-share", 0.25, "--align-stop-steps", 4)
    return words(folder, name, *align, "--route", 2, 4, 0.5, "--max-train-steps", 8, *more, grad_ratio_steps=0)


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, words: Words, teacher: Path, guided: Path
) -> tuple[Path, Callable[..., list[str]]]:
    """Two processes: 20 SGD steps across the stop at 10, and samples."""
    folder = tmp_path_factory.mktemp("pair")

    def argv(name: str, *more: object) -> list[str]:
        return words(
            folder,
            name,
            "--guiding-ckpt",
            teacher,
            "--align-hidden",
            32,
            "--align-stop-steps",
            10,
            "--align-interval",
            0.3,
            0.6,
            "--max-train-steps",
            20,
            *more,
            grad_ratio_steps=5,
        )

    job = {
        "folder": str(folder),
        "argv": argv("two"),
        "timed": timed(folder, words, "two-timed"),
        "sampling": [
            "--ckpt",
            str(guided),
            "--num-fid-samples",
            "13",
            "--num-steps",
            "4",
            "--batch-size",
            "3",
            "--cfg-scale",
            "2",
            "--out",
            str(folder / "two-samples"),
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = launch(
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        str(Path(__file__)),
        str(folder / "job.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("alignment guided has ended") == 1
    return folder, argv


def test_one_process_equals_two_and_accumulation_equals_one_batch(pair: tuple[Path, Callable[..., list[str]]]) -> None:
    folder, argv = pair
    expected = sgd_steps(argv("one"), 20)
    assert len(expected["ratios"]) == 2 and (expected["ratios"] > 0).all()
    accumulated = sgd_steps(argv("accumulated", "--gradient-accumulation-steps", 4), 20)
    assert_near(expected, load_file(folder / "found.safetensors"), accumulated)


def test_with_two_times_and_a_route_too(pair: tuple[Path, Any], words: Words) -> None:
    folder, _ = pair
    expected = sgd_steps(timed(folder, words, "one-timed"), 8, "train")
    accumulated = sgd_steps(timed(folder, words, "accumulated-timed", "--gradient-accumulation-steps", 4), 8, "train")
    assert_near(expected, load_file(folder / "timed.safetensors"), accumulated)


def assert_near(expected: dict[str, torch.Tensor], *others: dict[str, torch.Tensor]) -> None:
    """First gradients within 1e-6, losses of all steps and parameters within 1e-5."""
    for other in others:
        assert other.keys() == expected.keys()
        for name, value in expected.items():
            # the log has six digits of a loss
            tolerance = 1e-6 if name.startswith("gradient") else 1.1e-5
            torch.testing.assert_close(
                other[name],
                value,
                atol=tolerance,
                rtol=1e-4 if name.startswith("weight") else 0,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    assert any(value.abs().sum() > 0 for name, value in expected.items() if name.startswith("gradient"))


def test_sample_i_is_the_same_for_any_batch_size_and_process_count(
    pair: tuple[Path, Any], guided: Path, tmp_path: Path
) -> None:
    import generate

    folder, _ = pair
    pair_samples = np.load(folder / "two-samples" / "samples.npz")
    for size in (13, 5):
        out = generate.main(
            [
                "--ckpt",
                str(guided),
                "--num-fid-samples",
                "13",
                "--num-steps",
                "4",
                "--batch-size",
                str(size),
                "--cfg-scale",
                "2",
                "--out",
                str(tmp_path / str(size)),
            ]
        )
        samples = np.load(out / "samples.npz")
        assert np.array_equal(pair_samples["labels"], samples["labels"])
        # Sums of other batch shapes may differ in the last bit of fp32, which moves a pixel on a rounding edge.
        apart = np.abs(pair_samples["arr_0"].astype(int) - samples["arr_0"])
        assert apart.max() <= 1 and (apart > 0).mean() < 0.005
    assert pair_samples["arr_0"].shape == (13, 8, 8, 1) and len(np.unique(pair_samples["arr_0"], axis=0)) == 13


def test_after_the_stop_the_loss_is_the_plain_one_and_the_teacher_rests(
    tmp_path: Path, words: Words, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    target = Guided.target
    monkeypatch.setattr(Guided, "target", lambda self, context: called.append(1) or target(self, context))
    more = ["--guiding-ckpt", teacher, "--align-hidden", 32, "--align-stop-steps", 2, "--grad-ratio-steps", 0]
    train_guide.main(words(tmp_path, "run", *more, "--max-train-steps", 2))
    assert len(called) == 2
    # from here on, plain training takes the same steps from the checkpoint at the stop
    folder = Checkpoint.open(tmp_path / "run").path
    guided = build_run(words(tmp_path, "run", *more, "--max-train-steps", 5), "train_guide")
    plain = build_run(words(tmp_path, "plain", "--max-train-steps", 5))
    plain.network.load_state_dict(load_file(folder / "network.safetensors"))
    for name, slots in guided.optimizer.state_dict()["state"].items():
        plain.optimizer.state[list(plain.network.parameters())[name]] = {k: v.clone() for k, v in slots.items()}
    plain.step = 2
    assert guided.alignments == {} and [group["name"] for group in guided.optimizer.param_groups] == ["network"]
    after = loop.train(guided), loop.train(plain)
    assert len(called) == 2
    assert all(losses(after[0])[step] == losses(after[1])[step] for step in (3, 4, 5))
    weights = [Checkpoint.open(run).tensors("network") for run in after]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "heads.safetensors" not in Checkpoint.open(after[0]).config["files"]


def test_the_stop_within_a_run_equals_a_resume_at_the_stop(tmp_path: Path, words: Words, teacher: Path) -> None:
    more = ["--guiding-ckpt", teacher, "--align-hidden", 32, "--align-stop-steps", 2]
    through = train_guide.main(words(tmp_path / "a", "run", *more, "--max-train-steps", 4))
    train_guide.main(words(tmp_path / "b", "run", *more, "--max-train-steps", 2))
    assert_same_bits(through, train_guide.main(words(tmp_path / "b", "run", *more, "--max-train-steps", 4)))


def test_plain_and_guided_start_from_the_same_network_and_data(tmp_path: Path, words: Words, teacher: Path) -> None:
    plain = build_run(words(tmp_path, "plain"))
    guided = build_run(words(tmp_path, "guided", "--guiding-ckpt", teacher), "train_guide")
    for (name, a), (_, b) in zip(plain.network.state_dict().items(), guided.network.state_dict().items()):
        assert torch.equal(a, b), name
    other = build_run(words(tmp_path, "other", "--seed", 1))
    assert not torch.equal(other.network.x_embedder.proj.weight, plain.network.x_embedder.proj.weight)


def test_label_dropout_has_its_rate_and_feeds_the_null_label(tmp_path: Path, words: Words) -> None:
    from training import batches

    run = build_run(words(tmp_path, "run", "--cfg-prob", 0.25))
    dropped = np.concatenate([batches.plan(run.config, run.data, step).dropped for step in range(500)])
    assert dropped.mean() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / dropped.size) ** 0.5)
    source = batches.Batches(run.config, run.data, run.device, 0, 1)
    for step, (batch,) in enumerate(source.steps(0, 5, {})):
        lost = torch.from_numpy(batches.plan(run.config, run.data, step).dropped)
        assert torch.equal(batch.y[lost], torch.full_like(batch.y[lost], 10)) and torch.equal(
            batch.y[~lost], batch.labels[~lost]
        )


def test_an_epoch_visits_every_item_once_and_times_have_their_law(tmp_path: Path, words: Words) -> None:
    from training import batches

    run = build_run(words(tmp_path, "run", "--time-sampling", "logit-normal", uniform_from_epoch=2))
    plans = [batches.plan(run.config, run.data, step) for step in range(3 * run.epoch_steps)]
    for epoch in range(2):
        seen = np.concatenate([plan.index for plan in plans[epoch * run.epoch_steps : (epoch + 1) * run.epoch_steps]])
        assert len(np.unique(seen)) == len(seen) == run.epoch_steps * 16
    early = np.concatenate([plan.t for plan in plans[: 2 * run.epoch_steps]])
    late = np.concatenate([plan.t for plan in plans[2 * run.epoch_steps :]])
    assert np.quantile(early, [0.05, 0.5, 0.95]) == pytest.approx([0.162, 0.5, 0.838], abs=0.02)
    assert np.quantile(late, [0.05, 0.5, 0.95]) == pytest.approx([0.05, 0.5, 0.95], abs=0.03)


def test_every_step_logs_loss_by_quarter_of_t(teacher: Path) -> None:
    lines = read(teacher / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all("loss/latent" in line and "grad_norm" in line and line["images_per_second"] > 0 for line in lines)
    quarters = {key for line in lines for key in line if key.startswith("loss/t ")}
    assert quarters == {"loss/t 0-1/4", "loss/t 1/4-1/2", "loss/t 1/2-3/4", "loss/t 3/4-1"}


def test_ema_follows_its_definition(words: Words, tmp_path: Path) -> None:
    from training.ema import EMA, Exponential

    run = build_run(words(tmp_path, "run"))
    for warmup in (False, True):
        ema = EMA(run.network, Exponential(0.9, warmup))
        expected = run.network.x_embedder.proj.weight.detach().clone()
        for step in range(1, 30):
            with torch.no_grad():
                run.network.x_embedder.proj.weight.add_(0.1)
            decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
            expected = decay * expected + (1 - decay) * run.network.x_embedder.proj.weight.detach()
            ema.update(step)
        torch.testing.assert_close(ema.network.x_embedder.proj.weight, expected)
        assert ema.decay(10_000) == 0.9 and not ema.network.training


def test_short_runs_without_warm_up_are_warned(tmp_path: Path, words: Words, capsys: pytest.CaptureFixture) -> None:
    train.main(words(tmp_path, "short", "--no-ema-warmup", "--max-train-steps", 1))
    assert "--ema-warmup" in capsys.readouterr().out
    train.main(words(tmp_path, "warm", "--ema-warmup", "--max-train-steps", 1))
    assert "warning" not in capsys.readouterr().out


def test_a_resumed_run_keeps_its_teacher_though_that_run_has_gone_on(tmp_path: Path, words: Words) -> None:
    first = words(tmp_path, "s1", "--align", "latent", "--align-hidden", 16)
    second = words(tmp_path, "s2", "--guiding-ckpt", tmp_path / "s1", "--align-hidden", 16)
    train.main([*first, "--max-train-steps", "2"])
    run = train_guide.main([*second, "--max-train-steps", "1"])
    began = Checkpoint.open(run).config["resolved"]["guided"]["teacher"]
    train.main([*first, "--max-train-steps", "3"])
    train_guide.main([*second, "--max-train-steps", "2"])
    assert Checkpoint.open(run).config["resolved"]["guided"]["teacher"] == began and began["step"] == 2
    (Path(began["path"]) / "config.json").write_text((Path(began["path"]) / "config.json").read_text() + " ")
    with pytest.raises(UserError, match="teacher .* has changed"):
        train_guide.main([*second, "--max-train-steps", "3"])


def test_previews_do_not_touch_the_run(tmp_path: Path, words: Words) -> None:
    plain = train.main(words(tmp_path / "a", "run", "--max-train-steps", 2))
    shown = train.main(words(tmp_path / "b", "run", "--max-train-steps", 2, "--sampling-steps", 1))
    assert_same_bits(plain, shown)
    assert sorted(p.name for p in (shown / "samples").iterdir()) == ["0000001.png", "0000002.png"]


def test_latents_may_stay_on_disk_in_memory_or_on_the_device(tmp_path: Path, words: Words) -> None:
    disk = train.main(words(tmp_path / "disk", "run", "--max-train-steps", 3))
    for place in ("ram", "device"):
        run = build_run(words(tmp_path / place, "run", "--max-train-steps", 3, "--resident", place))
        assert (run.data._on_device is not None) == (place == "device") and run.data._rows[0].flags["OWNDATA"] == (
            place == "ram"
        )
        if place == "device":
            run.data._rows = None  # the host's rows are no longer read
        assert_same_bits(disk, loop.train(run))


def test_init_ckpt_starts_from_ema_weights_with_a_new_label_table(tmp_path: Path, words: Words, teacher: Path) -> None:
    import dataclasses

    from training.resume import start_from

    run = build_run(words(tmp_path, "run", "--init-ckpt", teacher))
    ema = Checkpoint.open(teacher).tensors("ema")
    assert all(torch.equal(value, ema[name]) for name, value in run.network.state_dict().items())
    config = json.loads((Checkpoint.open(teacher).path / "config.json").read_text())
    shutil.copytree(Checkpoint.open(teacher).path, tmp_path / "scaled")
    files.write_sealed(tmp_path / "scaled" / "config.json", {**config, "space": {**config["space"], "scale": [2.0]}})
    with pytest.raises(UserError, match="scale"):
        build_run(words(tmp_path, "other", "--init-ckpt", tmp_path / "scaled"))
    checkpoint = Checkpoint.open(teacher)
    other, _ = start_from(checkpoint, dataclasses.replace(checkpoint.spec, num_classes=3), seed=5)
    assert other.y_embedder.embedding_table.weight.shape == (4, 128)
    assert torch.equal(other.blocks[0].attn.qkv.weight, ema["blocks.0.attn.qkv.weight"])
    with pytest.raises(UserError, match="depth"):
        start_from(checkpoint, dataclasses.replace(checkpoint.spec, depth=5), seed=0)


def test_bf16_trains_close_to_fp32(tmp_path: Path, words: Words) -> None:
    argv = words(tmp_path, "run", "--max-train-steps", 3, "--align", "latent", "--align-hidden", 32)
    full = train.main([*argv, "--output-dir", str(tmp_path / "fp32")])
    mixed = train.main([*argv, "--output-dir", str(tmp_path / "bf16"), "--mixed-precision", "bf16"])
    assert Checkpoint.open(mixed).config["precision"] == "bf16"
    for step in (1, 2, 3):
        assert losses(mixed)[step]["loss/latent"] == pytest.approx(losses(full)[step]["loss/latent"], rel=0.02)
    assert losses(mixed) != losses(full)
    assert all(value.dtype == torch.float32 for value in saved_tensors(mixed).values())


def test_compiled_blocks_compute_the_same(
    tmp_path: Path, words: Words, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from torch import nn

    from models.backbone import Block

    # Dynamo traces, but without the minute of code generation
    monkeypatch.setattr(
        Block,
        "compile",
        lambda self, **_: compiled.append(self) or nn.Module.compile(self, backend="eager", fullgraph=True),
    )
    compiled: list[Block] = []
    argv = [
        *words(tmp_path, "run", "--max-train-steps", 2, "--guiding-ckpt", teacher, "--align-hidden", 32),
        "--output-dir",
    ]
    eager = train_guide.main([*argv, str(tmp_path / "eager"), "--compile", "off"])
    assert not compiled
    traced = train_guide.main([*argv, str(tmp_path / "compiled"), "--compile", "on"])
    assert len(compiled) == 6 + 6 + 4 and "compile on" in capsys.readouterr().out
    for step in (1, 2):
        assert losses(traced)[step]["loss/diffusion"] == pytest.approx(losses(eager)[step]["loss/diffusion"], abs=1e-5)
    assert saved_tensors(traced).keys() == saved_tensors(eager).keys()  # names do not change
    monkeypatch.setattr("shutil.which", lambda name: None)
    train_guide.main([*argv, str(tmp_path / "bare"), "--compile", "on"])
    assert "no C++ compiler found" in capsys.readouterr().out


def test_deterministic_sets_deterministic_kernels(tmp_path: Path, words: Words) -> None:
    try:
        build_run(words(tmp_path, "run", "--deterministic"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_trackers_get_what_the_log_gets(tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: sent.append((step, values)))
    run = train.main(words(tmp_path, "run", "--report-to", "wandb", "--max-train-steps", 2))
    assert [step for step, _ in sent] == [1, 2] and len(read(run / "log.jsonl")) == 2
    assert sent[0][1]["loss/diffusion"] == pytest.approx(read(run / "log.jsonl")[0]["loss/diffusion"], rel=1e-5)


def test_lightningdit_trains_both_stages_on_its_own_recipe(tmp_path: Path) -> None:
    """Channel-normalised fixed samples with stored flips, logit-normal times, MSE plus cosine, omega 10."""
    from models.latents import LatentSpace
    from preprocessing import shards

    values = np.random.Generator(np.random.Philox(1)).normal(3.0, 2.0, (40, 2, 1, 4, 4, 4)).astype(np.float32)
    folder = tmp_path / "latents"
    entry = shards.write_shard(folder, 0, values, np.arange(40) % 3)
    space = LatentSpace(name="va-vae", channels=4, stride=16, shift=(3.0, 3.0, 3.0, 2.0), scale=(0.5, 0.5, 0.5, 1.0))
    shards.write_manifest(
        folder,
        space=space,
        resolution=64,
        latent_size=4,
        views=2,
        parts=1,
        dtype="float32",
        crop="none",
        class_names=["a", "b", "c"],
        images=False,
        shards=[entry],
        source="random numbers",
    )
    argv = [
        "--recipe",
        "lightningdit",
        "--model",
        "LightningDiT-Tiny/1",
        "--data-dir",
        str(folder),
        "--output-dir",
        str(tmp_path),
        "--batch-size",
        "8",
        "--log-steps",
        "1",
        "--ema-warmup",
        "--max-train-steps",
        "3",
    ]
    teacher = train.main([*argv, "--exp-name", "stage1", "--align", "latent", "--align-hidden", "16"])
    run = train_guide.main(
        [
            *argv,
            "--exp-name",
            "stage2",
            "--guiding-ckpt",
            str(teacher),
            "--align-hidden",
            "16",
            "--align-stop-steps",
            "2",
        ]
    )
    saved = Checkpoint.open(run).config
    assert saved["align"]["guided"]["guide_scale"] == 10 and saved["train"]["velocity_loss"] == "mse+cosine"
    assert "loss/guided" in losses(run)[2] and "loss/guided" not in losses(run)[3]
    look = build_run([*argv, "--exp-name", "look"])
    from training import batches

    (batch,) = next(batches.Batches(look.config, look.data, look.device, 0, 1).steps(0, 1, {}))
    drawn = batches.plan(look.config, look.data, 0)
    assert set(drawn.view) == {0, 1}
    expected = (values[drawn.index, drawn.view, 0] - np.array(space.shift)[:, None, None]) * np.array(space.scale)[
        :, None, None
    ]
    np.testing.assert_allclose(batch.x0.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_checkpoints_rebuild_their_networks(guided: Path, teacher: Path) -> None:
    checkpoint = Checkpoint.open(guided)
    assert (
        checkpoint.step == 4
        and checkpoint.config["resolved"]["guided"]["teacher"]["digest"] == Checkpoint.open(teacher).digest
    )
    for weights, file in (("ema", "ema"), ("raw", "network")):
        network = checkpoint.network(weights)
        assert (
            all(torch.equal(v, checkpoint.tensors(file)[k]) for k, v in network.state_dict().items())
            and not network.training
        )
    assert not any("head" in name or "teacher" in name for name in checkpoint.tensors("network"))


if __name__ == "__main__":
    two_processes(
        **{
            key: Path(value) if key == "folder" else value
            for key, value in json.loads(Path(sys.argv[1]).read_text()).items()
        }
    )
