"""Sampling: what a sample depends on, what is recorded, and what a killed run keeps."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import generate
from generate import GenerateConfig
from models.checkpoint import Checkpoint
from models.pixels import PixelCodec, pixels, to_uint8
from runtime.errors import UserError
from runtime.locks import LOCK
from runtime.options import build
from sampling.config import SamplingConfig, SourceOptions
from sampling.sampler import Sampler
from sampling.source import Source
from sampling.store import Store
from tests.helpers import ended_at, held_elsewhere, killed_writer


def draw(ckpt: Path, out: Path, *words: object) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    folder = generate.main(
        [
            "--ckpt",
            str(ckpt),
            "--out",
            str(out),
            "--num-fid-samples",
            "20",
            *(() if "dopri5" in words else ("--num-steps", "4")),
            *map(str, words),
        ]
    )
    with np.load(folder / "samples.npz") as drawn:
        return drawn["arr_0"], drawn["labels"], json.loads((folder / "samples.json").read_text())


def sampler(ckpt: Path, **settings: Any) -> Sampler:
    return Sampler(
        Checkpoint.open(ckpt).network("raw"), PixelCodec(pixels(1)), SamplingConfig(num_steps=4, **settings), 20
    )


def test_everything_is_recorded_and_the_picture_exists(guided: Path, tmp_path: Path) -> None:
    images, labels, record = draw(guided, tmp_path / "a", "--cfg-scale", 2, "--guidance-high", 0.5)
    assert images.dtype == np.uint8 and images.shape == (20, 8, 8, 1) and labels.shape == (20,)
    assert (
        record["checkpoint"] == Checkpoint.open(guided).digest
        and record["cfg_scale"] == 2
        and record["weights"] == "ema"
    )
    assert record["evaluations"] == 4 + 2  # times 1, 0.68, 0.36, 0.04: the guided ones are at most 0.5
    assert record["decoder"] == "pixels" and record["precision"] == "fp32"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["grid.png", "samples.json", "samples.npz"]


@pytest.mark.parametrize(
    "argv",
    [
        ("--weights", "raw"),
        ("--seed", 1),
        ("--cfg-scale", 3),
        ("--mode", "ode"),
        ("--num-steps", 5),
        ("--mode", "ode", "--solver", "heun"),
        ("--mode", "ode", "--timestep-shift", 0.3),
        ("--mode", "ode", "--grid", "points"),
        ("--last-step", 0.2),
        ("--labels", "balanced"),
        ("--rounding", "truncate"),
        ("--mode", "ode", "--solver", "dopri5"),
        ("--cfg-scale", 3, "--guidance-low", 0.5),
        ("--cfg-scale", 3, "--guidance-high", 0.5),
    ],
)
def test_every_option_acts(guided: Path, tmp_path: Path, argv: tuple[object, ...]) -> None:
    base = argv[:2] if argv[:2] in (("--mode", "ode"), ("--cfg-scale", 3)) and len(argv) > 2 else ()
    plain, changed = draw(guided, tmp_path / "a", *base), draw(guided, tmp_path / "b", *argv)
    assert not np.array_equal(plain[0], changed[0])


def test_first3_guides_three_channels_only(guided: Path) -> None:
    """With one channel there is nothing beyond the third, so `first3` is `all`."""
    every, first = (
        sampler(guided, cfg_scale=3.0, guidance_channels=which).latents(range(4)) for which in ("all", "first3")
    )
    assert torch.equal(every, first)


def test_guidance_at_one_is_conditional_and_at_zero_unconditional(guided: Path) -> None:
    labels, null = np.arange(4), np.full(4, 10)
    conditional = sampler(guided, mode="ode").latents(range(4), labels)
    unconditional = sampler(guided, mode="ode").latents(range(4), null)
    torch.testing.assert_close(sampler(guided, mode="ode", cfg_scale=1.0).latents(range(4), labels), conditional)
    torch.testing.assert_close(sampler(guided, mode="ode", cfg_scale=0.0).latents(range(4), labels), unconditional)
    assert not torch.allclose(conditional, unconditional)


def test_balanced_labels_have_equal_counts_in_shuffled_order(guided: Path) -> None:
    labels = sampler(guided, labels="balanced").labels(range(20))
    assert np.bincount(labels).tolist() == [2] * 10 and labels.tolist() != sorted(labels)
    drawn = np.concatenate(
        [Sampler(sampler(guided).network, PixelCodec(pixels(1)), SamplingConfig(), 20).labels(range(2000))]
    )
    assert np.bincount(drawn, minlength=10).min() > 140  # uniform: 200 each


def test_a_killed_run_keeps_its_samples(guided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(guided, tmp_path / "whole", "--batch-size", 6)
    drawn, calls = Sampler._drawn, []

    def dies(self: Sampler, indices: Any, labels: Any = None) -> Any:
        calls.append(len(indices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return drawn(self, indices, labels)

    monkeypatch.setattr(Sampler, "_drawn", dies)
    with pytest.raises(KeyboardInterrupt):
        draw(guided, tmp_path / "killed", "--batch-size", 6)
    assert not (tmp_path / "killed" / "samples.npz").exists()
    again = draw(guided, tmp_path / "killed", "--batch-size", 6)
    assert calls == [6, 6, 6, 6, 6, 2]  # 6 were there and 6 still on the device, 14 were left
    assert np.array_equal(whole[0], again[0]) and np.array_equal(whole[1], again[1])


@pytest.mark.parametrize(
    ("first", "before", "fault"),
    [(1, (), None), (2, ("--seed", 1), None), (3, (), errno.ENOSPC), (4, ("--seed", 1), errno.EIO)],
)
def test_whatever_a_kill_or_an_error_leaves_the_same_command_finishes(
    guided: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: int,
    before: tuple[object, ...],
    fault: int | None,
) -> None:
    """At every fourth change of the file system, in an empty folder and in one whose samples are to be replaced."""
    opened = Source.open(SourceOptions(ckpt=str(guided)), SamplingConfig(num_steps=2))
    monkeypatch.setattr(Source, "open", lambda *_: opened)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process has written all the same
    words: tuple[object, ...] = ("--num-fid-samples", 3, "--num-steps", 2, *(["--overwrite"] if before else []))
    draw(guided, tmp_path / "whole", *words)
    draw(guided, tmp_path / "earlier", *words, *before)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    ends = []
    for number in itertools.count(first, 4):
        out = tmp_path / "again"
        if before:
            shutil.copytree(tmp_path / "earlier", out)
        ends.append(ended_at(number, lambda out=out: draw(guided, out, *words), fault))
        draw(guided, out, *words)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == whole, number
        shutil.rmtree(out)
        if ends[-1] is None:
            break
    assert set(ends[:-1]) <= ({2, 0} if fault else {-signal.SIGKILL}) and len(ends) > 10


def test_finished_samples_are_not_drawn_again(guided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw(guided, tmp_path / "a")
    monkeypatch.setattr(Sampler, "_drawn", None)  # would fail
    again = draw(guided, tmp_path / "a")
    assert np.array_equal(first[0], again[0])
    with pytest.raises(TypeError):
        draw(guided, tmp_path / "a", "--overwrite")


def test_what_a_score_needs_is_checked_before_sampling(
    guided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "images", None)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((8, 16, 16, 1), np.uint8))
    words = [
        "--ckpt",
        str(guided),
        "--out",
        str(tmp_path / "out"),
        "--features",
        "pixels",
        "--reference",
        str(tmp_path / "large.npz"),
    ]
    with pytest.raises(UserError, match="16"):
        generate.main([*words, "--num-fid-samples", "8"])
    with pytest.raises(UserError, match="at least 4"):
        generate.main([*words, "--num-fid-samples", "3"])


def begun(guided: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples in `out` that were all drawn, but not finished."""
    with monkeypatch.context() as patch:
        patch.setattr(Store, "finish", lambda self, names: [])
        draw_words = ["--ckpt", str(guided), "--out", str(out), "--num-fid-samples", "20", "--num-steps", "4"]
        generate.main(draw_words)


