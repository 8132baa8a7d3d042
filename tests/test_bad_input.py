"""Mistakes that a user can make: one line that names the culprit, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import generate
import train
import train_guide
from models import export
from models.checkpoint import Checkpoint
from runtime import files
from runtime.errors import UserError
from tests.helpers import ROOT, Words


def refused(main: Callable[[list[str]], object], argv: list[object], *expected: str) -> None:
    """`main(argv)` raises one line that contains every word of `expected`."""
    with pytest.raises(UserError) as caught:
        main([str(word) for word in argv])
    for word in expected:
        assert word in str(caught.value), str(caught.value)


@contextmanager
def size_limit(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def copy_of(folder: Path, into: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(folder, into)
    return into


def test_missing_data(tmp_path: Path, words: Words) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "nowhere", tmp_path / "empty"):
        refused(train.main, [*words(tmp_path, "x"), "--data-dir", place], str(place), "latent set")


def test_damaged_shards_and_manifests(tmp_path: Path, words: Words, data: Path) -> None:
    cut = copy_of(data, tmp_path / "cut")
    shard = next(cut.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(train.main, [*words(tmp_path, "x"), "--data-dir", cut], shard.name, "truncated")
    shard.write_bytes(b"not a shard at all, but long enough to have a header length")
    refused(train.main, [*words(tmp_path, "x"), "--data-dir", cut], shard.name)
    broken = copy_of(data, tmp_path / "broken")
    (broken / "manifest.json").write_text("{")
    refused(train.main, [*words(tmp_path, "x"), "--data-dir", broken], "manifest.json", "JSON")


def test_labels_out_of_range(tmp_path: Path, words: Words, data: Path) -> None:
    folder = copy_of(data, tmp_path / "labels")
    manifest = json.loads((folder / "manifest.json").read_text())
    files.write_sealed(folder / "manifest.json", {**manifest, "num_classes": 5, "class_names": list("01234")})
    refused(train.main, [*words(tmp_path, "x"), "--data-dir", folder], "label", "5")


def test_batches_that_do_not_divide_or_fit(tmp_path: Path, words: Words) -> None:
    refused(train.main, [*words(tmp_path, "x"), "--gradient-accumulation-steps", 3], "--batch-size 16", "3")
    refused(train.main, [*words(tmp_path, "x"), "--batch-size", 4096], "4096", "1797")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--modle", "SiT-B/2"], ("--modle", "--model")),
        (["--align", "latnt"], ("latnt", "latent")),
        (["--model", "SiT-B/3"], ("SiT-B/3", "SiT-B/2")),
        (["--align", "latent", "--align-depth", "7"], ("7", "1 to 6")),
        (["--align", "latent", "--preset", "papr"], ("papr", "paper")),
        (["--align", "latent", "--align-interval", "0.7", "0.4"], ("0.7 0.4",)),
        (["--align", "latent", "--align-stop-steps", "4", "--align-stop-epochs", "1"], ("give one of them",)),
        (["--guide-scale", "30"], ("--guide-scale",)),
        (["--mixed-precision", "fp16"], ("fp16", "bf16")),
        (["--mixed-precision", "fp8"], ("fp8", "bf16")),
        (["--batch-size", "many"], ("--batch-size", "many")),
        (["--max-train-steps", "0"], ("--max-train-steps",)),
        (["--cfg-prob", "1.5"], ("--cfg-prob", "1.5")),
        (["--learning-rate", "-1"], ("--learning-rate",)),
        (["--learning-rate", "nan"], ("--learning-rate", "nan")),
        (["--adam-beta2", "2"], ("--adam-beta2", "[0, 1)")),
        (["--sampling-steps", "-1"], ("--sampling-steps",)),
        (["--exp-name", ""], ("--exp-name",)),
        (["--align", "latent", "--align-stop-steps", "-5"], ("--align-stop-steps -5",)),
        (["--align", "latent", "--align-hidden", "0"], ("--align-hidden",)),
        (["--align", "latent", "--align-weight", "inf"], ("inf",)),
        (["--align", "latent", "--align-mask", "upstream"], ("--align-interval",)),
        (["--align", "sra", "--align-depth", "0"], ("0 is beyond",)),
        (["--align", "sra", "--sra-tail-length", "0"], ("--sra-tail-length",)),
        (["--init-ckpt", "/nowhere"], ("/nowhere",)),
    ],
)
def test_options(tmp_path: Path, words: Words, argv: list[str], expected: tuple[str, ...]) -> None:
    refused(train.main, [*words(tmp_path, "x"), *argv], *expected)


def test_required_options_are_named() -> None:
    refused(train.main, [], "--data-dir", "--exp-name")
    refused(train_guide.main, ["--data-dir", "x", "--exp-name", "y"], "--guiding-ckpt")
    refused(generate.main, [], "--ckpt")


def test_launcher_configurations_that_are_not_supported(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value, word in (
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp16"),
        ("WORLD_SIZE", "2", "but RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ("WORLD_SIZE", "two", "'two', not a number"),
        ("RANK", "x", "RANK is 'x'"),
        ("LOCAL_WORLD_SIZE", "", "LOCAL_WORLD_SIZE"),
        ("ACCELERATE_USE_CPU", "maybe", "invalid truth value maybe"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            refused(train.main, words(tmp_path, "x"), word)


def test_a_run_with_other_options_is_not_continued(tmp_path: Path, words: Words, data: Path) -> None:
    train.main(words(tmp_path, "run", "--max-train-steps", 1))
    for argv, culprit in (
        (["--qk-norm"], "qk_norm"),
        (["--seed", "7"], "seed"),
        (["--learning-rate", "0.5"], "learning-rate"),
        (["--align", "latent"], "latent"),
    ):
        refused(train.main, [*words(tmp_path, "run"), *argv], "cannot be continued", culprit)
    other = copy_of(data, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    files.write_sealed(other / "manifest.json", {**manifest, "source": "elsewhere"})
    refused(train.main, [*words(tmp_path, "run"), "--data-dir", other], "is not the latent set")


def test_damaged_checkpoints(tmp_path: Path, words: Words, guided: Path) -> None:
    def refuse_samples(folder: Path, *expected: str) -> None:
        refused(generate.main, ["--ckpt", folder, "--num-fid-samples", "2", "--out", tmp_path / "out"], *expected)

    refuse_samples(tmp_path / "nowhere", "nowhere")
    flipped = copy_of(guided, tmp_path / "flipped") / "checkpoints" / "0000004"
    file = flipped / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refuse_samples(flipped, "ema.safetensors", "damaged")
    file.unlink()
    refuse_samples(flipped, "ema.safetensors", "missing")
    (flipped / "config.json").write_text('{"kind": "checkpoint", "format": 1}')
    refuse_samples(flipped, "config.json")
    (flipped / "config.json").write_text("{")
    refuse_samples(flipped, "config.json", "JSON")


def test_a_teacher_that_does_not_fit(tmp_path: Path, words: Words, teacher: Path, data: Path) -> None:
    folder = copy_of(data, tmp_path / "scaled")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["space"]["scale"] = [2.0]
    files.write_sealed(folder / "manifest.json", manifest)
    refused(
        train_guide.main, [*words(tmp_path, "x"), "--data-dir", folder, "--guiding-ckpt", teacher], "teacher", "scale"
    )
    refused(train_guide.main, [*words(tmp_path, "x"), "--guiding-ckpt", tmp_path / "nowhere"], "nowhere")
    refused(
        train_guide.main,
        [*words(tmp_path, "x"), "--guiding-ckpt", teacher, "--guiding-depth", "7"],
        "--guiding-depth 7",
    )


def test_guidance_needs_a_null_class(tmp_path: Path, words: Words) -> None:
    """Without label dropout the null label is never trained."""
    run = train.main(words(tmp_path, "run", "--cfg-prob", 0, "--max-train-steps", 1))
    refused(train_guide.main, [*words(tmp_path, "x"), "--guiding-ckpt", run], "null class", "--guide-scale 30")
    train_guide.main(
        words(tmp_path, "one", "--guiding-ckpt", run, "--guide-scale", 1, "--align-hidden", 8, "--max-train-steps", 1)
    )
    sample = ["--ckpt", run, "--num-fid-samples", "2", "--num-steps", "2", "--out", tmp_path / "out"]
    refused(generate.main, [*sample, "--cfg-scale", "2"], "null class", "--cfg-scale 1")
    generate.main([str(word) for word in sample])


def test_places_that_cannot_be_written(tmp_path: Path, words: Words, guided: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(train.main, words(tmp_path / "file", "run"), "cannot write", str(tmp_path / "file"))
    refused(
        generate.main,
        ["--ckpt", guided, "--num-fid-samples", "2", "--num-steps", "2", "--out", tmp_path / "file" / "out"],
        "cannot write",
    )


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path: Path, words: Words) -> None:
    with size_limit(1_000_000):
        refused(train.main, words(tmp_path, "run", "--max-train-steps", 1), "cannot write", "0000001")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    train.main(words(tmp_path, "run", "--max-train-steps", 1))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000001"]


def test_a_full_disk_while_sampling(tmp_path: Path, guided: Path) -> None:
    argv = ["--ckpt", guided, "--num-fid-samples", "4000", "--num-steps", "2", "--out", tmp_path / "out"]
    with size_limit(20_000):
        refused(generate.main, argv, "cannot write")
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_a_full_disk_while_exporting(tmp_path: Path, guided: Path) -> None:
    with size_limit(20_000):
        refused(export.main, [guided, "--layout", "repa", "--out", tmp_path / "out.pt"], "cannot write", "out.pt")
    assert not list(tmp_path.iterdir())


def test_files_outside_their_folder_are_refused(tmp_path: Path, words: Words, data: Path, guided: Path) -> None:
    manifest = copy_of(data, tmp_path / "set") / "manifest.json"
    value = files.read_json(manifest)
    shutil.copy(tmp_path / "set" / value["shards"][0]["file"], tmp_path / "shard")
    value["shards"][0]["file"] = "../shard"
    files.write_sealed(manifest, value)
    refused(
        train.main,
        [*words(tmp_path, "x"), "--data-dir", tmp_path / "set"],
        "manifest.json",
        "../shard outside its folder",
    )
    config = copy_of(guided, tmp_path / "run") / "checkpoints" / "0000004" / "config.json"
    value = files.read_json(config)
    value["files"] = {name.replace("ema.", "../ema."): digest for name, digest in value["files"].items()}
    files.write_sealed(config, value)
    with pytest.raises(
        UserError, match=r"config.json is damaged: it names the file \.\./ema.safetensors outside its folder"
    ):
        Checkpoint.open(config.parent).require_whole()


def test_the_required_torch_is_beyond_the_known_flaws_of_loading() -> None:
    """CVE-2025-32434 below 2.6, CVE-2026-24747 below 2.10."""
    text = (ROOT / "requirements.txt").read_text()
    bounds = dict(re.findall(r"^([a-z-]+)>=([\d.]+)", text, flags=re.MULTILINE))
    assert [tuple(map(int, bounds[name].split("."))) for name in ("torch", "torchvision")] >= [(2, 10), (0, 25)]


def test_non_finite_losses_stop_the_run(tmp_path: Path, words: Words) -> None:
    argv = words(tmp_path, "run", "--learning-rate", "1e30", "--max-grad-norm", "0", "--max-train-steps", 40)
    refused(train.main, argv, "not finite")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    # between two reports too: the weights are checked before a checkpoint is written
    refused(train.main, [*argv, "--log-steps", "40", "--checkpointing-steps", "3"], "not finite")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_files_honour_the_umask(tmp_path: Path, words: Words) -> None:
    before = os.umask(0o027)
    try:
        run = train.main(words(tmp_path, "run", "--max-train-steps", 1))
    finally:
        os.umask(before)
    written = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".json", ".jsonl")]
    assert len(written) >= 6 and {path.stat().st_mode & 0o777 for path in written} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_dir()} == {0o750}
