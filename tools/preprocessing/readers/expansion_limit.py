"""How much more than its size on disk a file may give: the one rule against compressed bombs.

Text compresses 3 to 10 times, logs and tables up to 100, and a file that repeats itself some hundred times. Bombs give
1,000 times (gzip's limit) to 30,000 (zstd), or billions of rows without any bytes. Nothing here reads a file: readers
report what they took and gave, and are stopped within seconds. ``--max-expansion`` changes the bound or lifts it.
"""

from __future__ import annotations

from ....engine.errors import UserError

DEFAULT_EXPANSION = 300
LEAST_BYTES = 8 << 20
"""Files that give less are not looked at."""
_WINDOW_BYTES = 32 << 20
READ_AHEAD_BYTES = 16 << 10
"""What decompressors may read of a file at once, for its position to tell what they have used."""
LEAST_ROWS = 1 << 18
_ROWS_PER_BYTE = 8


class ExpansionLimit:
    """Watches one file being read.

    Both the file as a whole and every 32 MiB of what it gives are bounded, so that a bomb behind ordinary data is
    found too.

    Args:
        path: for messages.
        size: of the file on disk, or of the part of it that is read, in bytes.
        ratio: the bound; 0 for none.
    """

    def __init__(self, path: str, size: int, ratio: int) -> None:
        self._path, self._ratio, self._size = path, ratio, size
        self._most = max(LEAST_BYTES, ratio * size)
        self._window_start = (0, 0)

    def check(self, consumed: int, produced: int) -> None:
        """Take note of the bytes read from the disk and of the bytes that they gave, both from the file's start.

        Raises:
            UserError: that is more than the bound.
        """
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
        """Refuse more ``rows`` than ``size`` bytes on disk can hold unless nearly all of them are equal.

        Raises:
            UserError: there are more.
        """
        if self._ratio and rows > max(LEAST_ROWS, _ROWS_PER_BYTE * size):
            raise UserError(
                f"{self._path}: {rows:,} rows in {size:,} bytes: nearly all of them must be equal or empty, so this is "
                "no corpus; to read it nevertheless, give --max-expansion 0"
            )

    def _refuse(self, produced: int, taken: int) -> None:
        raise UserError(
            f"{self._path}: expands to more than {self._ratio} times its size ({produced:,} bytes from {taken:,}), "
            "which text does not; to read it nevertheless, give a larger --max-expansion, or 0 for no limit"
        )
