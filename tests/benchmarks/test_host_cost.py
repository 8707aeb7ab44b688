"""benchmarks/host_cost.py: what is known is counted, and a step of ours stays cheap."""

from __future__ import annotations

import sys

import pytest
import tiny_run
import torch

from retemper.benchmarks import host_cost
from retemper.benchmarks.host_cost import STEPS, WARMUP, CountingClock, OperatorCounter, best_of, format_rows
from retemper.engine import pretrain


def one_call() -> None:
    """One call of Python that calls nothing."""


def test_calls_and_operators_of_a_step_are_counted():
    clock, x = CountingClock(None), torch.ones(10)
    for _ in range(WARMUP + sum(STEPS.values())):
        for _ in range(7):
            one_call()
        x.to(torch.bfloat16)
        x.add(1.0)
        clock.step_done(0.0)
    figures = clock.record()
    assert sys.getprofile() is None
    # 7 calls, 2 methods of tensors, the range, and what ends the step.
    assert 10 <= figures["calls"] <= 20
    assert figures["operators"] == 2 and figures["copied_bytes"] == 60
    assert 0 <= figures["cpu_seconds"] < 1


def test_copies_are_told_from_arithmetic():
    x, y = torch.ones(8), torch.empty(8, dtype=torch.bfloat16)
    with OperatorCounter() as counter:
        y.copy_(x)
        x * 2
        torch._foreach_copy_([y], [x])
        x.view(2, 4)
    assert counter.copied_bytes == 2 * (8 * 4 + 8 * 2)
    assert counter.operators.total() == 4


def test_the_table_has_ratios_and_the_lowest_time():
    ours = [{"engine": "retemper", "calls": 50, "operators": 9, "cpu_seconds": s, "copied_bytes": 1e6} for s in (2, 1)]
    trainer = {"engine": "trainer", "calls": 100, "operators": 10, "cpu_seconds": 2.0, "copied_bytes": 2e6}
    last = format_rows(best_of([*ours, trainer])).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[2:-1]] == ["0.50", "0.90", "0.50", "0.50"]
    missing = {"engine": "trainer", "problem": "No module named 'accelerate'"}
    assert format_rows(best_of([*ours, missing])).splitlines()[-1] == "trainer: No module named 'accelerate'"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_makes_few_calls_for_each_parameter(precision, one_rank, run_file, tmp_path):
    """FSDP and DTensor took some hundred."""
    options = ["--run_folder", str(tmp_path), "--training.precision", precision, "--training.micro_batch_size", "8"]
    run = pretrain.build(tiny_run.configure(run_file, *options), one_rank)
    steps = [run.data.micro_batches(first) for first in (0, 8)]
    pretrain.one_step(run, steps[0], 200.0)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        pretrain.one_step(run, steps[1], 200.0)
    finally:
        sys.setprofile(None)
    assert calls < 90 * sum(1 for _ in run.model.parameters())


@pytest.mark.slow
def test_the_command(capsys):
    assert host_cost.main(["--layers", "2", "--rounds", "1", "--precision", "fp32"]) in (0, 1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| retemper"))
    assert int(line.split("|")[2].replace(",", "")) > 500