def test_other_settings_replace_nothing_unasked(guided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(guided, tmp_path / "begun", monkeypatch)
    first = draw(guided, tmp_path / "whole")
    for place, what in (("begun", "unfinished samples"), ("whole", "holds samples")):
        with pytest.raises(UserError, match=rf"{what} of other settings \(seed 0, not 1\).*--overwrite"):
            draw(guided, tmp_path / place, "--seed", 1)
        again = draw(guided, tmp_path / place, "--seed", 1, "--overwrite")
        assert again[2]["seed"] == 1 and not np.array_equal(first[0], again[0])
    assert np.array_equal(again[0], draw(guided, tmp_path / "other", "--seed", 1)[0])


def test_only_what_was_written_here_is_removed(guided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(guided, tmp_path, monkeypatch)
    (tmp_path / "partial" / "thesis.tex").write_text("mine")
    left = killed_writer(tmp_path / "samples.npz")
    for more in ((), ("--seed", 1, "--overwrite")):
        with pytest.raises(UserError, match="thesis.tex, which generate.py did not write"):
            draw(guided, tmp_path, *more)
    assert not left.exists()
    (tmp_path / "other" / "samples.npz").parent.mkdir()
    (tmp_path / "other" / "samples.npz").write_text("mine")
    with pytest.raises(UserError, match="only one of samples.npz and samples.json"):
        draw(guided, tmp_path / "other")
    assert (
        (tmp_path / "partial" / "thesis.tex").read_text() == (tmp_path / "other" / "samples.npz").read_text() == "mine"
    )


@pytest.mark.parametrize(
    "how", ["truncated images", "truncated checks", "flipped image", "flipped label", "header", "none"]
)
def test_damaged_unfinished_samples_are_drawn_again(
    guided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, how: str
) -> None:
    whole = draw(guided, tmp_path / "whole")
    begun(guided, tmp_path / "cut", monkeypatch)
    file = (
        tmp_path
        / "cut"
        / "partial"
        / {"truncated checks": "checks.npy", "flipped label": "labels.npy"}.get(how, "images.npy")
    )
    content = bytearray(file.read_bytes())
    # bit 40 of a label, as bit 0 of a pixel
    content[-3 if how == "flipped label" else -70] ^= 1
    content[20:22] = b"((" if how == "header" else content[20:22]
    file.write_bytes(content[:-70] if "truncated" in how else content)
    if how == "none":
        file.unlink()
    again = draw(guided, tmp_path / "cut")
    assert np.array_equal(whole[0], again[0]) and np.array_equal(whole[1], again[1])
    assert "damaged" in capsys.readouterr().out


def test_damaged_finished_samples_are_not_taken_for_whole(guided: Path, tmp_path: Path) -> None:
    draw(guided, tmp_path)
    file = tmp_path / "samples.npz"
    content = bytearray(file.read_bytes())
    content[300] ^= 1
    for damaged in (content, content[:-9]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="samples.npz is damaged.*--overwrite"):
            draw(guided, tmp_path)
    draw(guided, tmp_path, "--overwrite")


def test_a_record_of_samples_cannot_lose_its_seal(guided: Path, tmp_path: Path) -> None:
    draw(guided, tmp_path)
    record = tmp_path / "samples.json"
    for flipped in ('"seal"', '"format"', '"seed"'):
        whole = record.read_text()
        record.write_text(whole.replace(flipped, '"x' + flipped[2:]))
        with pytest.raises(UserError, match="samples.json was damaged or edited"):
            draw(guided, tmp_path)
        record.write_text(whole)


def test_two_at_once_in_one_place_are_refused(guided: Path, tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / LOCK), pytest.raises(UserError, match="another process is writing"):
        draw(guided, tmp_path)


def test_networks_that_are_not_finite_draw_nothing(
    guided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PixelCodec, "decode", lambda self, x: x * torch.tensor(float("nan")))
    with pytest.raises(UserError, match="sample 0 is not finite"):
        sampler(guided).images(range(2))


def test_presets_fix_what_moves_fid(guided: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from models.latents import LatentSpace
    from sampling.presets import PRESETS, decoder, find, settings

    published = {
        "table1-sde": None,
        "table1-ode": None,
        "fid10k": None,
        "self-transcendence-cfg": 1.44,
        "self-transcendence-cfg-512": None,
        "repa-nocfg": 5.90,
        "repa-cfg": 1.42,
        "rare-cfg": None,
        "sit-nocfg-sde": 8.3,
        "sit-cfg-sde": 2.06,
        "sit-cfg-ode": 2.15,
        "layersync-nocfg-ode": 11.24,
        "layersync-nocfg-sde": 8.29,
        "dispersive-nocfg": 32.35,
        "dispersive-cfg": 5.09,
        "lightningdit-64ep-nocfg": 5.14,
        "lightningdit-64ep": 2.11,
        "lightningdit-800ep-nocfg": 2.17,
        "lightningdit-800ep": 1.35,
        "internal-680ep-nocfg": 1.34,
        "internal-680ep": 1.19,
        "internal-800ep": 1.46,
    }
    assert {name: preset.published for name, preset in PRESETS.items()} == published
    assert generate.main(["--list-presets"]) is None
    listed = capsys.readouterr().out
    assert (
        all(name in listed and (fid is None or f"{fid:.2f}" in listed) for name, fid in published.items())
        and "not stated" in listed
    )
    for name in PRESETS:
        build(GenerateConfig, {"ckpt": "x"}, settings({"preset": name}))  # no contradiction within
    repa = settings({"preset": "repa-cfg"})
    assert (
        repa["mode"],
        repa["num_steps"],
        repa["cfg_scale"],
        repa["guidance_high"],
        repa["rounding"],
        repa["labels"],
        repa["weights"],
        repa["mixed_precision"],
        repa["tf32"],
    ) == ("sde", 250, 1.8, 0.7, "truncate", "random", "ema", "no", True)
    assert settings({"preset": "fid10k"})["num_fid_samples"] == 10_000 and "num_fid_samples" not in repa
    sd = LatentSpace(
        name="sd-vae", channels=4, stride=8, shift=(0.0,), scale=(0.18215,), vae="stabilityai/sd-vae-ft-mse"
    )
    assert decoder("repa-cfg", sd) == "stabilityai/sd-vae-ft-ema" and decoder(None, sd) is None
    assert decoder("repa-cfg", pixels(1)) is decoder("lightningdit-64ep", sd) is None
    for fixed in ("--tf32", "--mixed-precision=bf16"):
        with pytest.raises(UserError, match="fixes|needs a CUDA device"):
            generate.main(["--ckpt", str(guided), "--preset", "repa-cfg", fixed])
    with pytest.raises(UserError, match="--cfg-scale"):
        generate.main(["--ckpt", str(guided), "--preset", "repa-cfg", "--cfg-scale", "2"])
    with pytest.raises(UserError, match="repa-cfg"):
        generate.main(["--ckpt", str(guided), "--preset", "repa-cgf"])
    # evaluations per sample: LightningDiT's 249 and their guided share
    dropped = ("num_steps", "mixed_precision", "tf32")
    chosen = settings({"preset": "lightningdit-64ep"})
    lightning = sampler(guided, **{k: v for k, v in chosen.items() if k not in dropped})
    assert len(lightning.grid) == 4
    for name, guided_steps in (("lightningdit-64ep", 181), ("lightningdit-800ep", 168)):
        assert SamplingConfig(**find(name).settings).evaluations == 249 + guided_steps
    # 124 steps of two evaluations each, the last included
    assert SamplingConfig(**find("internal-680ep-nocfg").settings).evaluations == 248


def test_rounding_rules() -> None:
    values = torch.tensor([-1.0, -1.2, 0.0, 1.0, 1.5, 0.003]).view(6, 1, 1, 1)
    assert to_uint8(values).flatten().tolist() == [0, 0, 128, 255, 255, 128]
    assert to_uint8(values, "truncate").flatten().tolist() == [0, 0, 127, 255, 255, 127]


def test_contradictory_options_are_refused() -> None:
    for values in (
        {"mode": "sde", "solver": "heun"},
        {"guidance_low": 0.8, "guidance_high": 0.2},
        {"num_steps": 1},
        {"mode": "ode", "solver": "dopri5", "num_steps": 7},
    ):
        with pytest.raises(UserError):
            build(GenerateConfig, {"ckpt": "x"}, values)
