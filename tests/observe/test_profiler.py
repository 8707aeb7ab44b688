"""Profiled steps: traces in Chrome's format with the phases of each step, on every rank, and what may go wrong."""

from __future__ import annotations

import gzip
import json
import resource
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from torch.autograd import DeviceType

from retemper.engine.config.effects import Situation, without_effect
from retemper.engine.errors import UserError
from retemper.engine.observe import profiler as profiler_module
from retemper.engine.observe.profiler import StepProfiler, summarize
from retemper.engine.parallel.process_group import Ranks

SHORT = ["--training.train_tokens", str(6 * 8 * 32), "--training.eval_interval", "3", "--checkpoint.save_interval", "3"]


def options(folder: Path, first: int, last: int) -> list[str]:
    return [*SHORT, "--run_folder", str(folder), "--logging.profile_steps", f"[{first}, {last}]"]


def events(path: Path) -> list[dict]:
    """The complete events of a trace, after checks of the format.

    See "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
    """
    content = json.loads(gzip.decompress(path.read_bytes()))
    known = {"X", "M", "s", "f", "t", "i", "I", "C", "B", "E", "b", "e", "n"}
    assert {event["ph"] for event in content["traceEvents"]} <= known
    complete = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["name"] and {"pid", "tid", "ts"} <= event.keys() for event in complete)
    return complete


def inside(event: dict, outer: dict, slack: float = 1.0) -> bool:
    return (
        event["tid"] == outer["tid"]
        and outer["ts"] - slack <= event["ts"]
        and event["ts"] + event["dur"] <= outer["ts"] + outer["dur"] + slack
    )


def phases(trace: list[dict], step: int) -> Counter[str]:
    """How often each phase occurs inside of a step; PyTorch's optimizers add ranges of their own."""
    [of_step] = [event for event in trace if event["name"] == f"ProfilerStep#{step}"]
    return Counter(
        event["name"]
        for event in trace
        if event.get("cat") == "user_annotation"
        and event is not of_step
        and inside(event, of_step)
        and not event["name"].startswith("Optimizer.")
    )


def test_a_trace_has_the_phases_of_its_steps_and_only_these(one_rank, run_file, tmp_path, capsys, monkeypatch):
    # All operators, because which ones are the first depends on what else the machine does.
    monkeypatch.setattr(profiler_module, "_PRINTED_ROWS", 1000)
    tiny_run.train(one_rank, run_file, options(tmp_path, 2, 3))
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "rank00000_steps2-3.json.gz",
        "rank00000_steps2-3.txt",
    ]
    trace = events(tmp_path / "profile" / "rank00000_steps2-3.json.gz")
    steps = [event["name"] for event in trace if event["name"].startswith("ProfilerStep#")]
    assert sorted(steps) == ["ProfilerStep#2", "ProfilerStep#3"]
    once = {"data": 1, "forward": 2, "backward": 2, "optimizer": 1, "other": 1}  # two micro-batches
    assert phases(trace, 2) == once and phases(trace, 3) == once | {"evaluate": 1, "save": 1}
    forward = [event for event in trace if event["name"] == "forward"]
    products = [event for event in trace if event["name"] in ("aten::mm", "aten::addmm")]
    assert any(inside(event, outer) for event in products for outer in forward)
    table = (tmp_path / "profile" / "rank00000_steps2-3.txt").read_text()
    assert f"{sum(event['name'] == 'aten::mm' for event in trace) / 2:,.1f}" in table
    said = capsys.readouterr().out
    assert said.count("profile of steps 2 to 3") == 1 and "ms in a step: data " in said


def test_a_profile_changes_no_number_and_its_steps_are_marked(one_rank, run_file, tmp_path):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    tiny_run.train(one_rank, run_file, [*SHORT, "--run_folder", str(plain)])
    tiny_run.train(one_rank, run_file, options(profiled, 3, 4))
    assert tiny_run.curve(plain) == tiny_run.curve(profiled)
    marked = [record["step"] for record in tiny_run.records(profiled) if record.get("profiled")]
    assert marked == [2, 3, 4]  # the first is the warm-up
    assert not any("profiled" in record for record in tiny_run.records(plain)) and not (plain / "profile").exists()


def test_every_rank_writes_its_own_files(two_ranks, run_file, tmp_path):
    two_ranks.run(tiny_run.train, run_file, options(tmp_path, 1, 2))
    for rank in (0, 1):
        path = tmp_path / "profile" / f"rank{rank:05}_steps1-2.json.gz"
        assert phases(events(path), 1)["backward"] == 1
        assert json.loads(gzip.decompress(path.read_bytes()))["distributedInfo"]["rank"] == rank


def test_a_run_that_ends_early_writes_what_there_is(one_rank, run_file, tmp_path):
    tiny_run.train(one_rank, run_file, options(tmp_path, 5, 50))
    assert phases(events(tmp_path / "profile" / "rank00000_steps5-6.json.gz"), 6)["forward"] == 2


