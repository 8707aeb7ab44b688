"""Asked to stop in every phase of a run: it saves once, ends with 0, and goes on as if nothing had been."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time

import pytest
import stop_cases
import tiny_run

from retemper.engine import pretrain
from retemper.engine.guards import stop_request
from retemper.engine.guards.stop_request import NOTICES, REQUESTS, StopRequest

# Enough windows that an evaluation takes several turns.
OPTIONS = ["--training.eval_tokens", "2000", "--training.train_tokens", str(10 * 8 * 32), "--device", "cpu"]
OPTIONS += ["--training.micro_batch_size", "2"]


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported the run already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["retemper.engine.pretrain", "retemper.engine.start"])
    return context


@pytest.fixture(scope="module")
def undisturbed(one_rank, run_file, tmp_path_factory):
    """Run folder of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    tiny_run.train(one_rank, run_file, [*OPTIONS, "--run_folder", str(folder)])
    return folder


class Case:
    """A command that waits in a phase; when it is there, ``signals`` are sent, one after another."""

    def __init__(self, processes, run_file, folder, phase, *options):
        self.output = folder.parent / "output"
        arguments = ["--config", str(run_file), *OPTIONS, "--run_folder", str(folder), *options]
        self.pipe, theirs = processes.Pipe()
        target = (arguments, phase, theirs, self.output)
        self.process = processes.Process(target=stop_cases.command, args=target, daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.poll(60) and self.pipe.recv() == "here", self.said()

    def send(self, *signals):
        for number in signals:
            os.kill(self.process.pid, number)

    def end(self, go_on=True):
        """Exit status."""
        if go_on:
            self.pipe.send("go on")
        self.process.join(60)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def said(self):
        return self.output.read_text()


def _checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-"))


@pytest.mark.parametrize(
    ("phase", "number", "saved"),
    [
        ("step", signal.SIGUSR1, [4, 6]),
        ("step", signal.SIGHUP, [4, 6]),
        ("step", signal.SIGINT, [4, 6]),
        ("evaluation", signal.SIGTERM, [4, 5]),
        ("save", signal.SIGTERM, [4, "later"]),  # asked during step 4's save: stops there or later
    ],
)
def test_it_saves_once_and_the_next_run_is_the_undisturbed_one(
    phase, number, saved, processes, one_rank, run_file, undisturbed, tmp_path
):
    folder = tmp_path / "run"
    case = Case(processes, run_file, folder, phase)
    case.send(number, number, signal.SIGTERM)  # what terminal and launcher repeat is one wish
    assert case.end() == 0, case.said()
    stopped = int(re.search(r"stopped at step (\d+) as requested; resume: auto continues", case.said())[1])
    assert stopped == saved[-1] or (saved[-1] == "later" and 4 <= stopped < 10)
    assert _checkpoints(folder) == [f"step-{step:08d}" for step in sorted({*saved[:-1], stopped})]
    tiny_run.train(one_rank, run_file, [*OPTIONS, "--run_folder", str(folder)])
    assert tiny_run.curve(folder) == tiny_run.curve(undisturbed)
    best = [
        json.loads((run / "checkpoints" / "step-00000010" / "manifest.json").read_text())["best"]
        for run in (folder, undisturbed)
    ]
    assert best[0] == best[1]


@pytest.mark.parametrize("phase", ["reading", "loading", "first report"])
def test_before_the_first_step_there_is_nothing_to_save(phase, processes, run_file, tmp_path):
    case = Case(processes, run_file, tmp_path / "run", phase)
    case.send(signal.SIGTERM)
    # Before the ranks have met nothing is waited for.
    assert case.end(go_on=phase != "reading") == 0, case.said()
    assert case.said().endswith("stopped as requested before the first step: nothing to save\n")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(("phase", "number"), [("deaf step", signal.SIGINT), ("save", signal.SIGTERM)])
def test_a_second_wish_ends_it_at_once(phase, number, processes, one_rank, run_file, undisturbed, tmp_path):
    folder = tmp_path / "run"
    case = Case(processes, run_file, folder, phase)
    case.send(number)
    time.sleep(0.5)  # more than the grace of this process
    case.send(number)
    assert case.end(go_on=False) == 128 + number, case.said()
    assert f"{number.name} received again: ends at once" in case.said()
    assert (folder / "checkpoints").exists() == (phase == "deaf step" or bool(list(folder.glob("checkpoints/.*"))))
    assert [path.name for path in folder.glob("checkpoints/step-*")] == ["step-00000004"] * (phase == "deaf step")
    tiny_run.train(one_rank, run_file, [*OPTIONS, "--run_folder", str(folder)])
    assert tiny_run.curve(folder) == tiny_run.curve(undisturbed)


def test_a_limit_of_time_is_a_wish_to_stop(one_rank, run_file, tmp_path, capsys):
    # Long past when the first step is made, but not asked for before.
    overrides = [*OPTIONS, "--training.stop_after_minutes", "1e-9", "--run_folder", str(tmp_path)]
    stop = StopRequest(one_rank)
    assert not stop.agreed()
    stop.stop_after(1e-9)
    assert stop.agreed()
    stop.stop_after(1000)
    assert not stop.agreed()
    with pytest.raises(SystemExit) as left:
        tiny_run.train(one_rank, run_file, overrides)
    assert left.value.code == 0
    assert "nothing to save" in capsys.readouterr().out


def test_a_run_past_its_limit_saves_at_the_next_step(one_rank, run_file, tmp_path, capsys):
    overrides = [*OPTIONS, "--training.stop_after_minutes", "1000", "--run_folder", str(tmp_path)]
    run = pretrain.build(tiny_run.configure(run_file, *overrides), one_rank)

    def pass_the_limit():
        if run.progress.step == 6:
            run.stop._began -= 60 * 1000
            run.stop.stop_after(run.config.training.stop_after_minutes)

    tiny_run.before_step(run, pass_the_limit)
    pretrain.train(run)
    assert _checkpoints(tmp_path) == ["step-00000004", "step-00000007"]
    assert "stopped at step 7 as requested" in capsys.readouterr().out


def test_a_broken_off_evaluation_is_recorded_once_however_often_the_run_resumes(
    processes, one_rank, run_file, undisturbed, tmp_path
):
    folder = tmp_path / "run"
    case = Case(processes, run_file, folder, "evaluation")
    case.send(signal.SIGTERM)
    assert case.end() == 0, case.said()
    tiny_run.train_until(one_rank, run_file, [*OPTIONS, "--run_folder", str(folder)], 6)
    tiny_run.train(one_rank, run_file, [*OPTIONS, "--run_folder", str(folder)])
    assert tiny_run.curve(folder) == tiny_run.curve(undisturbed)


def test_a_step_that_hangs_ends_with_the_stacks_of_all_threads(processes, run_file, tmp_path):
    case = Case(processes, run_file, tmp_path / "run", "deaf step", "--parallel.timeout_seconds", "1")
    assert case.end(go_on=False) == 1
    stacks, _, end = case.said().partition("error: ")
    assert "stacks of all threads" in stacks and "stop_cases.py" in stacks and "in waiting" in stacks
    assert end.startswith("step 6, data: no progress for ") and "parallel.timeout_seconds" in end
    assert _checkpoints(tmp_path / "run") == ["step-00000004"]


def test_handlers_are_restored_and_those_set_inside_are_kept():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with StopRequest() as stop:
        stop.defer()
        with stop:
            pass
        assert signal.getsignal(signal.SIGTERM) not in before
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        assert signal.getsignal(signal.SIGTERM) == before[0]
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before[1])


@pytest.mark.parametrize("number", [*REQUESTS, *NOTICES], ids=lambda number: number.name)
def test_every_notice_of_an_end_asks_to_stop(number, one_rank):
    with StopRequest(one_rank) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        until = time.monotonic() + 5
        while not stop.agreed() and time.monotonic() < until:
            time.sleep(0.01)
        assert stop.agreed()


def test_a_notice_that_is_repeated_does_not_end_a_save_and_a_request_does(one_rank, capfd):
    """The kernel sends SIGXCPU every second from the limit of CPU time on, and launchers pass SIGHUP on."""
    if not (child := os.fork()):
        stop_request.GRACE_SECONDS = 0.05
        with StopRequest(one_rank):
            for number in [*NOTICES, *NOTICES, signal.SIGTERM, signal.SIGTERM]:
                os.kill(os.getpid(), number)
                time.sleep(0.1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert capfd.readouterr().err.startswith("SIGTERM received again: ends at once")


def test_a_hangup_that_is_ignored_stays_ignored(one_rank):
    """nohup, and a shell's ``trap '' HUP``: the run is to outlive its terminal."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(one_rank) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not stop.agreed()
    finally:
        signal.signal(signal.SIGHUP, former)
