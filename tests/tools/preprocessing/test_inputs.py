"""Which files ``--input`` stands for: folders, patterns, links, and what cannot be an input."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from retemper.engine.errors import UserError
from retemper.tools import preprocess
from retemper.tools.preprocessing.inputs import files
from retemper.tools.preprocessing.inputs.files import InputOptions, expand_inputs, with_stdin_copied


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder of files in a folder, which becomes the current one."""
    for name in ("z.jsonl", "a.txt", "B.JSON", "b/c.csv.gz", "b/deep/er/d.md", "b-1/x.html", "b/é 天.tsv.zst"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for name in (".hidden.jsonl", ".git/x.jsonl", "b/.cache/x.txt", "README", "b/x.parquet.gz", "b/x.gz", "x.docx"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


ALL = ["B.JSON", "a.txt", "b-1/x.html", "b/c.csv.gz", "b/deep/er/d.md", "b/é 天.tsv.zst", "z.jsonl"]


def names(*arguments: str, mode: str = "file") -> list[str]:
    """The paths in the folder ``data`` that ``arguments`` stand for."""
    files = expand_inputs(arguments, InputOptions(mode))
    return [os.path.relpath(file.path, "data") for file in files]


def test_a_folder_is_all_its_files_of_known_formats_by_path(corpus, capsys):
    assert names("data") == names(f"{corpus}/") == names("data/.") == ALL
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("note: --input data: left out 4 files of other formats, data/README first (1 of them: a")
    assert names("data/b", "data/a.txt") == ["b/c.csv.gz", "b/deep/er/d.md", "b/é 天.tsv.zst", "a.txt"]


def test_files_are_described(corpus):
    files = expand_inputs(["data/b/c.csv.gz", "data/a.txt", "data/B.JSON"], InputOptions("line"))
    described = [(f.format, f.compression, f.size, f.source, f.units) for f in files]
    assert described == [("csv", ".gz", 1, 0, 1), ("txt-lines", "", 1, 1, 1), ("json", "", 1, 2, 1)]
    assert files[1].version == str((corpus / "a.txt").stat().st_mtime_ns)


def test_inputs_are_listed_with_what_identifies_their_contents(corpus, capsys):
    preprocess.main(["--input", "data/b", "data/a.txt", "-", "--list-inputs"])
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [os.path.relpath(facts["path"], "data") for facts in listed[:-1]] == names("data/b", "data/a.txt")
    assert listed[-1] == {"path": "-", "size": 0, "identity": ""}
    modified = str((corpus / "a.txt").stat().st_mtime_ns)
    assert listed[-2] == {"path": "data/a.txt", "size": 1, "identity": modified}


PATTERNS = {
    "data/*.jsonl": ["z.jsonl"],
    "data/[ab].txt": ["a.txt"],
    "data/?.*": r"data/x.docx: a word processor's document, which is not read; convert it to text",
    "data/b*": ["b-1/x.html", "b/c.csv.gz", "b/deep/er/d.md", "b/é 天.tsv.zst"],
    "data/*/*.html": ["b-1/x.html"],
    "data/**": ALL,
    "data/**/*.txt": ["a.txt"],
    "data/**/*.md": ["b/deep/er/d.md"],
    "data/**/deep": ["b/deep/er/d.md"],
    "data/**/**/d.*": ["b/deep/er/d.md"],
    "data/**/er/*": ["b/deep/er/d.md"],
    "**/*.html": ["b-1/x.html"],
    "d*/**/c.*": ["b/c.csv.gz"],
    "data/**/.cache/*": "no file matches this pattern",
    "data/.cache*": "no file matches this pattern",
    "data/*.parquet": "no file matches this pattern",
    "data/**/*.parquet": "no file matches this pattern",
    "nowhere/**": "no file matches this pattern",
    "data/**/*": ALL,
    "data/*": ALL,
    "data/R*": "data/README: unknown format",
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", [False, True])
def test_patterns_stand_for_what_they_match(corpus, pattern, absolute):
    expected = PATTERNS[pattern]
    argument = f"{corpus.parent}/{pattern}" if absolute else pattern
    if isinstance(expected, list):
        assert names(argument) == expected
    else:
        with pytest.raises(UserError, match=expected):
            names(argument)


def test_a_name_may_look_like_a_pattern(corpus):
    for name in ("c[1].txt", "d*.txt", "e?.jsonl"):
        (corpus / name).write_bytes(b"x")
        assert names(f"data/{name}") == [name]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data/absent.jsonl"], "--input data/absent.jsonl: no such file or folder"),
        ([""], "--input : no such file or folder"),
        (
            ["data/README"],
            r"--input data/README: unknown format; known are .jsonl, .*, .xlsx, .* as .gz, .zst, .*--input-format",
        ),
        (["data/b/x.gz"], "--input data/b/x.gz: unknown format"),
        (["data/b/x.parquet.gz"], "a .parquet file in .gz compression; decompress it first"),
        (["data/a.txt", "data/a.txt"], "--input data/a.txt: data/a.txt is already an input, as data/a.txt; name each"),
        (["data/a.txt", "data/../data/a.txt"], "is already an input, as data/a.txt"),
        (["data", "data/b/c.csv.gz"], "--input data/b/c.csv.gz: .* is already an input, as data/b/c.csv.gz"),
        (["data/b", "data/*/c*"], "is already an input, as data/b/c.csv.gz"),
        (["-", "-"], "--input -: - is already an input"),
    ],
)
def test_what_names_nothing_or_twice_is_refused(corpus, arguments, expected):
    with pytest.raises(UserError, match=expected):
        expand_inputs(arguments, InputOptions())


def test_another_options_name_is_in_the_messages(corpus):
    for argument in ("data/README", "absent", "absent*"):
        with pytest.raises(UserError, match=r"^--held-out "):
            expand_inputs([argument], InputOptions(), "--held-out")


def test_an_empty_folder_is_refused(corpus):
    (corpus / "empty" / "deep").mkdir(parents=True)
    (corpus / "empty" / "deep" / "x.docx").write_bytes(b"")
    for arguments in (["data/empty"], ["data/e*"]):
        with pytest.raises(UserError, match=r"data/empty: no file that can be read .*1 of them: a word processor's"):
            names(*arguments)
    (corpus / "empty" / "deep" / "x.docx").unlink()
    with pytest.raises(UserError, match=r"data/empty: no .jsonl, .* file in this folder"):
        names("data/empty")
    assert names("data/**") == ALL


def test_links_are_followed_once_and_never_round(corpus, capsys):
    outside = corpus.parent / "outside"
    outside.mkdir()
    (outside / "o.txt").write_bytes(b"x")
    (outside / "back").symlink_to(corpus)
    (corpus / "loop").symlink_to(".")
    (corpus / "b" / "up").symlink_to("..")
    (corpus / "b" / "top").symlink_to(corpus.parent)
    (corpus / "0-same-as-b").symlink_to("b")
    (corpus / "0.txt").symlink_to("a.txt")
    (corpus / "out").symlink_to(outside)
    (corpus / "out-again").symlink_to(outside)
    (corpus / "y.txt").symlink_to(outside / "o.txt")
    expected = sorted([*ALL, "out/o.txt"])
    assert names("data") == expected
    assert (
        "note: data: left out 8 links to files that are read anyway, data/0-same-as-b first"
        in capsys.readouterr().err.splitlines()
    )
    assert names("data/**") == expected
    assert names("data/**/*.txt") == ["a.txt", "out/o.txt"]
    # A link may be what is asked for.
    (outside / "back").unlink()
    assert names("data/out") == ["out/o.txt"]
    with pytest.raises(UserError, match=r"data/a.txt is already an input, as data/0.txt"):
        names("data/*.txt")


def test_links_that_lead_round_between_folders_end(tmp_path):
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "x.txt").write_bytes(b"x")
        for other in range(12):
            (folder / f"to-{other}").symlink_to(tmp_path / str(other))
    for argument in (tmp_path, tmp_path / "**" / "*.txt", tmp_path / "0"):
        assert len(expand_inputs([str(argument)], InputOptions())) == 12


