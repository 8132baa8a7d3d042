"""Presets against the settings of their authors; branches of a run; names of checkpoints; published numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import generate
import models
import train
import train_guide
from alignment import BuildContext, Context, find
from alignment.haste import logits
from evaluations import monitor
from models import published
from models.checkpoint import Checkpoint
from models.pixels import pixels
from runtime import files, launch
from runtime.errors import UserError
from runtime.jsonlines import read
from runtime.streams import Stream
from tests.helpers import Words, build_run, class_folders, context_of, encoding, perturbed, tiny_vae
from training import command

ARGV = ["--data-dir", "d", "--exp-name", "e"]


def spec(name: str) -> models.ModelSpec:
    return models.spec(name, in_channels=4, input_size=32, num_classes=1000)


def setting(student: models.ModelSpec, **more: object) -> BuildContext:
    return BuildContext(
        **{
            "student": student,
            "space": pixels(student.in_channels),
            "seed": 0,
            "device": torch.device("cpu"),
            "dtype": None,
            "load": Checkpoint.open,
            **more,
        }
    )


# --- alignments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["SiT-B/2", "SiT-L/2", "SiT-XL/2"])
def test_the_authors_stop_after_100000_optimiser_steps_whatever_the_size(size: str) -> None:
    _, options = command.resolve(
        [*ARGV, "--guiding-ckpt", "c", "--preset", "upstream"], "train_guide.py", None, ("guided",)
    )
    assert find("guided").resolve(options["guided"], spec(size)).stop(5004) == 100_000
    assert options["guided"].guiding_precision == "tf32"
    _, options = command.resolve([*ARGV, "--guiding-ckpt", "c"], "train_guide.py", None, ("guided",))
    assert find("guided").resolve(options["guided"], spec(size)).stop(5004) == (
        100_080 if size == "SiT-B/2" else 50_040
    )


@pytest.mark.parametrize(
    ("name", "batch", "haste", "repa", "sync", "sra"),
    [
        ("SiT-XL/4", 256, (8, (5, 6, 7, 8), 250_000), 8, (8, 16), (8, 20)),
        ("LightningDiT-XL/1", 1024, (8, (5, 6, 7, 8), 62_500), 8, (8, 16), (8, 20)),
        ("LightningDiT-B/1", 1024, (8, (5, 6, 7, 8), 25_000), 4, (4, 8), (3, 8)),
        ("SiT-B/4", 512, (8, (5, 6, 7, 8), 50_000), 4, (4, 8), (3, 8)),
    ],
)
def test_blocks_go_by_depth_and_hastes_stop_by_images(
    name: str, batch: int, haste: tuple, repa: int, sync: tuple, sra: tuple
) -> None:
    network, resolved = spec(name), {}
    for method in ("haste", "repa", "layersync", "sra"):
        resolved[method] = find(method).resolve(find(method).Options(), network, batch)
    options = resolved["haste"]
    assert (options.depth, options.attention_depths, options.stop_steps) == haste and resolved["repa"].depth == repa
    assert [(resolved[m].depth, resolved[m].target_depth) for m in ("layersync", "sra")] == [sync, sra]


def test_haste_says_where_its_settings_are_ours(encoder: Path) -> None:
    kind = find("haste")
    for name, noted in (("SiT-Tiny/2", True), ("SiT-B/2", False), ("LightningDiT-Tiny/1", True)):
        student = models.spec(name, in_channels=1, input_size=8, num_classes=10)
        options = kind.resolve(
            kind.Options(encoder=str(encoder), hidden=8, attention_depths=(1,), encoder_depths=(1,)), student
        )
        notes = kind(options, setting(student, dry=True)).notes()
        assert ("our choice" in " ".join(notes)) == noted


def test_haste_scales_queries_before_a_product_in_float32() -> None:
    qk = 40 * Stream(0, "qk").normal((2, 2, 3, 5, 64))
    q, k = qk.double().unbind(1)
    exact = q @ k.transpose(-1, -2) / 8
    with torch.autocast("cpu", torch.bfloat16):
        ours = logits(qk)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-3)  # bf16 would be off by tens


def test_stage_1_takes_a_sixth_of_the_depth_and_sra2_its_own_blocks() -> None:
    kind = find("latent")
    sra2 = kind.presets["sra2"]["options"]
    for name, paper_depth, sra2_depth in (
        ("SiT-B/2", 2, 2),
        ("SiT-L/2", 4, 8),
        ("SiT-XL/2", 5, 8),
        ("SiT-Tiny/2", 1, 1),
    ):
        assert kind.resolve(kind.Options(), spec(name)).depth == paper_depth
        assert kind.resolve(kind.Options(**sra2), spec(name)).depth == sra2_depth
        assert kind.resolve(kind.Options(**sra2, depth=3), spec(name)).depth == 3
    student = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10)
    alignment = kind(kind.resolve(kind.Options(**sra2, hidden=16), student), setting(student))
    assert [type(module).__name__ for module in alignment.head] == ["Linear", "SiLU"] * 4 + ["Linear"] and kind.Options(
        **sra2
    ).weight == 1
    feature, x0 = Stream(1, "f").normal((2, 16, 128)), Stream(2, "x").normal((2, 1, 8, 8))
    zeros = torch.zeros(2)
    context = Context(x0, x0, x0, zeros, zeros.long(), zeros.long(), {1: feature}, {}, {})
    gap = (alignment.head(feature) - models.patchify(x0, 2)).abs()
    literal = torch.where(gap < 0.05, gap**2 / 0.1, gap - 0.025).mean((1, 2))
    torch.testing.assert_close(alignment(context), literal)


def test_the_longer_head_has_the_epsilon_of_the_final_layer() -> None:
    student = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10)
    kind = find("latent")
    (norm,) = [
        module
        for module in kind(
            kind.resolve(kind.Options(head="mlp-norm-linear", hidden=8), student), setting(student)
        ).modules()
        if isinstance(module, torch.nn.LayerNorm)
    ]
    assert norm.eps == 1e-6 == models.build(student).final_layer.norm_final.eps


@pytest.mark.parametrize(("preset", "published_batch"), [("paper", 16), ("pytorch", 32)])
def test_dispersive_warns_of_another_micro_batch(preset: str, published_batch: int) -> None:
    kind, student = find("dispersive"), spec("SiT-Tiny/2")
    options = kind.resolve(kind.Options(**kind.presets[preset]["options"]), student)
    assert kind(options, setting(student, micro_batch=published_batch)).notes() == []
    (note,) = kind(options, setting(student, micro_batch=256)).notes()
    assert "256" in note and str(published_batch) in note and f"{256 // published_batch} times" in note


@pytest.mark.parametrize(
    "more", [(), ("--align-interval", 0.3, 0.8), ("--align-interval", 0.3, 0.8, "--align-mask", "upstream")]
)
def test_labels_that_were_dropped_are_left_out_of_the_guide_loss_and_of_the_teachers_batch(
    tmp_path: Path, words: Words, teacher: Path, more: tuple
) -> None:
    """The mean over all samples of the loss times [label not dropped] (times [in range], or the share in range)."""
    guided = ("--guiding-ckpt", teacher, "--align-hidden", 32, "--guiding-labels", "skip", "--cfg-prob", 0.5)
    run = build_run(words(tmp_path, "run", *guided, *more), "train_guide")
    alignment, learner, rows = run.alignments["guided"], run.learner(), []
    for (batch,), _ in zip(run.batches(3), range(3)):
        labelled = (batch.y == batch.labels).float()
        inside = ((batch.t >= 0.3) & (batch.t <= 0.8)).float() if more else torch.ones(16)
        each = alignment(context_of(run.network, batch, alignment.taps)).detach()
        hook = alignment.teacher.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        loss = learner(batch)["guided"].detach()
        hook.remove()
        weight = inside.mean() if "upstream" in more else inside
        torch.testing.assert_close(loss, (each * labelled * weight).mean())
        chosen = labelled if "upstream" in more else labelled * inside
        assert rows.pop() == 2 * chosen.sum() < 32 and loss > 0 and not rows
    train_guide.main(words(tmp_path, "trained", *guided, *more, "--max-train-steps", 1))


def test_the_teacher_can_be_kept_in_float32_under_a_bf16_student(teacher: Path) -> None:
    student = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10)
    kind, targets = find("guided"), {}
    x, y = Stream(3, "x").normal((4, 1, 8, 8)), torch.tensor([1, 2, 3, 4])
    for name, precision, dtype in (
        ("exact", "run", None),
        ("fp32", "fp32", torch.bfloat16),
        # TF32 is float32 on a CPU
        ("tf32", "tf32", torch.bfloat16),
        ("run", "run", torch.bfloat16),
    ):
        options = kind.resolve(kind.Options(guiding_ckpt=str(teacher), guiding_precision=precision, hidden=8), student)
        alignment = kind(options, setting(student, dtype=dtype))
        network = perturbed(student, depth=alignment.guiding)  # a teacher of four steps is nearly the identity
        alignment.teacher.network.load_state_dict(network.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            targets[name] = alignment.target(Context(x, x, x, torch.full((4,), 0.5), y, y, {}, {}, {}))
    assert torch.equal(targets["fp32"], targets["exact"]) and torch.equal(targets["tf32"], targets["exact"])
    assert not torch.equal(targets["run"], targets["exact"])


@pytest.mark.parametrize(("precision", "inside"), [("tf32", "high"), ("fp32", "highest"), ("run", "medium")])
def test_tf32_is_on_during_the_teachers_pass_alone(
    precision: str, inside: str, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = models.spec("SiT-Tiny/2", in_channels=1, input_size=8, num_classes=10)
    kind, cuda, tf32_inside = find("guided"), torch.device("cuda"), launch.tf32_inside
    options = kind.resolve(kind.Options(guiding_ckpt=str(teacher), guiding_precision=precision, hidden=8), student)
    alignment, seen = kind(options, setting(student)), []
    # the switches exist without a GPU: they are set as for one
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(launch, "tf32_inside", lambda _, wanted: tf32_inside(cuda, wanted))

    def switches() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    alignment.teacher.network.register_forward_pre_hook(lambda *_: seen.append(switches()))
    x, y = Stream(3, "x").normal((4, 1, 8, 8)), torch.tensor([1, 2, 3, 4])
    before = switches()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = precision == "fp32"
        around = switches()
        alignment.target(Context(x, x, x, torch.full((4,), 0.5), y, y, {}, {}, {}))
        assert switches() == around and seen == [(inside, precision == "tf32")]
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_introduction_names_the_teacher_and_its_age(
    tmp_path: Path, words: Words, capsys: pytest.CaptureFixture, teacher: Path
) -> None:
    more = ("--align-hidden", 16, "--max-train-steps", 1, "--guiding-precision", "tf32")
    train_guide.main(words(tmp_path, "run", "--guiding-ckpt", teacher, *more))
    output = capsys.readouterr().out
    assert ("runs in float32" in output) == (not torch.cuda.is_available())
    assert f"teacher: {Checkpoint.open(teacher).path} at step 4 = 0.0 epochs" in output and "raw weights" in output
    assert "warning: the paper's teacher has trained for 40 epochs" in output and "RUN@STEP" in output
    assert Checkpoint.open(teacher).epochs == 4 / 112


# --- precision -------------------------------------------------------------------------------------------------------


def test_tf32_is_a_precision_of_its_own(
    tmp_path: Path, words: Words, capsys: pytest.CaptureFixture, guided: Path
) -> None:
    for method in ("dispersive", "layersync"):
        config, _ = command.resolve([*ARGV, "--align", method, "--preset", "paper"], "train.py", None)
        assert (config.mixed_precision, config.tf32) == ("no", True)
    with pytest.raises(UserError, match="write --mixed-precision no --tf32"):
        command.resolve([*ARGV, "--tf32"], "train.py", None)
    if not torch.cuda.is_available():
        for main, argv in (
            (train.main, words(tmp_path, "x", "--mixed-precision", "no", "--tf32")),
            (generate.main, ["--ckpt", str(guided), "--mixed-precision", "no", "--tf32"]),
        ):
            with pytest.raises(UserError, match="--tf32 needs a CUDA device"):
                main(argv)
        capsys.readouterr()
        run = train.main(words(tmp_path, "preset", "--align", "layersync", "--preset", "paper", "--max-train-steps", 1))
        assert capsys.readouterr().out.count("TF32") == 1 and Checkpoint.open(run).config["precision"] == "fp32"
    assert [launch.precision_name(None, on) for on in (False, True)] == ["fp32", "tf32"]
    assert set(launch.PRECISIONS) == {"bf16", "fp32", "tf32"}


def test_a_preset_samples_in_its_own_precision_with_its_own_decoder(
    guided: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = generate.main(
        [
            "--ckpt",
            str(guided),
            "--preset",
            "layersync-nocfg-sde",
            "--out",
            str(tmp_path / "out"),
            "--num-fid-samples",
            "4",
        ]
    )
    settings = json.loads((out / "samples.json").read_text())
    assert (
        settings["precision"] in ("fp32", "tf32")
        and settings["decoder"] == "pixels"
        and settings["preset"] == "layersync-nocfg-sde"
    )
    assert "batch_size" not in settings and "the published setting uses" in capsys.readouterr().out
    out = generate.main(
        [
            "--ckpt",
            str(guided),
            "--mode",
            "ode",
            "--solver",
            "dopri5",
            "--out",
            str(tmp_path / "adaptive"),
            "--num-fid-samples",
            "4",
            "--batch-size",
            "3",
        ]
    )
    assert (
        json.loads((out / "samples.json").read_text())["batch_size"] == 3
    )  # dopri5 chooses its steps for a whole batch


# --- recipes and numbers ---------------------------------------------------------------------------------------------


def test_published_numbers_are_rows_with_source_and_protocol() -> None:
    rows = published.rows()
    tables = {number: [row for row in rows if f"Table {number}" in row.source] for number in (1, 2, 3, 4, 5)}
    assert {number: len(table) for number, table in tables.items()} == {1: 28, 2: 14, 3: 7, 4: 4, 5: 18}
    assert all(
        row.source
        and row.metrics.get("fid", 0) + (row.device_hours or 0) > 1
        and row.status in ("published", "reported")
        for row in rows
    )
    fid = lambda **wanted: published.find(status="published", **wanted)[0].metrics["fid"]  # noqa: E731
    for model, numbers in {
        "SiT-B/2": (36.14, 29.04, 20.49),
        "SiT-L/2": (21.41, 14.61, 8.74),
        "SiT-XL/2": (17.63, 12.25, 7.51),
        "LightningDiT-B/1": (15.94, 15.87, 14.03),
        "LightningDiT-XL/1": (5.30, 5.07, 3.55),
    }.items():
        epochs = 80 if model.startswith("SiT") else 64
        fids = tuple(
            fid(method=method, model=model, epochs=epochs, samples=50_000, variant="")
            for method in ("none", "latent", "guided")
        )
        assert fids == numbers
    assert published.find(variant="table 5: lambda 0.3")[0].metrics == {"fid": 23.08, "is": 71.41}
    assert {row.samples for number in (4, 5) for row in tables[number]} == {10_000}
    assert (
        published.first(method="none", model="SiT-B/2", epochs=80, guidance="none").sampler == "SDE, 250 steps"
    )  # with a protocol


# --- names of checkpoints, and branches ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, words: Words, teacher: Path) -> Path:
    """A stage-2 run of 6 steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trunk")
    return train_guide.main(
        words(
            folder,
            "trunk",
            "--guiding-ckpt",
            teacher,
            "--align-hidden",
            32,
            "--align-stop-steps",
            5,
            "--max-train-steps",
            6,
            "--checkpointing-steps",
            1,
        )
    )


