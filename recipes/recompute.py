"""What a record says, computed again from its row, its statistics and the other records.

`faults` compares a record with what its row gives: the commands of the chain, the options that they resolve to, the
protocol of each score, and a Frechet distance from the statistics of its features. `between` compares records with each
other: a checkpoint has one digest wherever it is named, and no two results are the same file.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recipes import chain, costs, rows, scale
from recipes.chain import WORK, Chain
from recipes.scale import Places, Scale
from runtime import files
from runtime.errors import UserError
from runtime.options import as_dict, read

if TYPE_CHECKING:
    from dataset import LatentSet

# Two statistics of one reference, by different devices, are at most this share of their variance apart.
SAME = 1e-4


def reference_file(results: Path, digest: str) -> Path:
    """Where the statistics of a reference lie."""
    return results / "references" / f"{digest}.safetensors"


def plan_of(record: dict[str, Any], work: Path = WORK) -> Chain:
    """The chain that a record's row gives today. Raises UserError if row, scale or places do not exist any more."""
    row = rows.find(record["row"])
    size = scale.find(record["scale"]).at(Places(**record["places"]), [row])
    return chain.build(row, size, record["seed"], work)


def faults(folder: Path, record: dict[str, Any]) -> list[str]:
    """How a record differs from what its row gives and from its own statistics, in words."""
    try:
        plan = plan_of(record)
    except (UserError, TypeError) as error:
        return [f"its row cannot be built any more: {error}"]
    config = files.read_json(folder / "config.json")
    per_node = record["processes"] // max(1, record["nodes"])
    commands = [link.command(per_node, record["nodes"]) for link in plan.links]
    wrong = [] if record["commands"] == commands else [_difference(record["commands"], commands)]
    wrong += _wrong_options(plan, scale.find(record["scale"]), config)
    wrong += _wrong_digests(plan, config, record)
    if len(record["scores"]) != len(plan.scores):
        return [*wrong, f"its row has {len(plan.scores)} scores, not {len(record['scores'])}"]
    for score, planned in zip(record["scores"], plan.scores, strict=True):
        wrong += _wrong_protocol(score, planned, plan, config["precision"])
    return [*wrong, *_wrong_distances(folder, record)]


def _difference(recorded: Sequence[str], rebuilt: Sequence[str]) -> str:
    pairs = itertools.zip_longest(recorded, rebuilt, fillvalue="(none)")
    before, now = next((before, now) for before, now in pairs if before != now)
    return f"its row gives the command {now!r}, not {before!r}"


def _wrong_options(plan: Chain, size: Scale, config: dict[str, Any]) -> Iterator[str]:
    """How config.json differs from the options that the training command resolves to."""
    from training import command
    from training.setup import Setup

    link = next(link for link in reversed(plan.links) if link.name == "train")
    program, *words = link.words
    train, options = command.resolve(words, program, None, ("guided",) if program == "train_guide.py" else ())
    setup = Setup.of(train, options, data=cast("LatentSet", costs.sketch(plan.row, size)))
    # a run that a longer row went on with names the end of that; QK-norm is taken over from the teacher
    free = {"max_train_steps", *(["qk_norm"] if plan.teacher else [])}
    yield from _differences("", config["train"], as_dict(train), free)
    # classes and channels are those of the images
    fixed = ("name", "architecture", "depth", "hidden_size", "num_heads", "patch_size")
    spec = {key: value for key, value in setup.spec.to_json().items() if key in fixed}
    yield from _differences("model: ", config["model"], spec, set())
    if sorted(config["align"]) != sorted(options):
        yield f"config.json: the alignments are {sorted(config['align'])}, its command gives {sorted(options)}"
    for name, chosen in setup.options.items():
        yield from _differences(f"align: {name} ", config["align"].get(name, {}), as_dict(chosen), set())
        # a method also settles values that are not options; a branch whose method has ended has its trunk's stop
        settled = {key: value for key, value in as_dict(chosen).items() if value is not None}
        free = set() if plan.row.trunk is None else {"stop_steps"}
        yield from _differences(f"resolved: {name} ", config["resolved"].get(name, {}), settled, free)


def _differences(where: str, recorded: dict[str, Any], expected: dict[str, Any], free: set[str]) -> Iterator[str]:
    """The options of `recorded` that are not as `expected`; options that only one of them has are left out."""
    expected = json.loads(json.dumps(expected))
    for key in recorded.keys() & expected.keys() - free:
        if recorded[key] != expected[key]:
            yield f"config.json: {where}{key} is {recorded[key]}, its command gives {expected[key]}"


