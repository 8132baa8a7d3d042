"""Every bad input gets exit code 2 and one line that names culprit and remedy, and nothing is written.

The table is in `bad_options.py` and `bad_files.py`; `python -m tests.torture --inputs all` runs it as real processes.
Random bytes and random JSON follow below.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset
from evaluations.images import open_images
from models.archives import read_archive
from models.checkpoint import Checkpoint
from runtime import errors, files, jsonlines
from runtime.errors import UserError
from runtime.mapped import map_shard
from runtime.options import flags_of, options_of
from tests.torture import bad_files, bad_options, flips, rows
from tests.torture import world as worlds
from tests.torture.rows import Answer, Row
from tests.torture.world import COMMANDS, World

TABLE = bad_files.table()
JSON_FIELDS = [row for row in TABLE if ".json " in row.name]
# every third JSON field of another shape; `python -m tests.torture` has them all
SHORT = [row for row in TABLE if row not in JSON_FIELDS[1::3] + JSON_FIELDS[2::3]]
FEW = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return worlds.build(tmp_path_factory.mktemp("world"))


def test_the_table_has_rows_of_every_command_and_of_every_option() -> None:
    assert {row.command for row in TABLE} == set(COMMANDS)
    for name, command in COMMANDS.items():
        names = " ".join(row.name for row in TABLE if row.command == name)
        for opt in options_of(command.schema) if command.schema else ():
            # a flag without a value has one row, under its name without the last letter
            assert flags_of(opt.field)[0][:-1] in names, (name, opt.field.name)


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_inputs_are_one_line_with_culprit_and_remedy(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    faults = rows.faults([row for row in SHORT if row.command == command], world, tmp_path)
    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())


def test_the_words_of_the_table_work_where_nothing_is_wrong(world: World, tmp_path: Path) -> None:
    """Else a row could be refused for another reason than its own."""
    for command in COMMANDS:
        answer, _ = rows.answer(Row(command, "nothing wrong"), world, tmp_path)
        assert answer.code is None, (command, answer.lines)


def test_a_bound_has_a_row_on_each_side() -> None:
    bounds = {row.name for row in bad_options.rows() if row.command == "train.py" and "must lie in" in row.named}
    assert {"--cfg-prob -1.0", "--cfg-prob 2.0", "--batch-size 0", "--learning-rate 0.0", "--ema-decay 1.0"} <= bounds


def test_an_answer_that_is_not_as_it_should_be_is_a_fault() -> None:
    answer = Answer(2, ["error: --seed x is bad; use a number"], [])
    assert answer.fault(("--seed",)) is None
    for wrong in (
        Answer(1, answer.lines, []),
        Answer(2, answer.lines * 2, []),
        Answer(2, answer.lines, ["x"]),
        Answer(2, ["error: --seed x is bad"], []),
    ):
        assert wrong.fault(("--seed",))
    assert answer.fault(("--speed",))


@pytest.mark.parametrize(
    ("command", "name"), [("train.py", "data manifest.json garbled"), ("generate.py", "--ckpt /nowhere")]
)
def test_real_processes_answer_alike(world: World, tmp_path: Path, command: str, name: str) -> None:
    row = next(row for row in TABLE if (row.command, row.name) == (command, name))
    assert rows.faults([row], world, tmp_path, as_process=True) == {}


def test_a_name_cannot_send_codes_to_the_terminal(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UserError("\x1b]0;title\x07 is bad")

    with pytest.raises(SystemExit):
        errors.run(main)
    assert capsys.readouterr().err == "error: \\x1b]0;title\\x07 is bad\n"


JSON = st.recursive(
    # JSON has neither NaN nor infinity
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
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
        world.copy("data", tmp_path)
    sound = files.read_json(world.path("data/manifest.json"))
    files.write_sealed(folder / "manifest.json", {**sound, key: value})
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
    files.write_sealed(folder / "config.json", {**sound, key: value})
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
def test_any_flip_and_cut_in_an_npz_is_refused_or_changes_nothing(
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


def test_any_flip_in_any_file_is_refused_or_changes_nothing(world: World, tmp_path: Path) -> None:
    outcomes, faults = flips.run(world, tmp_path, 40, first=0)
    assert faults == [] and outcomes.total() == 40 and outcomes[flips.REFUSED] > 30


def test_a_flip_that_changes_the_meaning_is_a_fault(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "require_whole", lambda _: None)
    monkeypatch.setattr(Checkpoint, "require_intact", lambda *_: None)
    outcomes, faults = flips.run(world, tmp_path, 20, first=0)
    assert 0 < len(faults) == outcomes[flips.OTHER] and all(flips.CHECKPOINT in fault for fault in faults)


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
    assert jsonlines.read(tmp_path / "log.jsonl")[-1]["step"] == 3
