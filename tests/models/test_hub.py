"""Shared checkpoints: to the hub and back over its client's calls, to a folder, and to REPA's and SiT's layouts."""

from __future__ import annotations

import json
import re
import shutil
import signal
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import generate
from evaluations import evaluate
from models import convert, export, hub
from models.checkpoint import Checkpoint
from runtime import files
from runtime.errors import UserError
from tests.helpers import ended_at, parity


class Hub:
    """A stand-in for the hub: the calls of `huggingface_hub` that are made, over folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.private = root, None

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)
        self.private = private

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://hub.example/{repo_id}/tree/main"

    def snapshot_download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if revision is not None or not (self.root / name).is_dir():
            raise FileNotFoundError(f"no such repository: {name} {revision}")
        for file in (self.root / name).iterdir():
            assert file.name in ("README.md", "samples.png") or any(map(file.match, allow_patterns))
        return str(self.root / name)


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr("models.hub_client._silence", lambda address: None)
    for call in ("create_repo", "upload_folder", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{call}", getattr(stand_in, call))
    return stand_in


def test_a_checkpoint_goes_to_the_hub_with_its_card_and_comes_back(
    guided: Path, data: Path, tmp_path: Path, repositories: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = generate.main(
        ["--ckpt", str(guided), "--num-fid-samples", "20", "--num-steps", "2", "--out", str(tmp_path / "drawn")]
    )
    evaluate.main(
        [
            "--samples",
            str(drawn),
            "--reference",
            str(data),
            "--features",
            "pixels",
            "--out",
            str(tmp_path / "metrics.json"),
        ]
    )
    address = hub.main(
        [
            *(str(guided), "--to", "hub:lab/digits", "--private"),
            *("--metrics", str(tmp_path / "metrics.json"), "--samples", str(drawn)),
        ]
    )
    assert (tmp_path / "hub/lab/digits/samples.png").read_bytes() == (drawn / "grid.png").read_bytes()
    assert address == "https://hub.example/lab/digits/tree/main" and repositories.private
    known, fetched = Checkpoint.open(guided), Checkpoint.open("hub:lab/digits")
    assert (
        sorted(fetched.files) == ["ema.safetensors", "network.safetensors"]
        and fetched.config["packed_from"] == known.digest
    )
    for weights in ("ema", "raw"):
        assert all(torch.equal(value, fetched.tensors(weights)[name]) for name, value in known.tensors(weights).items())
    card = (tmp_path / "hub" / "lab" / "digits" / "README.md").read_text()
    result = json.loads((tmp_path / "metrics.json").read_text())
    for text in (
        "# `SiT-Tiny/2`, step 4",
        "`guided`",
        "guide_scale 30",
        "`1797` items of 10 classes",
        "![Samples, a row a class](samples.png)",
        "their labels: `0`, `1`, `2`,",
        "- class-conditional-image-generation",
        known.config["data"]["digest"],
        known.digest,
        f"| `fd` | {result['metrics']['fd']:.4f} |",
        "20 samples against",
        "mode sde",
        "num_steps 2",
        known.files["ema.safetensors"],
    ):
        assert text in card, text
    assert "pipeline_tag" not in card and not [name for name in ("heads", "optimizer") if name in card]
    again = generate.main(
        ["--ckpt", "hub:lab/digits", "--num-fid-samples", "20", "--num-steps", "2", "--out", str(tmp_path / "again")]
    )
    assert np.array_equal(np.load(drawn / "samples.npz")["arr_0"], np.load(again / "samples.npz")["arr_0"])
    monkeypatch.chdir(tmp_path)
    place = generate.main(["--ckpt", "hub:lab/digits", "--num-fid-samples", "2", "--num-steps", "2"])
    assert place.parent == Path("exps/lab--digits/samples")  # not in the hub's cache


def test_a_slim_copy_holds_the_averages_in_bfloat16(guided: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(guided)
    slim = Checkpoint.open(hub.main([str(guided), "--to", str(tmp_path / "slim"), "--slim"]))
    slim.require_whole()
    assert (
        slim.weights == [name for name in source.weights if name != "raw"] and "network.safetensors" not in slim.files
    )
    for name, value in source.tensors("ema").items():
        assert slim.tensors("ema")[name].dtype == torch.bfloat16
        torch.testing.assert_close(slim.tensors("ema")[name].float(), value, rtol=2**-8, atol=0)
    card = (tmp_path / "slim" / "README.md").read_text()
    assert slim.files["ema.safetensors"] in card and "`raw`" not in card
    grid = generate.main(
        ["--ckpt", str(slim.path), "--num-fid-samples", "2", "--num-steps", "2", "--out", str(tmp_path)]
    )
    assert np.load(grid / "samples.npz")["arr_0"].std() > 0
    with pytest.raises(UserError, match=r"network.safetensors; its weights are ema"):
        slim.tensors("raw")


HOSTILE = "x\n# Heading\n[link](http://a.example) <img src=y> `code` | cell \u202e"


def test_a_card_shows_what_a_stranger_wrote_as_code(guided: Path, tmp_path: Path) -> None:
    """Outside code spans, headings, links, pictures, HTML and cells of the table are the card's own."""
    copy = Path(shutil.copytree(Checkpoint.open(guided).path, tmp_path / "copy"))
    config = files.read_json(copy / "config.json")
    config["model"]["name"] = config["precision"] = config["train"]["recipe"] = HOSTILE
    config["data"] |= {"class_names": [HOSTILE] * 30, "count": HOSTILE}
    config["resolved"][HOSTILE] = {HOSTILE: HOSTILE}
    files.write_sealed(copy / "config.json", config)
    text = hub.card(
        Checkpoint.open(copy),
        hub.packed_files(Checkpoint.open(copy)),
        {
            "metrics": {HOSTILE: 1.0},
            "num_samples": 4,
            "reference": {"name": HOSTILE, "sha256": HOSTILE},
            "samples": {"sha256": None, "settings": {"decoder": HOSTILE}},
        },
    )
    spans = re.findall(r"`[^`\n]*`", text)
    assert sum("Heading" in span for span in spans) >= 28 and "and 10 more" in text
    outside = re.sub(r"`[^`\n]*`", "", text)
    assert not re.search(r"Heading|link|img|\u202e|[<\[]", outside)
    assert [line.count("|") for line in text.splitlines() if "|" in line] == [3, 3, 3]


