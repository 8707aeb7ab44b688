"""The whole GPU check, to the last line of both parts, with the packages of the GPU machine, and without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu_machine
import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", [1, 2])
def test_every_stage_runs_to_its_end(tmp_path, part):
    output = tmp_path / "out"
    command = [sys.executable, "benchmarks/gpu_check.py", "--rehearse", "--part", str(part), "--seconds", "3000"]
    command += ["--output", str(output), "--work", str(tmp_path / "work")]
    environment = gpu_machine.environment(tmp_path / "machine")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    record = json.loads((output / f"part{part}.json").read_text())
    assert {row["name"]: row["state"] for row in record["rows"]} == {row["name"]: "ok" for row in record["rows"]}
    assert all(row["headline"] for row in record["rows"]) and record["summary"]["problems"] == []
    assert all(row["gpu"]["power_watts"] for row in record["rows"])
    files = list(output.iterdir())
    assert len(files) <= 8 and (output / f"part{part}.md").read_text() in done.stdout.decode()
    with tarfile.open(output / f"part{part}.tar.gz") as archive:
        names = archive.getnames()
    assert part == 2 or "part1/0.5b-profile/trace.json.gz" in names
