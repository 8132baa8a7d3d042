"""README and docs: their commands parse, their code runs, their files, links and messages exist."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re
import shlex
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import generate
import models
import train
import train_guide
from alignment import Alignment
from config import TrainConfig
from generate import GenerateConfig
from models import published
from models.checkpoint import Checkpoint
from models.heads import hidden_width
from models.peers import PEERS
from models.routing import Segments
from recipes import claims, costs, inside, publish, rows, scale, table
from recipes.__main__ import COMMANDS
from recipes.record import load
from runtime.options import flags_of, options_of, read
from runtime.peaks import PEAKS
from runtime.text import spread
from sampling import presets
from tests.helpers import ROOT, assert_same_bits, inputs
from training import command, muon

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}


def blocks(language: str, page: str | None = None) -> list[str]:
    texts = PAGES.values() if page is None else [PAGES[page]]
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)]


def commands() -> list[tuple[str, ...]]:
    """Every command of every page, in a block or in a table, once."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [line for text in PAGES.values() for line in re.findall(r"`(python (?:-m|[a-z_]+\.py) [^`]+)`", text)]
    launched = ("python ", "accelerate launch --config_file ", "torchrun ")
    known = [tuple(shlex.split(line, comments=True)) for line in lines if line.startswith(launched)]
    return list(dict.fromkeys(known))


def after_launcher(words: Sequence[str]) -> list[str]:
    """The program and its words, after the launcher's own parser has read the launcher's words."""
    if words[0] == "python":
        return list(words[1:])
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        known = launch_command_parser().parse_args(words[2:])
        assert words[1] == "launch" and (ROOT / known.config_file).is_file()
        return (["-m"] if known.module else []) + [known.training_script, *known.training_script_args]
    from torch.distributed.run import get_args_parser

    assert words[0] == "torchrun", words
    known = get_args_parser().parse_args(words[1:])
    return [known.training_script, *known.training_script_args]


def flags(module: str) -> set[str]:
    """Every flag of the command in `module`."""
    namespace = importlib.import_module(module)
    schemas = [
        kind
        for kind in vars(namespace).values()
        if dataclasses.is_dataclass(kind) and any(field.metadata for field in dataclasses.fields(kind))
    ]
    return {flag for kind in schemas for opt in options_of(kind) for flag in flags_of(opt.field)}


@pytest.mark.parametrize(
    "words", [words for words in commands() if "smooth" not in words and "..." not in words], ids=" ".join
)
def test_commands_parse(words: tuple[str, ...]) -> None:
    rest = after_launcher(words)
    given = [word.replace("--no-", "--", 1) for word in rest if word.startswith("--")]
    if "NAME" in rest:
        rest[rest.index("NAME")] = "latent"
    if rest[0] in ("train.py", "train_guide.py"):
        command.resolve(rest[1:], rest[0], None, ("guided",) if "guide" in rest[0] else ())
    elif rest[0] == "generate.py" and "--list-presets" not in rest:
        read(GenerateConfig, rest[1:], prog="generate.py", between=presets.settings)
    elif rest[:2] == ["-m", "recipes"]:
        names = itertools.takewhile(lambda word: not word.startswith("--"), rest[3:])
        wanted = [word for word in names if "/" in word and not (ROOT / word / "record.json").is_file()]
        assert rest[2] in COMMANDS and [rows.find(name).name for name in wanted] == wanted
        assert set(given) <= {flag for opt in options_of(COMMANDS[rest[2]].options) for flag in flags_of(opt.field)}
    else:
        module = rest[1] if rest[0] == "-m" else rest[0].removesuffix(".py")
        if (ROOT / module.replace(".", "/") / "__main__.py").is_file():
            module += ".__main__"
        assert set(given) <= flags(module) and "--" not in rest


def test_pages_are_short_and_none_is_lost() -> None:
    assert PAGES["README.md"].count("\n") <= 150
    for page in PAGES:
        assert page == "README.md" or f"({page})" in PAGES["README.md"], f"README does not lead to {page}"


def test_links_and_pictures_exist() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
            file = (ROOT / page).parent / target
            assert file.exists(), f"{page} links to {target}"
            assert file.suffix != ".png" or file.read_bytes()[:4] == b"\x89PNG"


def test_named_files_and_targets_exist() -> None:
    names = {name for text in PAGES.values() for name in re.findall(r"`([^`\s]+)`", text)}
    files = [
        name
        for name in names
        if name.endswith((".py", "/", ".csv", ".tsv", ".yaml"))
        and not name.startswith(("exps/", "work/", "--"))
        and "*" not in name
        and name not in ("train/", "alignment/smooth.py", "models/registers.py", "models/uvit.py", "partial/")
    ]
    assert len(files) > 20
    for name in files:
        assert (ROOT / name).exists() or list(ROOT.glob(f"*/{name}")), name
    makefile = (ROOT / "Makefile").read_text()
    assert all(
        f"{target}:" in makefile
        for text in PAGES.values()
        for target in re.findall(r"^make (\w+)", text, flags=re.MULTILINE)
    )


def test_the_table_of_other_repositories_flags_is_the_one_that_answers() -> None:
    for flag, hint in PEERS.items():
        assert f"| `{flag}` | {hint.reply} |" in PAGES["docs/coming-from-repa.md"]


def test_every_message_of_the_troubleshooting_page_exists_in_the_code() -> None:
    texts = "".join(
        "".join(re.findall(r'f?"((?:[^"\\]|\\.)*)"', line)) if (line := raw.strip()) else ""
        for path in ROOT.glob("**/*.py")
        if path.relative_to(ROOT).parts[0] not in ("tests", ".venv", "runs", "work")
        for raw in path.read_text().splitlines()
    )
    messages = [
        re.search(r"`([^`]+)`", line)[1]
        for line in PAGES["docs/troubleshooting.md"].splitlines()
        if line.startswith("| `")
    ]
    assert len(messages) > 15
    for message in messages:
        assert message in texts, message


def test_symbols_name_real_flags_and_defaults() -> None:
    config, options = command.resolve(
        ["--data-dir", "d", "--exp-name", "e", "--guiding-ckpt", "c"], "train_guide.py", None, ("guided",)
    )
    known = {flag for field in dataclasses.fields(options["guided"]) for flag in flags_of(field, "guided", alone=True)}
    latent = command.resolve(["--data-dir", "d", "--exp-name", "e", "--align", "latent"], "train.py", None)[1]["latent"]
    known |= {
        flag for field in dataclasses.fields(latent) if field.metadata for flag in flags_of(field, "latent", alone=True)
    }
    table = PAGES["docs/methods.md"].split("## The paper's symbols")[1].split("\n## ")[0]
    known |= {flag for opt in options_of(type(config)) for flag in flags_of(opt.field)}
    for flag in re.findall(r"`(--[a-z-]+)", table):
        assert flag in known, flag
    assert options["guided"].weight == latent.weight == 0.5 and hidden_width(768) == 2048


def test_options_without_a_flag_are_the_rare_ones(tmp_path: Path) -> None:
    section = PAGES["docs/training.md"].split("## Options without a flag")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    rare = {opt.field.name for opt in options_of(TrainConfig) if opt.field.metadata["rare"]}
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == rare

    (example,) = re.findall(r"```json\n(.*?)```", section, flags=re.DOTALL)
    (tmp_path / "more.json").write_text(example)
    words = ["--data-dir", "d", "--exp-name", "e", "--align", "latent", "--checkpoints-total-limit", "2"]
    config, options = command.resolve([*words, "--config", str(tmp_path / "more.json")], "train.py", None)
    assert (config.keep_every, config.timeout_minutes, options["latent"].weight) == (50_000, 60, 0.5)


def measured(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_tables_of_measurements_come_from_their_files() -> None:
    """The blocks themselves are compared by `recipes check`; here, that none has lost its marks."""
    marks = [name for text in PAGES.values() for name in re.findall(r"<!-- results: (\w+) -->", text)]
    assert sorted(marks) == sorted(publish.BLOCKS)
    assert all(publish.page(text, ROOT / "results") == text for text in PAGES.values())


def _of_small_data() -> Iterator[tuple[str, str]]:
    """Page and sentence, with the numbers of quickstart and digits as their files have them."""
    rows = zip(*measured("quickstart")["seeds"].values(), strict=True)
    half, full, longer, _, guided, guided_full = (statistics.mean(row["fd"] for row in same) for same in rows)
    floor = measured("quickstart")["floor"]
    yield (
        "README.md",
        f"at 600 steps (pixel Fréchet distance to test images {guided:.1f} vs {half:.1f}; real images {floor:.1f}) and "
        f"at 1,200 ({guided_full:.1f} vs {full:.1f}); counting stage 1, plain SiT wins ({longer:.1f} at 1,800)",
    )
    yield "docs/photographs.md", f"As many training images are at {floor:.1f}."
    yield "docs/methods.md", f"One of its steps takes {1415 / 800:.2f} times as long here"
    rows = {name: [*values.values()] for name, values in measured("internal-digits")["rows"]["internal"].items()}
    plain = rows["plain, w = 1"]
    behind, ahead = (
        spread([sign * (a - b) for a, b in zip(rows[name], plain, strict=True)], 3)
        for name, sign in (("second velocity, w = 1", 1), ("stage 1, velocity target, w = 1.4", -1))
    )
    yield "docs/sampling.md", f"training here ({behind} behind plain SiT)"
    yield "docs/sampling.md", f"beats plain SiT by {ahead} at w = 1.4"
    methods = {
        row["key"]: [values["fd"] for values in row["metrics"].values()] for row in measured("compare-digits")["rows"]
    }
    first, second, third, repa, haste = (spread(methods[key]) for key in ("plain", "latent", "guided", "repa", "haste"))
    yield "docs/methods.md", f"is {first} for plain SiT, {second} for stage 1, and {third} for stage 2"
    yield "docs/methods.md", f"REPA and HASTE reach {repa} and {haste}"


def _of_others() -> Iterator[tuple[str, str]]:
    """The same of the study and of torture."""
    for name, start in (
        ("photographs-ten", "Ten seeds see a difference of {} with a chance of {}"),
        ("photographs-five", "Five seeds see a difference of {} with a chance of {} only"),
        ("photographs-encoders", "see a difference of {} with a chance of {} only. REPA"),
    ):
        tested = claims.load(ROOT / "results")[name]
        yield "docs/study.md", start.format(f"{tested.smallest_effect:g}", f"{tested.power.value:.2f}")
    networks = {line[0]: float(line[2].split()[0]) for line in inside.summary(inside.load(ROOT / "results"))[1:]}
    plain, teacher = (networks[f"{name}: f_c"] for name in ("plain, 40 epochs", "stage 1, 40 epochs (the teacher)"))
    yield "docs/study.md", f"neighbours in f_c from {plain:.2f} to {teacher:.2f} at equal steps"
    torture = measured("2026-11-21-torture-full")
    kills, flips = torture["kills"], torture["flips"]
    assert kills["counts"]["runs with the same bits"] == kills["counts"]["runs"]
    saving = kills["counts"]["during a save"]
    yield "README.md", f"We killed runs {kills['done']} times at random moments, {saving} times inside a save"
    yield "README.md", f"All of {flips['counts']['refused']:,} flipped bits were refused"


def _of_costs_and_peers() -> Iterator[tuple[str, str]]:
    """What methods cost, and what RARE reports."""
    yield "docs/study.md", _of_the_second_processor()
    yield "docs/study.md", _of_the_release()
    ours = costs.training_cost(rows.find("photographs/SiT-B-2/muon"), scale.find("photographs"))
    yield "docs/study.md", f"Muon's matrix products are {ours.ratio() - 1:.2f} of a step"
    times = {line[0]: line[1] for line in publish.measured.steps()}
    yield "docs/study.md", f"They are in bfloat16: a step takes {times['muon']} times as long"
    largest = models.outline(models.spec("SiT-XL/2", in_channels=4, input_size=32, num_classes=1000))
    row = "table1/SiT-XL-2/none-80"
    step = json.loads(costs.COUNTED.read_text())[row] / scale.find("paper").steps(rows.find(row), 80)
    share = f"{muon.flops(largest) / step:.0%}".replace("%", " %")
    yield "docs/study.md", f"for SiT-XL/2 at batch 256 they are {share} of one"
    yield "docs/methods.md", f"at batch 256, {share} of a step of SiT-XL/2"
    fids = {
        method: published.first(method=method, variant="RARE", model="SiT-B/2").metrics["fid"]
        for method in ("none", "sra", "repa", "haste")
    }
    numbers = "plain SiT {none:.2f}, SRA {sra:.2f}, REPA {repa:.2f}, HASTE {haste:.2f}".format(**fids)
    yield "docs/study.md", f"(400,000 steps, one seed, FID: {numbers})"
    floors = measured("2026-11-29-floors")["rows"]
    images, decoded = (
        floors[f"5,000 training images{how}, timm:mobilenetv2_100@96"] for how in ("", " through the autoencoder")
    )
    yield (
        "docs/study.md",
        f"a distance of {images['fd']:.1f}, a precision of {images['precision']:.2f} and a recall of "
        f"{images['recall']:.2f}; through the autoencoder {decoded['fd']:.1f}, {decoded['precision']:.2f} and "
        f"{decoded['recall']:.2f}",
    )
    right = floors["the test images themselves, timm:mobilenetv2_100@96"]["classifier_accuracy"]
    yield "docs/study.md", f"the classifier is right on {right:.3f} of the test images"


def _of_the_second_processor() -> str:
    plain = "photographs/SiT-B-2/plain"
    again = {record["seed"]: record["scores"] for record in load(ROOT / "results" / "second-processor")}
    first = {
        record["seed"]: record["scores"]
        for record in table.declared(load(ROOT / "results"))
        if record["row"] == plain and record["seed"] in again
    }
    early, late = (
        spread([table.quality(again[seed][place]) - table.quality(first[seed][place]) for seed in again], 1, "+")
        for place in (0, 1)
    )
    assert len(again) == len(first) == 5
    return f"differs from its records by {early} at 80 epochs and {late} at 146."


def _of_the_release() -> str:
    """The last step at which the guide loss was logged, seed by seed."""
    last = [
        max(
            entry["step"]
            for line in (ROOT / "results" / "records" / record["folder"] / "log.jsonl").read_text().splitlines()
            if "loss/guided" in (entry := json.loads(line))
        )
        for record in table.declared(load(ROOT / "results"))
        if record["row"] == "photographs/SiT-B-2/guided-plateau"
    ]
    return "at step {:,} (the end), {}, {}, {} and {}, later".format(*last)


def test_pages_count_the_rows_that_there_are() -> None:
    count = {name: len(rows.of_table(name)) for name in rows.TABLES}
    papers = sum(number for name, number in count.items() if name not in ("photographs", "digits"))
    assert f"its {papers} rows have not been run" in " ".join(PAGES["README.md"].split())
    assert f"| other authors' protocols | {count['peers']} |" in PAGES["docs/paper.md"]
    assert f"| together, shared runs once | {papers} |" in PAGES["docs/paper.md"]


def test_numbers_in_prose_are_those_of_their_files() -> None:
    for page, sentence in (*_of_small_data(), *_of_others(), *_of_costs_and_peers()):
        assert sentence in " ".join(PAGES[page].split()), f"{page} should say: {sentence}"


def test_the_example_alignment_trains(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    (code,) = [block for block in blocks("python") if "class Smooth(" in block]
    scope: dict = {"__name__": "alignment.smooth"}
    exec(compile(code, "docs", "exec", dont_inherit=True), scope)
    try:
        run = train.main(
            words(
                tmp_path, "run", "--align", "smooth", "--smooth-depth", 4, "--align-weight", 0.1, "--max-train-steps", 2
            )
        )
    finally:
        Alignment.registry.pop("smooth")
    assert '"loss/smooth"' in (run / "log.jsonl").read_text()


@pytest.mark.parametrize("name", ["Registers", "UViT"])
def test_the_example_backbone_trains_both_stages_continues_and_samples(
    name: str, tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    (code,) = [block for block in blocks("python") if f"class {name}(" in block]
    scope: dict = {"__name__": f"models.{name.lower()}"}
    exec(compile(code, "docs", "exec", dont_inherit=True), scope)
    try:
        stage1 = ("--model", f"{name}-Tiny/2", "--align", "latent", "--align-hidden", 32, "--compile", "off")
        teacher = train.main(words(tmp_path, "stage1", *stage1, "--max-train-steps", 2))
        stage2 = ("--guiding-ckpt", teacher, "--align-hidden", 32, "--guide-scale", 5)
        whole = train_guide.main(words(tmp_path / "whole", "stage2", *stage2, "--max-train-steps", 4))
        train_guide.main(words(tmp_path, "stage2", *stage2, "--max-train-steps", 2))
        parts = train_guide.main(words(tmp_path, "stage2", *stage2, "--max-train-steps", 4))
        assert_same_bits(whole, parts)
        generate.main(
            ["--ckpt", str(parts), "--out", str(tmp_path / "out"), "--num-fid-samples", "4", "--num-steps", "2"]
        )
        # its own parameters are trained, and its features are the patches in their places
        network, fresh = (Checkpoint.open(run).network("raw") for run in (parts, teacher))
        own = "registers" if name == "Registers" else "skips.4.weight"
        assert not torch.equal(network.state_dict()[own], fresh.state_dict()[own])
        x, t, y = inputs(network.spec)
        output = network(x, t, y, taps=(1, 4))
        assert output.features[1].shape == output.features[4].shape == (3, 16, 32)
        times, segments = t[:, None].expand(-1, 2), Segments.shuffled(torch.rand(3, 16), (4, 12))
        ordered = network(x, times, y, taps=(1, 4), segments=segments)
        for first, second in zip(
            (output.velocity, *output.features.values()), (ordered.velocity, *ordered.features.values())
        ):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    finally:
        models.ARCHITECTURES.pop(name.lower())


def test_sampling_from_plain_python(guided: Path) -> None:
    (code,) = [block for block in blocks("python") if "Checkpoint.open" in block]
    scope: dict = {}
    exec(
        code.replace("ckpts/sit-xl", str(guided)).replace('"cuda"', '"cpu"').replace("num_steps=50", "num_steps=4"),
        scope,
    )
    assert scope["images"].shape == (4, 8, 8, 1) and scope["images"].dtype == "uint8"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x * c[:, None])


class Other(nn.Module):
    """A network of another project: (N, T, width) in and out. In training mode it drops labels, as REPA's and DiT's."""

    def __init__(self, width: int, keeps_labels: bool = False) -> None:
        super().__init__()
        self.labels = nn.Embedding(11, width)
        self.keeps_labels = keeps_labels
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, xt: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.training and not self.keeps_labels:
            y = torch.full_like(y, 10)
        for block in self.blocks:
            xt = block(xt, self.labels(y) + t[:, None])
        return xt


def test_the_ten_lines_work_in_another_network() -> None:
    (code,) = [block for block in blocks("python") if "guided_loss" in block]
    torch.nn.init.normal_(torch.empty(1), generator=torch.Generator().manual_seed(0))
    student, teacher = Other(8, keeps_labels=True), Other(8)
    scope = {
        "student": student,
        "teacher": teacher,
        "student_width": 8,
        "teacher_width": 8,
        "student_block": student.blocks[1],
        "teacher_block": teacher.blocks[2],
    }
    exec(compile(code, "docs", "exec", dont_inherit=True), scope)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    xt, t, y = torch.ones(2, 5, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 2])
    student(xt, t, y)
    loss = scope["guided_loss"](xt, t, y, 10)
    f_u, f_c = teacher(xt, t, torch.full_like(y, 10)), teacher(xt, t, y)
    feature = student.blocks[1](student.blocks[0](xt, student.labels(y) + t[:, None]), student.labels(y) + t[:, None])
    torch.testing.assert_close(loss, 0.5 * ((scope["head"](feature) - (f_u + 30 * (f_c - f_u))) ** 2).mean())
    loss.backward()
    assert student.blocks[0].linear.weight.grad.abs().sum() > 0 and student.blocks[2].linear.weight.grad is None


def test_the_hours_follow_from_the_flops_beside_them() -> None:
    rows = re.findall(
        r"^\| (SiT\S+) \| [^|]+ \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", PAGES["docs/training.md"], flags=re.MULTILINE
    )
    assert len(rows) == 10
    for network, steps, flops, hours in rows:
        computed = int(steps.replace(",", "")) * 256 * float(flops) * 1e9 / (8 * 0.4 * 989e12) / 3600
        assert float(hours) == pytest.approx(computed, abs=0.06), network


def test_there_is_one_job_script_and_it_queues_itself_again() -> None:
    scripts = [
        block
        for block in re.findall(r"```\w*\n(.*?)```", "".join(PAGES.values()), flags=re.DOTALL)
        if "SBATCH" in block
    ]
    assert (
        len(scripts) == 1 and subprocess.run(["bash", "-n"], check=False, input=scripts[0], text=True).returncode == 0
    )
    head, body = re.findall(r"#SBATCH --([a-z-]+)", scripts[0]), scripts[0].replace("\\\n", " ")
    assert {"signal", "requeue", "time"} <= set(head)
    (launched,) = re.findall(r"train\.py (.*?)'", body)
    config, _ = command.resolve(launched.split(), "train.py", None)
    assert config.max_hours < 24 and "--time=24:00:00" in body
    assert f"-e {config.output_dir}/{config.exp_name}/ended-early.json" in body and "scontrol requeue" in body


def test_the_plans_follow_from_the_hours_of_the_tables() -> None:
    hours = {
        name: int(value.replace(",", ""))
        for name, value in re.findall(
            r"^\| ((?:Table|Figure|section) [\d.]+) \| \d+ \| [\d,]+ \| ([\d,]+) \|",
            PAGES["docs/paper.md"],
            re.MULTILINE,
        )
    }
    ablations = 3 * (hours["Table 4"] + hours["Table 5"] + hours["Figure 4"])
    plans = (
        2 * hours["Table 4"],
        ablations,
        ablations + 3 * hours["Table 1"] + hours["Figure 8"] + hours["section 4.5"],
    )
    rows = re.findall(r"^\| ([\d,]+) \| .* \| ([\d,]+) \| ([\d,]+) \| ", PAGES["docs/first-night.md"], re.MULTILINE)
    for (budget, h100, a800), computed in zip(rows, plans, strict=True):
        assert int(h100.replace(",", "")) == computed <= int(budget.replace(",", ""))
        assert int(a800.replace(",", "")) == round(computed * PEAKS["H100"] / PEAKS["A800"])


def test_the_lowest_torch_has_its_driver() -> None:
    (lowest,) = re.findall(r"^torch>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    (locked,) = re.findall(r"^torch==([\d.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    section = PAGES["docs/first-night.md"].split("## Which driver")[1]
    assert f"| {lowest}, the lowest" in section and f"| {locked}, in `requirements.lock`" in section


def test_how_to_cite_and_to_contribute() -> None:
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    bibtex = PAGES["README.md"].split("```bibtex")[1]
    assert citation["title"] in bibtex and all(author["family-names"] in bibtex for author in citation["authors"])
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([a-z_/]+\.(?:py|md)|[a-z_]+/)`", contributing) + re.findall(r"\]\(([^)]+)\)", contributing)
    assert len(named) > 5 and all((ROOT / name).exists() for name in named), named
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
