"""Paths as a POSIX shell expands them (the oracle is the shell), and names that do not exist refused."""

import subprocess

import pytest

from retemper.engine.errors import UserError
from retemper.engine.files.paths import expand_path


@pytest.mark.parametrize(
    "path",
    [
        "~",
        "~/runs/x",
        "$HOME/runs",
        "${DATA}/a",
        "a/$DATA/b$DATA",
        "~root/x",
        "a~b",
        "a/~/b",
        "org/name",
        "-",
        "100%",
        "",
    ],
)
def test_paths_are_expanded_as_a_shell_does(monkeypatch, tmp_path, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "some/where")
    shell = subprocess.run(["sh", "-c", f"printf %s {path}"], capture_output=True, text=True, check=True).stdout
    assert expand_path(path, "--input") == shell


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("$UNSET_HERE/x", "UNSET_HERE is not set"),
        ("~nobody-of-that-name/x", "no user 'nobody-of"),
        ("s3://bucket/run", "a URL, not a path"),
        ("file:///data/run", "a URL, not a path"),
        ("https://huggingface.co/Qwen/Qwen2-0.5B", "a URL, not a path"),
        ("${HOME:-/data}/x", r"\$\{\.\.\.\} is not expanded"),
        ("runs/$(date +%F)", r"\$\(\.\.\.\) is not expanded"),
    ],
)
def test_what_does_not_exist_is_refused(monkeypatch, path, reason):
    monkeypatch.delenv("UNSET_HERE", raising=False)
    with pytest.raises(UserError, match=reason):
        expand_path(path, "--input")
