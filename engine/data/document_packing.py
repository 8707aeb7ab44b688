"""Rearrange the documents of a source in its chunks, for shuffled documents and best-fit packing.

Nothing is stored, and nothing is built at the start. A *group* is ``CHUNKS_PER_GROUP`` consecutive chunks of the source
(the last group may be smaller). Its documents, cut at the edges of the group, are arranged in the same number of new
chunks. This needs only a key and the index entries of the group, so reading any chunk costs one group. A group of G
chunks of S tokens has exactly G * S tokens; so no token is lost or repeated, and there is no padding:

- *concat* concatenates the documents in the order of a keyed permutation, and cuts the result every S tokens;
- *best_fit* puts each document, longest first, into the chunk where it leaves the least space (best-fit decreasing;
  Ding et al., 2024, "Fewer Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830). Documents of more
  than S tokens first fill whole chunks. Their remainders, and the documents cut at the group's edges, are placed after
  all complete documents. What does not fit is cut to fill the remaining holes; the paper would open another chunk and
  pad it.
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .indexed_dataset import IndexedDataset
from .splitmix import GOLDEN, mix64

CHUNKS_PER_GROUP = 128
"""Chunks in a group. More chunks cut fewer documents at edges and holes (at 4,096 tokens a chunk and 900 a document:
2.2 % with 64, 1.7 % with 128, 1.1 % with 256). They also make every chunk of an uncached group more expensive."""
_GROUPS_CACHED = 32


class Spans(NamedTuple):
    """Runs of consecutive tokens, each of one document, in the order of the chunks."""

    starts: npt.NDArray[np.int64]
    """[P] positions of their first tokens in the dataset."""
    lengths: npt.NDArray[np.int64]
    """[P] number of tokens, at least one."""
    begins: npt.NDArray[np.bool_]
    """[P] True if the span contains the beginning of its document."""
    ends: npt.NDArray[np.bool_]
    """[P] True if the span contains the end of its document."""

    @property
    def num_whole(self) -> int:
        """Return the number of spans that are whole documents."""
        return int(np.count_nonzero(self.begins & self.ends))

    def take(self, where: npt.NDArray[np.integer] | npt.NDArray[np.bool_] | slice) -> Spans:
        """Return some of the spans, or all of them in another order."""
        return Spans(self.starts[where], self.lengths[where], self.begins[where], self.ends[where])


class ChunkGroup(NamedTuple):
    """The spans of one group of chunks in one epoch."""

    spans: Spans
    """The spans of all chunks, in order."""
    first: npt.NDArray[np.int64]
    """[chunks + 1] number of the first span of each chunk."""


@dataclass(eq=False)
class DocumentPacker:
    """Rearranges the documents of a source in its chunks. Safe to use from several threads."""

    dataset: IndexedDataset
    start: int
    """Position in the dataset of the source's first token."""
    num_chunks: int
    sequence_length: int
    """S, tokens in a chunk."""
    key: str
    """Of all random choices; made from seed, sequence length and source."""
    packing: Literal["concat", "best_fit"]
    every_epoch: bool
    """Whether each epoch has its own arrangement."""
    chunks_per_group: int = CHUNKS_PER_GROUP

    def __post_init__(self) -> None:
        self._cached_group = functools.lru_cache(maxsize=_GROUPS_CACHED)(self._make_group)

    def chunk(self, index: int, epoch: int) -> Spans:
        """Return the spans of chunk ``index``: S tokens."""
        number, place = divmod(index, self.chunks_per_group)
        spans, first = self.group(number, epoch)
        return spans.take(slice(int(first[place]), int(first[place + 1])))

    def group(self, number: int, epoch: int) -> ChunkGroup:
        """Return the spans of the chunks ``[number * chunks_per_group, ...)``."""
        return self._cached_group(number, epoch if self.every_epoch else 0)

    def _make_group(self, number: int, epoch: int) -> ChunkGroup:
        first = number * self.chunks_per_group
        count = min(self.chunks_per_group, self.num_chunks - first)
        start = self.start + first * self.sequence_length
        documents = spans_between(self.dataset, start, start + count * self.sequence_length)
        key = f"{self.key}/{epoch}/{number}"
        if self.packing == "best_fit":
            return best_fit(documents, count, self.sequence_length, key)
        order = np.argsort(random_values(f"{key}/documents", len(documents.starts)), kind="stable")
        return split_into_chunks(documents.take(order), count, self.sequence_length)


def spans_between(dataset: IndexedDataset, start: int, stop: int) -> Spans:
    """Return the documents in the tokens [``start``, ``stop``); the first and the last may be cut.

    At least one token must follow ``stop``.
    """
    boundaries = dataset.boundaries(max(0, start - 1), stop + 1)
    edges = np.array([start, stop])
    first, last = np.searchsorted(boundaries, edges, side="right").tolist()
    begins_whole = start == 0 or bool(first and boundaries[first - 1] == start)
    ends_whole = bool(last and boundaries[last - 1] == stop)
    starts = np.concatenate((edges[:1], boundaries[first : last - ends_whole]))
    begins, ends = (np.ones(len(starts), dtype=np.bool_) for _ in range(2))
    begins[0], ends[-1] = begins_whole, ends_whole
    return Spans(starts, np.diff(starts, append=stop), begins, ends)


def split_into_chunks(spans: Spans, count: int, sequence_length: int) -> ChunkGroup:
    """Concatenate ``spans`` and cut them into ``count`` chunks that they fill exactly."""
    edges = np.arange(count + 1) * sequence_length
    cut, places = _cut(spans, edges[1:-1])
    return ChunkGroup(cut, np.searchsorted(places, edges))


