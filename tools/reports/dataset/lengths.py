"""Count document lengths exactly, and derive percentiles and histograms."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .streams import DatasetStream

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
READ_WHOLE = 1 << 20
"""Maximum number of documents of which ``--quick`` reads every length; takes about 10 ms."""
_SAMPLE_RUNS, _SAMPLE_RUN = 256, 256
_SHORT = 1 << 20  # shorter lengths are counted in an array; longer documents are rare
_CURVE_POINTS = 200


@dataclass(frozen=True)
class LengthBin:
    """Documents of ``first`` to ``last`` tokens."""

    first: int
    last: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class LengthFacts:
    """Lengths of documents in tokens, end-of-document tokens included."""

    documents: int
    """Number of documents read."""
    sampled: bool
    """Whether only runs of documents, evenly spread over the dataset, were read."""
    empty: int
    """Number of documents without tokens."""
    mean: float
    """Mean over all documents, also for a sample."""
    longest: int
    """Longest document read."""
    percentiles: dict[int, float]
    """Linearly interpolated, like numpy.percentile."""
    histogram: list[LengthBin]
    """By powers of two, from the shortest to the longest."""
    curve: list[tuple[int, float]]
    """(length, share of the tokens in documents up to this length) at a few hundred lengths."""


class LengthCounts:
    """Counts lengths in bounded memory."""

    def __init__(self) -> None:
        self._short = np.zeros(_SHORT, dtype=np.int64)
        self._long: Counter[int] = Counter()

    def add(self, lengths: npt.NDArray[np.int64]) -> None:
        """Count ``lengths`` >= 0."""
        is_short = lengths < _SHORT
        counts = np.bincount(lengths[is_short])
        self._short[: len(counts)] += counts
        self._long.update(lengths[~is_short].tolist())

    def facts(self, sampled: bool) -> LengthFacts | None:
        """Return the facts; None if there are no documents."""
        long = np.array(sorted(self._long.items()), dtype=np.int64).reshape(-1, 2)
        short = np.flatnonzero(self._short)
        lengths = np.concatenate([short, long[:, 0]])
        documents = np.concatenate([self._short[short], long[:, 1]])
        if len(lengths) == 0:
            return None
        count, tokens = int(documents.sum()), lengths * documents
        return LengthFacts(
            documents=count,
            sampled=sampled,
            empty=int(self._short[0]),
            mean=int(tokens.sum()) / count,
            longest=int(lengths[-1]),
            percentiles={percent: _percentile(lengths, documents, percent) for percent in PERCENTILES},
            histogram=_histogram(lengths, documents),
            curve=_curve(lengths, tokens),
        )


def count_lengths(stream: DatasetStream) -> LengthFacts | None:
    """Count the lengths of all documents by reading the whole index."""
    counts = LengthCounts()
    for _, edges in stream.all_edges():
        counts.add(np.diff(edges))
    return counts.facts(sampled=False)


def sample_lengths(stream: DatasetStream) -> LengthFacts | None:
    """Count the lengths of all documents, or of 65,536 documents in 256 evenly spread runs if there are many.

    Neighbouring documents are often alike, so a run tells less than as many single documents. But a run needs only two
    disk reads, like a single document.
    """
    documents = stream.dataset.num_documents
    if documents <= max(READ_WHOLE, _SAMPLE_RUNS * _SAMPLE_RUN):
        return count_lengths(stream)
    counts = LengthCounts()
    for run in range(_SAMPLE_RUNS):
        first = (documents - _SAMPLE_RUN) * run // (_SAMPLE_RUNS - 1)
        counts.add(np.diff(stream.edges(first, first + _SAMPLE_RUN)))
    facts = counts.facts(sampled=True)
    return None if facts is None else replace(facts, mean=stream.dataset.num_tokens / documents)


def _percentile(lengths: npt.NDArray[np.int64], documents: npt.NDArray[np.int64], percent: float) -> float:
    ends = np.cumsum(documents)
    place = (int(ends[-1]) - 1) * percent / 100
    below = int(place)
    low, high = (int(lengths[np.searchsorted(ends, rank, side="right")]) for rank in (below, -int(-place // 1)))
    return low + (high - low) * (place - below)


def _histogram(lengths: npt.NDArray[np.int64], documents: npt.NDArray[np.int64]) -> list[LengthBin]:
    # Bit length of each: 0 -> 0, 1 -> 1, 2..3 -> 2, 4..7 -> 3 and so on; exact, unlike a logarithm.
    classes = np.searchsorted(2 ** np.arange(62), lengths, side="right")
    bins = []
    for power in range(int(classes[0]), int(classes[-1]) + 1):
        here = classes == power
        first, last = (0, 0) if power == 0 else (2 ** (power - 1), 2**power - 1)
        bins.append(LengthBin(first, last, int(documents[here].sum()), int((lengths * documents)[here].sum())))
    return bins


def _curve(lengths: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> list[tuple[int, float]]:
    total = max(1, int(tokens.sum()))
    shares = np.cumsum(tokens) / total
    # Evenly spread over the logarithm of the length, like the chart; the first and the last are included.
    marks = np.geomspace(max(1, int(lengths[0])), max(1, int(lengths[-1])), _CURVE_POINTS)
    kept = np.unique(np.append(np.searchsorted(lengths, marks, side="right") - 1, len(lengths) - 1).clip(0))
    return [(int(lengths[place]), float(shares[place])) for place in kept]
