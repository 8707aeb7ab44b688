"""Reads lines of a stream into one buffer, which is reused.

Parsing a line there is faster than in an object of its own: nothing is allocated or copied, and the buffer stays in the
processor's cache.
"""

from __future__ import annotations

import io

_BLOCK_BYTES = 256 << 10


class LineBuffer:
    """Lines of ``stream``. A returned view is valid until the next call.

    Args:
        stream: an error of its ``readinto`` is raised after all whole lines before it have been returned.
    """

    def __init__(self, stream: io.RawIOBase) -> None:
        self._stream = stream
        self._content = bytearray(2 * _BLOCK_BYTES)
        self._start = self._stop = 0
        """The bytes of ``_content`` that have been read from the stream and not been returned."""

    def seek(self, offset: int) -> None:
        """Continue at byte ``offset`` of the stream."""
        self._stream.seek(offset)
        self._start = self._stop = 0

    def peek(self, size: int = 1, /) -> bytes:
        """Return the next ``size`` bytes without moving; fewer at the end of the stream."""
        while self._stop - self._start < size and self._fill():
            pass
        return bytes(self._content[self._start : min(self._start + size, self._stop)])

    def read(self, size: int = -1, /) -> bytes:
        """Return the next ``size`` bytes, fewer at the end of the stream."""
        content = self.peek(size)
        self._start += len(content)
        return content

    def readline(self, limit: int) -> memoryview:
        """Return the next line with its line end, or its first ``limit`` bytes; empty at the end of the stream."""
        searched = self._start
        while (end := self._content.find(b"\n", searched, self._stop) + 1) == 0:
            searched_bytes = self._stop - self._start
            if searched_bytes >= limit or not self._fill():
                end = self._stop
                break
            searched = self._start + searched_bytes
        start = self._start
        self._start = min(end, start + limit)
        return memoryview(self._content)[start : self._start]

    def _fill(self) -> bool:
        """Read a block; return False at the end of the stream."""
        waiting = self._stop - self._start
        if len(self._content) - self._stop < _BLOCK_BYTES:
            # Views of the content may exist, which rule out resizing it.
            target = self._content if waiting <= len(self._content) // 2 else bytearray(2 * len(self._content))
            target[:waiting] = self._content[self._start : self._stop]
            self._content, self._start, self._stop = target, 0, waiting
        count = self._stream.readinto(memoryview(self._content)[self._stop : self._stop + _BLOCK_BYTES]) or 0
        self._stop += count
        return count > 0
