"""Files that are damaged, of another kind or of another shape, for every command that reads them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.bad_world import World, copied
from models.vae import WEIGHTS
from runtime import files

Found = tuple[list[str], list[str]]
WRONG = {"null": None, "text": "7", "negative": -1, "list": [[]], "huge": 10**30, "fraction": 0.5}
CHECKPOINT = "exps/stage1/checkpoints/0000001"
READERS = {  # artefact -> command, flag, the files in it that the command reads
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
    "images": [("encode", "--images", ("n0/1.png",))],
    "weights.pt": [("convert", "--source", ("",))],
    "weights.safetensors": [("convert", "--source", ("",))],
    "samples/samples.npz": [("evaluate", "--samples", ("",))],
    "reference.npz": [("evaluate", "--reference", ("",)), ("sweep", "--reference", ("",))],
}


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def garbled(file: Path) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 0x55 for byte in content[middle : middle + 8])
    file.write_bytes(content)


def text(file: Path) -> None:
    file.write_text("this is no such file\n" * 20)


def text_of(file: Path) -> None:
    file.write_text("no weights")


def zeros(file: Path) -> None:
    file.write_bytes(bytes(len(file.read_bytes())))


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)  # whoever reads it waits for a writer for ever


def removed(file: Path) -> None:
    file.unlink()


DAMAGES = (truncated, cut, emptied, garbled, text, zeros, folder, removed, pipe)
HARMLESS = {  # values of a file that has no checksum of its own, the end of a PNG, a folder that is called like a picture
    ("img00000001.npy", "garbled"),
    ("img00000001.npy", "zeros"),
    (WEIGHTS, "garbled"),
    ("weights.safetensors", "garbled"),
    ("latents_rank00_shard000.safetensors", "garbled"),
    ("1.png", "cut"),
    ("1.png", "folder"),
    ("1.png", "removed"),
}


def rows(row: Callable[..., Any]) -> Iterator[Any]:
    """The rows of damaged files."""
    for artefact, readers in READERS.items():
        for command, flag, names in readers:
            for name in names:
                for damage in DAMAGES:
                    if (Path(name or artefact).name, damage.__name__) in HARMLESS:
                        continue
                    yield row(
                        command,
                        f"{artefact} {name} {damage.__name__}",
                        damage=partial(_damaged, artefact, name, flag, damage),
                    )
    yield from _of_json(row)
    yield from _of_kind(row)


def _damaged(artefact: str, name: str, flag: str, damage: Callable[[Path], None], world: World, scratch: Path) -> Found:
    place = copied(world, artefact, scratch)
    file = place / name if name else place
    damage(file)
    culprit = Path(artefact).name if damage in (removed, folder, pipe) or not name else Path(name).name
    return [flag, str(place)], [culprit.split(".")[0]]


def _of_json(row: Callable[..., Any]) -> Iterator[Any]:
    """Every field of a manifest and of a checkpoint's config.json with a value of another shape, and without the field."""
    fields = {
        ("train.py", "--data-dir", "data", "manifest.json"): (
            "space",
            "resolution",
            "latent_size",
            "views",
            "parts",
            "dtype",
            "num_classes",
            "class_names",
            "count",
            "images",
            "shards",
            "format",
            "space.channels",
            "space.shift",
            "space.scale",
            "space.stride",
            "shards.0.file",
            "shards.0.count",
            "shards.0.sha256",
        ),
        ("generate.py", "--ckpt", CHECKPOINT, "config.json"): (
            "format",
            "kind",
            "model",
            "space",
            "step",
            "files",
            "model.name",
            "model.architecture",
            "model.depth",
            "model.hidden_size",
            "model.num_heads",
            "model.patch_size",
            "model.in_channels",
            "model.input_size",
            "model.num_classes",
            "model.qk_norm",
            "space.name",
            "space.channels",
            "space.stride",
            "space.shift",
            "space.scale",
            "files.ema\\.safetensors",
        ),
        ("encode", "--vae", "vae", "config.json"): (
            "latent_channels",
            "block_out_channels",
            "scaling_factor",
            "down_block_types",
            "norm_num_groups",
            "_class_name",
        ),
    }
    for (command, flag, artefact, name), keys in fields.items():
        for key in keys:
            for how in (*WRONG, "missing"):
                if (key, how) in _FITTING or (command == "encode" and how == "missing"):
                    continue
                yield row(command, f"{name} {key} {how}", damage=partial(_edited, artefact, name, flag, key, how))


