"""``make demo`` with a small budget: the whole job by the commands that it prints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from oracles.html_page import Page

from retemper.tools.demo import run as demo_run
from retemper.tools.demo.run import Command, Demo

TRAINER = """
import json, pathlib, time
from retemper.engine.weights.checkpoint.manifest import Manifest, write_manifest

run = pathlib.Path("runs/with_replay")
(run / "checkpoints").mkdir(parents=True)
(run / "hf" / "step-00000005").mkdir(parents=True)
with (run / "metrics.jsonl").open("w", buffering=1) as file:
    for step in range(6):
        for name, loss in (("domain", 3.0 - step / 10), ("general", 2.0 + step / 10)) if step in (0, 5) else ():
            file.write(json.dumps({"step": step, "tokens": 10 * step, "evaluation": name, "loss": loss}) + "\\n")
        if step:
            file.write(json.dumps({"step": step, "tokens": 10 * step, "loss": 3.0 - step / 10}) + "\\n")
        if step == 3:
            folder = run / "checkpoints" / "step-00000003"
            folder.mkdir()
            config = {"training": {"sequence_length": 10}}
            write_manifest(folder, Manifest("training", step=3, consumed_tokens=30, config=config))
time.sleep(600)
"""
"""Stands for the trainer: it has trained past a checkpoint."""

ROOT = Path(__file__).parents[1]


def _run_demo(folder, *options):
    command = [sys.executable, str(ROOT / "tools" / "demo" / "run.py"), "--folder", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_is_killed_past_a_checkpoint_and_reported(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(TRAINER)
    monkeypatch.setattr(Demo, "program", lambda demo, name: tmp_path / f"{name}.py")
    demo = Demo(tmp_path, [Command("retemper first", 4.25)])
    assert demo_run.run_and_kill(demo, ("retemper", "train")) in (40, 50)
    folder = tmp_path / "runs" / "with_replay"
    shutil.copytree(folder, tmp_path / "runs" / "without_replay")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    written = {"base_hf": "the <array>", "step-00000005": "return x"}
    monkeypatch.setattr(demo_run, "generate", lambda path: [written[path.name]] * len(demo_run.PROMPTS))
    demo_run.write_samples(demo)
    summary = demo_run.write_page(demo)
    assert "domain loss fell by 0.500 nats (-16.7 %): learned" in summary
    assert "general loss rose by 0.500 nats (+25.0 %): forgotten" in summary
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    page.require_self_contained()
    assert "retemper first 4.2 s retemper train # killed" in page.text and "all commands" in page.text
    assert "before without replay with replay domain 3.000 2.500 2.500" in page.text
    assert "before (step 0) The function returns the <array> after (step 5) The function returns return x" in page.text
    assert f"Python {sys.version_info.major}." in page.text and "step-00000003" in page.text


@pytest.mark.slow
def test_the_demo_runs_end_to_end(tmp_path):
    folder = tmp_path / "demo"
    run = _run_demo(folder, "--base-tokens", "40960", "--train-tokens", "122880")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "killed after" in run.stdout and "resumed from runs/with_replay/checkpoints/step-" in run.stdout
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")
    losses = {name: _losses(folder / "runs" / name) for name in ("with_replay", "without_replay")}
    for found in losses.values():
        assert found["domain"][-1] < found["domain"][0] - 0.2
    assert losses["with_replay"]["general"][-1] < losses["without_replay"]["general"][-1] - 0.05
    again = _run_demo(folder)
    assert again.returncode == 1 and "exists; remove it" in again.stderr


def _losses(folder: Path) -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        if name := (record := json.loads(line)).get("evaluation"):
            losses.setdefault(name, []).append(record["loss"])
    return losses