def test_special_files_and_broken_links_are_refused(corpus):
    (corpus / "gone.jsonl").symlink_to("absent")
    with pytest.raises(UserError, match=r"data/gone.jsonl: a broken symbolic link"):
        names("data")
    with pytest.raises(UserError, match=r"data/gone.jsonl: no such file or folder"):
        names("data/gone.jsonl")
    (corpus / "gone.jsonl").unlink()
    os.mkfifo(corpus / "pipe.jsonl")  # reading it would wait for ever
    for argument in ("data", "data/pipe.jsonl", "data/p*"):
        with pytest.raises(UserError, match=r"data/pipe.jsonl: not a regular file; .* --input -"):
            names(argument)
    (corpus / "pipe.jsonl").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("data/s.jsonl")
        with pytest.raises(UserError, match=r"data/s.jsonl: not a regular file"):
            names("data")


def test_what_cannot_be_read_is_refused(corpus, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: "a.txt" not in str(path))
    with pytest.raises(UserError, match=r"data/a.txt: no permission to read it"):
        names("data")
    monkeypatch.undo()
    os.chdir(corpus.parent)
    scan = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(files.os, "scandir", scandir)
    with pytest.raises(UserError, match=r"data/b/deep: cannot be read \(Permission denied\)"):
        names("data")


def test_names_that_are_no_text_can_be_read(corpus):
    (corpus / "bytes").mkdir()
    path = os.fsencode(corpus / "bytes") + b"/\xff.txt"
    Path(os.fsdecode(path)).write_bytes(b"x")
    (file,) = expand_inputs(["data/bytes"], InputOptions())
    assert os.fsencode(file.path) == b"data/bytes/\xff.txt"


class Stdin(io.TextIOWrapper):
    def __init__(self, content: bytes, is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(content))
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def test_standard_input_becomes_a_file(corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", Stdin(b"one\ntwo"))
    files = expand_inputs(["data/a.txt", "-"], InputOptions("line", "txt"))
    assert [(file.path, file.format, file.source) for file in files[1:]] == [("-", "txt-lines", 1)]
    copied = with_stdin_copied(files, tmp_path / "copy")
    assert copied[0] == files[0]
    assert (copied[1].path, copied[1].size, copied[1].source) == (str(tmp_path / "copy"), 7, 1)
    assert (tmp_path / "copy").read_bytes() == b"one\ntwo"
    assert with_stdin_copied(files[:1], tmp_path / "none") == files[:1]
    assert not (tmp_path / "none").exists()


def test_a_terminal_or_nothing_is_no_input(tmp_path, monkeypatch):
    files = expand_inputs(["-"], InputOptions())
    for stdin in (Stdin(b"", is_terminal=True), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(UserError, match="--input -: standard input is a terminal"):
            with_stdin_copied(files, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
