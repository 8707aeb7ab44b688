"""Limits and reports around a run: open files, torchrun's error file, slow work, the table at the end."""

from __future__ import annotations

import errno
import importlib.util
import json
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from retemper.engine.config.settings import CheckpointConfig, DataConfig, RunConfig, TrainingConfig
from retemper.engine.errors import UserError, report_user_error, run_command
from retemper.engine.observe import waiting
from retemper.engine.observe.end_summary import next_command
from retemper.engine.observe.totals import Totals
from retemper.engine.schedule import Progress

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [(64, 64, "error: this process may open 64 files"), (64, 2048, "2048"), (1024, 8192, "4096"), (4097, 8192, "4097")],
)
def test_the_limit_of_open_files_is_raised_or_refused(soft, hard, expected):
    program = (
        "import resource; from retemper.engine.files.open_limit import raise_open_files_limit; "
        "from retemper.engine.errors import run_command; "
        "run_command(lambda: (raise_open_files_limit(), print(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout + done.stderr).startswith(expected) and (done.stdout + done.stderr).count("\n") == 1
    assert done.returncode == int(expected.startswith("error"))


def test_too_many_open_files_is_a_line_however_it_is_wrapped(capsys):
    def main():
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError as error:
            raise RuntimeError("a library") from error

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: too many open files: this process may open ")


@pytest.mark.parametrize(("said", "local_rank", "left"), [(False, "3", True), (True, "0", True), (True, "1", False)])
def test_an_error_is_left_where_torchrun_reads_it(said, local_rank, left, monkeypatch, tmp_path, capsys):
    path = tmp_path / "error.json"
    for name, value in {"TORCHELASTIC_ERROR_FILE": str(path), "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    error = UserError("run.yaml: unknown key x")
    error.printed_elsewhere = said
    report_user_error(error)
    report_user_error(UserError("what follows from it"))
    assert ("unknown key" in capsys.readouterr().err) != said
    if left:  # as torchrun's agent reads it
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
        report = ChildFailedError("pretrain.py", {0: failure}).format_msg()
        assert "traceback : run.yaml: unknown key x\n" in report
    else:
        assert json.loads(path.read_text())["message"]["message"] == "what follows from it"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (SignalException("got a signal", 15), 143, ""),
        ("rank exits with 3", 3, ""),
        ("rank gets SIGKILL", 137, ""),
        (dist.DistNetworkError("port: 29500, EADDRINUSE: in use"), 1, "error: torchrun: port: 29500, EADDRINUSE"),
    ],
    ids=str,
)
def test_the_launchers_of_the_scripts_print_no_traceback(error, status, said, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("quiet_torchrun", ROOT / "launch" / "quiet_torchrun.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if isinstance(error, str):
        code = {"rank exits with 3": 3, "rank gets SIGKILL": -9}[error]
        error = ChildFailedError("x", {0: ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="none")})

    def run(arguments):
        assert arguments.training_script == "x.py" and arguments.nproc_per_node == "2"
        if error is not None:
            raise error

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(sys, "argv", ["quiet_torchrun.py", "--standalone", "--nproc-per-node", "2", "x.py"])
    assert module.main() == status
    printed = capsys.readouterr()
    assert printed.err.startswith(said) and printed.err.count("\n") == bool(said) and printed.out == ""


def test_slow_work_says_so_and_quick_work_does_not(monkeypatch):
    monkeypatch.setattr(waiting, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(waiting, "LINE_SECONDS", 0.1)
    said = []
    with waiting.report_if_slow("loading the weights", said.append):
        time.sleep(0.01)
    assert said == []
    with waiting.report_if_slow("loading the weights", said.append):
        time.sleep(0.22)
    assert len(said) == 2 and all(line.startswith("  loading the weights: 0:00:0") for line in said)
    with waiting.ProgressBar("evaluation", 4, said.append) as counted:
        for _ in range(4):
            time.sleep(0.06)
            counted.update(1)
    assert [line.partition(",")[0] for line in said[2:]] == ["  evaluation: 2 of 4", "  evaluation: 4 of 4"]


def test_the_table_at_the_end_says_what_this_start_has_done(one_rank):
    totals = Totals(Progress(step=10, samples=80, tokens=1000))
    for seconds, steps in ((1.5, 3), (0.5, 1)):
        totals.add_steps(seconds, steps)
    for step, loss in ((11, 3.0), (12, float("nan")), (13, 2.0), (14, 2.5)):
        totals.add_loss("training", step, loss)
    tokens, elapsed, memory, loss = totals.table(Progress(step=14, samples=112, tokens=1400), 100, one_rank)
    assert "400 (400) in this start, 1,400 in all; step 14" in tokens
    assert elapsed.endswith("0:00:02 of it in steps: 200 tokens/s, 200 per rank") and "GiB" in memory
    assert loss.endswith("training: first 3.0000 (step 11), lowest 2.0000 (step 13), last 2.5000 (step 14)")
    assert "0 (0) in this start" in totals.table(Progress(step=8, samples=64, tokens=800), 100, one_rank)[0]


def test_the_command_that_comes_next():
    run = RunConfig("runs/a b", DataConfig(), TrainingConfig(train_tokens=1))
    checkpoint = Path("runs/a b/checkpoints/step-00000004")
    assert next_command(run, checkpoint, False) == ["next        the same command continues from here"]
    # A run that has checkpoints is refused with resume: none.
    [line] = next_command(replace(run, resume="none"), checkpoint, False)
    assert "resume: auto" in line
    [line] = next_command(run, checkpoint, True)
    words = shlex.split(line)
    assert words[words.index("--checkpoint") + 1] == str(checkpoint)
    assert words[words.index("--output") + 1] == "runs/a b/hf/step-00000004"
    assert next_command(replace(run, checkpoint=CheckpointConfig(export_hf=True)), checkpoint, True) == []
