"""Bad files as rows, for every command that reads them: damaged files, JSON fields of another shape, wrong contents."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from config import TrainConfig
from models.vae import WEIGHTS
from runtime import files
from runtime.options import kind_of, options_of
from tests.torture import bad_options
from tests.torture.rows import Row
from tests.torture.world import World

Arguments = tuple[list[str], list[str]]
"""Arguments that hand a file to a command, and names that its answer must contain."""

CHECKPOINT = "exps/stage1/checkpoints/0000001"
READERS: dict[
    str, list[tuple[str, str, tuple[str, ...]]]
] = {  # artefact -> command, flag, files that the command reads
    "data": [
        ("train.py", "--data-dir", ("manifest.json", "shard-00000.safetensors")),
        ("verify", "--data-dir", ("manifest.json", "shard-00000.safetensors")),
        ("reference", "--images", ("manifest.json", "shard-00000.safetensors")),
    ],
    CHECKPOINT: [
        ("generate.py", "--ckpt", ("config.json", "ema.safetensors")),
        ("sweep", "--ckpt", ("config.json", "ema.safetensors")),
        ("train_guide.py", "--guiding-ckpt", ("config.json", "network.safetensors")),
        ("train.py", "--init-ckpt", ("config.json", "ema.safetensors")),
    ],
    "vae": [("encode", "--vae", ("config.json", WEIGHTS))],
    "repa": [("import_latents", "--source", ("vae-sd/dataset.json", "vae-sd/img00000001.npy"))],
    "lightning": [("import_latents", "--source", ("latents_rank00_shard000.safetensors", "latents_stats.pt"))],
    "images": [("encode", "--images", ("n00/1.png",))],
    "weights.pt": [("convert", "--source", ("",))],
    "weights.safetensors": [("convert", "--source", ("",))],
    "samples/samples.npz": [("evaluate", "--samples", ("",))],
    "reference.npz": [("evaluate", "--reference", ("",)), ("sweep", "--reference", ("",))],
}


def table() -> list[Row]:
    """All bad inputs, options and files, each once."""
    return list({(row.command, row.name): row for row in [*bad_options.rows(), *rows()]}.values())


def rows() -> Iterator[Row]:
    yield from _damaged_files()
    yield from _json_fields()
    for kind in (_option_files, _samples, _references, _masks, _weights, _latents, _labels, _scores, _pictures):
        yield from kind()


# Damaged files. `test_any_bytes` and `flips` try random bytes; these are the damages that have a name.


def _garbled(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0x55 for byte in content[middle : middle + 8]) + content[middle + 8 :]


NEW_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "cut": lambda content: content[:-3],
    "emptied": lambda _: b"",
    "garbled": _garbled,
    "text": lambda _: b"these are only words\n" * 20,
    "zeros": lambda content: bytes(len(content)),
    "deep": lambda _: b"[" * 100_000,
    "digits": lambda _: b"9" * 100_000,
}
INSTEAD: dict[str, Callable[[Path], None]] = {
    "removed": lambda _: None,
    "folder": Path.mkdir,
    "pipe": os.mkfifo,  # a reader would wait for a writer forever
}
DAMAGES = (*NEW_BYTES, *INSTEAD)
HARMLESS = {
    # files without a checksum of their own: other values are still values
    ("img00000001.npy", "garbled"),
    ("img00000001.npy", "zeros"),
    (WEIGHTS, "garbled"),
    ("weights.safetensors", "garbled"),
    ("latents_rank00_shard000.safetensors", "garbled"),
    # a picture is whole without the end of its file, and a set of pictures without one of them
    ("1.png", "cut"),
    ("1.png", "folder"),
    ("1.png", "removed"),
}


def damage(file: Path, how: str) -> None:
    if how in NEW_BYTES:
        file.write_bytes(NEW_BYTES[how](file.read_bytes()))
    else:
        file.unlink()
        INSTEAD[how](file)


def _damaged_files() -> Iterator[Row]:
    for artefact, readers in READERS.items():
        for command, flag, names in readers:
            for name in names:
                for how in DAMAGES:
                    if (Path(name or artefact).name, how) not in HARMLESS:
                        damaged = partial(_damaged, artefact, name, flag, how)
                        yield Row(command, f"{artefact} {name} {how}", damage=damaged)


def _damaged(artefact: str, name: str, flag: str, how: str, world: World, scratch: Path) -> Arguments:
    place = world.copy(artefact, scratch)
    damage(place / name if name else place, how)
    culprit = artefact if how in INSTEAD or not name else name
    return [flag, str(place)], [Path(culprit).name.split(".")[0]]


# Every field of a manifest and of two configurations with a value of another shape, and without the field.

OTHER_SHAPES = {"null": None, "text": "7", "negative": -1, "list": [[]], "huge": 10**30, "fraction": 0.5}
FIELDS = {
    ("train.py", "--data-dir", "data", "manifest.json"): """
        format space resolution latent_size views parts dtype num_classes class_names count images shards
        space.channels space.shift space.scale space.stride shards/0/file shards/0/count shards/0/sha256
    """,
    ("generate.py", "--ckpt", CHECKPOINT, "config.json"): """
        format kind model space step files
        model.name model.architecture model.depth model.hidden_size model.num_heads model.patch_size
        model.in_channels model.input_size model.num_classes model.qk_norm
        space.name space.channels space.stride space.shift space.scale files/ema.safetensors
    """,
    ("encode", "--vae", "vae", "config.json"): """
        latent_channels block_out_channels scaling_factor down_block_types norm_num_groups _class_name
    """,
}
"""Fields by command, flag, artefact and file. A dot separates their parts; a slash where a part has a dot itself."""
RIGHT_SHAPE = {
    ("resolution", "huge"),
    ("model.qk_norm", "missing"),
    ("model.name", "text"),
    ("space.name", "text"),
    ("class_names", "list"),
    ("space.scale", "negative"),
    ("scaling_factor", "fraction"),
    ("scaling_factor", "huge"),
    ("norm_num_groups", "null"),
    ("images", "fraction"),
}


def _json_fields() -> Iterator[Row]:
    for (command, flag, artefact, name), fields in FIELDS.items():
        for field in fields.split():
            # a VAE's configuration has defaults for missing fields
            for how in (*OTHER_SHAPES, *(() if command == "encode" else ("missing",))):
                if (field, how) not in RIGHT_SHAPE:
                    edited = partial(_edited, artefact, name, flag, field, how)
                    yield Row(command, f"{name} {field} {how}", damage=edited)


def _edited(artefact: str, name: str, flag: str, field: str, how: str, world: World, scratch: Path) -> Arguments:
    place = world.copy(artefact, scratch)
    content = files.read_json(place / name)
    *path, last = field.split("/" if "/" in field else ".")
    inner = content
    for part in path:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    if how == "missing":
        del inner[last]
    else:
        inner[last] = OTHER_SHAPES[how]
    write = files.write_sealed if files.SEAL in content else files.write_json
    write(place / name, content)
    return [flag, str(place)], [place.name]


# Whole files with wrong contents, by kind.


def _written(
    command: str,
    name: str,
    flag: str,
    file: str,
    write: Callable[[Path], object],
    words: tuple[str, ...] = (),
    named: str | None = None,
) -> Row:
    """A row whose file is written by `write`. The answer names `named`, or the file."""

    def make(_: World, scratch: Path) -> Arguments:
        write(scratch / file)
        return [flag, str(scratch / file)], [named or Path(file).stem]

    return Row(command, name, words, damage=make)


def _arrays(command: str, name: str, flag: str, **arrays: np.ndarray) -> Row:
    return _written(command, name, flag, f"{flag[2:]}.npz", lambda file: np.savez_compressed(file, **arrays))


WRONG_TYPE = {int: ("many", 1.5, True), float: ("much", [1.5, 2.5]), str: (7, ["raw", "ema"]), bool: ("yes", 1)}
"""JSON values that are not a value of an option, by its kind."""


def _option_files() -> Iterator[Row]:
    """Files of options in another form, and bad values of the options that have no flag."""
    latent = {"align": ["latent"]}
    contents: list[tuple[Any, str]] = [
        ([], "options.json"),
        ({"train": 3}, "options.json"),
        ({"train": {"lerning_rate": 1e-3}}, "learning_rate"),
        ({"align": {"latent": {"weight": 1}}}, "latent"),
        ({"train": latent, "align": {"latent": {"wieght": 1}}}, "weight"),
        ({"train": latent, "align": {"latent": {"weight": "much"}}}, "weight"),
        # of the right kind, but without use in this run
        ({"train": {"uniform_from_epoch": 3}}, "--time-sampling"),
        ({"train": {"eval_weights": "raw"}}, "eval_weights"),
        ({"train": {"eval_preset": "sit"}}, "eval_preset"),
    ]
    for opt in options_of(TrainConfig):
        if opt.field.metadata["rare"]:
            wrong = ("nonesuch",) if opt.field.metadata["choices"] else WRONG_TYPE[kind_of(opt.hint)[0]]
            for value in (*wrong, *bad_options.out_of_bounds(opt)):
                contents.append(({"train": {opt.field.name: value}}, opt.field.name))
    for content, named in contents:
        text = json.dumps(content)
        write = partial(Path.write_text, data=text)
        yield _written("train.py", f"--config {text}", "--config", "options.json", write, named=named)


def _samples() -> Iterator[Row]:
    images = np.zeros((4, 8, 8, 1), np.uint8)
    contents: dict[str, dict[str, np.ndarray]] = {
        "of one dimension": {"arr_0": np.zeros(5, np.uint8)},
        "of no images": {"arr_0": images[:0]},
        "of five channels": {"arr_0": np.zeros((4, 8, 8, 5), np.uint8)},
        "of other size": {"arr_0": np.zeros((4, 9, 9, 1), np.uint8)},
        "of floats": {"arr_0": images.astype(np.float32)},
        "of text": {"arr_0": np.array(["a", "b"])},
        "with labels: a fraction": {"arr_0": images, "labels": np.full(4, 0.5)},
        "with labels: too few": {"arr_0": images, "labels": np.zeros(3, np.int64)},
        "under another name": {"images": images},
        "with objects": {"arr_0": np.array([{}, []], object)},
    }
    for what, arrays in contents.items():
        yield _arrays("evaluate", f"samples {what}", "--samples", **arrays)
    for what, member in {"of a negative shape": _negative_shape(), "that are not arrays": b"text"}.items():
        write = partial(_archive, content=member)
        yield _written("evaluate", f"samples {what}", "--samples", "arrays.npz", write)


def _negative_shape() -> bytes:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 8, 8, 1), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(256)


def _archive(file: Path, content: bytes) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", content)


def _references() -> Iterator[Row]:
    contents = {
        "mu": np.zeros(3),
        "sigma": np.zeros((3, 3)),
        "pool": np.zeros((16, 3), np.float32),
        "labels": np.zeros(3, np.int64),
        "about": np.array("no JSON"),
        "about []": np.array("[]"),
        "about 3": np.array('{"name": 3}'),
    }
    for key, value in contents.items():
        for command in ("evaluate", "sweep"):
            changed = partial(_reference, key.split()[0], value)
            yield Row(command, f"reference with another {key}", damage=changed)
    yield Row("train.py", "a reference of other features", ("--eval-steps", "1"), damage=_other_features)


def _reference(key: str, value: np.ndarray, world: World, scratch: Path) -> Arguments:
    with np.load(world.path("reference.npz")) as sound:
        np.savez(scratch / "r.npz", **{**sound, key: value})
    return ["--reference", str(scratch / "r.npz")], ["r.npz", key]


def _other_features(world: World, scratch: Path) -> Arguments:
    folder = scratch / "vit"
    timm.models.save_for_hf(timm.create_model("test_vit"), str(folder), safe_serialization=True)
    words = ["--reference", str(world.path("reference.npz")), "--features", f"timm:{folder}"]
    return words, [f"timm:{folder}", "--features pixels"]


def _masks() -> Iterator[Row]:
    sound = np.zeros((1797, 8, 8), np.uint8)
    contents: dict[str, dict[str, np.ndarray]] = {
        "too few": {"masks": sound[:5]},
        "another size": {"masks": sound[:, :7, :7]},
        "no pixels": {"masks": sound[:, :0, :0]},
        "a third value": {"masks": sound + 2},
        "fractions": {"masks": sound.astype(float)},
        "under another name": {"x": sound},
        "too few groups": {"masks": sound, "groups": np.arange(4)},
        "groups of fractions": {"masks": sound, "groups": np.full(1797, 0.5)},
    }
    for what, arrays in contents.items():
        yield _arrays("probe", f"masks: {what}", "--masks", **arrays)
    for how in ("truncated", "emptied", "text", "zeros", "folder", "pipe"):

        def write(file: Path, how: str = how) -> None:
            np.savez(file, masks=sound)
            damage(file, how)

        yield _written("probe", f"masks {how}", "--masks", "masks.npz", write)


def _weights() -> Iterator[Row]:
    contents = {
        "a list": [1, 2],
        "a number": 3,
        "a class": complex(1, 2),
        "nothing": {},
        "text values": {"ema": {"a": "b"}},
    }
    for what, content in contents.items():
        write = partial(torch.save, content)
        yield _written("convert", f"weights: {what}", "--source", "weights.pt", write)
    yield Row("convert", "weights: not finite", damage=_not_finite)
    inception: dict[str, Callable[[Path], object]] = {
        "text": lambda file: file.write_text("no weights"),
        "another network": partial(torch.save, {"a": torch.zeros(2)}),
    }
    for what, write in inception.items():
        words = ("--features", "inception")
        name = f"Inception weights: {what}"
        yield _written("evaluate", name, "--feature-weights", "inception.pt", write, words)


def _not_finite(world: World, scratch: Path) -> Arguments:
    tensors = load_file(world.path("weights.safetensors"))
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.full_like(tensors[name], float("inf"))}, scratch / "inf.safetensors")
    return ["--source", str(scratch / "inf.safetensors")], ["inf.safetensors", name]


def _latents() -> Iterator[Row]:
    """Latents in LightningDiT's layout: other tensors, and headers whose offsets do not fit the file."""
    tensors = {
        "labels that are fractions": torch.tensor([0.5, 1, 0, 1]),
        "labels of two dimensions": torch.zeros(4, 1, dtype=torch.int64),
        "labels below 0": torch.tensor([-1, 0, 1, 0]),
        "labels beyond": torch.tensor([2**62, 0, 1, 0]),
        "latents of two dimensions": torch.zeros(4, 4),
    }
    for what, tensor in tensors.items():
        yield Row("import_latents", f"LightningDiT {what}", damage=partial(_lightning, what.split()[0], tensor))
    offsets = {
        "overlap": [[0, 64], [0, 64]],
        "negative": [[-64, 0], [0, 64]],
        "beyond": [[0, 64], [64, 2**60]],
        "gap": [[0, 64], [128, 192]],
        "reversed": [[64, 0], [64, 128]],
    }
    for what, (latents, labels) in offsets.items():
        header = {
            "latents": {"dtype": "F32", "shape": [1, 4, 2, 2], "data_offsets": latents},
            "labels": {"dtype": "I64", "shape": [8], "data_offsets": labels},
        }
        yield Row("import_latents", f"safetensors offsets {what}", damage=partial(_header, header))


