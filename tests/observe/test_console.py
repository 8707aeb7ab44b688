"""Standard output and error in every state that an environment can leave them in: nothing raises, the log has all."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from tqdm import tqdm

from retemper.engine.observe import console as module
from retemper.engine.observe.console import LOG_FILE, Console

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} ")


@contextmanager
def installed(monkeypatch, output, error):
    """Standard output and error as text streams of these descriptors, replaced by the console's."""
    streams = [os.fdopen(fd, "w", encoding=enc, closefd=False) for fd, enc in (output, error)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    console = Console()
    console.install()
    try:
        yield console
    finally:
        console.restore()


def logged(folder):
    """The lines of the log, each of which has a time."""
    lines = (folder / LOG_FILE).read_text().splitlines()
    assert all(STAMP.match(line) for line in lines)
    return [STAMP.sub("", line) for line in lines]


def pipe_without_reader():
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


def closed_terminal():
    ours, theirs = os.openpty()
    os.close(ours)
    return theirs


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (pipe_without_reader, "Broken pipe"),
        (full_disk, "No space left on device"),
        (closed_terminal, "Input/output error"),
    ],
)
def test_an_output_that_is_gone_is_one_note_and_the_log_has_every_line(make, reason, monkeypatch, tmp_path):
    gone, error = make(), os.open(tmp_path / "error", os.O_CREAT | os.O_WRONLY)
    with installed(monkeypatch, (gone, "utf-8"), (error, "utf-8")) as console:
        print("before the run is accepted", flush=True)
        console.open(tmp_path)
        for step in range(3):
            print(f"step {step}", flush=True)
        print("to standard error", file=sys.stderr)
    note = f"note: standard output cannot be written: {reason}; training continues, {LOG_FILE} has every line"
    assert (tmp_path / "error").read_text() == f"{note}\nto standard error\n"
    lines = logged(tmp_path)
    assert [line for line in lines if not line.startswith("note")] == [
        "before the run is accepted",
        "step 0",
        "step 1",
        "step 2",
        "to standard error",
    ]
    assert [line for line in lines if line.startswith("note")] == [note]


def test_both_gone_leaves_the_log(monkeypatch, tmp_path):
    with installed(monkeypatch, (full_disk(), "utf-8"), (pipe_without_reader(), "utf-8")) as console:
        console.open(tmp_path)
        print("a line")
        bar = tqdm(total=2, desc="bar", mininterval=0)
        bar.update(2)
        bar.close()
        sys.stderr.write("another\n")
    assert [line for line in logged(tmp_path) if line in ("a line", "another")] == ["a line", "another"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_characters_that_the_encoding_lacks_are_escaped(encoding, monkeypatch, tmp_path):
    output = os.open(tmp_path / "output", os.O_CREAT | os.O_WRONLY)
    with installed(monkeypatch, (output, encoding), (2, "utf-8")) as console:
        console.open(tmp_path)
        print("Müller 語 \udcff")
    expected = "Müller 語 \udcff\n".encode(encoding, "backslashreplace")
    assert (tmp_path / "output").read_bytes() == expected
    assert logged(tmp_path) == ["Müller 語 \\udcff"]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_does_not_read_delays_a_run_once(blocking, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_READER_SECONDS", 0.3)
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)
    with installed(monkeypatch, (writing, "utf-8"), (os.open(tmp_path / "error", os.O_CREAT | os.O_WRONLY), "utf-8")):
        began = time.perf_counter()
        for step in range(3000):  # far more than a pipe holds
            print(f"step {step} {'x' * 100}", flush=True)
        assert time.perf_counter() - began < 3
        assert b"step 0 " in os.read(reading, 1 << 20)
        print("it reads again", flush=True)
        assert os.read(reading, 1 << 20).endswith(b"it reads again\n")
    [note] = (tmp_path / "error").read_text().splitlines()
    assert "its reader does not read" in note


def test_nothing_is_written_before_a_run_is_accepted(monkeypatch, tmp_path):
    with installed(monkeypatch, (1, "utf-8"), (2, "utf-8")):
        print("refused", end="")
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_appends_and_a_bar_leaves_what_it_shows(monkeypatch, tmp_path):
    for start in range(2):
        with installed(monkeypatch, (os.open(os.devnull, os.O_WRONLY), "utf-8"), (2, "utf-8")) as console:
            console.open(tmp_path)
            print(f"start {start}\n\ra bar 1/2\ra bar 2/2\r         \rafter the bar", flush=True)
            print("  half", end="", flush=True)
            print(" a line")
    assert logged(tmp_path) == [line for n in (0, 1) for line in (f"start {n}", "after the bar", "  half a line")]


@pytest.mark.parametrize("what", ["folder", "fifo", "full", "missing"])
def test_a_log_that_cannot_be_written_is_one_note(what, monkeypatch, tmp_path):
    path = tmp_path / LOG_FILE
    {
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "full": lambda: path.symlink_to("/dev/full"),
        "missing": lambda: None,
    }[what]()
    output = os.open(tmp_path / "output", os.O_CREAT | os.O_WRONLY)
    with installed(monkeypatch, (output, "utf-8"), (2, "utf-8")) as console:
        console.open(tmp_path if what != "missing" else tmp_path / "no folder")
        print("a line")
        print("another")
    *lines, note = sorted((tmp_path / "output").read_text().splitlines())
    assert note.startswith("note: ") and "cannot be written" in note and lines == ["a line", "another"]


def test_output_that_is_the_log_has_each_line_once(monkeypatch, tmp_path):
    output = os.open(tmp_path / LOG_FILE, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    saved = os.dup(1)
    os.dup2(output, 1)
    try:
        with installed(monkeypatch, (1, "utf-8"), (2, "utf-8")) as console:
            console.open(tmp_path)
            print("a line")
    finally:
        os.dup2(saved, 1)
    assert (tmp_path / LOG_FILE).read_text() == "a line\n"


def test_streams_without_a_descriptor_are_written_by_their_methods(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    console = Console()
    console.install()
    print("a line")
    console.restore()
    assert output.getvalue() == "a line\n" and sys.stdout is output


def test_descriptors_that_are_closed_at_the_start_are_not_taken_by_files(tmp_path):
    """Else what is printed would be written into a checkpoint."""
    program = (
        "import os, sys; from retemper.engine.observe.console import Console; Console().install(); "
        "file = open('data', 'wb', buffering=0); print('printed'); os.write(1, b'by C++'); os.write(2, b'by C++'); "
        "sys.exit(0 if file.fileno() > 2 else 3)"
    )
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1" >&- 2>&- <&-', sys.executable, program], cwd=tmp_path, check=False
    )
    assert done.returncode == 0 and (tmp_path / "data").read_bytes() == b""
