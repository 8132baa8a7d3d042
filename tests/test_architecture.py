"""The house rules that a machine can check: who may import whom, where randomness and distribution live."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

# From the ground up, a part a line: it may import the parts above its line and itself, and of the rest nothing; the second
# entry is what it must not know although it stands above, the third which libraries.
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
OBJECTIVES = {file.stem for file in (ROOT / "alignment").glob("*.py")} - {"__init__", "base", "interval", "external"}


def sources() -> list[Path]:
    """Every file of the project; what runs leave behind is not part of it."""
    return sorted(
        file
        for file in ROOT.glob("**/*.py")
        if file.relative_to(ROOT).parts[0] not in ("tests", "runs", "work", "exps")
        and not any(part.startswith(".") for part in file.relative_to(ROOT).parts)
    )


def name_of(file: Path) -> str:
    """The dotted name under which `file` is imported."""
    return ".".join(part for part in file.relative_to(ROOT).with_suffix("").parts if part != "__init__")


MODULES = {name_of(file): file for file in sources()}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that a file imports anywhere in it, those for type checking among them; modules where they are ours."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found


TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}
IMPORTS = {name: imports(tree) for name, tree in TREES.items()}


def within(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def upward(part: str, imported: str) -> bool:
    """Whether `imported` lies on a floor above `part`, or is what `part` must not know."""
    place = PARTS.index(part)
    own = imported.split(".")[0]
    return own != part and (own in PARTS[place:] or within(imported, FLOORS[place][1] | FLOORS[place][2]))


def test_every_part_has_a_floor_and_every_floor_a_part() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(PARTS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down(name: str) -> None:
    wrong = sorted(imported for imported in IMPORTS[name] if upward(name.split(".")[0], imported))
    assert not wrong, f"{name} must not know {wrong}"


def test_the_rule_sees_an_arrow_that_runs_back_up() -> None:
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
    arrows = {
        (name.split(".")[0], imported.split(".")[0])
        for name, found in IMPORTS.items()
        for imported in found
        if imported in MODULES
    }
    assert not [pair for pair in arrows if pair[0] != pair[1] and pair[::-1] in arrows]
    left = {
        name: {imported for imported in found if imported in MODULES and imported != name}
        for name, found in IMPORTS.items()
    }
    while free := [name for name, found in left.items() if not found]:  # Kahn: what imports nothing that is left can go
        left = {name: found - set(free) for name, found in left.items() if name not in free}
    assert not left, f"circles among {sorted(left)}"


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_do_not_know_each_other(name: str) -> None:
    assert not IMPORTS[f"alignment.{name}"] & {f"alignment.{other}" for other in OBJECTIVES}


def test_the_root_holds_what_a_newcomer_looks_for() -> None:
    assert {file.stem for file in ROOT.glob("*.py")} == {
        "train",
        "train_guide",
        "generate",
        "loss",
        "dataset",
        "config",
        "interpolant",
    }


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
        assert word not in text, f"{name} has {word}"
    assert "torch.manual_seed(" not in text or "torch.random.fork_rng()" in text, f"{name} moves the global generator"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.randn",
            "torch.rand",
            "torch.randint",
            "torch.randperm",
        ):
            assert any(keyword.arg == "generator" for keyword in node.keywords), f"{name}:{node.lineno} draws globally"
