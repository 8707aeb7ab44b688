"""A run folder with history is never treated as a new one, and what cannot be removed stops nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess

import pytest
import saved_runs

from retemper.engine.errors import UserError
from retemper.engine.files.lock import run_folder_lock
from retemper.engine.files.removal import remove_tree
from retemper.engine.weights.checkpoint.run_record import note_start, origin_of
from retemper.engine.weights.checkpoint.store import CheckpointStore


def tree(folder):
    """Every path below ``folder``, with its content or target."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def record_steps(run_folder, last):
    lines = [json.dumps({"step": step, "tokens": 256 * step, "loss": 1.0}) + "\n" for step in range(1, last + 1)]
    (run_folder / "metrics.jsonl").write_text("".join(lines))


def moved_away(checkpoints):
    checkpoints.rename(checkpoints.parent.parent / "elsewhere")


def dangling_link(checkpoints):
    shutil.rmtree(checkpoints)
    checkpoints.symlink_to("/unmounted/disk")


def unmounted(checkpoints):
    for entry in checkpoints.iterdir():
        shutil.rmtree(entry)


def looping_link(checkpoints):
    shutil.rmtree(checkpoints)
    checkpoints.symlink_to("checkpoints")


def only_leftovers(checkpoints):
    unmounted(checkpoints)
    (checkpoints / f".step-00000016.{'0' * 32}.tmp").mkdir()


def only_other_names(checkpoints):
    unmounted(checkpoints)
    for name in ("lost+found", "latest", "mine"):
        (checkpoints / name).mkdir()


LOST = [moved_away, dangling_link, unmounted, looping_link, only_leftovers, only_other_names]


@pytest.mark.parametrize("resume", ["auto", "base"])
@pytest.mark.parametrize("lose", LOST)
def test_a_run_whose_checkpoints_are_gone_is_refused(lose, resume, one_rank, run_folder, tmp_path):
    record_steps(run_folder, 12)
    if resume == "base":
        resume = str(saved_runs.copy_of(run_folder / "checkpoints" / "step-00000004", tmp_path / "base"))
    lose(run_folder / "checkpoints")
    before = tree(run_folder)
    message, _ = saved_runs.resolve(one_rank, run_folder, resume)
    assert f"run_folder {run_folder}: the run has written checkpoints up to step 12" in message
    assert str(run_folder / "checkpoints") in message and "resume: none" in message and "\n" not in message
    assert tree(run_folder) == before
    assert saved_runs.resolve(one_rank, run_folder, "none") == ("fresh", [])


