"""Rearrange the documents of a source in its windows, for shuffled documents and best-fit packing.

Nothing is stored, and nothing is built at the start. A *group* is ``GROUP_WINDOWS`` consecutive windows of the source
(the last group may be smaller). Its documents, cut at the edges of the group, are arranged in the same number of new
windows. This needs only a key and the index entries of the group, so any window costs the layout of one group. A group
of G windows of S tokens holds exactly G * S tokens; so no token is lost or repeated, and there is no padding:

- *concat* concatenates the documents in the order of a keyed permutation, and cuts the result every S tokens;
- *best_fit* puts each document, longest first, into the window where it leaves the least space (best-fit decreasing;
  Ding et al., 2024, "Fewer Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830). Documents of more
  than S tokens first fill whole windows. Their remainders, and the documents cut at the group's edges, are placed after
  all complete documents. What does not fit is cut to fill the remaining holes; the paper would open another window and
  pad it.
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_left, insort
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .indexed_dataset import IndexedDataset
from .splitmix import GOLDEN, mix64

GROUP_WINDOWS = 128
"""Windows in a group. More windows cut fewer documents at edges and holes (at 4,096 tokens a window and 900 a document:
2.2 % with 64, 1.7 % with 128, 1.1 % with 256). They also make every window of an uncached group more expensive."""
_GROUPS_CACHED = 32


class Pieces(NamedTuple):
    """Runs of consecutive tokens, each of one document, in layout order."""

    starts: npt.NDArray[np.int64]
    """[P] positions of their first tokens in the dataset."""
    lengths: npt.NDArray[np.int64]
    """[P] number of tokens, at least one."""
    begins: npt.NDArray[np.bool_]
    """[P] True if the piece contains the beginning of its document."""
    ends: npt.NDArray[np.bool_]
    """[P] True if the piece contains the end of its document."""

    @property
    def num_whole(self) -> int:
        """Return the number of pieces that are whole documents."""
        return int(np.count_nonzero(self.begins & self.ends))

    def take(self, where: npt.NDArray[np.integer] | npt.NDArray[np.bool_] | slice) -> Pieces:
        """Return some of the pieces, or all of them in another order."""
        return Pieces(self.starts[where], self.lengths[where], self.begins[where], self.ends[where])


class Group(NamedTuple):
    """The layout of one group in one epoch."""

    pieces: Pieces
    """The pieces of all windows, in order."""
    first: npt.NDArray[np.int64]
    """[windows + 1] number of the first piece of each window."""


class DocumentLayout:
    """The windows of a source after its documents have been rearranged. Safe to use from several threads.

    Args:
        dataset: the source's dataset.
        start: position in the dataset of the source's first token.
        num_windows: of the source.
        sequence_length: S, tokens in a window.
        key: of all random choices; made from seed, sequence length and source.
        packing: see the module's docstring.
        every_epoch: whether each epoch has its own layout.
        group_windows: windows of a group.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        start: int,
        num_windows: int,
        sequence_length: int,
        key: str,
        packing: Literal["concat", "best_fit"],
        every_epoch: bool,
        group_windows: int = GROUP_WINDOWS,
    ):
        self.dataset = dataset
        self.start = start
        self.num_windows = num_windows
        self.sequence_length = sequence_length
        self.key = key
        self.packing = packing
        self.every_epoch = every_epoch
        self.group_windows = group_windows
        self._cached_group = functools.lru_cache(maxsize=_GROUPS_CACHED)(self._make_group)

    def window(self, index: int, epoch: int) -> Pieces:
        """Return the pieces of window ``index``: S tokens."""
        number, place = divmod(index, self.group_windows)
        pieces, first = self.group(number, epoch)
        return pieces.take(slice(int(first[place]), int(first[place + 1])))

    def group(self, number: int, epoch: int) -> Group:
        """Return the layout of the windows ``[number * group_windows, ...)``."""
        return self._cached_group(number, epoch if self.every_epoch else 0)

    def _make_group(self, number: int, epoch: int) -> Group:
        first = number * self.group_windows
        count = min(self.group_windows, self.num_windows - first)
        start = self.start + first * self.sequence_length
        documents = pieces_between(self.dataset, start, start + count * self.sequence_length)
        key = f"{self.key}/{epoch}/{number}"
        if self.packing == "best_fit":
            return best_fit(documents, count, self.sequence_length, key)
        order = np.argsort(random_values(f"{key}/documents", len(documents.starts)), kind="stable")
        return in_windows(documents.take(order), count, self.sequence_length)