def _lightning(key: str, tensor: torch.Tensor, world: World, scratch: Path) -> Arguments:
    place = world.copy("lightning", scratch)
    file = next(place.glob("*.safetensors"))
    save_file({**load_file(file), key: tensor}, file)
    return ["--source", str(place)], [place.name]


def _header(header: dict[str, Any], world: World, scratch: Path) -> Arguments:
    place = world.copy("lightning", scratch)
    file = next(place.glob("*.safetensors"))
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(192))
    return ["--source", str(place)], [file.name]


def _labels() -> Iterator[Row]:
    labels = {"fraction": 0.5, "text": "a", "beyond": 10**30, "negative": -1, "null": None, "list": [1]}
    for what, label in labels.items():
        yield Row("encode", f"dataset.json label {what}", damage=partial(_label, label))


def _label(label: Any, world: World, scratch: Path) -> Arguments:
    place = world.copy("images", scratch)
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*.png"))
    labels = [[names[0], label], *([name, number % 2] for number, name in enumerate(names[1:]))]
    (place / "dataset.json").write_text(json.dumps({"labels": labels}))
    return ["--images", str(place)], ["dataset.json"]


def _scores() -> Iterator[Row]:
    contents: dict[str, tuple[Any, ...]] = {
        "metrics": (3, {"fd": "x"}, {"fd": 10**400}),
        "num_samples": (None, "4"),
        "reference": (3, {}),
        "samples": (3, {}, {"sha256": None, "settings": 3}),
        "runs": ([], 3, [3]),
    }
    for key, values in contents.items():
        for value in values:
            name = f"metrics.json {key} {str(value)[:20]}"
            yield Row("hub", name, damage=partial(_score, key, value, "--metrics", ""))
            if key in ("metrics", "samples", "reference"):
                yield Row("steps", name, damage=partial(_score, key, value, "--scores", "x="))


