"""benchmarks/gpu_check.py: every command that it would run is understood, and what becomes of a stage that fails, hangs
or writes no result. Stages are scripts of a few lines here; the real ones need a GPU."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from retemper.benchmarks import gpu_check as check
from retemper.benchmarks import hardware_limits, peers
from retemper.benchmarks.kernel.names import KERNELS
from retemper.engine.errors import UserError
from retemper.tools import benchmark_kernels

ROOT = Path(__file__).parents[2]
PARSERS = {
    "tools/benchmark_kernels.py": benchmark_kernels.parse_arguments,
    "benchmarks/peers.py": peers.parse_arguments,
    "benchmarks/hardware_limits.py": hardware_limits.parse_arguments,
}


# --------------------------------------------------------------------------------------------------------------------
# The commands of a part


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("part", [1, 2])
def test_every_command_is_understood_and_ends_before_its_limit(tmp_path, part, dry_run):
    stages = check.stages(part, tmp_path, dry_run)
    assert len({stage.name for stage in stages}) == len(stages)
    # Stages beyond the time of the part are cut off, but each has some of it if all before it need theirs.
    assert sum(stage.limit_seconds for stage in stages[:-1]) + check.LEAST_SECONDS < check.PART_SECONDS <= 600
    for stage in stages:
        python, script, *arguments = stage.command
        assert python == sys.executable
        if script == "-m":
            assert arguments[0] == "pytest" and all(
                (ROOT / name).exists() for name in arguments if name.endswith(".py")
            )
            continue
        assert (ROOT / script).exists()
        options = PARSERS[script](arguments)
        if script == "tools/benchmark_kernels.py":
            assert options.time_limit < stage.limit_seconds
        if script == "benchmarks/peers.py":
            assert options.total_time < stage.limit_seconds and peers.asked_engines(options)[0] == peers.OURS
            # What decides whether our step has succeeded is read from where the command writes it.
            options.json.write_text(json.dumps({"rows": [{"engine": peers.OURS, "rate": 1.0}]}))
            assert check.our_step_problem(stage.name, tmp_path) is None


def test_all_gpu_tests_and_all_kernels_are_checked(tmp_path):
    stages = check.stages(1, tmp_path, False)
    files = {ROOT / name for stage in stages for name in stage.command if name.startswith("tests")}
    # Put together here, so that this file has no such text.
    assert files == {path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark." + "gpu" in path.read_text()}
    scripts = [stage.command for stage in stages if stage.command[1] == "tools/benchmark_kernels.py"]
    named = ",".join(benchmark_kernels.parse_arguments(command[2:]).kernels for command in scripts)
    assert sorted(named.split(",")) == sorted(KERNELS)


# --------------------------------------------------------------------------------------------------------------------
# One stage


def script(name, source, limit=30.0, checks=True, **more):
    return check.CheckStage(name, [sys.executable, "-S", "-c", source], limit, checks, **more)


@pytest.mark.parametrize(
    ("code", "benign", "state"), [(0, (0,), "ok"), (5, (0,), "failed"), (5, (0, 5), "ok"), (1, (0, 5), "failed")]
)
def test_a_stage_ends_as_its_exit_code_says(tmp_path, code, benign, state):
    source = f"import sys; print('out'); print('err', file=sys.stderr); sys.exit({code})"
    outcome = check.run_stage(script("kernels: a,b", source, benign_codes=benign), tmp_path, 100.0)
    assert (outcome.exit_code, outcome.state, outcome.checks) == (code, state, True)
    assert sorted(outcome.tail.split()) == ["err", "out"] and "sys.exit" in outcome.command
    assert sorted((tmp_path / "kernels_a-b.log").read_text().split()) == ["err", "out"]


def test_only_the_end_of_a_long_output_is_shown(tmp_path):
    outcome = check.run_stage(script("long", "print('x' * 50000 + 'end')"), tmp_path, 100.0)
    assert len(outcome.tail) == check.RECENT and outcome.tail.rstrip().endswith("end")
    assert len((tmp_path / "long.log").read_text()) > 50000


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "LEAST_SECONDS", 0.5)
    source = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("started", flush=True)
time.sleep(60)
"""
    stage = check.CheckStage("hang", [sys.executable, "-S", "-c", source, str(tmp_path / "pid")], 100.0, False)
    # Long enough for it to start its child, on a machine that is busy with much else as well.
    for seconds in (1.0, 4.0, 16.0, 64.0):
        outcome = check.run_stage(stage, tmp_path, seconds)
        if outcome.tail:
            break
    assert (outcome.exit_code, outcome.state, outcome.tail.strip()) == (None, "timed out", "started")
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.02)


def test_without_time_a_stage_is_not_started(tmp_path):
    outcome = check.run_stage(script("late", "print('ran')"), tmp_path, 4.0)
    assert outcome.state == "no time left" and not (tmp_path / "late.log").exists()