def pieces_between(dataset: IndexedDataset, start: int, stop: int) -> Pieces:
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
    return Pieces(starts, np.diff(starts, append=stop), begins, ends)


def in_windows(pieces: Pieces, count: int, sequence_length: int) -> Group:
    """Concatenate ``pieces`` and cut them into ``count`` windows that they fill exactly."""
    edges = np.arange(count + 1) * sequence_length
    cut, places = _cut(pieces, edges[1:-1])
    return Group(cut, np.searchsorted(places, edges))


def random_values(key: str, count: int) -> npt.NDArray[np.uint64]:
    """Return [``count``] 64-bit numbers: splitmix64 from a hash of ``key``."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return mix64(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(seed))


def _cut(pieces: Pieces, edges: npt.NDArray[np.int64]) -> tuple[Pieces, npt.NDArray[np.int64]]:
    """Concatenate ``pieces`` and cut them at the ascending places ``edges``; return the results and their
    beginnings.
    """
    last = np.cumsum(pieces.lengths)
    first = last - pieces.lengths
    places = np.sort(np.concatenate((first, edges)), kind="stable")  # two ascending runs: merged in linear time
    places = places[np.diff(places, prepend=-1) > 0]
    owner = np.searchsorted(first, places, side="right") - 1
    stops = np.append(places[1:], last[-1:])
    offset = places - first[owner]
    begins, ends = pieces.begins[owner] & (offset == 0), pieces.ends[owner] & (stops == last[owner])
    return Pieces(pieces.starts[owner] + offset, stops - places, begins, ends), places


def best_fit(documents: Pieces, count: int, sequence_length: int, key: str) -> Group:
    """Arrange ``documents`` in ``count`` windows that they fill exactly, with few cuts, by best-fit decreasing.

    Never cuts more documents than concatenation would. Windows, documents within them, and documents of equal length
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
    # Pieces that did not fit fill the remaining holes, the largest hole first, so that they are cut as little as
    # possible.
    holes = holes[::-1]
    filling, hole = _cut_into_holes(rest.take(~fits), holes[:, 0])
    pieces = Pieces(*(np.concatenate(parts) for parts in zip(full, rest.take(fits), filling, strict=True)))
    window = np.concatenate((np.arange(num_open, count), bins[fits], holes[hole, 1]))
    if pieces.num_whole < full.num_whole + rest.num_whole:
        # Decreasing lengths are a heuristic: about one tiny group in a thousand is better off in its original order.
        plain = in_windows(documents, count, sequence_length)
        if plain.pieces.num_whole > pieces.num_whole:
            return plain
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(random_values(f"{key}/windows", count), kind="stable")] = np.arange(count)
    window = rank[window]
    order = np.lexsort((random_values(f"{key}/places", len(window)), window))
    return Group(pieces.take(order), np.searchsorted(window[order], np.arange(count + 1)))


def _split_long(documents: Pieces, sequence_length: int) -> tuple[Pieces, Pieces]:
    """Return the whole windows filled by documents of at least ``sequence_length`` tokens, and the remainders of all
    documents.
    """
    whole, rest = np.divmod(documents.lengths, sequence_length)
    owner = np.repeat(np.arange(len(whole)), whole)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(whole) - whole, whole)  # of the window within its document
    full = Pieces(
        documents.starts[owner] + number * sequence_length,
        np.full(len(owner), sequence_length),
        documents.begins[owner] & (number == 0),
        documents.ends[owner] & (number == whole[owner] - 1) & (rest[owner] == 0),
    )
    left = Pieces(documents.starts + whole * sequence_length, rest, documents.begins & (whole == 0), documents.ends)
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


def _cut_into_holes(pieces: Pieces, holes: npt.NDArray[np.int64]) -> tuple[Pieces, npt.NDArray[np.int64]]:
    """Concatenate ``pieces`` and cut them into ``holes`` that they fill exactly; also return the number of each piece's
    hole.
    """
    if not len(pieces.starts):
        return pieces, np.empty(0, dtype=np.int64)
    ends = np.cumsum(holes)
    cut, places = _cut(pieces, ends[:-1])
    return cut, np.searchsorted(ends, places, side="right")
