"""The house rules that a machine can check: imports, randomness, distribution, size and plain words."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

# The floors of the house from the ground up, one part per line. A part may import itself and the parts above its line.
# The second entry lists exceptions that it must not import although they stand above, the third entry libraries that it
# must not import.
FLOORS: list[tuple[str, set[str], set[str]]] = [
    ("runtime", set(), {"diffusers", "timm"}),
    ("interpolant", {"runtime"}, {"accelerate"}),
    ("config", {"interpolant"}, {"torch", "accelerate"}),
    ("models", {"config", "interpolant"}, {"accelerate"}),
    (
        "dataset",
        {"models.backbone", "models.layers", "models.sit", "models.lightningdit", "models.checkpoint", "models.vae"},
        {"accelerate"},
    ),
    ("sampling", {"dataset"}, set()),
    ("alignment", {"sampling", "models.checkpoint"}, {"accelerate"}),
    ("preprocessing", {"alignment", "sampling"}, set()),
    (
        "loss",
        {"preprocessing", "sampling", "dataset", "runtime.launch", "runtime.progress"},
        {"accelerate", "tqdm", "wandb"},
    ),
    ("evaluations", {"alignment", "loss"}, set()),
    ("training", {"interpolant", "evaluations", "sampling", "preprocessing", "models.vae"}, {"diffusers"}),
    ("train", {"interpolant", "loss"}, set()),
    ("train_guide", {"interpolant", "loss", "train"}, set()),
    ("generate", {"interpolant", "loss", "train", "train_guide", "training", "alignment"}, set()),
    ("recipes", set(), set()),
    ("benchmarks", set(), set()),
]
PARTS = [name for name, _, _ in FLOORS]
SHARED = {"__init__", "base", "interval", "external", "release", "weights"}  # by the objectives
OBJECTIVES = {file.stem for file in (ROOT / "alignment").glob("*.py")} - SHARED


def files(pattern: str) -> list[Path]:
    """The files of the project that match `pattern`, without results and without what runs leave behind."""
    parts = [part for part in ROOT.iterdir() if part.name not in ("results", "runs", "work", "exps")]
    ours = [file for part in parts if part.name[0] != "." for file in (part, *part.rglob("*")) if file.match(pattern)]
    return sorted(file for file in ours if ROOT / "benchmarks" / "results" not in file.parents)


def name_of(file: Path) -> str:
    """The dotted name under which `file` is imported."""
    return ".".join(part for part in file.relative_to(ROOT).with_suffix("").parts if part != "__init__")


MODULES = {name_of(file): file for file in files("*.py") if file.relative_to(ROOT).parts[0] != "tests"}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything that a file imports, for type checking too; a name of ours is that of its module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names


TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}
IMPORTS = {name: imports(tree) for name, tree in TREES.items()}


def within(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def upward(part: str, imported: str) -> bool:
    """Whether `imported` lies on a floor above `part`, or is an exception that `part` must not import."""
    place = PARTS.index(part)
    own = imported.split(".")[0]
    return own != part and (own in PARTS[place:] or within(imported, FLOORS[place][1] | FLOORS[place][2]))


def test_every_part_has_a_floor_and_every_floor_a_part() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(PARTS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down(name: str) -> None:
    wrong = sorted(imported for imported in IMPORTS[name] if upward(name.split(".")[0], imported))
    assert not wrong, f"{name} must not import {wrong}"


def test_the_rule_notices_an_import_that_runs_up() -> None:
    tree = ast.parse(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from training.run import Run\nimport alignment.latent"
    )
    assert {imported for imported in imports(tree) if upward("models", imported)} == {
        "training.run",
        "alignment.latent",
    }
    assert (
        upward("dataset", "models.backbone") and not upward("dataset", "models.latents") and upward("config", "torch")
    )


def test_no_two_parts_import_each_other_and_no_files_go_in_a_circle() -> None:
    internal = {
        name: {imported for imported in imported_names if imported in MODULES and imported != name}
        for name, imported_names in IMPORTS.items()
    }
    arrows = {
        (name.split(".")[0], imported.split(".")[0]) for name, targets in internal.items() for imported in targets
    }
    assert not [pair for pair in arrows if pair[0] != pair[1] and pair[::-1] in arrows]
    # Kahn's algorithm: remove files that import nothing that is left, until there are no such files.
    while free := {name for name, targets in internal.items() if not targets}:
        internal = {name: targets - free for name, targets in internal.items() if name not in free}
    assert not internal, f"circles among {sorted(internal)}"


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_do_not_know_each_other(name: str) -> None:
    assert not IMPORTS[f"alignment.{name}"] & {f"alignment.{other}" for other in OBJECTIVES}


COMMANDS = sorted(
    name
    for name, file in MODULES.items()
    # the help of training lists networks and methods, which need torch
    if "errors.run(main)" in file.read_text() and name.split(".")[0] not in ("train", "train_guide", "benchmarks")
)

START = """
import importlib, sys
for name in sys.argv[1:]:
    main = importlib.import_module(name).main
    for words in (["--help"], ["--nonsense"]):
        try:
            main(words)
        except (SystemExit, Exception) as end:
            print(type(end).__name__, end)
        assert "torch" not in sys.modules, name