def test_a_checkpoint_is_named_by_its_folder_its_run_or_run_at_step(trunk: Path) -> None:
    folder = trunk / "checkpoints" / "0000002"
    assert (
        Checkpoint.open(folder).path
        == Checkpoint.open(f"{trunk}@2").path
        == Checkpoint.open(f"{trunk}@0000002").path
        == folder
    )
    assert Checkpoint.open(trunk).step == 6 and Checkpoint.open(f"{trunk}@2").step == 2
    with pytest.raises(UserError, match="no checkpoint of step 7; its steps are 1, 2, 3, 4, 5, 6"):
        Checkpoint.open(f"{trunk}@7")
    with pytest.raises(UserError, match="or RUN@STEP"):
        Checkpoint.open(trunk.parent / "nowhere")


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        (2, ("--align-stop-steps", 4)),  # an earlier stop
        (4, ("--align-stop-steps", 4)),  # a stop at the branch itself
        (2, ("--align-stop-steps", 0)),  # no stop at all
        (5, ("--align-stop-steps", 6)),  # a longer one, from the step at which the trunk's head was last saved
    ],
)
def test_a_branch_equals_a_run_that_had_its_options_from_the_start(
    step: int, changed: tuple, trunk: Path, tmp_path: Path, words: Words, teacher: Path
) -> None:
    more = ["--guiding-ckpt", teacher, "--align-hidden", 32, "--max-train-steps", 8]
    branch = train_guide.main(words(tmp_path, "branch", *more, *changed, "--branch-from", f"{trunk}@{step}"))
    whole = train_guide.main(words(tmp_path, "whole", *more, *changed))
    first, second = Checkpoint.open(branch), Checkpoint.open(whole)
    assert first.files.keys() == second.files.keys() and first.step == second.step == 8
    for name in ("network", "ema", "optimizer"):
        actual, expected = first.tensors(name), second.tensors(name)
        assert actual.keys() == expected.keys() and all(
            torch.equal(value, expected[key]) for key, value in actual.items()
        )
    assert read(branch / "log.jsonl")[0]["step"] == step + 1