def _score(key: str, value: Any, flag: str, before: str, world: World, scratch: Path) -> Arguments:
    scores = {**files.read_json(world.path("scores/metrics.json")), key: value}
    files.write_sealed(scratch / "metrics.json", scores)
    return [flag, f"{before}{scratch / 'metrics.json'}"], ["metrics.json", key]


def _pictures() -> Iterator[Row]:
    """Pictures that are odd by their size or by their name; codes in a name must not reach the terminal."""
    yield Row("encode", "a link that loops", PIXELS, ("again",), _loop)
    yield Row(
        "encode", "a picture of 60,000 x 2", (*PIXELS, "--resolution", "256"), ("n00/0.png", "60000 x 2"), _narrow
    )
    yield Row("encode", "escape codes in a name", PIXELS, ("\\x1b[31mred.png",), _escape)


PIXELS = ("--vae", "pixels")


def _loop(world: World, scratch: Path) -> Arguments:
    place = world.copy("images", scratch)
    (place / "n00" / "again").symlink_to(place, target_is_directory=True)
    return ["--images", str(place)], []


def _narrow(world: World, scratch: Path) -> Arguments:
    place = world.copy("images", scratch)
    Image.new("RGB", (60_000, 2)).save(place / "n00" / "0.png")
    return ["--images", str(place)], []


def _escape(world: World, scratch: Path) -> Arguments:
    place = world.copy("images", scratch)
    (place / "n00" / "\x1b[31mred.png").write_bytes(b"")
    return ["--images", str(place)], []
