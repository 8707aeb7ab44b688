"""How the ranks of a run join, agree on what they run, watch each other and say why they end."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from forked import LIMIT_SECONDS, Program, fork_server

from retemper.engine.guards import liveness
from retemper.engine.guards.rank_consistency import PACKAGE, code_files, flatten
from retemper.engine.guards.rendezvous import Rendezvous, _join

TIMEOUT_SECONDS = 4
RANK = """
import os, signal, sys, time
import torch, torch.distributed as dist
from retemper.engine.errors import UserError, run_command
from retemper.engine.guards import rank_consistency
from retemper.engine.parallel.process_group import process_group
from retemper.engine.guards.stop_request import StopRequest

torch.set_num_threads(1)
"""
STORE = """
import signal
import torch.distributed as dist

store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
signal.pause()
"""


class Launched:
    """Ranks as a launcher starts them, but each with a host name and a program of its own."""

    def __init__(self, server: ForkServerContext, folder: Path, programs: list[str]):
        # As torchrun's agent does, which outlives the ranks.
        self.store = Program(server, STORE, folder / "store.log")
        while not self.store.out.endswith("\n"):
            assert self.store.process.is_alive(), self.store.err
            time.sleep(0.01)
        agent = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": self.store.out.strip(),
            "WORLD_SIZE": str(len(programs)),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        self.ranks = []
        for rank, program in enumerate(programs):
            named = f"import socket; socket.gethostname = lambda: 'host{rank}'\n{RANK}{program}"
            numbers = {"RANK": str(rank), "LOCAL_RANK": "0", "GROUP_RANK": str(rank)}
            self.ranks.append(Program(server, named, folder / f"rank{rank}.log", environment=agent | numbers))

    def say(self, rank: int) -> str:
        """What a rank has printed."""
        return self.ranks[rank].out + self.ranks[rank].err

    def errors(self, rank: int) -> list[str]:
        """Its error lines."""
        return re.findall(rf"^\[rank {rank}\] error: (.*)", self.say(rank), re.MULTILINE)

    def wait(self, ranks=None) -> list[int]:
        """Exit codes of ``ranks``, or of all."""
        return [self.ranks[rank].wait() for rank in ranks or range(len(self.ranks))]

    def until_said(self, rank: int, text: str) -> None:
        """Until a rank has printed ``text``."""
        while text not in self.say(rank):
            assert self.ranks[rank].process.is_alive(), self.say(rank)
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server():
    """Has imported what ``RANK`` does: three seconds of a core less for each rank."""
    names = ("guards.rank_consistency", "parallel.process_group", "guards.stop_request")
    with fork_server(*(f"retemper.engine.{name}" for name in names)) as context:
        yield context


@pytest.fixture
def launch(server, tmp_path):
    """Starts a rank for each of the programs that are given."""
    launched: list[Launched] = []

    def start(*programs: str) -> Launched:
        launched.append(Launched(server, tmp_path, list(programs)))
        return launched[-1]

    yield start
    for run in launched:
        for program in [*run.ranks, run.store]:
            program.close()


AGREE = """
class Config:
    pass

def read():
    {read}

rank_consistency.to_dict = lambda config: config.values
rank_consistency.code_files = lambda package: {files}
torch.__version__ = {torch!r}

def main():
    config, rendezvous = rank_consistency.agree_on_config(read, several=True)
    print("agreed with", [note["host"] for note in rendezvous.notes])

