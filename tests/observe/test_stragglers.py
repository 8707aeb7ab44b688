"""A rank that is slow by itself is named, with what it is slow at; one that only waits for it is not."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from torch import nn

from retemper.engine import pretrain
from retemper.engine.data.loader import Prefetcher
from retemper.engine.observe import stragglers
from retemper.engine.observe.console_lines import ConsoleLines
from retemper.engine.observe.stragglers import Stragglers, Times

STEPS = 4
OPTIONS = ["--training.train_tokens", str(STEPS * 8 * 32), "--training.eval_interval", "2"]
SLEEP = 0.2


def train(ranks, path, overrides, slow_rank=None, part=None):
    """What the run says, in which ``slow_rank`` sleeps in every step: in waiting for data, or in its first block."""
    run, lines = pretrain.build(tiny_run.configure(path, *overrides), ranks), []
    run.report.observers.append(ConsoleLines(lines.append))
    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == slow_rank:
            block = run.model.decoders[0].model.blocks[0]
            owner, name = (Prefetcher, "get") if part == "data" else (block, "forward")
            function = getattr(owner, name)

            def slowly(*arguments, **named):
                time.sleep(SLEEP)
                return function(*arguments, **named)

            patch.setattr(owner, name, slowly)
        pretrain.train(run)
    return lines


@pytest.mark.parametrize("part", ["data", "blocks"])
def test_a_rank_that_sleeps_is_named(part, two_ranks, run_file, tmp_path):
    options = [*OPTIONS, "--training.micro_batch_size", "4", "--run_folder", str(tmp_path)]
    said, _ = two_ranks.run(train, run_file, options, 1, part)
    first, *later = [record for record in tiny_run.records(tmp_path) if "evaluation" not in record]
    assert "slowest_rank" not in first and len(later) == STEPS - 1
    for record in later:
        assert record["slowest_rank"] == 1
        assert record[f"slowest_rank_{part}_seconds"] > SLEEP / 2 > record[f"other_ranks_{part}_seconds"]
        other = "data" if part == "blocks" else "blocks"
        assert record[f"slowest_rank_{other}_seconds"] < SLEEP / 2
    # In two reports running.
    lines = [line for line in said if "slowest: rank" in line]
    what = {"data": "reading data", "blocks": "the blocks' forward pass"}[part]
    assert len(lines) == STEPS - 2 and all(
        f"  slowest: rank 1 ({socket.gethostname()}), {what} 0." in line for line in lines
    )


@pytest.mark.parametrize("options", [["--logging.stragglers", "false"], None], ids=["off", "one rank"])
def test_nothing_is_said_where_nothing_is_compared(options, one_rank, two_ranks, run_file, tmp_path):
    arguments = (run_file, [*OPTIONS, *(options or []), "--run_folder", str(tmp_path)])
    if options:
        said, _ = two_ranks.run(train, *arguments)
    else:
        said = train(one_rank, *arguments)
    assert not any("slow" in key or "other_ranks" in key for record in tiny_run.records(tmp_path) for key in record)
    assert len(said) > STEPS and not any("slowest" in line for line in said)


class Clock:
    """Time that passes only where somebody says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Sleeper(nn.Module):
    """A block whose parameters arrive after ``gathering`` seconds, and which then computes for ``computing``."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.gathering, self.computing = clock, 0.0, 0.0
        self.register_forward_pre_hook(self._gather, prepend=True)  # as FSDP does

    def _gather(self, module, inputs):
        self.clock.now += self.gathering

    def forward(self, hidden):
        self.clock.now += self.computing
        return hidden


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stragglers, "time", clock)
    return clock


@pytest.fixture
def watched(monkeypatch):
    """Rank 0 of several, of which the others report the times in a list."""

    def watch(blocks, others):
        monkeypatch.setattr(stragglers, "_of_all", lambda ranks, mine: [mine, *(Times(*times) for times in others)])
        size = 1 + len(others)
        options = {"device": torch.device("cpu"), "all_gather": lambda name: [name] * size}
        ranks = SimpleNamespace(rank=0, world_size=size, **options)
        return Stragglers(ranks, blocks, True)

    return watch


def _step(watch, clock, blocks, data=0.0):
    with watch.reading():
        clock.now += data
    for block in blocks:
        block(torch.zeros(()))


def test_whose_time_is_what(clock, watched):
    block = Sleeper(clock)
    watch = watched([block], [(0.5, 2.0, 7.0), (0.25, 4.0, 5.0)])
    _step(watch, clock, [block])
    assert watch.report(watch.lap()) == ({}, [])
    block.gathering, block.computing = 1.0, 3.0
    _step(watch, clock, [block] * 2, data=0.5)
    block.computing = 50.0
    with torch.no_grad():
        block(torch.zeros(()))
    _step(watch, clock, [block], data=0.25)  # only the data of later steps counts
    assert watch.report(watch.lap()) == (
        {
            "slowest_rank": 0,
            "slowest_rank_data_seconds": 0.375,
            "slowest_rank_blocks_seconds": 6.0,
            "slowest_rank_waiting_seconds": 2.0,
            "other_ranks_data_seconds": 0.375,
            "other_ranks_blocks_seconds": 3.0,
            "other_ranks_waiting_seconds": 6.0,
        },
        [],
    )


def test_of_many_calls_some_are_timed_for_all(clock, watched, monkeypatch):
    monkeypatch.setattr(stragglers, "_MOST_TIMED", 4)
    block = Sleeper(clock)
    watch = watched([block], [(0.0, 1.0, 0.0)])
    _step(watch, clock, [block])
    watch.report(watch.lap())
    block.computing = 2.0
    _step(watch, clock, [block] * 10)
    assert watch.report(watch.lap()).values["slowest_rank_blocks_seconds"] == 20.0


def test_a_line_is_said_of_who_is_much_slower_twice(clock, watched):
    block, others = Sleeper(clock), [(0.0, 1.0, 0.0)] * 2
    watch = watched([block], others)

    def report(seconds):
        block.computing = seconds
        _step(watch, clock, [block])
        return watch.report(watch.lap()).lines

    assert [report(s) for s in (9.0, 1.19, 1.19, 1.3)] == [[]] * 4
    [line] = report(1.4)
    expected = "the blocks' forward pass 1.400 s a step, 1.000 s on others, which wait for it"
    assert line == f"  slowest: rank 0 ({socket.gethostname()}), {expected}"
    others[:] = [(0.0, 0.05, 0.0)] * 2
    assert [report(s) for s in (0.069, 0.069)] == [[], []]  # a third more, and too little to matter
    others[:] = [(0.0, 1.0, 0.0)] * 2
    assert report(1.4) == []
    others[0] = (0.0, 3.0, 0.0)  # another one
    assert report(1.4) == []
    others[0] = (2.0, 1.0, 0.0)
    [line] = report(1.0)
    assert "rank 1" in line and "reading data 2.000 s" in line
