"""Files around the code that can become wrong without an error: CI's targets, lists of pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import retemper

ROOT = Path(__file__).parents[1]
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
CONTRIBUTING, SECURITY = ((ROOT / f"{name}.md").read_text("utf-8") for name in ("CONTRIBUTING", "SECURITY"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == retemper.__version__
    assert citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_make_targets_that_exist(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        target = re.fullmatch(r"make ([a-z-]+)", command)
        assert target and target[1] in MAKE_TARGETS, command


def test_ci_covers_lint_and_both_parts_of_the_suite() -> None:
    workflows = "".join(path.read_text("utf-8") for path in WORKFLOWS)
    assert set(re.findall(r"run: make ([a-z-]+)", workflows)) >= {"lint", "test", "test-slow"}


def test_pre_commit_runs_what_make_installs() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    for hook in repository["hooks"]:
        program, argument = hook["entry"].split()[:2]
        if program == "make":
            assert argument in MAKE_TARGETS
        else:
            assert re.search(rf"^{Path(program).name}==", lock, re.MULTILINE)


def test_what_contributors_and_the_security_policy_are_referred_to_exists() -> None:
    targets = re.findall(r"(?:^ {4}|`)make ([a-z-]+)", CONTRIBUTING, re.MULTILINE)
    assert len(targets) > 5 and set(targets) <= MAKE_TARGETS
    folders = "engine|kernels|tests|tools|checkpoint_convert|megatron_configs"
    paths = re.findall(rf"(?<![\w/.])(?:{folders})/[\w./]*", CONTRIBUTING + SECURITY)
    assert len(paths) > 10
    for name in paths:
        assert (ROOT / name).exists(), name
    names = {
        "engine/model/family_table.py": ("FAMILIES",),
        "engine/model/families.py": ("parse_decoder_architecture",),
        "engine/observe/observer.py": ("Observer",),
        "engine/observe/reporter.py": ("create_observers",),
    }
    for path, defined in names.items():
        for name in defined:
            assert name in CONTRIBUTING and name in (ROOT / path).read_text("utf-8")
