"""Share a checkpoint: put it on the Hugging Face hub or into a folder, with a model card.

    python -m models.hub exps/stage2@400000 --to hub:user/name --samples samples/stage2 --metrics metrics.json
    python -m models.hub exps/stage2 --to /shared/stage2             # the same files in a folder
    python generate.py --ckpt hub:user/name                          # or hub:user/name@REVISION

The copy holds the network, its averages, those of a head that predicts the velocity (sampling may guide with it),
`config.json`, and the card. It leaves out other heads and the optimiser. Every command that reads a checkpoint accepts
`hub:user/name`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import NotRequired, TypedDict

import models
from models.checkpoint import Checkpoint, read_config
from models.hub_client import PREFIX, answered
from runtime import errors, files, schema
from runtime.errors import require
from runtime.options import option, read
from runtime.schema import Field, Number
from runtime.text import code

PICTURE = "samples.png"
SHOWN = 20  # class names on a card


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `python -m models.hub CKPT`."""

    ckpt: str = option(help="checkpoint: a folder, a run (its latest) or RUN@STEP (may be given as first word)")
    to: str = option(help="hub:user/name, or a folder")
    metrics: str | None = option(None, help="metrics.json of this checkpoint's samples, for the model card")
    samples: str | None = option(None, help="folder of this checkpoint's samples, for the picture on the model card")
    slim: bool = option(False, help="the averages alone, in bfloat16: half the size or less, for sampling and teaching")
    private: bool = option(False, help="make the hub's repository private")


class _Samples(TypedDict):
    sha256: str | None
    settings: dict[str, Any] | None


class _Run(TypedDict):
    samples: _Samples


class _Reference(TypedDict):
    name: str
    sha256: str


class Metrics(TypedDict):
    """The part of a metrics.json that the card shows."""

    metrics: dict[str, Number]
    num_samples: int
    reference: _Reference
    samples: NotRequired[_Samples]
    runs: NotRequired[Annotated[list[_Run], Field(min_length=1)]]


def main(argv: Sequence[str] | None = None) -> Path | str:
    """Run the command; returns the new place of the checkpoint."""
    options = read(Options, argv, prog="python -m models.hub", description=__doc__, first="ckpt")
    source = Checkpoint.open(options.ckpt)
    result = None
    # metrics of another checkpoint are refused before anything is written
    if options.metrics is not None:
        remedy = "give the metrics.json of this checkpoint's samples"
        result = schema.read(Metrics, options.metrics, remedy, sealed=True)
        require_own(source, result, options.metrics)
    picture = None if options.samples is None else own_picture(source, Path(options.samples))
    if not options.to.startswith(PREFIX):
        require(not options.private, "--private is for the hub: --to hub:user/name")
        pack(source, Path(options.to), result, picture, options.slim)
        print(f"written: {options.to}")
        return Path(options.to)
    return push(source, options, result, picture)


def push(source: Checkpoint, options: Options, result: Metrics | None, picture: Path | None) -> str:
    """Put a checkpoint on the hub; returns its address. Raises UserError if the hub cannot be reached or refuses."""
    import tempfile

    import huggingface_hub

    name = options.to.removeprefix(PREFIX)
    with tempfile.TemporaryDirectory() as folder, answered(f"push to {options.to}"):
        packed = Path(folder) / "checkpoint"
        # packed first: the hub gets no repository for a checkpoint whose files are damaged
        pack(source, packed, result, picture, options.slim)
        huggingface_hub.create_repo(name, private=options.private, exist_ok=True)
        address = huggingface_hub.upload_folder(repo_id=name, folder_path=packed, commit_message=f"step {source.step}")
    print(f"pushed: {address}")
    return str(address)


def require_own(source: Checkpoint, result: Metrics, path: str) -> None:
    """Raise UserError unless the metrics belong to samples of this checkpoint, and their settings to these samples."""
    for run in _runs(result):
        settings = run["samples"]["settings"] or {}
        require(
            settings.get("checkpoint") == source.digest,
            f"{path} does not say that its samples are of {source.path}: give a score of samples that generate.py drew "
            f"from it",
        )
        # scores of samples that were not written have no digest in either place
        require(
            settings.get("samples") == run["samples"]["sha256"],
            f"{path} has the settings of other samples than it scored: their digests differ; score the samples again",
        )


def own_picture(source: Checkpoint, folder: Path) -> Path:
    """The grid in a folder that generate.py drew from this checkpoint. Raises UserError for any other."""
    record, picture = files.read_sealed(folder / "samples.json"), folder / "grid.png"
    require(
        record.get("checkpoint") == source.digest,
        f"{folder} does not hold samples of {source.path}: give samples that generate.py drew from it",
    )
    require(
        files.digest(picture) == record.get("picture"),
        f"{picture} is not the picture that generate.py drew: its digest differs; draw the samples again",
    )
    return picture


def _runs(result: Metrics) -> list[_Run]:
    """The scored files of samples: several seeds, or the only one."""
    nothing: _Samples = {"sha256": None, "settings": None}
    return result.get("runs") or [{"samples": result.get("samples", nothing)}]


def packed_files(source: Checkpoint) -> dict[str, str]:
    """The files that sampling reads, with their digests: weights, and averages of them and of heads for sampling."""
    return {
        name: digest
        for name, digest in source.files.items()
        if name.split(".")[0].split("-")[0] in ("network", "ema") or "-head-" in name
    }


