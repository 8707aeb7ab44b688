"""Print without failing, and copy all printed lines with their times to a log file.

A terminal may close, a pipe may lose its reader, a disk may fill up, and an encoding may lack a character. None of
these may end a run, whichever library prints, so :meth:`Console.install` replaces ``sys.stdout`` and ``sys.stderr``.
Output of C++ code, which writes to the descriptors directly, is not in the log file. Progress bars of tqdm on
:func:`live_output` are not in the log file either, and stay below all printed lines.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO, cast

from tqdm import tqdm

from .terminal import colored, shows_colors

LOG_FILE = "log.txt"
_READER_SECONDS = 10.0
"""How long a reader that does not read (Ctrl-S, a pager) may delay the run once."""
_MOST_PENDING = 1 << 20
"""Maximum number of bytes that wait for space on the disk of the log file; older ones are dropped."""


class Console:
    """Receives the printed lines of this process.

    Args:
        logged: whether to write them to a log file. They stay in memory until :meth:`open`, so that a run with a
            configuration error creates no file.
    """

    def __init__(self, logged: bool = True):
        self._logged = logged
        self._lock = threading.RLock()
        self._pending = bytearray()
        self._descriptor: int | None = None
        self._path = Path(LOG_FILE)
        self._failing = False
        self._former: tuple[Any, Any] | None = None
        self.live: TextIO | None = None
        """Standard output for bars; None before :meth:`install`."""

    def install(self) -> None:
        """Replace ``sys.stdout`` and ``sys.stderr``.

        Closed descriptors become /dev/null. Otherwise a file opened later could get their number and the output.
        """
        for descriptor in (0, 1, 2):
            try:
                os.fstat(descriptor)
            except OSError:
                null = os.open(os.devnull, os.O_RDWR)
                if null != descriptor:
                    os.dup2(null, descriptor)
                    os.close(null)
        self._former = sys.stdout, sys.stderr
        output = _Stream(sys.stdout, "standard output", self)
        self.live = cast(TextIO, _LiveOutput(output))
        sys.stdout, sys.stderr = output, _Stream(sys.stderr, "standard error", self)

    def restore(self) -> None:
        """Undo :meth:`install`, and close the log file."""
        if self._former is not None:
            sys.stdout, sys.stderr = self._former
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._former = self.live = None

    def open(self, run_folder: str | Path) -> None:
        """Append all lines so far, and all later ones, to the log file of a run. A failure is only printed."""
        if not self._logged:
            return
        self._path = Path(run_folder) / LOG_FILE
        try:
            # Non-blocking: opening a FIFO without a reader would wait.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(self._path, flags, 0o666)
        except OSError as error:
            self._logged = False
            print(f"note: {self._path} cannot be written: {error.strerror or error}; training continues", flush=True)
            return
        if any(_is_same_file(descriptor, standard) for standard in (1, 2)):
            os.close(descriptor)  # the output is redirected to the log file already
            self._logged = False
            return
        with self._lock:
            self._descriptor = descriptor
            self._write_pending()

    def log(self, line: str) -> None:
        """Add ``line`` to the log file, with the time."""
        if not self._logged:
            return
        with self._lock:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S%z")
            self._pending += f"{stamp} {line}\n".encode("utf-8", "backslashreplace")
            del self._pending[:-_MOST_PENDING]
            if self._descriptor is not None:
                self._write_pending()

    def unwritable(self, name: str, reason: str) -> None:
        """Report on the other stream or in the log file that a stream cannot be written."""
        with_log = f"training continues, {self._path} has every line" if self._logged else "training continues"
        note = f"note: {name} cannot be written: {reason}; {with_log}"
        other = sys.stderr if name == "standard output" else sys.stdout
        if isinstance(other, _Stream) and not other.failing:
            other.write(f"{note}\n")
        else:
            self.log(note)

    def _write_pending(self) -> None:
        assert self._descriptor is not None
        try:
            while self._pending:
                del self._pending[: os.write(self._descriptor, self._pending)]
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._failing = True
                print(f"note: {self._path} cannot be written now: {error.strerror or error}", flush=True)


class _Stream(io.TextIOBase):
    """A text stream whose ``write`` never raises because of its reader.

    Lines are written in one piece, because ranks share a terminal. A stream without a descriptor, as in tests, is
    written by its own methods.
    """

    def __init__(self, stream: TextIO | None, name: str, console: Console):
        self._stream, self._name, self.console = stream, name, console
        self._lock = threading.RLock()
        self._texts: dict[int, str] = {}
        """What each thread has written of a line: print() writes a line and its end in two parts."""
        self._line = ""
        self.failing = False
        self._fd: int | None = None
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
        with contextlib.suppress(OSError, ValueError):
            self._fd = stream.fileno() if stream is not None else None
        self._colored = shows_colors(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._fd is not None and os.isatty(self._fd)

    def fileno(self) -> int:
        if self._fd is None:
            raise io.UnsupportedOperation("fileno")
        return self._fd

    def write(self, text: str) -> int:
        with self._lock:
            self._texts[threading.get_ident()] = self._texts.get(threading.get_ident(), "") + text
        if "\n" in text or "\r" in text:
            # A bar would overwrite the beginning of a line.
            self._print(whole_lines="\r" not in text)
        return len(text)

    def flush(self) -> None:
        if self._texts.get(threading.get_ident()):
            self._print(whole_lines=False)

    def _print(self, whole_lines: bool) -> None:
        # A bar takes tqdm's lock and then this one.
        with tqdm.external_write_mode(self.console.live), self._lock:
            written = self._texts.pop(threading.get_ident(), "")
            end = written.rfind("\n") + 1 if whole_lines else len(written)
            text = written[:end]
            if written[end:]:
                self._texts[threading.get_ident()] = written[end:]
            self.emit(colored(text) if self._colored else text)
            self._tee(text)

    def emit(self, text: str) -> None:
        """Write ``text`` as it is, and not to the log file."""
        try:
            if self._fd is not None:
                self._write_bytes(text.encode(self.encoding, "backslashreplace"))
            elif self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
        except (OSError, ValueError) as error:
            if not self.failing:
                self.failing = True
                self.console.unwritable(self._name, getattr(error, "strerror", None) or str(error))
        else:
            self.failing = False

    def _write_bytes(self, data: bytes) -> None:
        assert self._fd is not None
        while data:
            _, ready, _ = select.select([], [self._fd], [], 0 if self.failing else _READER_SECONDS)
            if not ready:
                raise OSError(errno.EAGAIN, "its reader does not read")
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]  # what a writable pipe takes

    def _tee(self, text: str) -> None:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            # A progress bar redraws its line: log only the last version.
            *redrawn, shown = line.rstrip("\r").split("\r")
            if shown.strip() or not redrawn:
                self.console.log(shown)


class _LiveOutput(io.TextIOBase):
    """Writes text that redraws itself: to the terminal, and not to the log file."""

    def __init__(self, stream: _Stream):
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        self._stream.emit(text)
        return len(text)


def live_output() -> TextIO:
    """Return the stream for bars: standard output without the log file; without a :class:`Console`, standard error."""
    live = sys.stdout.console.live if isinstance(sys.stdout, _Stream) else None
    return live if live is not None else sys.stderr


def log_only(line: str) -> None:
    """Add ``line`` to the log file of the run, if there is one, and print it nowhere."""
    if isinstance(sys.stdout, _Stream):
        sys.stdout.console.log(line)


def _is_same_file(descriptor: int, other: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.fstat(other))
    except OSError:
        return False
