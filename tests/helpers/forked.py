"""Programs in processes of their own that start in milliseconds, because they are forked off a server.

A process that imports PyTorch takes seconds of a core before it does anything.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

LIMIT_SECONDS = 240
"""For a process to end, on a machine that is busy with much else. Only a hang takes so long."""


@contextlib.contextmanager
def fork_server(*modules: str) -> Iterator[ForkServerContext]:
    """Start processes off a server that has imported ``modules``, and pytest.

    Python has one such server for each process. One that code under test has started, with other imports, is ended
    before, and this one after.
    """
    for name in modules:
        importlib.import_module(name)  # The server would pass over one that is not there.
    server = forkserver._forkserver
    server._stop()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", *modules])
    yield context
    server._stop()


class Program:
    """Python code that runs as the main program of a process, and what has become of it.

    Args:
        context: the :func:`fork_server`.
        text: the code.
        log: the file for all that it prints; what goes to stderr is in ``log`` with the suffix ``.err``.
        arguments: its command line.
        environment: variables to set.
        folder: where it runs.
    """

    def __init__(
        self,
        context: ForkServerContext,
        text: str,
        log: Path,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ):
        self._out, self._err = log, log.with_suffix(".err")
        for file in (self._out, self._err):
            file.touch()
        settings = (text, [str(argument) for argument in arguments], dict(environment or {}), folder)
        self.process: BaseProcess = context.Process(target=_run, args=(self._out, self._err, *settings))
        self.process.start()

    @property
    def out(self) -> str:
        """What it has printed."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it has printed to stderr."""
        return self._err.read_text()

    def wait(self) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        self.process.join(LIMIT_SECONDS)
        assert self.process.exitcode is not None, f"hangs: {self.out}{self.err}"
        return self.process.exitcode

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.join()


def _run(out: Path, err: Path, text: str, arguments: list[str], environment: dict[str, str], folder: Path | None):
    for number, log in ((1, out), (2, err)):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment)
    sys.argv = ["program", *arguments]
    if folder is not None:
        os.chdir(folder)
    code = 1
    try:
        exec(text, {"__name__": "program"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