def pack(
    source: Checkpoint, out: Path, result: Metrics | None = None, picture: Path | None = None, slim: bool = False
) -> None:
    """Write the copy of a checkpoint to the folder `out`, atomically, with a `picture` of its samples.

    `slim` leaves out the raw network, and rounds the averages to bfloat16.

    Raises:
        UserError: damaged files, or `slim` for a checkpoint without averages.
    """
    names = packed_files(source)
    if slim:
        names = {name: digest for name, digest in names.items() if not name.startswith("network")}
        require(bool(names), f"--slim keeps averages alone, and {source.path} has none: leave it out")
    with files.replacing(out, is_packed) as folder:
        folder.mkdir()
        for name in names:
            source.require_intact(name)
            if slim:
                tensors = files.load_tensors(source.path / name)
                files.save_tensors(folder / name, {key: value.bfloat16() for key, value in tensors.items()})
                names[name] = files.digest(folder / name)
            else:
                shutil.copyfile(source.path / name, folder / name)
        files.write_sealed(
            folder / "config.json",
            {**source.config, "files": names, "packed_from": source.digest},
        )
        if picture is not None:
            shutil.copyfile(picture, folder / PICTURE)
        (folder / "README.md").write_text(card(source, names, result, picture is not None), encoding="utf-8")


def is_packed(path: Path) -> bool:
    """Whether `path` is a folder that `pack` wrote, with nothing else in it; a run's own checkpoint is not."""
    config = read_config(path)
    return (
        "packed_from" in config
        and isinstance(config.get("files"), dict)
        and {file.name for file in path.iterdir()} <= {"config.json", "README.md", PICTURE, *config["files"]}
    )


def card(source: Checkpoint, names: dict[str, str], result: Metrics | None, pictured: bool = False) -> str:
    """The model card of the files `names` (with their digests): method, data, protocol and numbers, as recorded.

    Whatever they record as free text becomes a code span (`runtime.text.code`), since they may be a stranger's.
    """
    spec, space = source.spec, source.space
    header = [
        "library_name: self-transcendence",
        # the hub has no pipeline of class-conditional networks, which get a free tag
        *(["pipeline_tag: unconditional-image-generation"] if spec.num_classes == 1 else []),
        "tags:",
        "- image-generation",
        *(["- class-conditional-image-generation"] if spec.num_classes > 1 else []),
        "- diffusion",
        f"- {spec.architecture}",
        "- arxiv:2601.07773",
    ]
    weights = [name for name in source.weights if name != "raw" or "network.safetensors" in names]
    network = [
        f"{models.parameter_count(models.outline(spec)) / 1e6:.1f}M parameters, {spec.depth} blocks of width "
        f"{spec.hidden_size}{', QK-norm' if spec.qk_norm else ''}; latents {spec.in_channels}x{spec.input_size}x"
        f"{spec.input_size} of {code(space.vae or space.name)}; {spec.num_classes} classes; weights: "
        f"{', '.join(map(code, weights))}.",
        *(["", f"![Samples, a row a class]({PICTURE})"] if pictured else []),
    ]
    digests = [
        f"Packed from the checkpoint {code(source.digest)}, as scores and samples call it.",
        "",
        *(f"- {code(name)}: {code(digest)}" for name, digest in names.items()),
    ]
    use = ["```bash", "python generate.py --ckpt hub:USER/NAME --num-fid-samples 64", "```"]
    sections = {
        f"# {code(spec.name)}, step {source.step:,}": network,
        "## Method": _method(source.config, source.step),
        "## Data": _data(source.config.get("data")),
        "## Numbers": _numbers(result),
        "## Files": digests,
        "## Use": use,
    }
    parts = [
        "\n".join(["---", *header, "---"]),
        *(f"{title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines),
    ]
    return "\n\n".join(parts) + "\n"


def _data(data: dict[str, Any] | None) -> list[str]:
    if not data:
        return []
    names = data["class_names"]
    more = f" and {len(names) - SHOWN} more, which config.json lists" if len(names) > SHOWN else ""
    return [
        f"{code(data['count'])} items of {len(names)} classes; latent set {code(data['digest'])}.",
        "",
        f"Classes, in the order of their labels: {', '.join(map(code, names[:SHOWN]))}{more}.",
    ]


def _method(config: dict[str, Any], step: int) -> list[str]:
    train = config.get("train")
    if not train:
        return [f"Converted from {code((config.get('source') or {}).get('file', 'unknown'))}."]
    alignments = [
        f"- {code(name)}: " + ", ".join(code(f"{key} {value}") for key, value in chosen.items() if value is not None)
        for name, chosen in (config.get("resolved") or {}).items()
    ]
    return [
        f"{step:,} steps of {code(train['batch_size'])} samples, learning rate {code(train['learning_rate'])}, recipe "
        f"{code(train['recipe'])}, seed {code(train['seed'])}, {code(config.get('precision'))}.",
        "",
        *(alignments or ["Plain flow matching, no alignment."]),
    ]


def _numbers(result: Metrics | None) -> list[str]:
    if result is None:
        return []
    settings, reference = _runs(result)[0]["samples"]["settings"] or {}, result["reference"]
    protocol = ", ".join(code(f"{key} {settings[key]}") for key in PROTOCOL if settings.get(key) is not None)
    return [
        "| metric | value |",
        "| --- | ---: |",
        *(f"| {code(name)} | {value:.4f} |" for name, value in result["metrics"].items()),
        "",
        f"{result['num_samples']:,} samples against {code(reference['name'])} ({code(reference['sha256'])}); "
        f"{protocol}.",
    ]


# The settings of sampling without which a number cannot be compared
PROTOCOL = (
    "preset",
    "mode",
    "solver",
    "num_steps",
    "evaluations",
    "cfg_scale",
    "guidance_low",
    "guidance_high",
    "weights",
    "labels",
    "decoder",
    "seed",
    "precision",
)


if __name__ == "__main__":
    errors.run(main)