run_command(main)
"""


def agreeing(seed: int = 1, files: str = "{'engine/step.py': 'a'}", torch: str = "2.13.0", **more) -> str:
    values = {"seed": seed, "training": {"train_tokens": 1000}, "data": [{"path": "x"}], **more}
    read = f"config = Config(); config.values = {values!r}"
    read += f"; config.parallel = Config(); config.parallel.timeout_seconds = {LIMIT_SECONDS}; return config"
    return AGREE.format(read=read, files=files, torch=torch)


def test_ranks_that_run_the_same_agree(launch):
    run = launch(agreeing(), agreeing(), agreeing())
    assert run.wait() == [0, 0, 0], [run.say(rank) for rank in range(3)]
    assert "agreed with ['host0', 'host1', 'host2']" in run.say(1)


@pytest.mark.parametrize(
    "odd, message",
    [
        (
            agreeing(seed=7, data=[{"path": "y"}]),
            "the configuration differs on rank 1 (host1) from rank 0's: seed is 7, not 1, data[0].path is "
            '"y", not "x"; start every node with the same files and the same command',
        ),
        (
            agreeing(extra=1, files="{'engine/step.py': 'b', 'engine/new.py': 'c'}"),
            "the configuration differs on rank 1 (host1) from rank 0's: extra is 1, not unset; the code differs on "
            "rank 1 (host1) from rank 0's: engine/step.py, engine/new.py; start every",
        ),
        (agreeing(torch="2.11.0"), "PyTorch is 2.11.0 on rank 1 (host1), not 2.13.0 as on rank 0; start every"),
    ],
    ids=["config", "config and code", "torch"],
)
def test_a_node_that_differs_is_refused_by_every_rank_and_printed_once(launch, odd, message):
    run = launch(agreeing(), odd, agreeing())
    assert run.wait() == [1, 1, 1]
    assert [run.say(rank) for rank in (1, 2)] == ["", ""]
    assert run.say(0).count("\n") == 1
    [line] = run.errors(0)
    assert line.startswith(message)


def test_a_config_that_one_node_cannot_read_is_said_by_the_first_rank(launch):
    wrong = AGREE.format(read="raise UserError('run.yaml: unknown key x')", files={}, torch="2.13.0")
    run = launch(agreeing(), wrong)
    assert run.wait() == [1, 1]
    assert run.say(1) == ""
    assert run.say(0) == "[rank 0] error: rank 1: run.yaml: unknown key x\n"


def test_a_rank_that_does_not_come_is_named(launch):
    soon = agreeing().replace(f"timeout_seconds = {LIMIT_SECONDS}", "timeout_seconds = 6")
    run = launch(soon, soon, "sys.exit('no such file')")
    assert run.wait() == [1, 1, 1]
    for rank in range(2):
        assert run.say(rank).startswith(f"[rank {rank}] error: 1 of 3 ranks did not come within 6 s: 2 (came: those of")


def test_hashes_cover_the_code_and_every_setting():
    files = code_files(PACKAGE)
    assert {"__init__.py", "engine/step.py", "kernels/rope.py", "tools/preprocess.py"} <= files.keys()
    assert not any(name.startswith(("tests/", ".venv/", "build/")) for name in files)
    nested = {"a": {"b": [1, {"c": None}], "d": {}}, "e": []}
    assert flatten(nested) == {"a.b[0]": "1", "a.b[1].c": "null", "a.d": "{}", "e": "[]"}


WORK = """
def main():
    with process_group("cpu", {timeout}) as ranks, StopRequest(ranks):
        # Where the last rank is missing, the second waits for it, and the first for the second.
        pair = dist.new_group([1, 2])
        last = ranks.world_size - 1
        for step in range({steps}):
            if step == 50 and ranks.rank == last:
                print("now", flush=True)
                {event}
            if ranks.rank > 0:
                dist.all_reduce(torch.ones(1), group=pair)
            ranks.all_reduce(1)
            time.sleep(0.005)
        print("finished", flush=True)

