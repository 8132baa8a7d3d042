"""Bad inputs: every one is answered with exit code 2 and one line that names culprit and remedy, and nothing is written.

The table is `benchmarks.bad_inputs`; `python -m benchmarks.torture --inputs all` runs it as real processes.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset
from benchmarks import bad_inputs, bad_world, flips, torture
from benchmarks.bad_world import World
from evaluations.images import open_images
from models.archives import read_archive
from models.checkpoint import Checkpoint
from runtime import errors, files
from runtime.errors import UserError
from runtime.mapped import map_shard
from training import log

TABLE = bad_inputs.rows()
SHAPES = [
    row for row in TABLE if ".json " in row.name
]  # one field of another shape: every third, the torture has them all
SHORT = [row for row in TABLE if row not in SHAPES[1::3] + SHAPES[2::3]]
FEW = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return bad_world.build(tmp_path_factory.mktemp("world"))


def test_the_table_is_long_and_covers_every_command() -> None:
    assert len(SHORT) >= 400 and {row.command for row in TABLE} == set(bad_world.MAINS)


@pytest.mark.parametrize("command", bad_world.MAINS)
def test_bad_inputs_are_one_line_with_culprit_and_remedy(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    faults = bad_inputs.check([row for row in SHORT if row.command == command], world, tmp_path)
    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())


def test_the_words_of_the_table_work_where_nothing_is_wrong(world: World, tmp_path: Path) -> None:
    """Else a row could be refused for another reason than its own."""
    for command in bad_world.MAINS:
        row = bad_inputs.Row(command, "nothing wrong")
        found, _ = bad_inputs.answer(row, world, tmp_path)
        assert found.code is None, (command, found.lines)


def test_the_check_sees_an_answer_that_is_not_as_it_should_be() -> None:
    answer = bad_inputs.Answer(2, ["error: --seed x is bad; use a number"], [])
    assert answer.fault(("--seed",)) is None
    for wrong in (
        bad_inputs.Answer(1, answer.lines, []),
        bad_inputs.Answer(2, answer.lines * 2, []),
        bad_inputs.Answer(2, answer.lines, ["x"]),
        bad_inputs.Answer(2, ["error: --seed x is bad"], []),
    ):
        assert wrong.fault(("--seed",))
    assert answer.fault(("--speed",))


PROCESSES = [
    ("train.py", "data manifest.json garbled"),
    ("generate.py", "--ckpt /nowhere"),
]  # the others: benchmarks.torture


@pytest.mark.parametrize(("command", "name"), PROCESSES)
def test_real_processes_answer_alike(world: World, tmp_path: Path, command: str, name: str) -> None:
    row = next(row for row in TABLE if (row.command, row.name) == (command, name))
    found, said = torture.answer_of_process(row, world, tmp_path)
    assert found.fault(said) is None


def test_a_name_cannot_send_codes_to_the_terminal(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UserError("\x1b]0;title\x07 is bad")

    with pytest.raises(SystemExit):
        errors.run(main)
    assert capsys.readouterr().err == "error: \\x1b]0;title\\x07 is bad\n"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FEW
@given(
    value=JSON,
    key=st.sampled_from(["space", "shards", "count", "views", "dtype", "class_names", "latent_size", "images"]),
)
def test_any_json_in_a_manifest_is_read_or_refused(world: World, tmp_path: Path, value: object, key: str) -> None:
    folder = tmp_path / "data"
    if not folder.exists():
        bad_world.copied(world, "data", tmp_path)
    sound = files.read_json(world.path("data/manifest.json"))
    plain = json.loads(json.dumps({**sound, key: value}, allow_nan=True).replace("NaN", "0").replace("Infinity", "1"))
    files.write_sealed(folder / "manifest.json", plain)
    try:
        dataset.LatentSet(folder)
    except UserError as error:
        assert "data" in str(error)


@FEW
@given(value=JSON, key=st.sampled_from(["model", "space", "files", "step", "resolved", "train", "format", "kind"]))
def test_any_json_in_a_checkpoint_is_read_or_refused(world: World, tmp_path: Path, value: object, key: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir(exist_ok=True)
    sound = files.read_json(Checkpoint.open(world.path("exps/stage1")).path / "config.json")
    plain = json.loads(json.dumps({**sound, key: value}, allow_nan=True).replace("NaN", "0").replace("Infinity", "1"))
    files.write_sealed(folder / "config.json", plain)
    try:
        Checkpoint.open(folder)
    except UserError as error:
        assert str(folder) in str(error)


@FEW
@given(
    header=st.dictionaries(
        st.sampled_from(["latents", "labels", "__metadata__", "x"]),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["F32", "I64", "U8", "BF16", 3]),
                "shape": JSON | st.lists(st.integers(-2, 9), max_size=3),
                "data_offsets": JSON | st.lists(st.integers(-9, 200), min_size=2, max_size=2),
            },
        )
        | JSON,
        max_size=3,
    )
)
def test_any_safetensors_header_is_mapped_within_the_file_or_refused(tmp_path: Path, header: dict) -> None:
    file = tmp_path / "a.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    try:
        arrays = map_shard(file)
    except UserError as error:
        assert "a.safetensors" in str(error)
    else:
        assert sum(array.nbytes for array in arrays.values()) == 64


@FEW
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.none() | st.integers(0, 10_000))
def test_any_flip_in_an_npz_or_a_weight_file_is_refused_or_changes_nothing(
    world: World, tmp_path: Path, place: int, bit: int, cut: int | None
) -> None:
    sound = world.path("samples/samples.npz")
    content = bytearray(sound.read_bytes())
    content[place % len(content)] ^= 1 << bit
    file = tmp_path / "s.npz"
    file.write_bytes(content[:cut])
    try:
        images = np.concatenate(list(open_images(file).batches(range(8), 8)))
    except UserError as error:
        assert "s.npz" in str(error)
    else:
        assert np.array_equal(images, np.load(sound)["arr_0"])


@FEW
@given(content=st.binary(max_size=200), zipped=st.booleans())
def test_any_bytes_as_a_weight_file_are_refused(tmp_path: Path, content: bytes, zipped: bool) -> None:
    if zipped:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", b"3")
        content = stream.getvalue()
    (tmp_path / "w.pt").write_bytes(content)
    try:
        read_archive(tmp_path / "w.pt")
    except UserError as error:
        assert "w.pt" in str(error)


@FEW
@given(lines=st.lists(st.binary(max_size=20) | JSON.map(lambda value: json.dumps(value).encode()), max_size=5))
def test_any_log_is_read(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 3, "loss": 1}']))
    assert log.read(tmp_path / "log.jsonl")[-1]["step"] == 3


def test_a_short_torture_loses_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process killed, and flips: the short form; the long one is run by hand."""
    monkeypatch.setattr(bad_world, "build", lambda _: world)
    short = [
        "--kills",
        "1",
        "--steps",
        "16",
        "--flips",
        "22",
        "--starts",
        "0",
        "--inputs",
        "0",
        "--out",
        str(tmp_path / "torture.json"),
    ]
    torture.main(short)
    found = files.read_json(tmp_path / "torture.json")
    assert (
        found["kills"]["done"] == found["kills"]["counts"]["runs with the same bits"] == 1
        and not found["kills"]["faults"]
    )
    assert found["flips"]["done"] == sum(found["flips"]["counts"].values()) == 22 and not found["flips"]["faults"]