_FITTING = {  # values that happen to be of the right shape
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


def _edited(artefact: str, name: str, flag: str, key: str, how: str, world: World, scratch: Path) -> Found:
    place = copied(world, artefact, scratch)
    value = files.read_json(place / name)
    *path, last = [part.replace("\0", ".") for part in key.replace("\\.", "\0").split(".")]
    inner = value
    for part in path:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    if how == "missing":
        del inner[last]
    else:
        inner[last] = WRONG[how]
    (files.write_sealed if files.SEAL in value else files.write_json)(place / name, value)
    return [flag, str(place)], [place.name]


def _of_kind(row: Callable[..., Any]) -> Iterator[Any]:
    """Files that are whole, and hold something else than they should."""

    def made(name: str, flag: str, write: Callable[[Path], None], world: World, scratch: Path) -> Found:
        write(scratch / name)
        return [flag, str(scratch / name)], [Path(name).stem]

    shapes = {
        "one dimension": (5,),
        "no images": (0, 8, 8, 1),
        "five channels": (4, 8, 8, 5),
        "other size": (4, 9, 9, 1),
    }
    arrays = {
        **{what: np.zeros(shape, np.uint8) for what, shape in shapes.items()},
        "floats": np.zeros((4, 8, 8, 1), np.float32),
        "text": np.array(["a", "b"]),
    }
    for what, array in arrays.items():
        yield row(
            "evaluate",
            f"samples of {what}",
            damage=partial(made, "s.npz", "--samples", lambda file, a=array: np.savez(file, arr_0=a)),
        )
    yield row("evaluate", "samples of a negative shape", damage=partial(made, "s.npz", "--samples", _negative))
    for what, labels in {"a fraction": np.full(4, 0.5), "too few": np.zeros(3, np.int64)}.items():
        yield row(
            "evaluate",
            f"samples with labels: {what}",
            damage=partial(
                made,
                "s.npz",
                "--samples",
                lambda file, a=labels: np.savez(file, arr_0=np.zeros((4, 8, 8, 1), np.uint8), labels=a),
            ),
        )
    for key, value in {
        "mu": np.zeros(3),
        "sigma": np.zeros((3, 3)),
        "pool": np.zeros((16, 3), np.float32),
        "labels": np.zeros(3, np.int64),
        "about": np.array("no JSON"),
        "about []": np.array("[]"),
        "about 3": np.array('{"name": 3}'),
    }.items():
        for command in ("evaluate", "sweep"):
            yield row(command, f"reference with another {key}", damage=partial(_reference, key.split()[0], value))
    plain = np.zeros((1797, 8, 8), np.uint8)
    for what, arrays in {
        "too few": {"masks": plain[:5]},
        "another size": {"masks": plain[:, :7, :7]},
        "no pixels": {"masks": plain[:, :0, :0]},
        "a third value": {"masks": plain + 2},
        "fractions": {"masks": plain.astype(float)},
        "none": {"x": plain},
        "too few groups": {"masks": plain, "groups": np.arange(4)},
        "groups of fractions": {"masks": plain, "groups": np.full(1797, 0.5)},
    }.items():
        yield row(
            "probe",
            f"masks: {what}",
            damage=partial(made, "m.npz", "--masks", lambda file, a=arrays: np.savez_compressed(file, **a)),
        )
    for damage in (truncated, emptied, text, zeros, folder, pipe):
        yield row(
            "probe",
            f"masks {damage.__name__}",
            damage=partial(made, "m.npz", "--masks", lambda file, d=damage: _damaged_masks(d, file)),
        )
    yield row(
        "evaluate",
        "samples under another name",
        damage=partial(
            made, "s.npz", "--samples", lambda file: np.savez(file, images=np.zeros((4, 8, 8, 1), np.uint8))
        ),
    )
    yield row(
        "evaluate",
        "samples with objects",
        damage=partial(made, "s.npz", "--samples", lambda file: np.savez(file, arr_0=np.array([{}, []], object))),
    )
    yield row("evaluate", "a ZIP that is no npz", damage=partial(made, "s.npz", "--samples", _zip_of_text))
    weights = {
        "a list": [1, 2],
        "a number": 3,
        "a class": complex(1, 2),
        "nothing": {},
        "text values": {"ema": {"a": "b"}},
    }
    for what, value in weights.items():
        yield row(
            "convert",
            f"weights: {what}",
            damage=partial(made, "w.pt", "--source", lambda file, v=value: torch.save(v, file)),
        )
    yield row("convert", "weights: not finite", damage=_not_finite)
    for what, write in {
        "text": text_of,
        "another network": lambda file: torch.save({"a": torch.zeros(2)}, file),
    }.items():
        yield row(
            "evaluate",
            f"Inception weights: {what}",
            ("--features", "inception"),
            damage=partial(made, "inception.pt", "--inception-weights", write),
        )
    for key, tensor in {
        "labels": torch.tensor([0.5, 1, 0, 1]),
        "labels of two dimensions": torch.zeros(4, 1, dtype=torch.int64),
        "labels below 0": torch.tensor([-1, 0, 1, 0]),
        "labels beyond": torch.tensor([2**62, 0, 1, 0]),
    }.items():
        yield row("import_latents", f"LightningDiT {key}", damage=partial(_lightning, "labels", tensor))
    yield row(
        "import_latents",
        "LightningDiT latents of two dimensions",
        damage=partial(_lightning, "latents", torch.zeros(4, 4)),
    )
    for what, labels in {
        "fraction": 0.5,
        "text": "a",
        "beyond": 10**30,
        "negative": -1,
        "null": None,
        "list": [1],
    }.items():
        yield row("encode", f"dataset.json label {what}", damage=partial(_label, labels))
    for what, header in {
        "overlap": [[0, 64], [0, 64]],
        "negative": [[-64, 0], [0, 64]],
        "beyond": [[0, 64], [64, 2**60]],
        "gap": [[0, 64], [128, 192]],
        "reversed": [[64, 0], [64, 128]],
    }.items():
        yield row("import_latents", f"safetensors offsets {what}", damage=partial(_offsets, header))
    scores = {
        "metrics": (3, {"fd": "x"}, {"fd": 10**400}),
        "num_samples": (None, "4"),
        "reference": (3, {}),
        "samples": (3, {}, {"settings": 3}),
        "runs": ([], 3, [3]),
    }
    for key, values in scores.items():
        for value in values:
            yield row(
                "hub", f"metrics.json {key} {str(value)[:20]}", damage=partial(_scores, key, value, "--metrics", "")
            )
            if key in ("metrics", "samples", "reference"):
                yield row(
                    "steps",
                    f"metrics.json {key} {str(value)[:20]}",
                    damage=partial(_scores, key, value, "--scores", "x="),
                )
    yield row(
        "train.py",
        "a reference of other features",
        ("--eval-steps", "1", "--features", "scenes"),
        damage=_other_features,
    )
    yield row("encode", "a link that loops", ("--vae", "pixels"), damage=_loop)
    yield row("encode", "a picture of 60,000 x 2", ("--vae", "pixels", "--resolution", "256"), damage=_narrow)
    yield row("encode", "escape codes in a name", ("--vae", "pixels"), damage=_escape)


def _negative(file: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 8, 8, 1), }".ljust(117) + b"\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(256))


