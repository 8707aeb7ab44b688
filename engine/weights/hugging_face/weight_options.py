"""Parse options about weights: names of dtypes, and sizes of files."""

from __future__ import annotations

import re

from ...errors import UserError

DTYPE_NAMES = ("bfloat16", "float16", "float32")
AUTO = "auto"
DTYPE_CHOICES = (AUTO, *DTYPE_NAMES)
DEFAULT_MAX_SHARD_SIZE = "5GB"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_shard_size(size: str) -> int:
    """Return the bytes of a size such as ``5GB`` (decimal units, as on the Hub).

    Raises:
        UserError: it is not a positive number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", size, re.IGNORECASE)
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if num_bytes < 1:
        raise UserError(f"--max-shard-size {size}: expected a positive size in KB, MB, GB or TB, such as 5GB")
    return num_bytes
