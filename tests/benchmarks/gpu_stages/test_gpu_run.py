"""What becomes of stages that fail, hang or write no result, and of a command that is ended. Stages are scripts of a
few lines here; the real ones need a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest
import torch

from retemper.benchmarks import gpu_check
from retemper.benchmarks.gpu_stages import run as run_module
from retemper.benchmarks.gpu_stages.plan import Setting, Stage, part_folder
from retemper.benchmarks.gpu_stages.run import PartRun
from retemper.benchmarks.gpu_stages.sensors import FIELDS, Sensors
from retemper.benchmarks.report import BenchmarkReport
from retemper.engine.errors import UserError

ROOT = Path(__file__).parents[3]
NO_GPU = ["/nonexistent/nvidia-smi"]


def script(name, source, limit=30.0, kind="ceilings", **more):
    return Stage(name, kind, [sys.executable, "-S", "-c", textwrap.dedent(source)], limit, **more)


def writes(path, report):
    return f"import pathlib; pathlib.Path({str(path)!r}).write_text({json.dumps(report)!r})\n"


@pytest.fixture
def run_part(tmp_path, monkeypatch):
    """Run a part of given stages; return its problems, its record and its table."""

    def run(*found, seconds=100.0, sensors=NO_GPU):
        monkeypatch.setattr(run_module, "stages", lambda part, setting: list(found))
        monkeypatch.setattr(run_module, "RESERVE_SECONDS", 0.0)
        output = tmp_path / "out"
        output.mkdir(exist_ok=True)
        report = BenchmarkReport("command", {}, {})
        part = PartRun(2, Setting(tmp_path / "work", None), output, seconds, report, Sensors(sensors, 0.1))
        problems = part.run()
        return problems, json.loads((output / "part2.json").read_text()), (output / "part2.md").read_text()

    return run


def test_stages_run_in_order_and_a_failing_one_stops_none(run_part, tmp_path):
    trace = tmp_path / "trace"

    def stage(name, code, checks):
        source = f"import sys; open({str(trace)!r}, 'a').write('{name} '); print('I am {name}'); sys.exit({code})"
        return script(name, source, checks=checks)

    problems, record, text = run_part(stage("one", 1, False), stage("two", 3, True), stage("three", 0, True))
    assert trace.read_text().split() == ["one", "two", "three"]
    assert problems == record["summary"]["problems"] == ["two: failed"]
    assert [(row["name"], row["state"], row["exit_code"]) for row in record["rows"]] == [
        ("one", "failed", 1),
        ("two", "failed", 3),
        ("three", "ok", 0),
    ]
    assert "- FAILED: two: failed" in text and "I am two" in text and "I am three" not in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["part2.json", "part2.md", "part2.tar.gz"]
    with tarfile.open(tmp_path / "out" / "part2.tar.gz") as archive:
        assert {"part2/one.log", "part2/three.log", "part2/sensors.json"} <= set(archive.getnames())


@pytest.mark.parametrize(("code", "benign", "state"), [(5, (0,), "failed"), (5, (0, 5), "ok"), (1, (0, 5), "failed")])
def test_a_stage_ends_as_its_exit_code_says(run_part, code, benign, state):
    _, record, _ = run_part(script("one", f"raise SystemExit({code})", benign_codes=benign))
    assert record["rows"][0]["state"] == state


def test_only_the_end_of_a_long_output_is_recorded(run_part, tmp_path):
    _, record, _ = run_part(script("long", "print('x' * 50000 + 'end')"))
    assert len(record["rows"][0]["tail"]) == run_module.TAIL and record["rows"][0]["tail"].rstrip().endswith("end")
    assert len((part_folder(tmp_path / "work", 2) / "long.log").read_text()) > 50000


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(run_part, monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "LEAST_SECONDS", 0.5)
    monkeypatch.setattr(run_module, "WRITE_SECONDS", 0.1)
    pid = tmp_path / "pid"
    source = f"""
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)"])
        pathlib.Path({str(pid)!r}).write_text(str(child.pid))
        print("started", flush=True)
        time.sleep(1000)
    """
    # Long enough for it to start its child, on a machine that is busy with much else as well.
    for seconds in (1.0, 4.0, 16.0, 64.0):
        problems, record, _ = run_part(script("hang", source, seconds, checks=True))
        if record["rows"][0]["tail"]:
            break
    assert (record["rows"][0]["state"], record["rows"][0]["exit_code"]) == ("timed out", None)
    assert problems == ["hang: timed out"]
    child = Path(f"/proc/{pid.read_text()}/stat")
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.02)


def test_without_time_a_stage_is_not_started(run_part, tmp_path):
    problems, record, _ = run_part(script("late", "print('ran')", checks=True), seconds=4.0)
    assert record["rows"][0]["state"] == "no time left" and problems == ["late: no time left"]
    assert not (part_folder(tmp_path / "work", 2) / "late.log").exists()


def test_a_stage_may_use_the_time_that_others_left_and_is_told_its_limit(run_part):
    stages = [script("short", "", 30.0), script("fixed", "", 20.0, is_fixed=True), script("long", "", 10.0)]
    stages[2].command.append("{seconds}")
    _, record, _ = run_part(*stages, seconds=1000.0)
    limits = [row["limit_seconds"] for row in record["rows"]]
    assert limits[:2] == [pytest.approx(30, abs=0.1), 20] and 55 < limits[2] < 60
    assert float(record["rows"][2]["command"].split()[-1]) == pytest.approx(limits[2] - run_module.END_SECONDS, abs=0.1)


def test_a_stage_that_needs_longer_takes_no_time_of_the_next(run_part, monkeypatch):
    monkeypatch.setattr(run_module, "LEAST_SECONDS", 0.1)
    _, record, _ = run_part(script("slow", "import time; time.sleep(30)", 0.5), script("next", "", 20.0))
    assert record["rows"][0]["state"] == "timed out"
    assert record["rows"][1]["limit_seconds"] == 20 and record["rows"][1]["state"] == "ok"


def test_what_a_stage_has_written_is_kept_while_it_runs(run_part, monkeypatch, tmp_path):
    """Killed at any moment, the command leaves the stages before, and what the running one has written so far."""
    monkeypatch.setattr(run_module, "WRITE_SECONDS", 0.05)
    report = {"rows": [], "summary": {"breakdown_seconds": {"data": 0.001}}}
    path = part_folder(tmp_path / "work", 2) / "second.json"
    seen = f"""
        import json, time
        while True:
            rows = json.load(open({str(tmp_path / "out" / "part2.json")!r}))["rows"]
            if rows[-1]["name"] == "second" and rows[-1]["result"]:
                break
            time.sleep(0.02)
        print(rows[0]["state"], rows[1]["state"], rows[1]["headline"])
    """
    source = writes(path, report) + textwrap.dedent(seen)
    _, record, _ = run_part(script("first", ""), script("second", source, kind="profile"))
    assert record["rows"][1]["tail"].strip() == "ok running data 1.0 ms" and record["rows"][1]["state"] == "ok"
    assert record["rows"][1]["result"] == report


def test_a_report_that_cannot_be_read_stops_nothing(run_part, tmp_path):
    folder = part_folder(tmp_path / "work", 2)
    broken = script("broken", writes(folder / "broken.json", {"rows": [{"unknown": 1}]}), kind="step", checks=True)
    half = script("half", f"open({str(folder / 'half.json')!r}, 'w').write('{{\"rows\": [')", kind="step")
    problems, record, _ = run_part(broken, half, script("last", ""))
    assert [row["state"] for row in record["rows"]] == ["ok", "ok", "ok"]
    assert problems == ["broken: cannot be read: KeyError: 'settings'"] and record["rows"][1]["result"] is None


def test_an_old_result_does_not_count(run_part, tmp_path):
    folder = part_folder(tmp_path / "work", 2)
    folder.mkdir(parents=True)
    (folder / "step.json").write_text(json.dumps({"rows": [{"engine": "retemper", "rate": 1.0}]}))
    problems, _, _ = run_part(script("step", "", kind="step", checks=True))
    assert problems == ["step: retemper: no result was written"]


def test_clocks_and_power_of_each_stage_are_recorded(run_part):
    readings = ["1980", "3201", "650.25", "[N/A]", "97", "70000"]
    assert len(readings) == len(FIELDS)
    fake = [sys.executable, "-S", "-c", f"print({', '.join(readings)!r})"]
    _, record, text = run_part(script("one", "import time; time.sleep(1)"), sensors=fake)
    gpu = record["rows"][0]["gpu"]
    assert gpu["power_watts"] == {"least": 650.25, "median": 650.25, "most": 650.25} and "celsius" not in gpu
    assert "1980 (1980 to 1980)" in text
    _, record, text = run_part(script("one", ""))
    assert record["rows"][0]["gpu"] == "not available" and "not available" in text


# --------------------------------------------------------------------------------------------------------------------
# The command

ENDED = """
import sys
sys.path.insert(0, {benchmarks!r})
import retemper
from retemper.benchmarks import gpu_check
from retemper.benchmarks.gpu_stages import run
from retemper.benchmarks.gpu_stages.plan import Stage
from retemper.engine.errors import run_command
code = "import os, pathlib, time; pathlib.Path({pid!r}).write_text(str(os.getpid())); time.sleep(100)"
sleep = [sys.executable, "-S", "-c", code]
found = [Stage("first", "ceilings", [sys.executable, "-S", "-c", ""], 30.0), Stage("second", "ceilings", sleep, 60.0)]
run.stages = lambda part, setting: found
run_command(lambda: gpu_check.main(["--rehearse", "--output", {output!r}, "--work", {work!r}]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_command_leaves_the_finished_stages(tmp_path, number):
    pid, output = tmp_path / "pid", tmp_path / "out"
    names = {"benchmarks": ROOT / "benchmarks", "pid": pid, "output": output, "work": tmp_path / "work"}
    code = ENDED.format(**{name: str(path) for name, path in names.items()})
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        while not pid.exists() or not pid.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(30)
        rows = json.loads((output / "part1.json").read_text())["rows"]
        assert rows[0]["name"] == "first" and rows[0]["state"] == "ok"
        if number == signal.SIGTERM:  # it ends the stage, too
            assert [row["state"] for row in rows] == ["ok", "interrupted"] and process.returncode == 130
            assert not (output / "part2.json").exists()
            assert not Path(f"/proc/{pid.read_text()}").exists()
    finally:
        if number == signal.SIGKILL:
            os.kill(int(pid.read_text()), signal.SIGKILL)


def test_other_files_are_not_replaced(tmp_path):
    (tmp_path / "part2.json").write_text("mine")
    with pytest.raises(UserError, match="is not a report of this command"):
        gpu_check.main(["--rehearse", "--part", "2", "--output", str(tmp_path), "--work", str(tmp_path / "work")])
    assert (tmp_path / "part2.json").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check.packages, "missing", lambda: [])
    assert gpu_check.main(["--part", "1", "--output", str(tmp_path / "out")]) == 1
    assert "--rehearse" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_missing_packages_are_named_before_time_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.packages, "missing", lambda: ["orjson"])
    with pytest.raises(UserError, match="not installed: orjson; name a folder of their wheels with --wheels"):
        gpu_check.main(["--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="holds no wheels"):
        gpu_check.main(["--output", str(tmp_path / "out"), "--wheels", str(tmp_path)])
    with pytest.raises(UserError, match="--seconds -1"):
        gpu_check.main(["--seconds", "-1"])
