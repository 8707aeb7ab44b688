"""``make demo`` with a small budget: the whole job by the commands that it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _run_demo(folder, *options):
    command = [sys.executable, str(ROOT / "tools" / "demo" / "run.py"), "--folder", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_demo_runs_end_to_end(tmp_path):
    folder = tmp_path / "demo"
    run = _run_demo(folder, "--base-tokens", "40960", "--train-tokens", "122880")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "killed after" in run.stdout and "resumed from runs/domain/checkpoints/step-" in run.stdout
    assert "domain loss fell by" in run.stdout
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (folder / "runs" / "domain" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record.get("evaluation") == "domain"]
    assert losses[-1] < losses[0] - 0.2
    again = _run_demo(folder)
    assert again.returncode == 1 and "exists; remove it" in again.stderr
