"""Checkpoints of formats 1 and 2 are read, verified and upgraded as ever.

``format_2`` was written by the release before format 3, on 4 ranks, with tensors cut along rows, columns and both.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import saved_runs
import torch
from safetensors.torch import load_file

from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.engine.weights.checkpoint.verify import find_damage
from retemper.tools import checkpoint as command
from retemper.tools.checkpoint_report import upgrading

WRITTEN = Path(__file__).parent / "format_2"
NAME = "step-00000004"
NEW = {"hf/config.json", "hf/tokenizer.json", "manifest.json", "tensors.json"}


@pytest.fixture
def run_folder(tmp_path):
    """A run with that checkpoint."""
    shutil.copytree(WRITTEN / NAME, tmp_path / "run" / "checkpoints" / NAME)
    return tmp_path / "run"


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_as_written(folder):
    found, expected = saved_runs.tensors_of(folder), load_file(WRITTEN / "expected.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_it_is_verified_resumed_and_read(run_folder, one_rank):
    assert find_damage(run_folder / "checkpoints" / NAME)[1] == []
    assert saved_runs.resolve(one_rank, run_folder) == (NAME, [])
    assert_as_written(run_folder / "checkpoints" / NAME)


def test_a_changed_byte_is_found(run_folder, one_rank):
    path = run_folder / "checkpoints" / NAME / "__2_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
    assert "__2_0.distcp: damaged" in saved_runs.resolve(one_rank, run_folder)[0]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_upgrade(run_folder, one_rank, version, named, capsys):
    folder = run_folder / "checkpoints" / NAME
    if version == 1:
        saved_runs.rewrite_manifest(folder, lambda content: None, version=1)
    (folder / "notes.txt").write_text("mine")
    before = read_manifest(folder)
    assert command.main(["upgrade", str(run_folder if named == "run" else folder)]) == 0
    assert f"{folder}: upgraded" in capsys.readouterr().out
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == [NAME]
    assert {name for name in files_of(folder) if not name.startswith("tensor-")} == NEW | {"notes.txt"}
    assert_as_written(folder)
    after, damage = find_damage(folder)
    assert damage == [] and after is not None and after.format_version == 3
    assert dataclasses.replace(after, files={}) == dataclasses.replace(before, files={}, format_version=3)
    assert saved_runs.resolve(one_rank, run_folder) == (NAME, [])
    kept = files_of(folder)
    assert command.main(["upgrade", str(run_folder)]) == 0
    assert "already in the current format" in capsys.readouterr().out and files_of(folder) == kept


@pytest.mark.parametrize("step", ["copy_files", "write_manifest", "sync_path"])
def test_an_upgrade_that_fails_leaves_everything_or_can_be_completed(run_folder, one_rank, monkeypatch, step):
    folder = run_folder / "checkpoints" / NAME
    before = files_of(folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(upgrading, step, full)
    with pytest.raises(UserError, match="No space left"):
        upgrading.upgrade(run_folder)
    monkeypatch.undo()
    if step != "sync_path":  # after both have been renamed
        assert files_of(folder) == before
        assert [path.name for path in (run_folder / "checkpoints").iterdir()] == [NAME]
    upgrading.upgrade(run_folder)
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == [NAME]
    assert find_damage(folder)[1] == [] and read_manifest(folder).format_version == 3


def test_an_upgrade_killed_between_its_two_names_is_never_a_new_start(run_folder, one_rank):
    folder = run_folder / "checkpoints" / NAME
    folder.rename(f"{folder}{upgrading.OLD}")
    assert "holds no other checkpoint that can be resumed" in saved_runs.resolve(one_rank, run_folder)[0]
    lines = []
    upgrading.upgrade(run_folder, lines.append)
    assert "an upgrade was interrupted" in lines[0] and lines[1] == f"{folder}: upgraded"
    assert_as_written(folder)


def test_what_is_damaged_or_a_link_is_not_upgraded(run_folder, tmp_path):
    folder = run_folder / "checkpoints" / NAME
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match=f"link: a link; name the folder that it leads to, {folder}"):
        upgrading.upgrade(tmp_path / "link")
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    before = files_of(folder)
    with pytest.raises(UserError, match=r"__1_0\.distcp: damaged"):
        upgrading.upgrade(folder)
    assert files_of(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == [NAME]


def test_the_present_format_needs_no_reader_of_pickles(saved, tmp_path):
    """Saving, verifying and loading import neither the guarded unpickler nor DCP's planner."""
    code = f"""
import sys, torch
from pathlib import Path
from retemper.engine.weights.checkpoint.tensors import load_tensors, stored_tensors
from retemper.engine.weights.saving import save_tensors
from retemper.engine.weights.checkpoint.verify import find_damage
folder = Path({str(saved / "checkpoints" / NAME)!r})
assert find_damage(folder)[1] == []
tensors = {{name: torch.empty(item.shape, dtype=item.dtype) for name, item in stored_tensors(folder).items()}}
load_tensors(folder, tensors, distributed=False)
save_tensors(Path({str(tmp_path)!r}), tensors, distributed=False)
print([name for name in sys.modules if "conversion.dcp" in name or name.startswith("torch.distributed.checkpoint")])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
