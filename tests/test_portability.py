"""macOS and Windows, simulated: their systems lack functions and files that Linux has."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run

import retemper
from retemper.engine import system
from retemper.engine.errors import UserError

ROOT = Path(retemper.__file__).resolve().parent
COMMANDS = sorted(
    path
    for folder in ("engine", "tools", "checkpoint_convert", "launch")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.name != "quiet_torchrun.py"
)
# Python imports it at the start of every process, of workers too. What is deleted is what Python's documentation marks
# as Linux only. /proc and /sys do not exist on macOS.
WITHOUT_LINUX = """
import os, resource, select, signal, sys

for name in '''copy_file_range eventfd memfd_create O_DIRECT O_TMPFILE pidfd_open posix_fadvise posix_fallocate
        sched_getaffinity sched_setaffinity setns splice ST_NOEXEC unshare'''.split():
    if hasattr(os, name):
        delattr(os, name)
del os.sysconf_names["SC_AVPHYS_PAGES"], select.epoll, signal.SIGPWR
signal.Signals._member_map_.pop("SIGPWR")
signal.Signals._member_names_.remove("SIGPWR")
hidden = ("/proc", "/sys")


def is_hidden(path):
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(hidden)


def refuse(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and is_hidden(arguments[0]):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])


def hiding(function):
    def call(path, *arguments, **named):
        refuse("open", [path])
        return function(path, *arguments, **named)
    return call


sys.addaudithook(refuse)
os.stat, os.lstat = hiding(os.stat), hiding(os.lstat)
setrlimit = resource.setrlimit


def refuse_address_space(kind, limits):
    if kind == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    setrlimit(kind, limits)


resource.setrlimit = refuse_address_space
"""
WINDOWS = """
import sys
sys.platform = "win32"
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
"""


def run(folder: Path, customization: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with ``customization`` in all its processes."""
    (folder / "sitecustomize.py").write_text(customization)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, command)]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=280)


def test_memory_is_counted_in_the_unit_of_the_system(monkeypatch):
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    for platform, expected in (("linux", 5000 * 1024), ("darwin", 5000)):
        monkeypatch.setattr(sys, "platform", platform)
        assert system.peak_memory() == expected
    assert 0 < system.free_memory() < system.total_memory()
    monkeypatch.delitem(os.sysconf_names, "SC_AVPHYS_PAGES")
    assert system.free_memory() is None


def test_what_needs_linux_says_so(monkeypatch):
    system.require_linux("this")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="counting needs Linux; this is darwin"):
        system.require_linux("counting")


@pytest.mark.parametrize("command", [["-m", "retemper"], [ROOT / "engine" / "pretrain.py"]], ids=["module", "script"])
def test_windows_is_answered_in_one_line(command, tmp_path):
    done = run(tmp_path, WINDOWS, *command, "--help")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: ") and "Linux, macOS and WSL" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.name)
def test_every_command_answers_windows_in_one_line(command, tmp_path):
    test_windows_is_answered_in_one_line([command], tmp_path)


EVERYTHING = """
import importlib, pkgutil, retemper
for package in ("engine", "kernels", "tools", "checkpoint_convert"):
    folder = importlib.import_module(f"retemper.{package}")
    for module in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}."):
        if not module.name.endswith(".retemper"):
            importlib.import_module(module.name)
"""


@pytest.mark.slow
def test_all_modules_import_without_what_only_linux_has(tmp_path):
    done = run(tmp_path, WITHOUT_LINUX, "-c", EVERYTHING)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_corpus_is_tokenized_without_what_only_linux_has(tmp_path, tiny_tokenizer):
    (tmp_path / "corpus.jsonl").write_text('{"text": "The sea was calm."}\n' * 20000)
    words = ["--input", "corpus.jsonl", "--tokenizer", tiny_tokenizer, "--encoder", "fast", "--workers", "2"]
    for customization, prefix in ((WITHOUT_LINUX, "without"), ("", "with")):
        command = [ROOT / "tools" / "preprocess.py", *words, "--output-prefix", prefix, "--shuffle"]
        done = run(tmp_path, customization, *command)
        assert done.returncode == 0, done.stderr
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"without{suffix}").read_bytes() == (tmp_path / f"with{suffix}").read_bytes()


@pytest.mark.slow
def test_a_run_trains_without_what_only_linux_has(tmp_path):
    path = tiny_run.write_config(tmp_path)
    done = run(
        tmp_path, WITHOUT_LINUX, ROOT / "engine" / "pretrain.py", "--config", path, "--checkpoint.asynchronous", "true"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in all" in done.stdout  # the memory of the machine, since what is free is not known
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000020"
    command = [ROOT / "tools" / "checkpoint.py", "verify", checkpoint]
    assert run(tmp_path, WITHOUT_LINUX, *command).returncode == 0
    measured = run(tmp_path, WITHOUT_LINUX, ROOT / "tools" / "benchmark.py", "--config", path, "--steps", "2")
    assert measured.returncode == 0, measured.stderr
