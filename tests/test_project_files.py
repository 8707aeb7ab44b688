"""Files around the code that can become wrong without an error: the wheel's contents, CI's targets, lists of pages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import retemper

ROOT = Path(__file__).parents[1]
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
CONTRIBUTING, SECURITY = ((ROOT / f"{name}.md").read_text("utf-8") for name in ("CONTRIBUTING", "SECURITY"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the tracked files, built in a copy of them: a build writes into the folder of its source."""
    pytest.importorskip("setuptools", minversion="77")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    program = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(output)!r}))"
    # Isolated: with the source on sys.path, its kernels/ would hide the package of that name.
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next(output.glob("*.whl")))


def test_the_wheel_has_the_type_marker_and_the_licence(wheel: zipfile.ZipFile) -> None:
    info = f"retemper-{retemper.__version__}.dist-info"
    names = set(wheel.namelist())
    assert {"retemper/py.typed", "retemper/engine/pretrain.py", f"{info}/licenses/NOTICE"} <= names
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    # Next to an expression, a classifier of a licence is an error for package indexes (PEP 639).
    assert "\nClassifier: License" not in metadata


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