@pytest.mark.parametrize("config", ["save_interval: 4", "save_interval: 1000", "{broken", None, b"\xff\xfe"])
def test_without_a_record_the_curve_tells(config, one_rank, run_folder):
    """Run folders of former versions."""
    (run_folder / "run.json").unlink()
    moved_away(run_folder / "checkpoints")
    record_steps(run_folder, 12)
    if isinstance(config, bytes):
        (run_folder / "config.yaml").write_bytes(config)
    elif config is not None:
        text = f"checkpoint: {{{config}}}\ntraining: {{train_tokens: 100000}}\n" if ":" in config else config
        (run_folder / "config.yaml").write_text(text)
    message, _ = saved_runs.resolve(one_rank, run_folder)
    expected = "fresh" if "1000" in str(config) else "its recorded curve reaches step 12"
    assert expected in message
    # Where the budget is used up there was a last checkpoint.
    record_steps(run_folder, 400)
    assert "its recorded curve reaches step 400" in saved_runs.resolve(one_rank, run_folder)[0]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(one_rank, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    note_start(folder, fresh=True, origin=None)
    record_steps(folder, 50)  # a first save may have been on its way
    (folder / "checkpoints" / f".step-00000004.{'0' * 32}.tmp").mkdir(parents=True)
    assert saved_runs.resolve(one_rank, folder) == ("fresh", [])


@pytest.mark.parametrize("record", ["", "[]", '{"began_at": 1}', '{"began_at": null, "newest_step": "x"}'])
def test_a_record_that_cannot_be_read_is_as_none(record, one_rank, run_folder):
    (run_folder / "run.json").write_text(record)
    assert saved_runs.resolve(one_rank, run_folder) == ("step-00000012", [])
    moved_away(run_folder / "checkpoints")
    record_steps(run_folder, 2000)
    assert "curve reaches step 2000" in saved_runs.resolve(one_rank, run_folder)[0]


@pytest.mark.parametrize(
    ("broken", "refused"), [((12,), 12), ((4, 8, 12), 12), ((8, 12), 12), ((4,), None), ((4, 8), None)]
)
def test_a_link_that_leads_nowhere_is_not_passed_over(broken, refused, one_rank, run_folder):
    """The newest checkpoint on an unmounted disk: without the refusal, the run would silently repeat its steps, and
    could not save where the link is."""
    for step in broken:
        link = run_folder / "checkpoints" / f"step-{step:08d}"
        shutil.rmtree(link)
        link.symlink_to(f"/unmounted/{link.name}")
    before = tree(run_folder)
    message, _ = saved_runs.resolve(one_rank, run_folder)
    if refused:
        assert f"step-{refused:08d}: a link to /unmounted/step-{refused:08d}, which does not exist" in message
    else:
        assert message == "step-00000012"
    assert tree(run_folder) == before


def test_newer_checkpoints_that_were_moved_away_are_mentioned(one_rank, run_folder, tmp_path):
    (run_folder / "checkpoints" / "step-00000012").rename(tmp_path / "kept")
    name, [line] = saved_runs.resolve(one_rank, run_folder)
    assert name == "step-00000008" and line.startswith("note: ") and "checkpoint of step 12" in line


def test_a_copy_of_a_run_folder_resumes(one_rank, run_folder, tmp_path):
    subprocess.run(["cp", "-r", str(run_folder), str(tmp_path / "copy")], check=True)
    assert saved_runs.resolve(one_rank, tmp_path / "copy") == ("step-00000012", [])


def test_one_folder_under_two_paths_has_one_writer(run_folder, tmp_path):
    (tmp_path / "alias").symlink_to(run_folder)
    with (
        run_folder_lock(run_folder),
        pytest.raises(UserError, match="is writing to it"),
        run_folder_lock(tmp_path / "alias"),
    ):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# resume: PATH, and the same command again


@pytest.fixture
def begun(one_rank, run_folder, tmp_path, monkeypatch):
    """(run folder that began at a checkpoint of another run, that checkpoint)."""
    monkeypatch.chdir(tmp_path)
    base, folder = run_folder / "checkpoints" / "step-00000004", tmp_path / "longer"
    folder.mkdir()
    store = CheckpointStore(folder, one_rank, 3, False)
    assert store.resolve(str(base))[0] == base
    note_start(folder, fresh=False, origin=store.origin)
    assert saved_runs.resolve(one_rank, folder, str(base))[0] == "step-00000004"  # killed before its first checkpoint
    saved_runs.save(one_rank, folder, 6, 10)
    return folder, base


def relative(folder, base):
    return os.path.relpath(base)


def with_dots(folder, base):
    return f"{base.parent}/../checkpoints/{base.name}/"


def by_a_link(folder, base):
    (folder.parent / "link").symlink_to(base)
    return str(folder.parent / "link")


def a_copy(folder, base):
    return str(saved_runs.copy_of(base, folder.parent / "copy"))


def removed(folder, base):
    shutil.rmtree(base)
    return str(base)


@pytest.mark.parametrize("spelling", [relative, with_dots, by_a_link, a_copy, removed])
def test_the_same_command_continues_from_the_runs_own_newest(spelling, one_rank, begun):
    folder, base = begun
    name, [line] = saved_runs.resolve(one_rank, folder, spelling(folder, base))
    assert name == "step-00000010" and "began at" in line and "its own newest" in line


def test_without_a_record_the_manifests_tell_where_a_run_began(one_rank, begun):
    folder, base = begun
    (folder / "run.json").unlink()
    assert "is newer" in saved_runs.resolve(one_rank, folder, str(base))[0]

    def resumed(content):
        content["config"]["resume"] = os.path.relpath(base)

    saved_runs.rewrite_manifest(folder / "checkpoints" / "step-00000006", resumed)
    assert saved_runs.resolve(one_rank, folder, str(base))[0] == "step-00000010"


def test_another_checkpoint_than_the_one_it_began_at_is_refused(one_rank, begun):
    folder, base = begun
    assert "is newer" in saved_runs.resolve(one_rank, folder, str(base.with_name("step-00000008")))[0]
    assert "is newer" in saved_runs.resolve(one_rank, folder, str(folder / "checkpoints" / "step-00000006"))[0]
    # A fresh run in the same folder did not begin there.
    note_start(folder, fresh=True, origin=None)
    assert "is newer" in saved_runs.resolve(one_rank, folder, str(base))[0]


def test_resume_auto_in_between_keeps_where_the_run_began(one_rank, begun):
    folder, base = begun
    note_start(folder, fresh=False, origin=None)
    assert saved_runs.resolve(one_rank, folder, str(base))[0] == "step-00000010"


def test_a_checkpoint_in_the_runs_own_folder(one_rank, run_folder, tmp_path):
    """Gone back by hand: the newer ones are moved away, and the run is killed once more on its way."""
    named = run_folder / "checkpoints" / "step-00000004"
    for step in (8, 12):
        (run_folder / "checkpoints" / f"step-{step:08d}").rename(tmp_path / str(step))
    store = CheckpointStore(run_folder, one_rank, 3, False)
    assert store.resolve(str(named))[0] == named
    note_start(run_folder, fresh=False, origin=store.origin)
    saved_runs.save(one_rank, run_folder, 5, 8)
    assert saved_runs.resolve(one_rank, run_folder, str(named))[0] == "step-00000008"


def test_a_damaged_newest_one_of_a_run_that_began_at_a_path_is_quarantined(one_rank, begun):
    folder, base = begun
    (folder / "checkpoints" / "step-00000010" / "rank-00000.safetensors").write_bytes(b"")
    assert saved_runs.resolve(one_rank, folder, str(base))[0] == "step-00000006"
    assert (folder / "checkpoints" / "step-00000010.damaged").is_dir()


@pytest.mark.slow
def test_both_ranks_continue_alike(two_ranks, begun):
    folder, base = begun
    results = two_ranks.run(saved_runs.resolve, folder, str(base))
    assert [name for name, _ in results] == ["step-00000010"] * 2


def test_the_record_identifies_the_checkpoint(one_rank, run_folder):
    origin = origin_of(run_folder / "checkpoints" / "step-00000008", 8)
    note_start(run_folder, fresh=False, origin=origin)
    content = json.loads((run_folder / "run.json").read_text())
    assert content["newest_step"] == 12 and content["began_at"]["step"] == 8
    assert content["began_at"]["path"] == os.path.realpath(run_folder / "checkpoints" / "step-00000008")


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be removed


def test_links_to_archived_checkpoints_are_unlinked(one_rank, run_folder, tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    for step in (4, 8):
        path = run_folder / "checkpoints" / f"step-{step:08d}"
        path.rename(archive / path.name)
        path.symlink_to(archive / path.name)
    leftover = run_folder / "checkpoints" / f".step-00000002.{'0' * 32}.tmp"
    leftover.symlink_to(archive)
    store, kept = CheckpointStore(run_folder, one_rank, 1, False), tree(archive)
    assert store.prune(None) == []
    [line] = store.remove_leftovers()
    assert str(leftover) in line and "could not" not in line
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == ["step-00000012"]
    assert tree(archive) == kept


@pytest.fixture
def immutable(monkeypatch):
    """Function: files and folders of these names cannot be removed or renamed, as with ``chattr +i``."""

    def refuse(*names):
        for function in ("unlink", "rmdir", "remove", "rename"):
            call = getattr(os, function)

            def refusing(path, *rest, call=call, **options):
                if os.path.basename(os.fspath(path)) in names:
                    raise OSError(errno.EPERM, os.strerror(errno.EPERM), os.path.basename(path))
                return call(path, *rest, **options)

            monkeypatch.setattr(os, function, refusing)

    return refuse


def test_what_cannot_be_removed_is_named_with_its_full_path_and_passed_over(one_rank, run_folder, immutable):
    immutable("rank-00000.safetensors", "step-00000008")
    store = CheckpointStore(run_folder, one_rank, 1, False)
    [line] = store.prune(None)
    assert line.startswith("note: ") and "Operation not permitted and 1 more" in line
    folder = run_folder / "checkpoints"
    [leftover] = folder.glob(".step-*.tmp")
    assert f"{leftover}/rank-00000.safetensors: Operation not permitted" in line
    # All that can be removed is gone; later starts mention the rest, and go through.
    assert [path.name for path in leftover.rglob("*")] == ["rank-00000.safetensors"]
    for _ in range(2):
        [line] = store.remove_leftovers()
        assert f"{leftover}/rank-00000.safetensors: Operation not permitted" in line
    assert saved_runs.resolve(one_rank, run_folder) == ("step-00000012", [])


def test_a_file_that_appears_while_its_folder_is_removed(tmp_path, monkeypatch):
    """NFS renames files that others hold open to .nfs..., so that the folder is not empty."""
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("")
    unlink = os.unlink

    def silly_rename(path, *rest, **options):
        unlink(path, *rest, **options)
        (folder / "inner" / ".nfs0001").touch()

    monkeypatch.setattr(os, "unlink", silly_rename)
    [problem] = remove_tree(folder)
    assert problem.startswith(f"{folder}/inner: Directory not empty")
    monkeypatch.undo()
    assert remove_tree(folder) == [] and not folder.exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "run.json", ".lock"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_what_is_no_file_in_the_place_of_one_is_refused_before_it_is_read(
    checkpoints, kind, name, one_rank, run_folder
):
    """A FIFO would be waited for, /dev/zero read without end."""
    path = run_folder / name
    path.unlink(missing_ok=True)
    if not checkpoints:
        moved_away(run_folder / "checkpoints")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert f"{path}: not a regular file" in saved_runs.resolve(one_rank, run_folder)[0]


def test_remove_tree_follows_no_link(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for name, target in (("folder/a", "../outside"), ("folder/inner/b", "../../outside/file"), ("folder/c", "nowhere")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "link").symlink_to("folder")
    assert remove_tree(tmp_path / "link") == [] and (tmp_path / "folder" / "inner").is_dir()
    assert remove_tree(tmp_path / "folder") == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "outside"]
    assert remove_tree(tmp_path / "none") == []
