"""``--split`` and ``--max-documents``.

The side of a document depends only on its text and the shares. It stays the same when the corpus grows, is reordered or
is stored in another format, and copies of a text are on the same side: no text is both in training and validation data.
Shares are probabilities.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ....engine.data.splitmix import mix64
from ....engine.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_MAX_NAMES = 127  # sides are int8
_TOLERANCE = Fraction(1, 10**9)
_EXAMPLE = "give names and shares that sum to 1, such as train=0.98,valid=0.02"


@dataclass(frozen=True)
class DocumentSplit:
    """The parsed ``--split train=0.98,valid=0.02``."""

    names: tuple[str, ...]
    bounds: tuple[int, ...]
    """The largest 64-bit word of each name; its range begins after that of the name before."""

    @staticmethod
    def parse(argument: str) -> DocumentSplit:
        """Parse names and shares. A bound depends only on the shares up to it.

        Raises:
            UserError: a wrong name or share, a name twice, fewer than two, or shares that do not sum to 1 within 1e-9.
        """
        shares: dict[str, Fraction] = {}
        for part in argument.split(","):
            name, equals, share = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise UserError(f"--split: {part.strip()!r} in {argument!r} is not name=share; {_EXAMPLE}")
            if not _NAME.fullmatch(name):
                raise UserError(f"--split: {name!r} in {argument!r} is not a name; use letters, digits, - and _")
            if name in shares:
                raise UserError(f"--split: {argument!r} names {name!r} twice; give each name one share")
            shares[name] = _share(share, name, argument)
        if not 2 <= len(shares) <= _MAX_NAMES:
            raise UserError(f"--split: {argument!r} has {len(shares)} name(s), not 2 to {_MAX_NAMES}; {_EXAMPLE}")
        total = sum(shares.values(), Fraction())
        if abs(total - 1) > _TOLERANCE:
            raise UserError(f"--split: the shares of {argument!r} sum to {float(total):.10g}; {_EXAMPLE}")
        bounds = []
        below = Fraction()
        for share_of_name in shares.values():
            below += share_of_name
            bounds.append(min(math.ceil(below * 2**64), 2**64) - 1)
        # Rounded shares may sum to a little less than 1.
        bounds[-1] = 2**64 - 1
        return DocumentSplit(tuple(shares), tuple(bounds))

    def side(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int8]:
        """Return int8[documents], indices into ``names``, for hashes of texts uint64[documents, 2]."""
        # Exact deduplication uses the first word. The second one is, for most texts, their 64-bit XXH3, by which a
        # corpus may have been sampled before: mixing makes it independent of that.
        words = mix64(digests[:, 1])
        return np.searchsorted(np.array(self.bounds, dtype=np.uint64), words, side="left").astype(np.int8)


def _share(text: str, name: str, argument: str) -> Fraction:
    try:
        # A float first: an exact fraction of 1e-999999999 would take all memory.
        if 0 < float(text) <= 1:
            return Fraction(text)
    except ValueError:
        pass
    raise UserError(f"--split: the share {text!r} of {name!r} in {argument!r} is not a number above 0 and up to 1")


def within_limit(
    sources: npt.NDArray[np.integer], keep: npt.NDArray[np.bool_], limit: int, counts: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return which documents are the first ``limit`` kept ones of their source, in input order.

    Call it for consecutive arrays of documents with the same ``counts``, after all other filters.

    Args:
        sources: int[documents], indices into ``counts``.
        keep: bool[documents], what earlier filters keep.
        limit: documents of each source.
        counts: int64[sources], documents so far; updated in place.
    """
    kept = np.flatnonzero(keep)
    order = np.argsort(sources[kept], kind="stable")
    owners = sources[kept][order]
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    sizes = np.diff(starts, append=len(owners))
    rank = np.arange(len(owners)) - np.repeat(starts, sizes) + counts[owners]
    counts[owners[starts]] = np.minimum(counts[owners[starts]] + sizes, np.maximum(counts[owners[starts]], limit))
    result = np.zeros(len(keep), dtype=np.bool_)
    result[kept[order[rank < limit]]] = True
    return result