def test_a_picture_is_of_this_checkpoint_and_as_it_was_drawn(guided: Path, teacher: Path, tmp_path: Path) -> None:
    few = ["--num-fid-samples", "2", "--num-steps", "2"]
    drawn = generate.main(["--ckpt", str(guided), *few, "--out", str(tmp_path / "drawn")])
    words = ["--samples", str(drawn), "--to", str(tmp_path / "packed")]
    with pytest.raises(UserError, match="drawn does not hold samples of"):
        hub.main([str(teacher), *words])
    hub.main([str(guided), *words])
    hub.main([str(guided), "--to", str(tmp_path / "packed")])  # its own copy, picture included
    assert not (tmp_path / "packed" / "samples.png").exists()
    shutil.copy(tmp_path / "drawn" / "samples.npz", tmp_path / "drawn" / "grid.png")
    with pytest.raises(UserError, match="grid.png is not the picture that generate.py drew"):
        hub.main([str(guided), *words])


def test_what_the_hub_or_the_metrics_refuse_is_one_line(
    guided: Path, teacher: Path, tmp_path: Path, repositories: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="cannot fetch hub:lab/none@v2: no such repository: lab/none v2"):
        Checkpoint.open("hub:lab/none@v2")
    settings = {"checkpoint": Checkpoint.open(teacher).digest}
    result = {"metrics": {}, "num_samples": 4, "reference": {"name": "r", "sha256": "0"}}
    own = {"sha256": "a", "settings": {"checkpoint": Checkpoint.open(guided).digest, "samples": "a"}}
    other = {"sha256": "a", "settings": settings}
    for scored, message in (
        ({"samples": other}, "does not say that its samples are of"),
        ({}, "does not say that its samples are of"),
        ({"runs": [{"samples": own}, {"samples": other}]}, "does not say that its samples are of"),
        ({"samples": {**own, "sha256": "b"}}, "has the settings of other samples than it scored"),
    ):
        files.write_sealed(tmp_path / "other.json", {**result, **scored})
        with pytest.raises(UserError, match=message):
            hub.main([str(guided), "--to", "hub:lab/digits", "--metrics", str(tmp_path / "other.json")])
    files.write_json(tmp_path / "other.json", {**result, "samples": own})
    with pytest.raises(UserError, match="other.json was damaged or edited"):
        hub.main([str(guided), "--to", "hub:lab/digits", "--metrics", str(tmp_path / "other.json")])
    with pytest.raises(UserError, match="--private is for the hub"):
        hub.main([str(guided), "--to", str(tmp_path / "folder"), "--private"])