"""


def test_commands_read_their_options_before_they_import_torch() -> None:
    """`--help` and a wrong option answer at once: torch, whose import takes seconds, comes when the work begins."""
    assert len(COMMANDS) > 15
    result = subprocess.run(
        [sys.executable, "-c", START, *COMMANDS], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--nonsense") == len(COMMANDS), result.stdout


NEWER = """
import datetime, tomllib, warnings
def newer() -> None:
    with warnings.catch_warnings(action="ignore"):
        print(datetime.UTC, tomllib)
"""


def test_the_types_check_finds_what_the_lowest_python_lacks() -> None:
    """README promises Python 3.10; all three came with 3.11, one of them as an argument of an older function."""
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "-c", NEWER], capture_output=True, text=True, cwd=ROOT, check=False
    )
    for lack in ('"tomllib"', '"action"', '"UTC"'):
        assert re.search(f"error: .*{lack}", result.stdout), result.stdout


@pytest.mark.parametrize("name", sorted(MODULES))
def test_functions_stay_short(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{name}.{node.name} is longer than 60 lines"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_bans(name: str) -> None:
    """No draw from a global generator, no unpickling, no blanket except, no process groups of our own."""
    text = MODULES[name].read_text()
    for word in (
        "np.random.seed",
        "random.seed(",
        "np.random.rand",
        "torch.distributed",
        "except Exception",
        "except:",
        "weights_only=False",
        "pickle.load",
    ):
        # no error of a tracker ends a run
        assert word not in text or (word, name) == ("except Exception", "training.tracker"), f"{name} has {word}"
    assert "torch.manual_seed(" not in text or "torch.random.fork_rng()" in text, f"{name} moves the global generator"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.randn",
            "torch.rand",
            "torch.randint",
            "torch.randperm",
        ):
            assert any(keyword.arg == "generator" for keyword in node.keywords), f"{name}:{node.lineno} draws globally"


# Phrases that must be read twice, and variable names that say nothing. The dots keep the list from finding itself.
PHRASES = "t.old|d.oubts?|m.end(?:s|ed)?|hold_.in|by h.eart|for w.ant of|in so m.any words|to be h.ad|what to s.ay of"
NEGATIONS = "(?:is|are) n.one"  # in this case of letters only: `x is None` is Python
PLAIN = re.compile(rf"(?<!\w)(?:(?i:{PHRASES})|{NEGATIONS})(?!\w)".replace(".", ""))
VAGUE = {"one", "found", "said", "kept", "mine", "theirs", "t" + "old"}


def vague_names(tree: ast.AST) -> Iterator[str]:
    """Vague names among the variables and parameters of a file. The fields of a TypedDict are keys of a format."""
    keys = {
        id(line.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "TypedDict" in map(ast.unparse, node.bases)
        for line in node.body
        if isinstance(line, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in keys
        name = node.id if stored else node.arg if isinstance(node, ast.arg) else None
        if name in VAGUE:
            yield f"{node.lineno}: variable {name}"


def test_plain_words() -> None:
    """Plain English in code, tests and pages; quotations (lines that begin with ">") are left alone."""
    places = []
    for file in [*files("*.py"), *files("*.md")]:
        text = file.read_text()
        lines = [f"{number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if line[:1] != ">"]
        places += [f"{file.relative_to(ROOT)}:{line}" for line in lines if PLAIN.search(line)]
        if file.suffix == ".py":
            places += [f"{file.relative_to(ROOT)}:{name}" for name in vague_names(ast.parse(text))]
    assert not places, "\n".join([f"{len(places)} places:", *places])
