"""Files and folders appear under their names only when they are complete."""

from __future__ import annotations

import os

import pytest

from retemper.engine.errors import UserError
from retemper.engine.files.atomic import new_folder, replace_file


def test_a_file_that_cannot_be_completed_keeps_its_former_content(tmp_path):
    path = tmp_path / "run.json"
    replace_file(path, [b"for", b"mer"])

    def chunks():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, chunks())
    assert path.read_bytes() == b"former" and os.listdir(tmp_path) == ["run.json"]
    replace_file(path, [b"new"])
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["run.json"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "content" and os.listdir(tmp_path) == ["out"]
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out"):
        pass


def test_nothing_is_left_of_a_folder_that_failed(tmp_path):
    for error in (KeyboardInterrupt, UserError("refused")):
        with pytest.raises((KeyboardInterrupt, UserError)), new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("content")
            raise error
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()  # by another program meanwhile
    assert os.listdir(tmp_path) == ["out"] and not os.listdir(tmp_path / "out")