# --------------------------------------------------------------------------------------------------------------------
# A part

STEP = "step: tiny"
WRITE = "import json, pathlib; pathlib.Path({path!r}).write_text(json.dumps({{'rows': {rows!r}}}))"


def run_part(monkeypatch, output, make_stages, *options):
    monkeypatch.setattr(check, "stages", lambda part, folder, dry_run: make_stages(folder))
    code = check.main(["--part", "2", "--dry-run", "--output", str(output), *options])
    return code, json.loads((output / "summary_part2.json").read_text()), (output / "summary_part2.md").read_text()


def test_stages_run_in_order_and_a_failing_one_stops_none(monkeypatch, tmp_path, capsys):
    trace = tmp_path / "trace"

    def make_stages(folder):
        def stage(name, code, checks):
            source = f"import sys; open({str(trace)!r}, 'a').write('{name} '); print('I am {name}'); sys.exit({code})"
            return script(name, source, checks=checks)

        return [stage("machine", 1, False), stage("tests", 3, True), stage("kernels", 0, True)]

    code, record, text = run_part(monkeypatch, tmp_path / "out", make_stages)
    assert code == 1 and trace.read_text().split() == ["machine", "tests", "kernels"]
    assert record["settings"]["part"] == 2 and record["summary"]["problems"] == ["tests: failed"]
    assert [(stage["name"], stage["state"], stage["exit_code"]) for stage in record["rows"]] == [
        ("machine", "failed", 1),
        ("tests", "failed", 3),
        ("kernels", "ok", 0),
    ]
    assert "- FAILED: tests: failed" in text and "passed" not in text
    assert all(f"## {name}\n" in text and f"I am {name}" in text for name in ("machine", "tests", "kernels"))
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("checks", [True, False])
def test_only_checks_of_correctness_fail_a_part(monkeypatch, tmp_path, checks):
    code, record, text = run_part(
        monkeypatch, tmp_path, lambda _: [script("stage", "raise SystemExit(1)", checks=checks)]
    )
    assert (code, bool(record["summary"]["problems"])) == (int(checks), checks)
    assert ("All checks of correctness passed." in text) is not checks


def test_a_check_without_time_fails_the_part(monkeypatch, tmp_path):
    code, record, _ = run_part(monkeypatch, tmp_path, lambda _: [script("a", "")], "--seconds", "1")
    assert code == 1 and record["summary"]["problems"] == ["a: no time left"]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"engine": "trainer", "problem": "out of memory"}, {"engine": "retemper", "rate": 1.0}], None),
        ([{"engine": "trainer", "rate": 1.0}, {"engine": "retemper", "problem": "refused"}], "retemper: refused"),
        ([{"engine": "trainer", "rate": 1.0}], "retemper: not run"),
        (None, "no result was written"),
    ],
)
def test_a_step_stands_or_falls_with_our_engine(monkeypatch, tmp_path, rows, problem):
    path = tmp_path / "step_tiny.json"
    # Of a run before this one; it must not stand for this one.
    path.write_text(json.dumps({"rows": [{"engine": "retemper", "rate": 1.0}]}))
    (tmp_path / "summary_part2.md").touch()
    source = "" if rows is None else WRITE.format(path=str(path), rows=rows)
    code, record, text = run_part(
        monkeypatch, tmp_path, lambda _: [script(STEP, source + "\nraise SystemExit(1)", checks=False)]
    )
    assert code == (problem is not None)
    assert record["summary"]["problems"] == ([] if problem is None else [f"{STEP}: {problem}"])
    assert problem is None or f"- FAILED: {STEP}: {problem}" in text


def test_a_folder_of_others_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "summary_part2.json").write_text("mine")
    with pytest.raises(UserError, match="holds no results of this command"):
        run_part(monkeypatch, tmp_path, lambda _: [])
    assert (tmp_path / "summary_part2.json").read_text() == "mine"


def test_the_summary_is_written_after_every_stage(monkeypatch, tmp_path):
    path = tmp_path / "summary_part2.json"
    source = f"import json; print(len(json.load(open({str(path)!r}))['rows']))"
    _, record, _ = run_part(monkeypatch, tmp_path, lambda _: [script("first", ""), script("second", source)])
    assert record["rows"][1]["tail"].strip() == "1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert check.main(["--part", "1", "--output", str(tmp_path / "out")]) == 1
    assert "--dry-run" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [1, 2])
def test_the_list_has_every_command_and_runs_none(tmp_path, capsys, part):
    output = tmp_path / "out"
    assert check.main(["--part", str(part), "--list", "--output", str(output)]) == 0
    listed = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
    assert listed == [stage.command for stage in check.stages(part, output, False)]
    assert not output.exists()


def test_make_starts_it():
    """``make -n`` prints the command; its options are those of the script."""
    printed = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu-check", "PART=2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(printed.stdout)
    assert (ROOT / words[1]).samefile(check.__file__) and words[words.index("--part") + 1] == "2"
