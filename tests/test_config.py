"""The command line is derived from the dataclasses: types, defaults, layers, and every flag acts."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import generate
from config import COMMON, RECIPES, TrainConfig
from generate import GenerateConfig
from models.peers import PEERS
from runtime.errors import UserError
from runtime.foreign import edits
from runtime.options import as_dict, build, flags_of, group, option, options_of, parse, peek, read
from training import command


@dataclass(frozen=True, kw_only=True)
class Small:
    name: str = option(help="a name")
    steps: int = option(3, help="steps, 50% of them")
    rates: tuple[float, float] | None = option(None, help="two rates")
    words: tuple[str, ...] = option(("a",), help="any words")
    fast: bool = option(False, help="fast")
    mode: str = option("x", choices=("x", "y"), help="mode")


def parse_one(argv: list[str]) -> dict:
    return parse({"": Small}, argv, prog="small")[""]


def test_values_are_typed_and_only_given_ones_are_returned() -> None:
    given = parse_one(["--name", "n", "--rates", "0.1", "1e-3", "--words", "p", "q", "--fast"])
    assert given == {"name": "n", "rates": (0.1, 1e-3), "words": ("p", "q"), "fast": True}
    assert build(Small, given).steps == 3
    assert build(Small, {"steps": 5}, given, {"name": "later"}) == Small(
        name="later", steps=5, rates=(0.1, 1e-3), words=("p", "q"), fast=True
    )
    assert parse_one(["--no-fast"]) == {"fast": False}


def test_mistakes_are_named() -> None:
    for argv, reply in (
        (["--stps", "3"], "--steps"),
        (["--steps", "x"], "--steps"),
        (["--mode", "z"], "--mode"),
        (["--rates", "1"], "--rates"),
    ):
        with pytest.raises(UserError, match=reply):
            parse_one(argv)
    with pytest.raises(UserError, match="missing --name"):
        build(Small, {})
    with pytest.raises(UserError, match="steps"):
        build(Small, {"stepz": 1})


def test_abbreviations_are_not_accepted() -> None:
    with pytest.raises(UserError):
        parse_one(["--step", "4"])


def test_sections_have_their_own_flags_and_a_common_one_where_it_is_clear() -> None:
    @dataclass(frozen=True, kw_only=True)
    class One:
        weight: float = option(0.5, help="w")
        only: int = option(1, help="o")

    both = parse(
        {"": Small, "p": One, "q": Small}, ["--p-weight", "2", "--align-only", "4", "--q-steps", "9"], prog="x"
    )
    assert both == {"": {}, "p": {"weight": 2.0, "only": 4}, "q": {"steps": 9}}
    with pytest.raises(UserError):  # two alignments have a weight: which one is meant?
        parse({"": Small, "p": One, "q": One}, ["--align-weight", "1"], prog="x")


def test_peek_reads_one_option_and_nothing_else() -> None:
    assert peek(TrainConfig, "align", ["--what", "ever", "--align", "a", "b", "--seed", "3"]) == ["a", "b"]
    assert peek(TrainConfig, "align", ["--seed", "3"]) == ("none",)


@pytest.mark.parametrize("schema", [TrainConfig, GenerateConfig])
def test_every_option_has_help_and_a_flag_of_its_own(schema: type) -> None:
    flags = [flag for opt in options_of(schema) for flag in flags_of(opt.field)]
    assert len(flags) == len(set(flags)) > 20
    assert all(len(opt.field.metadata["help"]) > 5 for opt in options_of(schema))


@dataclass(frozen=True, kw_only=True)
class Big:
    small: Small = group(Small, without=("steps",))
    steps: str = option("1:3", help="a range in place of the group's own")


def test_groups_are_composed_and_laid_flat() -> None:
    opt = read(Big, ["n", "--mode", "y", "--steps", "2:4"], prog="big", first="name")
    assert opt == Big(small=Small(name="n", mode="y"), steps="2:4")
    assert as_dict(opt) == {"name": "n", "rates": None, "words": ["a"], "fast": False, "mode": "y", "steps": "2:4"}
    assert build(Big, as_dict(opt)) == opt
    with pytest.raises(UserError, match="missing --name"):
        read(Big, [], prog="big")


def test_settings_stand_between_defaults_and_words() -> None:
    preset = lambda given: {"mode": "y", "fast": True} if given.get("name") == "n" else {}  # noqa: E731
    assert read(Small, ["--name", "n", "--no-fast"], prog="small", between=preset) == Small(
        name="n", mode="y", fast=False
    )
    assert read(Small, ["--name", "m"], prog="small", between=preset) == Small(name="m")


def test_words_of_the_peers_are_answered() -> None:
    """A flag of REPA gets its reply before any nearest-word hint; a flag that exists here is never looked up."""
    for words in (["--path-type", "linear"], ["--enc-type=dinov2-vit-b"], ["--proj-coeff", "0.5"], ["--fused-attn"]):
        with pytest.raises(UserError) as caught:
            command.resolve(["--data-dir", "d", "--exp-name", "e", *words], "train.py", None)
        assert PEERS[words[0].split("=")[0]].reply in str(caught.value) and "did you mean" not in str(caught.value)
    both = {
        flag for schema in (TrainConfig, GenerateConfig) for opt in options_of(schema) for flag in flags_of(opt.field)
    }
    train = {flag for opt in options_of(TrainConfig) for flag in flags_of(opt.field)}
    assert set(PEERS) & both == {"--model", "--qk-norm"} <= train  # options of training, known to a checkpoint
    for hint in PEERS.values():
        for flag in re.findall(r"--[a-z][a-z0-9-]+", f"{hint.reply} {' '.join(hint.words or ())}"):
            assert flag in both | ALIGNED, flag


ALIGNED = {
    "--align-encoder",
    "--align-depth",
    "--align-weight",
    "--align-stop-steps",
    "--align-interval",
    "--align-mask",
    "--guide-scale",
    "--guiding-ckpt",
    "--guiding-depth",
    "--guided-depth",
    "--out",
    "--stop-epoch",
}
REPAS = (
    "--report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --path-type=linear --prediction=v "
    "--weighting=uniform --model=SiT-XL/2 --enc-type=dinov2-vit-b --proj-coeff=0.5 --encoder-depth=8 "
    "--output-dir=exps --exp-name=linear-dinov2-b-enc8 --data-dir=data"
)
# The authors' train_selftrans.sh and REPA's generate.py, as their pages print them.
AUTHORS = (
    "--report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --path-type=linear --prediction=v "
    "--weighting=uniform --model=SiT-B/2 --stu-depth=6 --tea-depth=8 --cfg_guide=30.0 --output-dir=exps/self_trans "
    "--ckpt_guided_model=exps/vaeloss@200000 --t-range 0.4 0.7 --batch-size=256 --exp-name=sit-b --data-dir=data"
)
SAMPLES = (
    "--model SiT-XL/2 --num-fid-samples 50000 --ckpt exps/a --path_type=linear --encoder_depth=8 "
    "--projector_embed_dims=768 --per-proc-batch-size=64 --mode=sde --num_steps=250 --cfg-scale=1.8 --guidance_high=0.7"
)


def refused(words: str, resolve: Callable[[list[str]], object]) -> tuple[set[str], list[str]]:
    """The flags that a pasted command is refused for, and the words of the command that the message offers."""
    with pytest.raises(UserError) as caught:
        resolve(words.split())
    message, command = str(caught.value).split(" | translated: ")
    assert "\n" not in message and "did you mean" not in message
    return {part.split()[0] for part in message.split(" | ")}, shlex.split(command)


def test_a_pasted_command_is_answered_as_a_whole() -> None:
    """One message names every foreign flag, and the command that it offers is the one that was meant."""
    trained = lambda words: command.resolve(words, "train.py", None)  # noqa: E731
    flags, words = refused(REPAS, trained)
    foreign = "--allow-tf32 --mixed-precision --path-type --prediction --weighting --enc-type --proj-coeff"
    assert flags == {*foreign.split(), "--encoder-depth"} and words[:2] == ["python", "train.py"]
    config, options = trained(words[2:])
    assert (config.report_to, config.mixed_precision, config.exp_name) == ("wandb", "bf16", "linear-dinov2-b-enc8")
    repa = options["repa"]
    assert (repa.encoder, repa.weight, repa.depth) == ("dinov2-vit-b", 0.5, 8)

    guided = lambda words: command.resolve(words, "train_guide.py", None, ("guided",))  # noqa: E731
    flags, words = refused(AUTHORS, guided)
    assert {"--stu-depth", "--tea-depth", "--cfg_guide", "--ckpt_guided_model", "--t-range"} < flags
    options = guided(words[2:])[1]["guided"]
    assert (options.guided_depth, options.guiding_depth, options.guide_scale) == (6, 8, 30)
    assert (options.interval, options.mask, options.guiding_ckpt) == ((0.4, 0.7), "upstream", "exps/vaeloss@200000")

    flags, words = refused(SAMPLES, generate.resolve)
    assert {"--encoder_depth", "--num_steps", "--guidance_high"} < flags
    sampling = generate.resolve(words[2:]).sampling
    assert (sampling.mode, sampling.num_steps, sampling.cfg_scale, sampling.guidance_high) == ("sde", 250, 1.8, 0.7)


def test_all_unknown_flags_come_at_once_and_a_hint_is_near() -> None:
    with pytest.raises(UserError) as caught:
        command.resolve(["--sed", "3", "--max-steps", "3", "--path-type=cosine", "--keep-every", "2"], "train.py", None)
    parts = str(caught.value).split(" | ")
    assert parts[0] == "unknown option --sed (did you mean --seed?)" and parts[1] == "unknown option --max-steps"
    assert parts[2].startswith("--path-type is not") and "--config FILE" in parts[3] and "translated" not in parts[3]
    assert [edits("seed", word) for word in ("seed", "sed", "speed", "sade", "")] == [0, 1, 1, 3, 4]
    with pytest.raises(UserError, match="--align-depth .* add --align .*latent") as caught:
        command.resolve(["--align-depth", "3"], "train.py", None)
    assert "guided" not in str(caught.value)


def test_layers_of_a_run(capsys: pytest.CaptureFixture) -> None:
    argv = ["--data-dir", "d", "--exp-name", "e"]
    config, options = command.resolve(argv, "train.py", None)
    assert (
        config.learning_rate,
        config.batch_size,
        config.adam_beta2,
        config.max_grad_norm,
        config.ema_decay,
        config.cfg_prob,
        config.adam_weight_decay,
    ) == (1e-4, 256, 0.999, 1.0, 0.9999, 0.1, 0.0) and options == {}
    config, options = command.resolve(
        [
            *argv,
            "--align",
            "latent",
            "--preset",
            "upstream",
            "--recipe",
            "digits",
            "--align-hidden",
            "64",
            "--align-interval",
            "0.1",
            "0.2",
        ],
        "train.py",
        None,
    )
    assert config.qk_norm and config.learning_rate == RECIPES["digits"]["learning_rate"]
    assert (
        options["latent"].hidden == 64
        and options["latent"].interval == (0.1, 0.2)
        and options["latent"].mask == "upstream"
    )
    config, options = command.resolve(
        [*argv, "--align", "latent", "--preset", "upstream", "--no-qk-norm"], "train.py", None
    )
    assert not config.qk_norm and options["latent"].mask == "upstream"
    config, _ = command.resolve([*argv, "--recipe", "lightningdit", "--batch-size", "8"], "train.py", None)
    assert (config.batch_size, config.adam_beta2, config.velocity_loss, config.time_sampling, config.max_grad_norm) == (
        8,
        0.95,
        "mse+cosine",
        "logit-normal",
        0,
    )


def test_the_recipe_option_names_every_recipe() -> None:
    opt = next(opt for opt in options_of(TrainConfig) if opt.field.name == "recipe")
    assert set(opt.field.metadata["choices"]) == set(RECIPES)
    long = RECIPES["lightningdit-800ep"]
    assert (long["max_train_steps"], long["uniform_from_epoch"]) == (1_000_000, 480)
    assert long.items() >= {k: v for k, v in RECIPES["lightningdit"].items() if k != "max_train_steps"}.items()


def test_a_config_survives_json() -> None:
    config = build(TrainConfig, {"data_dir": "d", "exp_name": "e", "align": ("latent", "x")})
    assert build(TrainConfig, as_dict(config)) == config


def test_help_is_readable(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        command.resolve(["--align", "latent", "--help"], "train.py", "First line.\n\n    a command\n")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "SiT-XL/2" in text and "LightningDiT-XL/1" in text and "layersync" in text and "token-cosine" in text
    assert (
        "--latent-depth" in text
        and "--align-depth" in text
        and "    a command\n" in text
        and "(default 0.0001)" in text
    )


@pytest.mark.parametrize(
    "module, headings",
    [
        (
            "train",
            [
                "data",
                "network",
                "method",
                "optimisation",
                "precision",
                "run",
                "logging",
                "scores",
                "models",
                "alignments",
            ],
        ),
        ("generate", ["network", "samples", "solver", "guidance", "scores"]),
        ("evaluations.evaluate", ["images", "scores", "metrics", "output"]),
        ("evaluations.sweep", ["network", "sweep", "guidance", "scores"]),
        ("preprocessing.encode", ["images", "encoder", "latent set", "work"]),
        ("models.convert", ["files", "network", "latent space"]),
    ],
)
def test_help_comes_in_groups(module: str, headings: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    output = capsys.readouterr().out
    places = [re.search(rf"^{heading}\b.*:$", output, flags=re.MULTILINE) for heading in headings]
    assert all(places), dict(zip(headings, places))
    if module == "train":
        assert "SiT-XL/2" in output and "layersync" in output.split("alignments")[-1]


def test_a_number_outside_its_bounds_is_refused_and_help_shows_them(capsys: pytest.CaptureFixture) -> None:
    argv = ["--data-dir", "d", "--exp-name", "e"]
    for flag, value, bounds in (
        ("--cfg-prob", "1.5", "[0, 1]"),
        ("--ema-decay", "1", "[0, 1)"),
        ("--learning-rate", "0", "(0, inf)"),
        ("--adam-beta2", "1", "[0, 1)"),
        ("--num-fid-samples", "3", "[4, 1e8]"),
    ):
        with pytest.raises(UserError, match=rf"{flag} .* must lie in {re.escape(bounds)}"):
            command.resolve([*argv, flag, *value.split()], "train.py", None)
    with pytest.raises(SystemExit):
        command.resolve(["--help"], "train.py", None)
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "moving average (default 0.9999); at least 0 and below 1" in text
        and "warm-up (default 0.0001); above 0" in text
    )


def test_help_shows_twenty_common_options_first_and_writes_values_as_people_do(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.resolve(["--help"], "train.py", None)
    text = capsys.readouterr().out
    first, others = re.split(r"\n\n(?=data:)", text.split("common options:\n")[1], maxsplit=1)
    shown = re.findall(r"^  (--[a-z-]+)", first, flags=re.MULTILINE)
    assert shown == [f"--{name.replace('_', '-')}" for name in COMMON] and len(shown) == 20
    assert not set(shown) & set(re.findall(r"^  (--[a-z-]+)", others, flags=re.MULTILINE))
    assert text.startswith("usage: train.py [options]\n") and "--data-dir PATH" in first and "--model NAME" in first
    assert "--max-train-steps N" in first and "--init-ckpt PATH" in first and "--ema-decay X" in others
    assert not re.search(r"STR|FLOAT|INT\b|default \)|default False|, inf", text)


def test_a_file_of_options_stands_below_flags(tmp_path: Path) -> None:
    """The run.json of a run repeats it; settings without a flag come from such a file alone."""
    argv = ["--data-dir", "d", "--exp-name", "e", "--align", "latent", "--preset", "upstream", "--align-hidden", "8"]
    config, options = command.resolve([*argv, "--recipe", "digits", "--ema-lengths", "0.1"], "train.py", None)
    record = {"train": as_dict(config), "align": {"latent": as_dict(options["latent"])}, "resolved": {"latent": {}}}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(record))
    again = command.resolve(["--config", str(file)], "train.py", None)
    assert again == (dataclasses.replace(config, config=str(file)), options)
    record["train"] |= {"ema_snapshot_steps": 7, "adam_beta1": 0.8}
    file.write_text(json.dumps(record))
    changed, own = command.resolve(["--config", str(file), "--seed", "5", "--align-hidden", "9"], "train.py", None)
    assert (changed.ema_snapshot_steps, changed.adam_beta1, changed.seed, own["latent"].hidden) == (7, 0.8, 5, 9)
    with pytest.raises(UserError, match="--adam-beta1 is not an option here: give it in a file: --config FILE"):
        command.resolve([*argv, "--adam-beta1", "0.8"], "train.py", None)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"train": {"batch_sise": 4}}, "has no option batch_sise .did you mean batch_size"),
        ({"train": {"batch_size": "4"}}, "batch_size is '4'; give a value of type int"),
        ({"train": {"batch_size": 4.5}}, "batch_size is 4.5; give a value of type int"),
        ({"train": {"batch_size": True}}, "batch_size is True; give"),
        ({"train": {"batch_size": [4]}}, "batch_size is .4.; give"),
        ({"train": {"verify": 1}}, "verify is 1; give"),
        ({"train": {"align": "latent"}}, "align is 'latent'; give"),
        ({"train": {"skip_steps": [1, 2, 3]}}, "skip_steps is .1, 2, 3.; give"),
        ({"train": {"resident": "tape"}}, "resident is 'tape'; give one of disk, ram, device"),
        ({"train": {"keep_every": 0, "checkpoints_total_limit": 1}}, "keep_every 0 must lie in .1, inf"),
        ({"align": {"repa": {}}}, "has options of repa, which this command does not train"),
        ({"train": [1]}, "is not of the form"),
        ({"batch_size": 4}, "is not of the form"),
        ([1], "is not of the form"),
    ],
)
def test_a_wrong_file_of_options_is_one_line(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(content))
    argv = ["--data-dir", "d", "--exp-name", "e", "--config", str(tmp_path / "x.json")]
    with pytest.raises(UserError, match=message):
        command.resolve(argv, "train.py", None)
