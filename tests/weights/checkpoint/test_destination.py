"""Where a run will write is tested before its first step, and a full disk says what is needed."""

from __future__ import annotations

import errno
import os
import types
from pathlib import Path

import pytest
import saved_runs

from retemper.engine.errors import UserError
from retemper.engine.files.disk_space import require_space
from retemper.engine.weights.checkpoint import destination, store
from retemper.engine.weights.checkpoint.destination import require_writable
from retemper.engine.weights.checkpoint.store import CheckpointStore

FOLDERS = ("run", "run/checkpoints", "run/tensorboard", "run/hf")


def entries(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("present", [(), ("run",), FOLDERS])
def test_a_good_place_is_left_as_it_was(present, tmp_path):
    for name in present:
        (tmp_path / name).mkdir(exist_ok=True)
    require_writable(tmp_path / name for name in FOLDERS)
    assert entries(tmp_path) == sorted(present)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize(
    ("what", "said"),
    [("file", "a file, where the run needs"), ("dangling", "a link to /unmounted/x"), ("loop", "levels of symbolic")],
)
def test_what_is_in_the_way_is_named(name, what, said, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if what == "file":
        path.write_text("mine")
    else:
        path.symlink_to("/unmounted/x" if what == "dangling" else path.name)
    before = entries(tmp_path)
    with pytest.raises(UserError) as refused:
        require_writable(tmp_path / name for name in FOLDERS)
    assert str(refused.value).startswith(f"{path}: ") and said in str(refused.value)
    assert entries(tmp_path) == before


def test_a_link_to_a_folder_on_another_disk_is_good(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    require_writable(tmp_path / name for name in FOLDERS)


@pytest.mark.parametrize(
    ("number", "call", "said"),
    [
        (errno.EROFS, "mkdir", "Read-only file system"),
        (errno.EACCES, "mkdir", "Permission denied"),
        (errno.ENOSPC, "mkdir", "no space left"),
        (errno.ENOSPC, "write", "no space left"),
        (errno.EDQUOT, "write", "no space left"),
    ],
)
def test_a_disk_that_refuses(number, call, said, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((os, "mkdir") if call == "mkdir" else (Path, "write_bytes")), refuse)
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be written: {said}"):
        require_writable([tmp_path / "run"])
    monkeypatch.undo()
    assert entries(tmp_path) == []


def test_space_is_that_of_the_disk_on_which_the_folder_will_be(tmp_path):
    free = os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    (tmp_path / "checkpoints").symlink_to("/dev/shm")
    require_space(tmp_path / "checkpoints" / "new", free // 2, "a checkpoint", lambda: "")
    with pytest.raises(UserError, match=r"no space left for a checkpoint: about .* are needed, .* are free; buy one"):
        require_space(tmp_path / "checkpoints" / "new", 2 * free, "a checkpoint", lambda: "buy one")


@pytest.mark.parametrize("keep_every", [0, 8])
def test_a_full_disk_says_what_can_be_pruned(keep_every, one_rank, run_folder, monkeypatch):
    """The command in the message is what ``tools/checkpoint.py prune`` does: the numbers are compared."""
    saved_runs.save(one_rank, run_folder, 16, 20)

    def full(*_):
        raise UserError(f"rank-00000.safetensors: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(store, "save_tensors", full)
    filled = types.SimpleNamespace(f_bavail=2, f_frsize=500)
    monkeypatch.setattr(destination.os, "statvfs", lambda path: filled)
    checkpoints = CheckpointStore(run_folder, one_rank, 3, True, keep_every)
    checkpoints.expected_bytes = 1500
    with pytest.raises(UserError) as refused:
        checkpoints.save(saved_runs.tensors_at(24), saved_runs.ASSETS, saved_runs.manifest_at(24))
    monkeypatch.undo()
    message = str(refused.value)
    assert "no space left for a checkpoint: about 1.5 kB are needed, 1 kB are free" in message
    removed = [8, 12, 16] if not keep_every else [12]
    sizes = [
        sum(file.stat().st_size for file in (run_folder / "checkpoints" / f"step-{step:08d}").rglob("*")
            if file.is_file())
        for step in removed
    ]  # fmt: skip
    every = f" --keep-every {keep_every}" if keep_every else ""
    number = f"{len(removed)} checkpoint{'s' if len(removed) > 1 else ''}"
    assert message.endswith(
        f"retemper checkpoint prune {run_folder} --keep-last 1{every} removes {number} and frees "
        f"{sum(sizes) / 1000:.3g} kB"
    )
    assert not list((run_folder / "checkpoints").glob(".*"))