def test_a_torture_goes_on_where_it_was_cut_off(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same flips as in one go, none twice; other settings are refused."""
    monkeypatch.setattr(bad_world, "build", lambda _: world)
    tried: list[int] = []
    monkeypatch.setattr(
        torture,
        "bit_flips",
        lambda world, place, chances: ((str(chance.randrange(2)), tried.append(number)) for number, chance in chances),
    )

    def flipped(count: int, name: str, *more: object) -> dict:
        rest = ["--kills", 0, "--starts", 0, "--inputs", 0, "--out", tmp_path / name, *more]
        torture.main([str(word) for word in ["--flips", count, *rest]])
        return files.read_json(tmp_path / name)["flips"]

    assert flipped(3, "parts")["done"] == 3 and flipped(9, "parts")["done"] == 9 and flipped(9, "parts")["done"] == 9
    assert tried == list(range(9))
    assert files.read_json(tmp_path / "parts")["flips"]["counts"] == flipped(9, "whole")["counts"]
    with pytest.raises(UserError, match=r"holds results of .*'seed': 0.* use the same, or another file"):
        flipped(9, "parts", "--seed", 1)


def test_a_flip_that_changes_the_meaning_is_a_fault(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flips.Checkpoint, "require_whole", lambda _: None)
    monkeypatch.setattr(flips.Checkpoint, "require_intact", lambda *_: None)
    found = list(flips.flips(world, tmp_path, [(1, random.Random(seed)) for seed in range(12)]))
    assert any(fault and came_to == "accepted with another meaning" for came_to, fault in found)
