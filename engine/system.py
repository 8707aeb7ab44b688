"""Return facts about this machine that Linux and macOS report in different ways, or not at all.

Code that needs one of these systems asks here, or looks for the function that it calls (``hasattr(os, ...)``).
Windows is refused when the package is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from .errors import ERROR_FILE_VARIABLE, UserError

PARENT_VARIABLE = "RETEMPER_PARENT"
"""Environment variable with the process id of a parent with which its child is to end."""
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMP_NUM_THREADS")
"""Beginnings of the variables of torchrun, which would make another process believe that it is a rank."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def require_linux(what: str) -> None:
    """Refuse what reads the files of Linux in /proc.

    Raises:
        UserError: this is another system.
    """
    if not sys.platform.startswith("linux"):
        raise UserError(f"{what} needs Linux; this is {sys.platform}")


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent ends, if the parent has asked for it.

    The parent asks by its process id in ``PARENT_VARIABLE``. Only Linux can do this; elsewhere nothing happens.
    """
    if os.environ.get(PARENT_VARIABLE) != str(os.getppid()) or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it has ended in the meantime
        os.kill(os.getpid(), signal.SIGTERM)


def environment_of_tool(problem: Path | None = None) -> dict[str, str]:
    """Return the environment for a command of this project that a run starts as a process.

    The process is not a rank, ends with this one, and writes the line of its error to the file ``problem``.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    reports = {} if problem is None else {ERROR_FILE_VARIABLE: str(problem)}
    return {**own, **reports, PARENT_VARIABLE: str(os.getpid())}


def usable_cores() -> int:
    """Return the number of cores that this process may use; macOS does not restrict processes to some cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int | None:
    """Return the bytes of memory that no process uses; None where the system does not report them, as on macOS."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes. Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