run_command(main)
"""


def working(event: str, steps: int = 100_000, timeout: int = TIMEOUT_SECONDS) -> list[str]:
    return [WORK.format(event=event, steps=steps, timeout=timeout)] * 3


def test_an_undisturbed_run_ends_well(launch):
    run = launch(*working("pass", steps=60, timeout=LIMIT_SECONDS))
    assert run.wait() == [0, 0, 0], [run.say(rank) for rank in range(3)]
    assert [run.errors(rank) for rank in range(3)] == [[], [], []]


@pytest.mark.parametrize(
    "event, reason",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"rank 2 \(host2\) gave no sign of life for \d+ s; see that node"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", r"rank 2 \(host2\) gave no sign of life for \d+ s; see that node"),
        ("time.sleep(1000)", r"rank 2 \(host2\) has not come to a collective operation in which others have waited"),
        pytest.param(
            "raise KeyError('no such thing')",
            r"rank 2 \(host2\) has ended with an error of its own: KeyError: 'no such thing'",
            marks=pytest.mark.slow,
        ),
        (
            "raise UserError('a bad file')",
            r"rank 2 \(host2\) has ended with an error of its own: UserError: a bad file",
        ),
    ],
    ids=["killed", "stopped", "hanging", "failed", "refused"],
)
def test_the_rank_that_is_the_cause_is_named_by_all_others(launch, event, reason):
    run = launch(*working(event))
    codes = run.wait([0, 1])
    assert codes == [1, 1]
    for rank in (0, 1):
        [line] = run.errors(rank)
        assert re.match(reason, line), line
        assert "rank 0" not in line and "rank 1" not in line
        assert ("where each thread stands" in run.say(rank)) == ("raise" not in event)
    if "sleep" in event:  # the one at fault says where it is
        assert run.wait([2]) == [1]
        stacks = run.say(2).partition("[rank 2] where each thread stands")[2]
        assert re.search(r'^  File "<string>", line \d+ in main$', stacks, re.MULTILINE)
    if "raise" in event:
        assert run.wait([2]) == [1]
        assert "no such thing" in run.say(2) or run.errors(2) == ["a bad file"]


def test_an_error_that_all_share_is_printed_once(launch):
    together = """
            try:
                ranks.raise_on_all('bad' if step == 20 and ranks.rank == 1 else None)
            except UserError:
                time.sleep(ranks.rank / 2)  # not all are as quick to say so
                raise
"""
    run = launch(
        *[program.replace("ranks.all_reduce(1)", together) for program in working("pass", timeout=LIMIT_SECONDS)]
    )
    assert run.wait() == [1, 1, 1]
    assert [run.errors(rank) for rank in range(3)] == [["rank 1: bad"], [], []]


@pytest.mark.slow
def test_a_node_that_held_the_store_is_named_when_it_is_gone(launch):
    run = launch(*working("pass"))
    run.until_said(2, "now")
    for process in (run.store.process, run.ranks[0].process):
        os.kill(process.pid, signal.SIGSTOP)
    assert run.wait([1, 2]) == [1, 1]
    for rank in (1, 2):
        [line] = run.errors(rank)
        expected = r"rank 0 \(host0\) gave no sign of life for \d+ s, nor did the launcher's store on the same host;"
        assert re.match(expected, line), line


@pytest.mark.slow
def test_a_run_goes_on_without_the_store(launch):
    run = launch(*working("pass", steps=50 + TIMEOUT_SECONDS * 200))
    run.until_said(2, "now")
    os.kill(run.store.process.pid, signal.SIGSTOP)
    run.until_said(0, "finished")
    assert all(run.errors(rank) == [] for rank in range(3))


@pytest.mark.parametrize("stale", [["roll"], ["hello/1", "roll"], ["hello/0", "hello/1", "roll"]], ids=str)
def test_what_a_former_attempt_left_in_the_store_is_not_taken_for_the_new_one(stale):
    store = dist.HashStore()
    former = _meet_all(store)
    for key in {"hello/0", "hello/1", "roll"} - set(stale):
        store.delete_key(key)
    again = _meet_all(store)
    assert [rendezvous.notes[1]["attempt"] for rendezvous in again] == [again[0].notes[1]["attempt"]] * 2
    assert again[0].notes[1]["attempt"] != former[0].notes[1]["attempt"]
    former[0].store.set("key", "old")
    assert not again[1].store.check(["key"])
    again[0].store.set("key", "new")
    assert again[1].store.get("key") == b"new"


def _meet_all(store: dist.Store) -> list[Rendezvous]:
    """Two ranks that join, the first one some time after the second."""
    with ThreadPoolExecutor(2) as pool:
        note = {"attempt": time.monotonic()}
        second = pool.submit(_join, store, 1, 2, note, LIMIT_SECONDS)
        time.sleep(0.2)
        return [pool.submit(_join, store, 0, 2, note, LIMIT_SECONDS).result(), second.result()]


def test_a_group_that_is_being_made_or_taken_down_is_passed_over(monkeypatch):
    """PyTorch's tables of groups are filled and emptied one after the other, while the watch reads them."""
    world = SimpleNamespace(pg_map={object(): None}, pg_group_ranks={})
    monkeypatch.setattr(liveness.distributed_c10d, "_world", world)
    assert liveness._collectives_begun() == {}
