"""A terminal whose screen tests can read: a pseudo-terminal of the kernel, drawn by the emulator pyte."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path
from select import select

import pyte


class PseudoTerminal:
    """A terminal of ``columns`` x ``rows``; programs write to ``descriptor``."""

    def __init__(self, columns: int = 100, rows: int = 30):
        self.ours, self.descriptor = os.openpty()
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self._screen)
        self.received = b""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int = 30) -> None:
        """Change the size, as a user does with the window."""
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._screen.resize(rows, columns)

    def press(self, keys: bytes) -> None:
        """Type ``keys``."""
        os.write(self.ours, keys)

    def shown(self) -> list[str]:
        """All lines that were ever on the screen, without those that were overwritten, and empty ones."""
        while select([self.ours], [], [], 0)[0] and self._receive():
            pass
        columns = self._screen.columns
        history = ["".join(line[column].data for column in range(columns)) for line in self._screen.history.top]
        return [line.rstrip() for line in [*history, *self._screen.display] if line.strip()]

    def run(self, command: Sequence[str | Path], cwd: Path | None = None, **environment: str) -> int:
        """Run ``command`` in the terminal to its end, and return its exit status."""
        process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, start_new_session=True,
            stdin=self.descriptor, stdout=self.descriptor, stderr=self.descriptor,
        )  # fmt: skip
        while process.poll() is None:
            if select([self.ours], [], [], 0.1)[0]:
                self._receive()
        return process.returncode

    def hang_up(self) -> None:
        """Close the window."""
        os.close(self.ours)

    def close(self) -> None:
        """Free the descriptors."""
        for descriptor in (self.ours, self.descriptor):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _receive(self) -> bool:
        data = os.read(self.ours, 1 << 16)
        self.received += data
        self._stream.feed(data)
        return bool(data)
