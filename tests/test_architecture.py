"""The house rules that a machine can check: who may import whom, where randomness and distribution live."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"alignment", "config", "dataset", "errors", "evaluations", "files", "generate", "loss", "models", "path", "preprocessing",
        "progress", "recipes", "samplers", "samples", "sampling", "train", "train_guide", "training"}
BASICS = {"errors", "files", "config", "progress", "training.streams"}

# What each part may import of ours, beside itself and the basics. Entry points and recipes may import anything.
ALLOWED = {
    "errors": set(), "progress": set(), "files": {"errors"}, "config": {"errors"}, "path": set(), "training.streams": set(),
    "samplers": {"path"},
    "models": {"models", "training.checkpoint"},
    "dataset": {"models.latents"},
    "alignment": {"alignment", "models", "path"},
    "loss": {"alignment", "models", "path"},
    "sampling": {"samplers", "models"},
    "samples": {"sampling"},
    "training": {"training", "loss", "alignment", "dataset", "models", "sampling", "path", "evaluations"},
    "preprocessing": {"preprocessing", "dataset", "models", "training.launch"},
    "evaluations": {"evaluations", "dataset", "preprocessing", "models.latents", "training.launch"},
}
ENTRIES = {"train", "train_guide", "generate"}
EXCEPTIONS = {"models/convert.py", "evaluations/sweep.py"}  # commands: entry points that live in a package


def sources() -> list[Path]:
    return sorted(p for folder in (".", "alignment", "models", "training", "preprocessing", "evaluations")
                  for p in (ROOT / folder).glob("*.py"))


def imports(file: Path) -> set[str]:
    """Dotted names of ours that `file` imports at run time (not those for type checking alone)."""
    found = set()
    tree = ast.parse(file.read_text())
    typing_only = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
                   for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("file", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(file: Path) -> None:
    relative = str(file.relative_to(ROOT))
    part = file.stem if file.parent == ROOT else f"{file.parent.name}"
    if part in ENTRIES or relative in EXCEPTIONS:
        return
    key = "training.streams" if relative == "training/streams.py" else part
    allowed = (ALLOWED[key] | BASICS) if key not in ("errors", "path", "progress") else ALLOWED[key]
    wrong = [name for name in imports(file) if not any(name == ok or name.startswith(f"{ok}.") for ok in allowed)]
    assert not wrong, f"{relative} must not know {wrong}"


def test_config_and_errors_know_no_tensors() -> None:
    for name in ("config.py", "errors.py", "files.py"):
        tree = ast.parse((ROOT / name).read_text())
        top = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        assert "torch" not in top, name


@pytest.mark.parametrize("file", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_bans(file: Path) -> None:
    """No draw from a global generator, no unpickling, no blanket except, no process groups of our own."""
    text = file.read_text()
    for word in ("torch.manual_seed(", "np.random.seed", "random.seed(", "np.random.rand", "torch.distributed",
                 "except Exception", "except:", "weights_only=False", "pickle.load"):
        assert word not in text, f"{file.name} has {word}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.randn", "torch.rand", "torch.randint", "torch.randperm"):
            assert any(keyword.arg == "generator" for keyword in node.keywords), f"{file.name}:{node.lineno} draws globally"