def _wrong_digests(plan: Chain, config: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    """Digests of a record that contradict each other."""
    digests, last = record["digests"], record["scores"][-1]
    if last["step"] == record["step"] and last["checkpoint"] != digests["checkpoint"]:
        yield "its last score is of another checkpoint than it names"
    teacher = config["resolved"].get("guided", {}).get("teacher", {}).get("digest")
    if teacher != digests["teacher"] or (teacher is None) != (plan.teacher is None):
        yield "its teacher is not that of config.json"
    if record["precision"] != config["precision"]:
        yield f"its precision is {record['precision']}, that of config.json {config['precision']}"
    options = dict(itertools.pairwise(plan.scores[-1].link.words))
    latents = next(link for link in plan.links if link.name == "latents")
    data = dict(itertools.pairwise(latents.words)).get("--out")
    if options["--reference"] == data and any(
        score["protocol"]["reference"] != digests["data"] for score in record["scores"]
    ):
        yield "its samples are compared with another set than it was trained on, against its command"


def _wrong_protocol(score: dict[str, Any], planned: chain.Score, plan: Chain, precision: str) -> Iterator[str]:
    """How the protocol of a score differs from its sampling command."""
    import generate
    from sampling import presets

    recorded, where = score["protocol"], f"the score of step {score['step']}"
    if (score["preset"], score["epochs"], score["step"]) != (planned.preset, planned.epochs, planned.step):
        yield f"{where} and {score['preset']} is not {planned.preset} at step {planned.step}, which its row gives"
    words = planned.link.words
    words = words[2:] if words[0] == "-m" else words[1:]
    config = read(generate.GenerateConfig, list(words), prog="generate.py", between=presets.settings)
    expected = {**as_dict(config.sampling), "num_fid_samples": config.num_fid_samples, "training_precision": precision}
    for key in recorded.keys() & expected.keys():
        if recorded[key] != expected[key]:
            yield f"{where} has {key} {recorded[key]}, its command gives {expected[key]}"
    if recorded["features"]["name"] != config.scores.features:
        yield f"{where} has features {recorded['features']['name']}, its command gives {config.scores.features}"
    if score["num_samples"] != config.num_fid_samples:
        yield f"{where} is of {score['num_samples']} samples, its command draws {config.num_fid_samples}"


def _wrong_distances(folder: Path, record: dict[str, Any]) -> Iterator[str]:
    """How the distances of a record differ from what its statistics give."""
    from evaluations import metrics, projection

    samples = files.load_tensors(folder / "features.safetensors")
    for number, score in enumerate(record["scores"]):
        where, file = f"step {score['step']}", reference_file(folder.parent.parent, score["reference_statistics"])
        if not file.is_file() or files.digest(file) != score["reference_statistics"]:
            yield f"{file} is missing or has changed since"
            continue
        try:
            of_samples = projection.unpack(samples, f"{number}.")
            of_reference = projection.unpack(files.load_tensors(file))
            distance = metrics.frechet(of_samples, of_reference)
        except (KeyError, ValueError, UserError) as error:
            yield f"the statistics of {where} give no distance: {error}"
            continue
        if not math.isclose(distance, score["fd64"], rel_tol=1e-6, abs_tol=1e-9):
            yield f"the statistics of {where} give a projected distance of {distance:.6g}, not {score['fd64']:.6g}"
        whole = next(value for name, value in score["metrics"].items() if name in ("fid", "fd"))
        # a projection lowers the distance, and does not change it where there is nothing to leave out
        if score["fd64"] > whole * (1 + SAME) + 1e-6:
            yield f"{where}: the projected distance {score['fd64']:.6g} is above the whole one, {whole:.6g}"
        if len(of_samples.mean) != min(score["feature_width"], projection.WIDTH) or (
            score["feature_width"] <= projection.WIDTH and not math.isclose(score["fd64"], whole, rel_tol=SAME)
        ):
            yield f"{where}: its {score['feature_width']} features give {score['fd64']:.6g}, not {whole:.6g}"


def between(records: Sequence[dict[str, Any]], results: Path) -> list[str]:
    """What contradicts itself between finished records, in words."""
    wrong: list[str] = []
    # a checkpoint, as RUN@STEP at a scale in a precision -> its digest -> the records that name it
    names: dict[tuple[str, ...], dict[str, list[str]]] = {}
    places: dict[str, set[tuple[str, ...]]] = {}
    contents: dict[str, list[tuple[str, set[tuple[str, ...]]]]] = {}
    for record in records:
        try:
            plan = plan_of(record)
        except (UserError, TypeError):
            continue  # `faults` says so
        known = [(f"{plan.run}@{score['step']}", score["checkpoint"]) for score in record["scores"]]
        if plan.teacher is not None and record["digests"]["teacher"]:
            known.append((f"{plan.teacher[0]}@{plan.teacher[1]}", record["digests"]["teacher"]))
        where = (str(record["scale"]), str(record["precision"]))
        of: set[tuple[str, ...]] = {(*where, name) for name, _ in known[: len(record["scores"])]}
        for name, digest in known:
            names.setdefault((*where, name), {}).setdefault(digest, []).append(record["folder"])
            places.setdefault(digest, set()).add((*where, name))
        for file in ("metrics.json", "features.safetensors"):
            contents.setdefault(record["files"][file], []).append((record["folder"], of))
    for place, digests in names.items():
        if len(digests) > 1:
            first, second = [folders[0] for folders in digests.values()][:2]
            wrong.append(f"{place[-1]} is another checkpoint in {first} than in {second}")
    for digest, known_as in places.items():
        if len(known_as) > 1:
            wrong.append(f"the checkpoint {digest[:8]} is called {' and '.join(sorted(name[-1] for name in known_as))}")
    for same in contents.values():
        (first, of_first), *others = same
        wrong += [f"{first} and {other} hold the same result" for other, of in others if of != of_first]
    return [*wrong, *_unlike_references(records, results)]


def _unlike_references(records: Sequence[dict[str, Any]], results: Path) -> Iterator[str]:
    """References whose statistics differ between records."""
    from evaluations import metrics, projection

    digests: dict[str, list[str]] = {}
    for score in (score for record in records for score in record["scores"]):
        of = json.dumps([score["protocol"][key] for key in ("reference", "features")], sort_keys=True)
        digests.setdefault(of, []).append(score["reference_statistics"])
    for known in digests.values():
        existing = [file for digest in dict.fromkeys(known) if (file := reference_file(results, digest)).is_file()]
        first, *others = (projection.unpack(files.load_tensors(file)) for file in existing)
        for file, other in zip(existing[1:], others, strict=True):
            if metrics.frechet(first, other) > SAME * first.covariance.trace():
                yield f"{existing[0].name} and {file.name} are of one reference and differ"
