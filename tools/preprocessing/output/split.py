"""Which documents go where: the sides of ``--split``, and ``--max-documents``.

A document's side depends on its text and on the shares, and on nothing else. So a document stays on its side when the
corpus grows, is cut or ordered differently, or is read again in another format; and equal texts are on one side, so
that no text of the validation set is among the training set too. Shares are met as probabilities are by many draws.
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
class Split:
    """What ``--split train=0.98,valid=0.02`` says."""

    names: tuple[str, ...]
    bounds: tuple[int, ...]
    """For each name the largest 64-bit word that falls to it; what is above the one before."""

    @staticmethod
    def parse(argument: str) -> Split:
        """Read names and shares. Each bound follows from the shares up to it, whatever the later ones are.

        Raises:
            UserError: a wrong name or share, a name twice, fewer than two, or shares that do not sum to 1 within 1e-9.
        """
        shares: dict[str, Fraction] = {}
        for part in argument.split(","):
            name, equals, share = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise UserError(f"--split: {part.strip()!r} in {argument!r} is not name=share; {_EXAMPLE}")
            if not _NAME.fullmatch(name):
                raise UserError(f"--split: {name!r} in {argument!r} is no name; use letters, digits, - and _")
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
        return Split(tuple(shares), tuple(bounds))

    def side(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int8]:
        """The side of each document.

        Args:
            digests: uint64[documents, 2], hashes of the texts.

        Returns:
            int8[documents], indices into ``names``.
        """
        # Exact deduplication sorts by the first word. The second is, for most texts, their 64-bit XXH3, by which a
        # corpus may have been sampled before: mixed, it says nothing about that.
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
    """Keep the first ``limit`` kept documents of each source, in input order.

    Called for one array of documents after another, with the same ``counts``; the result does not depend on where the
    corpus is cut into arrays. Comes after every other filter: a document that another filter drops takes no place.

    Args:
        sources: int[documents], the source of each, an index into ``counts``.
        keep: bool[documents], what earlier filters keep.
        limit: documents of each source.
        counts: int64[sources], documents taken so far; updated in place.

    Returns:
        bool[documents], True for a part of those that ``keep`` has.
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