def random_values(key: str, count: int) -> npt.NDArray[np.uint64]:
    """Return [``count``] 64-bit numbers: splitmix64 from a hash of ``key``."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return mix64(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(seed))


def _cut(spans: Spans, edges: npt.NDArray[np.int64]) -> tuple[Spans, npt.NDArray[np.int64]]:
    """Concatenate ``spans`` and cut them at the ascending places ``edges``; return the results and their
    beginnings.
    """
    last = np.cumsum(spans.lengths)
    first = last - spans.lengths
    places = np.sort(np.concatenate((first, edges)), kind="stable")  # two ascending runs: merged in linear time
    places = places[np.diff(places, prepend=-1) > 0]
    owner = np.searchsorted(first, places, side="right") - 1
    stops = np.append(places[1:], last[-1:])
    offset = places - first[owner]
    begins, ends = spans.begins[owner] & (offset == 0), spans.ends[owner] & (stops == last[owner])
    return Spans(spans.starts[owner] + offset, stops - places, begins, ends), places


def best_fit(documents: Spans, count: int, sequence_length: int, key: str) -> ChunkGroup:
    """Arrange ``documents`` in ``count`` chunks that they fill exactly, with few cuts, by best-fit decreasing.

    Never cuts more documents than concatenation would. Chunks, documents within them, and documents of equal length
    are ordered randomly by ``key``.
    """
    full, rest = _split_long(documents, sequence_length)
    # Whole documents come first, because cut ones may be cut again: if edges and remainders only fill gaps, fifty times
    # fewer documents are cut. Within each kind, the longest come first; the key orders equal lengths.
    random = random_values(f"{key}/documents", len(rest.starts))
    rest = rest.take(np.lexsort((random, -rest.lengths, ~(rest.begins & rest.ends))))
    num_open = count - len(full.starts)
    bins, holes = _fit(rest.lengths, num_open, sequence_length)
    fits = bins >= 0
    # Spans that did not fit fill the remaining holes, the largest hole first, so that they are cut as little as
    # possible.
    holes = holes[::-1]
    filling, hole = _cut_into_holes(rest.take(~fits), holes[:, 0])
    spans = Spans(*(np.concatenate(parts) for parts in zip(full, rest.take(fits), filling, strict=True)))
    chunk = np.concatenate((np.arange(num_open, count), bins[fits], holes[hole, 1]))
    if spans.num_whole < full.num_whole + rest.num_whole:
        # Decreasing lengths are a heuristic: about one tiny group in a thousand is better off in its original order.
        plain = split_into_chunks(documents, count, sequence_length)
        if plain.spans.num_whole > spans.num_whole:
            return plain
    rank = np.empty(count, dtype=np.int64)
    # The key keeps the former name of chunks: another key would change the order of every run.
    rank[np.argsort(random_values(f"{key}/windows", count), kind="stable")] = np.arange(count)
    chunk = rank[chunk]
    order = np.lexsort((random_values(f"{key}/places", len(chunk)), chunk))
    return ChunkGroup(spans.take(order), np.searchsorted(chunk[order], np.arange(count + 1)))


def _split_long(documents: Spans, sequence_length: int) -> tuple[Spans, Spans]:
    """Return the whole chunks filled by documents of at least ``sequence_length`` tokens, and the remainders of all
    documents.
    """
    whole, rest = np.divmod(documents.lengths, sequence_length)
    owner = np.repeat(np.arange(len(whole)), whole)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(whole) - whole, whole)  # of the chunk within its document
    full = Spans(
        documents.starts[owner] + number * sequence_length,
        np.full(len(owner), sequence_length),
        documents.begins[owner] & (number == 0),
        documents.ends[owner] & (number == whole[owner] - 1) & (rest[owner] == 0),
    )
    left = Spans(documents.starts + whole * sequence_length, rest, documents.begins & (whole == 0), documents.ends)
    return full, left.take(rest > 0)


def _fit(
    lengths: npt.NDArray[np.int64], num_bins: int, room: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Put each of ``lengths``, in their order, into the bin with the least remaining room that holds it (best fit).

    Returns:
        [len(lengths)] bin of each, -1 if none holds it; and [holes, 2] (room, bin) of every bin with room, the least
        room first.
    """
    # Room and bin are combined in one number, so one sorted list of integers is the whole state. This loop takes most
    # of a group's time, hence its plainness.
    free = [room * num_bins + number for number in range(num_bins)]
    chosen = []
    for size in (lengths * num_bins).tolist():
        place = bisect_left(free, size)
        if place == len(free):
            chosen.append(-1)
            continue
        best = free.pop(place)
        chosen.append(best)
        best -= size
        if best >= num_bins:
            insort(free, best)
    taken = np.array(chosen, dtype=np.int64)
    holes = np.array(free, dtype=np.int64)
    bins = max(1, num_bins)
    return np.where(taken < 0, -1, taken % bins), np.stack((holes // bins, holes % bins), axis=1)


def _cut_into_holes(spans: Spans, holes: npt.NDArray[np.int64]) -> tuple[Spans, npt.NDArray[np.int64]]:
    """Concatenate ``spans`` and cut them into ``holes`` that they fill exactly; also return the number of each span's
    hole.
    """
    if not len(spans.starts):
        return spans, np.empty(0, dtype=np.int64)
    ends = np.cumsum(holes)
    cut, places = _cut(spans, ends[:-1])
    return cut, np.searchsorted(ends, places, side="right")