def test_offline_one_line_says_so(guided: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, sent to a port where nothing listens."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (
        lambda: Checkpoint.open("hub:lab/nothing-of-the-kind"),
        lambda: hub.main([str(guided), "--to", "hub:lab/digits"]),
    ):
        with pytest.raises(UserError, match="cannot (fetch|push to) hub:lab/.*is there a network") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert huggingface_hub.__version__


def test_a_folder_takes_a_checkpoint_as_well(guided: Path, tmp_path: Path) -> None:
    folder = hub.main([str(guided), "--to", str(tmp_path / "shared" / "digits")])
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "ema.safetensors",
        "network.safetensors",
    }
    assert Checkpoint.open(folder).network("ema") is not None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="not what this command wrote there"):
        hub.main([str(guided), "--to", str(tmp_path / "mine")])
    hub.main([str(guided), "--to", str(folder)])  # its own copy it may write again
    own = Checkpoint.open(shutil.copytree(guided, tmp_path / "run")).path
    with pytest.raises(
        UserError, match="not what this command wrote there"
    ):  # a run's checkpoint has an optimiser to lose
        hub.main([str(guided), "--to", str(own)])
    Checkpoint.open(own).require_whole()


@pytest.mark.parametrize("command", ["hub", "export"])
def test_a_killed_copy_leaves_nothing_after_the_next_start(guided: Path, tmp_path: Path, command: str) -> None:
    """Early, in the middle and after the last rename, when an export is refused because its file is whole."""
    out = tmp_path / "out"

    def copy() -> None:
        if command == "hub":
            hub.main([str(guided), "--to", str(out / "copy")])
        else:
            export.main([str(guided), "--layout", "repa", "--out", str(out / "copy.pt")])

    numbers = (3, 9, 16) if command == "hub" else (3, 5, 6)
    for number in numbers:
        out.mkdir()
        assert ended_at(number, copy) == -signal.SIGKILL and [*out.rglob("*.tmp")]
        with suppress(UserError) if (out / "copy.pt").exists() else nullcontext():
            copy()
        assert len([*out.iterdir()]) == 1 and not [*out.rglob("*.tmp")]
        shutil.rmtree(out)


@pytest.mark.parametrize("kind, name", [("repa", "repa_sit"), ("sit", "sit_original")])
def test_export_is_the_inverse_of_conversion(kind: str, name: str, tmp_path: Path) -> None:
    """The weights that the peers' own code made, brought here and back; and a run's checkpoint there and back."""
    weights, _ = parity(name)
    torch.save(weights, tmp_path / "published.pt")
    converted = convert.main([str(tmp_path / "published.pt"), "--out", str(tmp_path / "here"), "--num-heads", "4"])
    file = export.main([str(converted), "--layout", kind, "--out", str(tmp_path / "back.pt")])
    back = torch.load(file, weights_only=True)["ema"]
    expected = {key: value for key, value in weights.items() if not key.startswith("projectors")}
    assert back.keys() == expected.keys()
    unused = 0
    for key, value in expected.items():
        if kind == "sit" and key.startswith("final_layer.linear"):  # rows of channels that nothing reads are zeros now
            used = torch.arange(len(value)) % (len(value) // 4) < len(value) // 8
            value, unused = value * used.view(-1, *[1] * (value.ndim - 1)), unused + 1
        torch.testing.assert_close(back[key], value, atol=2e-6, rtol=1e-5, msg=key)
    assert unused == (2 if kind == "sit" else 0)


def test_a_run_survives_the_way_there_and_back(guided: Path, tmp_path: Path) -> None:
    known = Checkpoint.open(guided)
    for kind in ("repa", "sit"):
        file = export.main([str(guided), "--layout", kind, "--out", str(tmp_path / f"{kind}.pt")])
        with pytest.raises(UserError, match="exists"):
            export.main([str(guided), "--layout", kind, "--out", str(file)])
        again = Checkpoint.open(convert.main([str(file), "--out", str(tmp_path / kind), "--vae", "pixels"]))
        assert again.spec == known.spec and again.step == 4
        for weights in ("ema", "raw"):
            for name, value in known.tensors(weights).items():
                torch.testing.assert_close(again.tensors(weights)[name], value, atol=1e-6, rtol=1e-5)
