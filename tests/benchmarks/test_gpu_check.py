"""benchmarks/gpu_check.py: which commands a part runs, in which order, and what becomes of a stage that fails, hangs or
writes no result. Stages are scripts of a few lines here; the real ones need a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from retemper.benchmarks.kernel.names import KERNELS
from retemper.engine.errors import UserError
from retemper.tools import benchmark_kernels

ROOT = Path(__file__).parents[2]
STEPS = ["step: qwen2.5-0.5b", "step: qwen2.5-7b", "step: qwen2.5-0.5b-again"]


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check():
    return load("gpu_check")


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield load("peers")
    sys.path.remove(str(ROOT / "benchmarks"))


# --------------------------------------------------------------------------------------------------------------------
# The commands of a part


def test_part_1_tests_before_it_measures(check, tmp_path):
    stages = check.stages(1, tmp_path, False)
    assert [stage.name for stage in stages] == [
        "machine",
        "tests",
        "kernels: linear_cross_entropy",
        "kernels: attention",
        "kernels: rms_norm,rope,swiglu",
    ]
    assert [stage.checks for stage in stages] == [False, True, True, True, True]
    tests = stages[1].command
    assert tests[:5] == [sys.executable, "-m", "pytest", "-m", "gpu"]
    files = [name for name in tests if name.endswith(".py")]
    # Put together here, so that this file has no such text.
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark." + "gpu" in path.read_text()}
    assert files and {ROOT / name for name in files} == marked
    assert stages[1].benign_codes == (0,)


def test_part_1_measures_every_kernel_at_the_sizes_of_the_issue(check, tmp_path):
    kernels = []
    for stage in check.stages(1, tmp_path, False)[2:]:
        assert (
            stage.command[:2] == [sys.executable, "tools/benchmark_kernels.py"] and (ROOT / stage.command[1]).exists()
        )
        options = benchmark_kernels.parse_arguments(stage.command[2:])
        kernels += options.kernels.split(",")
        assert (options.sizes, options.device, options.no_compile) == ("issue", "cuda", False)
        assert options.time_limit < stage.limit_seconds
        assert options.json.parent == tmp_path and options.plot.parent == tmp_path
    assert sorted(kernels) == sorted(KERNELS)


def test_part_2_times_both_models_beside_their_peers(check, peers, tmp_path):
    machine, *steps = check.stages(2, tmp_path, False)
    assert machine.name == "machine" and [stage.name for stage in steps] == STEPS
    found = []
    for stage in steps:
        assert stage.command[:2] == [sys.executable, "benchmarks/peers.py"] and (ROOT / stage.command[1]).exists()
        options = peers.parse_arguments(stage.command[2:])
        engines = peers.asked_engines(options)
        assert engines[0] == peers.OURS and options.device == "cuda"
        assert options.total_time < stage.limit_seconds
        assert options.json == tmp_path / f"step_{stage.name.removeprefix('step: ')}.json"
        found.append((options.model, options.batch, options.sequence, options.precision))
    small, large, again = ([*peers.asked_engines(peers.parse_arguments(x.command[2:]))] for x in steps)
    assert found[0] == ("qwen2.5-0.5b", 4, 4096, "bf16") and found[1] == ("qwen2.5-7b", 2, 4096, "bf16-states")
    assert found[2] == found[0] and again == [peers.OURS]
    assert {"trainer+compile", "trainer+liger", "litgpt+compile", "trainer+compile+chunked"} <= set(small)
    assert {"trainer", "trainer+compile", "trainer+liger", "litgpt+compile"} <= set(large)
    assert machine.limit_seconds + sum(stage.limit_seconds for stage in steps) <= check.PART_SECONDS <= 600


@pytest.mark.parametrize("part", [1, 2])
def test_a_dry_run_has_the_same_stages_in_tiny_sizes(check, peers, tmp_path, part):
    real, dry = (check.stages(part, tmp_path, dry_run) for dry_run in (False, True))
    assert [(stage.name, stage.checks) for stage in real] == [(stage.name, stage.checks) for stage in dry]
    for stage in dry:
        if stage.name.startswith("kernels: "):
            options = benchmark_kernels.parse_arguments(stage.command[2:])
            assert (options.sizes, options.device, options.no_compile) == ("tiny", "cpu", True)
        if stage.name.startswith("step: "):
            options = peers.parse_arguments(stage.command[2:])
            assert (options.model, options.device, options.layers) == ("small", "cpu", 2)


# --------------------------------------------------------------------------------------------------------------------
# One stage


def script(check, name, source, limit=30.0, checks=True, **more):
    return check.Stage(name, [sys.executable, "-S", "-c", source], limit, checks, **more)


@pytest.mark.parametrize(
    ("code", "benign", "state"), [(0, (0,), "ok"), (5, (0,), "failed"), (5, (0, 5), "ok"), (1, (0, 5), "failed")]
)
def test_a_stage_ends_as_its_exit_code_says(check, tmp_path, code, benign, state):
    source = f"import sys; print('out'); print('err', file=sys.stderr); sys.exit({code})"
    outcome = check.run_stage(script(check, "kernels: a,b", source, benign_codes=benign), tmp_path, 100.0)
    assert (outcome.exit_code, outcome.state, outcome.checks) == (code, state, True)
    assert sorted(outcome.tail.split()) == ["err", "out"] and "sys.exit" in outcome.command
    assert sorted((tmp_path / "kernels_a-b.log").read_text().split()) == ["err", "out"]


def test_only_the_end_of_a_long_output_is_shown(check, tmp_path):
    outcome = check.run_stage(script(check, "long", "print('x' * 50000 + 'end')"), tmp_path, 100.0)
    assert len(outcome.tail) == check.RECENT and outcome.tail.rstrip().endswith("end")
    assert len((tmp_path / "long.log").read_text()) > 50000


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(check, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "LEAST_SECONDS", 0.5)
    source = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("started", flush=True)
time.sleep(60)
"""
    stage = check.Stage("hang", [sys.executable, "-S", "-c", source, str(tmp_path / "pid")], 100.0, False)
    # Long enough for it to start its child, on a machine that is busy with much else as well.
    for seconds in (1.0, 4.0, 16.0, 64.0):
        outcome = check.run_stage(stage, tmp_path, seconds)
        if outcome.tail:
            break
    assert (outcome.exit_code, outcome.state, outcome.tail.strip()) == (None, "timed out", "started")
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.02)


