"""What a clean checkout needs: the lock file, and the workflow that runs the checks."""

from __future__ import annotations

import re
import subprocess

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT


def requirements(name: str) -> dict[str, Requirement]:
    """The requirements in a file, by name."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line and not line.startswith("-r ")]
    return {canonicalize_name(requirement.name): requirement for requirement in wanted}


def test_the_lock_holds_one_version_of_all_that_is_required() -> None:
    locked = requirements("requirements.lock")
    versions = {name: str(next(iter(requirement.specifier))) for name, requirement in locked.items()}
    assert all(re.fullmatch(r"==[0-9][\w.]*", version) for version in versions.values())  # no local builds
    for file in ("requirements.txt", "requirements-dev.txt"):
        for name, requirement in requirements(file).items():
            assert name in locked, name
            assert requirement.specifier.contains(versions[name][2:], prereleases=True), name
    assert versions["torch"] != "==2.13.0"


def test_the_lock_names_no_place() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and " @ " not in text and "--" not in text.replace("\n# ", "")


def test_the_workflow_runs_the_check_of_a_clean_checkout() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 and subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert [line for line in script.read_text().splitlines() if line.startswith(("make", ".venv"))] == [
        "make lint",
        "make test",
        ".venv/bin/python -m recipes check",
        ".venv/bin/python -m recipes check --results results/second-processor",
    ]
