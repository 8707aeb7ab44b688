"""Check disks, memory, CPU cores, open files, shared memory and text encoding of this machine."""

from __future__ import annotations

import locale
import os
import sys
import tempfile
from pathlib import Path

from ...engine.errors import UserError
from ...engine.files.disk_space import format_bytes, free_bytes
from ...engine.system import usable_cores
from .finding import Finding, note, ok, problem

GROUP = "Machine"
_LITTLE_SPACE = 10e9
_NO_SPACE = 1e9
_LITTLE_MEMORY = 4e9
_WANTED_FILES = 4096
_LEAST_FILES = 128
_LITTLE_SHARED_MEMORY = 1e9
_SHARED_MEMORY = Path("/dev/shm")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def check_machine(run_folder: Path) -> list[Finding]:
    """Return findings on this machine. A byte is written to each folder and removed again.

    Args:
        run_folder: where runs will write.
    """
    return [
        *_disks(run_folder),
        _memory(),
        _cores(),
        *_open_files(),
        *_shared_memory(),
        _encoding(),
    ]


def _disks(run_folder: Path) -> list[Finding]:
    temporary = Path(tempfile.gettempdir())
    folders = {
        "run folder": run_folder,
        "cache": Path(os.environ.get("RETEMPER_CACHE") or "~/.cache/retemper").expanduser(),
        "Hub cache": Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser(),
        "TMPDIR": temporary,
    }
    return [*(disk(name, folder) for name, folder in folders.items()), *_executable(temporary)]


def disk(name: str, folder: Path) -> Finding:
    """Return a finding on a folder that will be written to."""
    from ...engine.weights.checkpoint.destination import require_writable

    try:
        require_writable([folder])
    except UserError as error:
        return problem(GROUP, name, str(error), "")
    free = free_bytes(folder)
    text = f"{format_bytes(free)} free in {folder}"
    if free < _NO_SPACE:
        return problem(GROUP, name, text, "free some space, or name another folder")
    if free < _LITTLE_SPACE:
        return note(GROUP, name, text, "a checkpoint takes 12 bytes for each parameter")
    return ok(GROUP, name, text)


def _executable(temporary: Path) -> list[Finding]:
    """Return a note if programs in the temporary folder cannot run: torch.compile and Triton load libraries there."""
    flag = getattr(os, "ST_NOEXEC", 0)
    if not flag or not os.statvfs(temporary).f_flag & flag:
        return []
    remedy = "set TMPDIR to another folder"
    return [note(GROUP, "TMPDIR", f"{temporary} is mounted noexec, but torch.compile loads libraries there", remedy)]


def _memory() -> Finding:
    import torch

    from ...engine.parallel.memory_check import device_memory

    total = device_memory(torch.device("cpu"))
    text = f"{format_bytes(total)} (within the limit of the control group, if there is one)"
    if total < _LITTLE_MEMORY:
        return note(GROUP, "memory", text, "models above 100M parameters need more")
    return ok(GROUP, "memory", text)


def _cores() -> Finding:
    count = usable_cores()
    quota = _cpu_quota()
    if quota is not None and quota < count:
        text = f"{count}, but the control group limits this process to {quota:g}"
        return note(GROUP, "CPU cores", text, f"set OMP_NUM_THREADS to {max(1, int(quota))}")
    return ok(GROUP, "CPU cores", str(count))


def _cpu_quota() -> float | None:
    """Return the number of cores that the control group allows; None without a limit."""
    try:
        limit, period = _CPU_QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def _open_files() -> list[Finding]:
    try:
        import resource
    except ImportError:
        return []
    return [open_files(*resource.getrlimit(resource.RLIMIT_NOFILE), resource.RLIM_INFINITY)]


def open_files(soft: int, hard: int, unlimited: int) -> Finding:
    """Return a finding on the limits of open files. Runs raise the soft limit themselves."""
    if hard == unlimited:
        return ok(GROUP, "open files", f"{soft:,}; a run may raise it without limit")
    text = f"{soft:,}; a run may raise it to {hard:,}"
    remedy = f"raise the hard limit, for example with `ulimit -Hn {_WANTED_FILES}` as root"
    if hard < _LEAST_FILES:
        return problem(GROUP, "open files", f"{text}; it needs {_LEAST_FILES}", remedy)
    if hard < _WANTED_FILES:
        return note(GROUP, "open files", f"{text}; many datasets or ranks need {_WANTED_FILES:,}", remedy)
    return ok(GROUP, "open files", text)


def _shared_memory() -> list[Finding]:
    if not _SHARED_MEMORY.is_dir():
        return []
    size = os.statvfs(_SHARED_MEMORY)
    total = size.f_blocks * size.f_frsize
    text = f"{format_bytes(total)} in {_SHARED_MEMORY}"
    if total < _LITTLE_SHARED_MEMORY:
        remedy = "start the container with --ipc=host or --shm-size=8g"
        return [note(GROUP, "shared memory", f"{text}; NCCL may need more between the GPUs of a machine", remedy)]
    return [ok(GROUP, "shared memory", text)]


def _encoding() -> Finding:
    names = {
        "files": locale.getpreferredencoding(False),
        "file names": sys.getfilesystemencoding(),
        "output": getattr(sys.stdout, "encoding", None) or "utf-8",
    }
    others = {what: name for what, name in names.items() if name.lower().replace("-", "") not in ("utf8", "utf8sig")}
    if others:
        listed = ", ".join(f"{what} {name}" for what, name in others.items())
        return note(GROUP, "encoding", f"{listed}, not UTF-8", "export PYTHONUTF8=1")
    return ok(GROUP, "encoding", "UTF-8")