def test_a_resumed_run_profiles_only_steps_that_are_left(one_rank, run_file, tmp_path):
    tiny_run.train_until(one_rank, run_file, [*SHORT, "--run_folder", str(tmp_path)], 4)
    tiny_run.train(one_rank, run_file, options(tmp_path, 1, 3))
    assert not (tmp_path / "profile").exists()


def test_a_resume_in_the_middle_profiles_the_rest(one_rank, run_file, tmp_path):
    tiny_run.train_until(one_rank, run_file, [*SHORT, "--run_folder", str(tmp_path)], 3)
    tiny_run.train(one_rank, run_file, options(tmp_path, 2, 5))
    assert [path.name for path in (tmp_path / "profile").glob("*.gz")] == ["rank00000_steps4-5.json.gz"]


def test_a_run_that_fails_leaves_no_profile_and_no_profiler(one_rank, run_file, tmp_path, capsys):
    tiny_run.train_until(one_rank, run_file, options(tmp_path / "failed", 2, 5), 3)
    assert not (tmp_path / "failed" / "profile").exists() and "no profile is written" in capsys.readouterr().out
    tiny_run.train(one_rank, run_file, options(tmp_path / "next", 1, 2))  # only one profiler can run
    assert len(list((tmp_path / "next" / "profile").iterdir())) == 2


@pytest.mark.parametrize("kind", ["full disk", "no folder"])
def test_a_profile_that_cannot_be_written_is_one_note(kind, run_file, tmp_path, capfd):
    if kind == "no folder":
        (tmp_path / "profile").write_text("a file")
    profiler = StepProfiler([1, 1], tmp_path, Ranks(0, 1, torch.device("cpu")), lambda *lines: print(*lines, sep="\n"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with profiler.following(0):
        profiler.begin_phase("forward")
        for _ in range(200):
            torch.ones(3).sum()
        if kind == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            profiler.step_done(1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        profiler.begin_phase("forward")
        profiler.step_done(2)
    said = capfd.readouterr().out
    assert said.count("note: no profile in") == 1 and said.count("\n") == 1
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".txt"]
    assert left == (["profile"] if kind == "no folder" else [])


@pytest.mark.parametrize("steps", [[3], [0, 4], [5, 4], [1, 2, 3], [1.5, 2], [True, 2], "[a, 2]"])
def test_settings_that_name_no_steps_are_refused(steps, run_file):
    with pytest.raises(UserError, match=r"logging\.profile_steps"):
        tiny_run.configure(run_file, "--logging.profile_steps", str(steps))


def test_steps_after_the_last_one_are_noted(run_file):
    config = tiny_run.configure(run_file, "--logging.profile_steps", "[21, 22]")
    assert any("profile_steps" in line for line in without_effect(Situation(config)))
    config = tiny_run.configure(run_file, "--logging.profile_steps", "[20, 22]")
    assert not any("profile_steps" in line for line in without_effect(Situation(config, step=21)))
    assert any("profile_steps" in line for line in without_effect(Situation(config, step=22)))


def average(key: str, device: DeviceType, own: float, count: int = 2, annotation: bool = False) -> SimpleNamespace:
    """An entry of ``key_averages()``, with times in microseconds."""
    on_cpu = device == DeviceType.CPU
    return SimpleNamespace(
        key=key,
        count=count,
        device_type=device,
        is_user_annotation=annotation,
        self_cpu_time_total=own if on_cpu else 0.0,
        cpu_time_total=own if on_cpu else 0.0,
        self_device_time_total=own,  # of the kernels that an operator has launched
        device_time_total=own,
    )


def test_on_a_gpu_the_table_has_kernels_and_no_operator_twice():
    lines = summarize(
        [
            average("aten::mm", DeviceType.CPU, 9000.0),
            average("forward", DeviceType.CPU, 500.0, annotation=True),
            average("forward", DeviceType.CUDA, 8000.0, annotation=True),
            average("ampere_gemm", DeviceType.CUDA, 6000.0, count=4),
            average("ncclDevKernel_AllGather", DeviceType.CUDA, 2000.0),
        ],
        num_steps=2,
    )
    assert "forward 4.00" in lines[0]
    cells = [line.split() for line in lines[2:]]
    assert cells == [["ampere_gemm", "2.0", "3.00", "75.0%"], ["ncclDevKernel_AllGather", "1.0", "1.00", "25.0%"]]


def test_other_steps_cost_less_than_a_microsecond_each_phase(tmp_path):
    profiler = StepProfiler(None, tmp_path, Ranks(0, 1, torch.device("cpu")), print)
    began = time.process_time()
    for _ in range(10_000):
        profiler.begin_phase("forward")
    assert time.process_time() - began < 0.05
