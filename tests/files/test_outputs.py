"""No command replaces what it reads, or a file that is not its own; what is compared is files, not names."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from retemper.engine.errors import UserError
from retemper.engine.files import outputs
from retemper.engine.files.lock import exclusive_lock
from retemper.engine.files.outputs import Use, open_new, require_own_folder, require_report, require_separate


def test_a_file_is_found_under_every_name(tmp_path):
    read = tmp_path / "corpus.json"
    read.write_text("text")
    (tmp_path / "sub").mkdir()
    (tmp_path / "hard.json").hardlink_to(read)
    (tmp_path / "link.json").symlink_to(read)
    (tmp_path / "folder").symlink_to(tmp_path)
    os.chdir(tmp_path)
    for name in ("corpus.json", "./sub/../corpus.json", "hard.json", "link.json", "folder/corpus.json", read):
        with pytest.raises(UserError, match=r"^--output: .* is an input \(--input corpus.json\); choose another"):
            require_separate([Use("--input", "corpus.json")], [Use("--output", name)])
        assert os.path.samefile(name, read)  # the oracle
    require_separate([Use("--input", read), Use("--input", "absent")], [Use("--output", "other"), Use("-o", "sub/x")])


def test_folders_inside_and_around_what_is_read(tmp_path):
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    for inside in (model, model / "new", model / "a" / "b", tmp_path / "link" / "new"):
        with pytest.raises(UserError, match="it is inside --hf"):
            require_separate([Use("--hf", model)], folders=[Use("--output x", inside)])
    for read in (model, model / "config.json", tmp_path / "link"):
        with pytest.raises(UserError, match="holds an input"):
            require_separate([Use("--config", read)], folders=[Use("--output x", tmp_path / "models")])
    require_separate([Use("--hf", model)], folders=[Use("--output x", tmp_path / "models" / "m2")])


def test_temporary_files_never_follow_links(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    with open_new(tmp_path / "a") as file:
        file.write(b"x")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)), exclusive_lock(tmp_path / "b", str):
        pass
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "a").is_symlink()


def test_only_its_own_work_folder_is_emptied(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "lock").touch()
    for name in ("absent", "empty", "own"):
        require_own_folder(tmp_path / name, "lock", "-o")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    (tmp_path / "link").symlink_to(tmp_path / "own")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for name in ("other", "link", "file", "dangling"):
        with pytest.raises(UserError, match=f"^-o: its temporary folder .*{name} was not created by this program"):
            require_own_folder(tmp_path / name, "lock", "-o")


OTHERS = {
    "a.json": '{"text": "a corpus"}',
    "list.json": "[1]",
    "quoted.json": json.dumps({"text": '{"generator": "retemper-report"'}),
    "a.html": "<html>mine</html>",
    "a.yaml": "model: x",
    "a.png": "\x89PNG",
    "space": " ",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_report_replaces_no_file_of_others(tmp_path, name):
    path = tmp_path / name
    path.write_text(OTHERS[name])
    for link in (path, tmp_path / "link"):
        if link != path:
            link.symlink_to(path)
        with pytest.raises(UserError, match=f"^--json {link}: exists, and is not a report"):
            outputs.write_json_report("--json", link, {"a": 1})
    assert path.read_text() == OTHERS[name] and sorted(os.listdir(tmp_path)) == sorted([name, "link"])


def test_a_report_replaces_its_own_and_empty_files(tmp_path):
    path = tmp_path / "plan.json"
    path.touch()
    for value in (1, 2):
        require_report("--json", path)
        outputs.write_json_report("--json", path, {"a": value})
        assert json.loads(path.read_text())["a"] == value
    assert os.listdir(tmp_path) == ["plan.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    outputs.write_json_report("--json", "/dev/null", {"a": 1})
    assert not Path("/dev/null").is_file()


def test_a_report_is_json_by_the_standard(tmp_path):
    record = {"a": [float("nan"), 1.5], "b": {"c": (float("inf"), 2)}}
    outputs.write_json_report("--json", tmp_path / "report.json", record)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["a"] == [None, 1.5] and found["b"] == {"c": [None, 2]}


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plots_and_pages_carry_the_mark(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    from retemper.benchmarks.kernel.report import plot_results
    from retemper.tools.reports.page import page

    for path in (tmp_path / f"plot.{suffix}", tmp_path / f"again.{suffix}"):
        plot_results([], path, "title")
        plot_results([], path, "title")  # over its own
    outputs.write_report("--html", tmp_path / "a.html", page("title", ["x"]))
    outputs.write_report("--html", tmp_path / "a.html", page("title", ["y"]))
    with pytest.raises(UserError, match="is an input"):
        require_report("--html", tmp_path / "a.html", [Use("--config", tmp_path / "a.html")])
