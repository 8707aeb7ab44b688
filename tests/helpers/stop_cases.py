"""The command in a process of its own that waits in a named phase, until it is told to go on."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from retemper.engine import pretrain, step
from retemper.engine.errors import run_command
from retemper.engine.guards import stop_request
from retemper.engine.observe import start_summary
from retemper.engine.parallel.forward_backward import NonPipelined
from retemper.engine.start import RandomStart
from retemper.engine.weights.checkpoint import store

AFTER_STEPS = 5


def command(arguments: list[str], phase: str, pipe: Connection, output: Path) -> None:
    """``pretrain.py`` with ``arguments``; says when it is in ``phase`` for the first time, and waits there."""
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv[1:] = arguments
    torch.set_num_threads(1)
    stop_request.GRACE_SECONDS = 0.3
    owner, name, due = {
        "reading": (pretrain, "parse_config", lambda *_: True),
        "loading": (RandomStart, "load_into", lambda *_: True),
        "first report": (start_summary, "describe_start", lambda *_: True),
        "step": (step, "train_step", _after_steps()),
        "deaf step": (step, "train_step", _after_steps()),
        "evaluation": (NonPipelined, "evaluate", lambda *_: True),
        "save": (store, "save_tensors", lambda *_: True),
    }[phase]
    _wait_before(owner, name, due, pipe, deaf=phase == "deaf step")
    run_command(pretrain.main)


def _after_steps() -> Any:
    """Whether it is called for the step after :data:`AFTER_STEPS`."""
    calls = iter(range(1 << 20))
    return lambda *_: next(calls) == AFTER_STEPS


def _wait_before(owner: Any, name: str, due: Any, pipe: Connection, deaf: bool) -> None:
    function, waited = getattr(owner, name), []

    def waiting(*arguments, **named):
        if not waited and due(*arguments):
            waited.append(True)
            pipe.send("here")
            if deaf:  # in C++, where Python handles no signal
                dist.HashStore().wait(["what nobody sets"], timedelta(seconds=60))
            pipe.recv()
        return function(*arguments, **named)

    setattr(owner, name, waiting)
