"""A run folder has one writer."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest
import saved_runs

from retemper.engine.errors import UserError
from retemper.engine.files.lock import run_folder_lock
from retemper.engine.weights.checkpoint.store import CheckpointStore

HOLD = """
import sys
from retemper.engine.files.lock import run_folder_lock
with run_folder_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def lock_of_two_ranks(ranks, folder):
    """What each rank hears when the folder is taken."""
    try:
        with CheckpointStore(folder, ranks, 1, False).locked():
            return "held"
    except UserError as error:
        return str(error)


def test_a_second_writer_is_refused_until_the_first_is_gone(one_rank, tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        message = lock_of_two_ranks(one_rank, folder)
        assert f"process {holder.pid} on {socket.gethostname()} is writing to it" in message
        assert "\n" not in message
        os.kill(holder.pid, signal.SIGKILL)  # nothing is cleaned up
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        holder.stdin.close()
    assert lock_of_two_ranks(one_rank, folder) == "held"
    assert (folder / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_every_rank_hears_it_and_the_lock_ends_with_the_run(two_ranks, tmp_path):
    with run_folder_lock(tmp_path):
        assert all("is writing to it" in message for message in two_ranks.run(lock_of_two_ranks, tmp_path))
    assert two_ranks.run(lock_of_two_ranks, tmp_path) == ["held"] * 2
    assert two_ranks.run(lock_of_two_ranks, tmp_path) == ["held"] * 2


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def unsupported(descriptor, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with run_folder_lock(tmp_path) as [line]:
        assert "cannot be locked on this file system" in line
    monkeypatch.undo()
    with run_folder_lock(tmp_path) as notes:
        assert notes == []


def test_an_error_of_the_disk_is_no_lock(tmp_path, monkeypatch):
    def broken(descriptor, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"), run_folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("change", ["written", "removed"])
def test_a_run_that_was_overtaken_while_it_started_is_refused(change, one_rank, run_folder):
    """Otherwise it would go on from an old checkpoint, and drop the records that the other run has made since."""
    store = CheckpointStore(run_folder, one_rank, 9, False)
    assert store.resolve("auto")[0].name == "step-00000012"
    if change == "written":
        saved_runs.save(one_rank, run_folder, 16)
    else:
        store.remove(run_folder / "checkpoints" / "step-00000004")
    with (
        pytest.raises(UserError, match=r"step-000000(16|04): written or removed by another run") as refused,
        store.locked(),
    ):
        raise AssertionError("it went on")
    assert "start again" in str(refused.value)
    assert store.resolve("auto") is not None
    with store.locked():
        pass


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    """flock alone would: a run whose worker outlives it could not be started again."""
    started, starts = os.pipe()
    with run_folder_lock(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(starts, b"!")
            signal.pause()
            os._exit(0)
        assert os.read(started, 1) == b"!"
    os.close(started)
    os.close(starts)
    try:
        with run_folder_lock(tmp_path):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