def test_a_branch_is_continued_like_any_run(trunk: Path, tmp_path: Path, words: Words, teacher: Path) -> None:
    more = ["--guiding-ckpt", teacher, "--align-hidden", 32, "--align-stop-steps", 4, "--branch-from", f"{trunk}@2"]
    train_guide.main(words(tmp_path, "branch", *more, "--max-train-steps", 5))
    train_guide.main(words(tmp_path, "branch", *more, "--max-train-steps", 8))
    train_guide.main(words(tmp_path, "whole", *more, "--max-train-steps", 8))
    first, second = (Checkpoint.open(tmp_path / name).tensors("network") for name in ("branch", "whole"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("step", "changed", "message"),
    [
        (4, ("--align-stop-steps", 2), "the weight of guided at step 2 was 0.5, not 0"),
        (6, ("--align-stop-steps", 8), "the weight of guided at step 5 was 0, not 0.5"),
        (2, ("--align-weight", 0.1), "step 0 was 0.5, not 0.1"),
        (2, ("--guide-scale", 3), "guide-scale is 30.0, not 3.0; a branch may change weight, schedule"),
        (
            2,
            ("--learning-rate", 0.5),
            "learning-rate is 0.001, not 0.5; a branch may change only options of its alignments",
        ),
        (2, ("--seed", 1), "seed is 0, not 1"),
        (2, ("--init-ckpt", "x"), "not both"),
    ],
)
def test_a_branch_that_would_differ_before_its_step_is_refused(
    step: int, changed: tuple, message: str, trunk: Path, tmp_path: Path, words: Words, teacher: Path
) -> None:
    more = ["--guiding-ckpt", teacher, "--align-hidden", 32, "--align-stop-steps", 5, "--max-train-steps", 8]
    with pytest.raises(UserError, match=message):
        train_guide.main(words(tmp_path, "branch", *more, *changed, "--branch-from", f"{trunk}@{step}"))
    assert not (tmp_path / "branch").exists()


def test_a_branch_of_another_method_or_without_its_head_is_refused(
    trunk: Path, tmp_path: Path, words: Words, teacher: Path
) -> None:
    with pytest.raises(
        UserError, match=r"alignments are \['guided'\], not \['none'\]; to end one here, give --align-stop-steps 2"
    ):
        train.main(words(tmp_path, "plain", "--branch-from", f"{trunk}@2", "--max-train-steps", 8))
    bare = tmp_path / "bare"
    shutil.copytree(trunk / "checkpoints" / "0000005", bare)
    config = json.loads((bare / "config.json").read_text())
    config["files"].pop("heads.safetensors")
    files.write_sealed(bare / "config.json", config)
    with pytest.raises(UserError, match="its head is gone"):
        train_guide.main(
            words(
                tmp_path,
                "branch",
                "--guiding-ckpt",
                teacher,
                "--align-hidden",
                32,
                "--align-stop-steps",
                8,
                "--branch-from",
                bare,
                "--max-train-steps",
                8,
            )
        )


# --- scores while training, and 512 pixels ---------------------------------------------------------------------------


def test_scores_while_training_take_any_preset_and_either_weights(
    tmp_path: Path, words: Words, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [
        "--max-train-steps",
        2,
        "--eval-steps",
        2,
        "--reference",
        data,
        "--features",
        "pixels",
        "--num-fid-samples",
        8,
    ]
    both = read(train.main(words(tmp_path, "both", *common, eval_weights=["ema", "raw"])) / "log.jsonl")[-1]
    assert both["eval/fd@8"] != both["eval/raw/fd@8"]
    precisions = []

    class Recorded(monitor.Sampler):
        def __init__(self, *args: Any) -> None:
            precisions.append(args[4])
            super().__init__(*args)

    monkeypatch.setattr(monitor, "Sampler", Recorded)
    bf16 = words(tmp_path, "bf16", *common, "--mixed-precision", "bf16", eval_preset="table1-sde")
    train.main([*bf16, "--num-fid-samples", "4"])
    assert len(precisions) == 2 and set(precisions) == {
        None
    }  # the rehearsal and the score: the preset's, not the run's
    run = train.main(words(tmp_path, "preset", *common, eval_preset="table1-sde"))
    assert read(run / "log.jsonl")[-1]["eval/table1-sde/fd@8"] > 0
    out = generate.main(
        [
            "--ckpt",
            str(run),
            "--preset",
            "table1-sde",
            "--num-fid-samples",
            "8",
            "--out",
            str(tmp_path / "samples"),
            "--reference",
            str(data),
            "--features",
            "pixels",
        ]
    )
    scored = json.loads((out / "metrics.json").read_text())["metrics"]["fd"]
    assert read(run / "log.jsonl")[-1]["eval/table1-sde/fd@8"] == pytest.approx(scored, rel=1e-5)
    with pytest.raises(UserError, match="add --eval-steps"):
        train.main(words(tmp_path, "x", eval_preset="table1-sde"))
    with pytest.raises(UserError, match="ema, raw, or ema raw"):
        train.main(words(tmp_path, "x", *common, eval_weights=["ema", "ema"]))


def test_the_commands_for_512_pixels_at_tiny_size(tmp_path: Path) -> None:
    """Encode, train both stages, sample: the commands for 512 pixels are those for 256; the latents give the size."""
    import preprocessing.encode

    vae, latents = tiny_vae(tmp_path / "vae"), {}
    for resolution in (32, 64):
        images, out = class_folders(tmp_path / f"images{resolution}"), tmp_path / str(resolution)
        preprocessing.encode.main(encoding(images, vae, out, "--resolution", str(resolution)))
        argv = [
            "--recipe",
            "digits",
            "--data-dir",
            str(tmp_path / str(resolution)),
            "--output-dir",
            str(tmp_path / f"exps{resolution}"),
            "--batch-size",
            "4",
            "--max-train-steps",
            "1",
            "--align-hidden",
            "8",
            "--vae",
            vae,
        ]
        teacher = train.main([*argv, "--exp-name", "stage1", "--align", "latent"])
        run = train_guide.main([*argv, "--exp-name", "stage2", "--guiding-ckpt", str(teacher)])
        latents[resolution] = Checkpoint.open(run).spec.input_size
        out = generate.main(
            [
                "--ckpt",
                str(run),
                "--preset",
                "self-transcendence-cfg-512",
                "--vae",
                vae,
                "--num-fid-samples",
                "2",
                "--out",
                str(tmp_path / f"samples{resolution}"),
            ]
        )
        assert np.load(out / "samples.npz")["arr_0"].shape == (2, resolution, resolution, 3)
    assert latents == {32: 8, 64: 16}