def test_without_time_a_stage_is_not_started(check, tmp_path):
    outcome = check.run_stage(script(check, "late", "print('ran')"), tmp_path, 4.0)
    assert outcome.state == "no time left" and not (tmp_path / "late.log").exists()


# --------------------------------------------------------------------------------------------------------------------
# A part

STEP = "step: tiny"
WRITE = "import json, pathlib; pathlib.Path({path!r}).write_text(json.dumps({{'rows': {rows!r}}}))"


def run_part(check, monkeypatch, output, make_stages, *options):
    monkeypatch.setattr(check, "stages", lambda part, folder, dry_run: make_stages(folder))
    code = check.main(["--part", "2", "--dry-run", "--output", str(output), *options])
    return code, json.loads((output / "summary_part2.json").read_text()), (output / "summary_part2.md").read_text()


def test_stages_run_in_order_and_a_failing_one_stops_none(check, monkeypatch, tmp_path, capsys):
    trace = tmp_path / "trace"

    def make_stages(folder):
        def stage(name, code, checks):
            source = f"import sys; open({str(trace)!r}, 'a').write('{name} '); print('I am {name}'); sys.exit({code})"
            return script(check, name, source, checks=checks)

        return [stage("machine", 1, False), stage("tests", 3, True), stage("kernels", 0, True)]

    code, record, text = run_part(check, monkeypatch, tmp_path / "out", make_stages)
    assert code == 1 and trace.read_text().split() == ["machine", "tests", "kernels"]
    assert record["part"] == 2 and record["problems"] == ["tests: failed"]
    assert [(stage["name"], stage["state"], stage["exit_code"]) for stage in record["stages"]] == [
        ("machine", "failed", 1),
        ("tests", "failed", 3),
        ("kernels", "ok", 0),
    ]
    assert "- FAILED: tests: failed" in text and "passed" not in text
    assert all(f"## {name}\n" in text and f"I am {name}" in text for name in ("machine", "tests", "kernels"))
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("checks", [True, False])
def test_only_checks_of_correctness_fail_a_part(check, monkeypatch, tmp_path, checks):
    code, record, text = run_part(
        check, monkeypatch, tmp_path, lambda _: [script(check, "stage", "raise SystemExit(1)", checks=checks)]
    )
    assert (code, bool(record["problems"])) == (int(checks), checks)
    assert ("All checks of correctness passed." in text) is not checks


def test_a_check_without_time_fails_the_part(check, monkeypatch, tmp_path):
    code, record, _ = run_part(check, monkeypatch, tmp_path, lambda _: [script(check, "a", "")], "--seconds", "1")
    assert code == 1 and record["problems"] == ["a: no time left"]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"engine": "trainer", "problem": "out of memory"}, {"engine": "retemper", "rate": 1.0}], None),
        ([{"engine": "trainer", "rate": 1.0}, {"engine": "retemper", "problem": "refused"}], "retemper: refused"),
        ([{"engine": "trainer", "rate": 1.0}], "retemper: not run"),
        (None, "no result was written"),
    ],
)
def test_a_step_stands_or_falls_with_our_engine(check, monkeypatch, tmp_path, rows, problem):
    path = tmp_path / "step_tiny.json"
    # Of a run before this one; it must not stand for this one.
    path.write_text(json.dumps({"rows": [{"engine": "retemper", "rate": 1.0}]}))
    (tmp_path / "summary_part2.md").touch()
    source = "" if rows is None else WRITE.format(path=str(path), rows=rows)
    code, record, text = run_part(
        check, monkeypatch, tmp_path, lambda _: [script(check, STEP, source + "\nraise SystemExit(1)", checks=False)]
    )
    assert code == (problem is not None)
    assert record["problems"] == ([] if problem is None else [f"{STEP}: {problem}"])
    assert problem is None or f"- FAILED: {STEP}: {problem}" in text


def test_a_folder_of_others_is_left_alone(check, monkeypatch, tmp_path):
    (tmp_path / "summary_part2.json").write_text("mine")
    with pytest.raises(UserError, match="holds no results of this command"):
        run_part(check, monkeypatch, tmp_path, lambda _: [])
    assert (tmp_path / "summary_part2.json").read_text() == "mine"


def test_the_summary_is_written_after_every_stage(check, monkeypatch, tmp_path):
    path = tmp_path / "summary_part2.json"
    source = f"import json; print(len(json.load(open({str(path)!r}))['stages']))"
    _, record, _ = run_part(
        check, monkeypatch, tmp_path, lambda _: [script(check, "first", ""), script(check, "second", source)]
    )
    assert record["stages"][1]["tail"].strip() == "1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(check, tmp_path, capsys):
    assert check.main(["--part", "1", "--output", str(tmp_path / "out")]) == 1
    assert "--dry-run" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_make_starts_it(check):
    makefile = (ROOT / "Makefile").read_text()
    assert "benchmarks/gpu_check.py --part $(PART)" in makefile