def _reference(key: str, value: np.ndarray, world: World, scratch: Path) -> Found:
    with np.load(world.path("reference.npz")) as sound:
        np.savez(scratch / "r.npz", **{**sound, key: value})
    return ["--reference", str(scratch / "r.npz")], ["r.npz", key]


def _scores(key: str, value: Any, flag: str, before: str, world: World, scratch: Path) -> Found:
    (scratch / "metrics.json").write_text(
        json.dumps({**files.read_json(world.path("scores/metrics.json")), key: value})
    )
    return [flag, f"{before}{scratch / 'metrics.json'}"], ["metrics.json", key]


def _damaged_masks(damage: Callable[[Path], None], file: Path) -> None:
    np.savez(file, masks=np.zeros((1797, 8, 8), np.uint8))
    damage(file)


def _other_features(world: World, scratch: Path) -> Found:
    return ["--reference", str(world.path("reference.npz"))], ["scenes", "--features pixels"]


def _zip_of_text(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", "text")


def _not_finite(world: World, scratch: Path) -> Found:
    tensors = load_file(world.path("weights.safetensors"))
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.full_like(tensors[name], float("inf"))}, scratch / "inf.safetensors")
    return ["--source", str(scratch / "inf.safetensors")], ["inf.safetensors", name]


def _lightning(key: str, tensor: torch.Tensor, world: World, scratch: Path) -> Found:
    place = copied(world, "lightning", scratch)
    file = next(place.glob("*.safetensors"))
    save_file({**load_file(file), key: tensor}, file)
    return ["--source", str(place)], [place.name]


def _label(label: Any, world: World, scratch: Path) -> Found:
    place = copied(world, "images", scratch)
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*.png"))
    (place / "dataset.json").write_text(
        json.dumps({"labels": [[name, label if not number else number % 2] for number, name in enumerate(names)]})
    )
    return ["--images", str(place)], ["dataset.json"]


def _offsets(offsets: list[list[int]], world: World, scratch: Path) -> Found:
    place = copied(world, "lightning", scratch)
    file = next(place.glob("*.safetensors"))
    header = json.dumps(
        {
            "latents": {"dtype": "F32", "shape": [1, 4, 2, 2], "data_offsets": offsets[0]},
            "labels": {"dtype": "I64", "shape": [8], "data_offsets": offsets[1]},
        }
    ).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(192))
    return ["--source", str(place)], [file.name]


def _loop(world: World, scratch: Path) -> Found:
    place = copied(world, "images", scratch)
    (place / "n0" / "again").symlink_to(place, target_is_directory=True)
    return ["--images", str(place)], ["again"]


def _narrow(world: World, scratch: Path) -> Found:
    from PIL import Image

    place = copied(world, "images", scratch)
    Image.new("RGB", (60_000, 2)).save(place / "n0" / "0.png")
    return ["--images", str(place)], ["n0/0.png", "60000 x 2"]


def _escape(world: World, scratch: Path) -> Found:
    place = copied(world, "images", scratch)
    (place / "n0" / "\x1b[31mred.png").write_bytes(b"")
    return ["--images", str(place)], ["\\x1b[31mred.png"]
