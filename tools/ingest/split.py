"""STUB (signatures are final; implementation follows within minutes)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Split:
    """What ``--split train=0.98,valid=0.02`` says."""

    names: tuple[str, ...]
    bounds: tuple[int, ...]

    @staticmethod
    def parse(argument: str) -> Split:
        """Raises UserError."""
        raise NotImplementedError

    def side(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int8]:
        """int8[n] index into ``names`` from digests uint64[n, 2]."""
        raise NotImplementedError


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
