"""``retemper launch``: the scripts and manifests of launch/, and a copy of one that finds the installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import retemper
from retemper.engine.errors import UserError
from retemper.tools import launch_scripts

ROOT = Path(retemper.__file__).resolve().parent
# Answers the question for the package as Python does, and records all other arguments.
PYTHON = f"""#!/usr/bin/env bash
[[ $1 != -c ]] || exec {sys.executable} "$@"
printf '%s\\n' "$@" > "$RECORD"
"""


def test_every_script_is_listed_with_its_purpose(capsys):
    launch_scripts.main([])
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    in_folder = {path.name for path in (ROOT / "launch").iterdir() if path.is_file()}
    assert set(rows) == in_folder - {"retemper.py", "quiet_torchrun.py"}


def test_a_file_is_shown_and_its_path_printed(capsys):
    for command in ("show", "path"):
        launch_scripts.main([command, "slurm.sh"])
    content = (ROOT / "launch" / "slurm.sh").read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"{content}{ROOT / 'launch' / 'slurm.sh'}\n"
    with pytest.raises(UserError, match=r"one_node\.sh.*--help"):
        launch_scripts.main(["show", "slrm.sh"])


@pytest.mark.parametrize("script", ["one_node.sh", "many_nodes.sh"])
def test_a_copy_runs_the_installed_package(script, tmp_path, capsys):
    launch_scripts.main(["copy", script, str(tmp_path / "mine.sh")])
    assert capsys.readouterr().out == f"{tmp_path / 'mine.sh'}\n"
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    settings = {"PYTHON": str(tmp_path / "python"), "RECORD": str(tmp_path / "record"), "NNODES": "2"}
    environment = {**os.environ, **settings, "RDZV_ENDPOINT": "node0:29400"}
    subprocess.run([tmp_path / "mine.sh", "--config", "x.yaml"], env=environment, cwd=tmp_path, check=True)
    arguments = (tmp_path / "record").read_text().split()
    assert arguments[-2:] == ["--config", "x.yaml"]
    found = [Path(arguments[0]).resolve(), Path(arguments[-3]).resolve()]
    assert found == [ROOT / "launch" / "quiet_torchrun.py", ROOT / "engine" / "pretrain.py"]


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch_scripts.main(["copy", "slurm.sh"])
    for arguments, said in ((["slurm.sh"], "exists already"), (["one_node.sh", "none/x.sh"], "none does not exist")):
        with pytest.raises(UserError, match=said):
            launch_scripts.main(["copy", *arguments])
