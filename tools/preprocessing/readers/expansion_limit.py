"""The limit on how far a file may expand, against decompression bombs.

Text compresses 3 to 10 times, logs and tables up to 100, repetitive files some hundred times. Bombs reach 1,000 times
(gzip's limit) to 30,000 (zstd), or billions of rows without bytes. Readers report what they read and produced, and are
stopped within seconds. ``--max-expansion`` changes or removes the limit.
"""

from __future__ import annotations

from ....engine.errors import UserError

DEFAULT_EXPANSION = 300
LEAST_BYTES = 8 << 20
"""Files that expand to less are not checked."""
_WINDOW_BYTES = 32 << 20
READ_AHEAD_BYTES = 16 << 10
"""Bytes that decompressors may read at once, so that the file position shows what they have used."""
LEAST_ROWS = 1 << 18
_ROWS_PER_BYTE = 8


class ExpansionLimit:
    """Checks one file while it is read.

    The limit holds for the whole file and for every 32 MiB of its contents, to find a bomb after ordinary data too.

    Args:
        path: for messages.
        size: bytes on disk of the file, or of the part that is read.
        ratio: the limit; 0 for none.
    """

    def __init__(self, path: str, size: int, ratio: int) -> None:
        self._path, self._ratio, self._size = path, ratio, size
        self._most = max(LEAST_BYTES, ratio * size)
        self._window_start = (0, 0)

    def check(self, consumed: int, produced: int) -> None:
        """Check the bytes read and what they expanded to, both from the file's start. Raise UserError if too many."""
        if not self._ratio:
            return
        if produced > self._most:
            self._refuse(produced, self._size)
        window = produced - self._window_start[1]
        if window >= _WINDOW_BYTES:
            taken = consumed - self._window_start[0]
            if window > self._ratio * (taken + 2 * READ_AHEAD_BYTES):
                self._refuse(window, taken)
            self._window_start = (consumed, produced)

    def check_rows(self, rows: int, size: int) -> None:
        """Raise UserError for more ``rows`` than ``size`` bytes on disk can contain, unless nearly all are equal."""
        if self._ratio and rows > max(LEAST_ROWS, _ROWS_PER_BYTE * size):
            raise UserError(
                f"{self._path}: {rows:,} rows in {size:,} bytes: nearly all of them must be equal or empty, so this is "
                "not a corpus; to read it anyway, give --max-expansion 0"
            )

    def _refuse(self, produced: int, taken: int) -> None:
        raise UserError(
            f"{self._path}: expands to more than {self._ratio} times its size ({produced:,} bytes from {taken:,}), "
            "more than text does; to read it anyway, give a larger --max-expansion, or 0 for no limit"
        )
