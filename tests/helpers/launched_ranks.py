"""Ranks that are started as by a launcher, for the tests of how they join and watch each other."""

from __future__ import annotations

import re
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

from forked import LIMIT_SECONDS, Program

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
