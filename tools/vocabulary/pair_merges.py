"""Continue byte-pair encoding after the last merge of a tokenizer.

Sennrich, Haddow and Birch (2016, https://arxiv.org/abs/1508.07909): the most frequent pair of neighbours becomes a
token, repeatedly. Here the words of the corpus begin as the tokenizer's pieces, so that every new token consists of
existing ones. New merges come after all old ones: an encoder first makes the old pieces, exactly as before, and then
joins them further. So no text needs more tokens than before, and the counts here are those of the encoder.

All words are concatenated in arrays, and a merge touches only the places of its pair. The libraries can train only from
single characters.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_GAP = -1
"""Marks gaps between words, and places whose token was joined to the previous one."""
FIRST_UNKNOWN = -2
"""Symbols up to this one represent characters that the vocabulary lacks: they cannot be joined until they have an
id.
"""
_SHIFT = 32
NO_RIGHT = -1
"""Replaces the right half of a merge that makes a token of a single character which the vocabulary lacks."""


@dataclass(frozen=True)
class Merge:
    """``left`` and ``right`` next to each other become ``token``."""

    left: int
    """An id; or, with :data:`NO_RIGHT`, the symbol of a character."""
    right: int
    token: int
    count: int
    """Number of places in the corpus where the merge was made."""


class PairCorpus:
    """Words as tokens, in which pairs are merged one after another.

    Args:
        words: symbols of each distinct word: ids, and negative symbols of unknown characters.
        counts: number of occurrences of each word.
        min_count: rarer pairs are not counted.
        unknown_cost: number of tokens that the tokenizer uses for each unknown symbol.
    """

    def __init__(
        self,
        words: Sequence[Sequence[int]],
        counts: Sequence[int],
        min_count: int = 1,
        unknown_cost: Mapping[int, int] | None = None,
    ):
        self._min_count, self._unknown_cost = min_count, dict(unknown_cost or {})
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        ends = np.cumsum(lengths + 1)
        self._tokens: Ints = np.full(int(ends[-1]) + 1 if len(words) else 1, _GAP)
        is_token = np.ones(len(self._tokens), bool)
        is_token[0] = is_token[ends] = False
        self._tokens[is_token] = np.fromiter((s for word in words for s in word), np.int64, int(lengths.sum()))
        self._weights: Ints = np.zeros(len(self._tokens), np.int64)
        self._weights[is_token] = np.repeat(np.asarray(counts, np.int64), lengths)
        place = np.arange(len(self._tokens), dtype=np.int64)
        self._next, self._before = place + 1, place - 1
        self._next[-1] = 0
        self.counts: dict[int, int] = {}
        """Number of occurrences of each pair, by its code."""
        self._places: dict[int, Ints] = {}
        known = self._tokens >= 0
        self.total = int(self._weights[known].sum())
        """Number of tokens of the whole corpus, repeated words counted."""
        unknown = np.flatnonzero(self._tokens <= FIRST_UNKNOWN)
        self._unknown_places = dict(_grouped(self._tokens[unknown], unknown))
        self.unknown = {
            symbol: (int(self._weights[at].sum()), self._unknown_cost[symbol])
            for symbol, at in self._unknown_places.items()
        }
        """Number of occurrences of each unknown symbol, and the number of tokens that it currently costs."""
        self.total += sum(occurrences * cost for occurrences, cost in self.unknown.values())
        self._count(np.flatnonzero(known[:-1] & known[1:]))

    def merge(self, left: int, right: int, token: int) -> tuple[int, list[int]]:
        """Join the pair from left to right in every word; or give an unknown character (``NO_RIGHT``) its token.

        Returns:
            The number of joined places, and the codes of the pairs that ``token`` is now part of.
        """
        if right == NO_RIGHT:
            return self._name(left, token)
        at = self._places.pop(code_of(left, right), np.zeros(0, np.int64))
        self.counts.pop(code_of(left, right), None)
        at = at[self._tokens[at] == left]
        at = at[self._tokens[self._next[at]] == right]
        if left == right:
            at = self._without_overlaps(at)
        if not len(at):
            return 0, []
        second = self._next[at]
        self._forget(np.unique(np.concatenate([self._before[at], at, second])))
        behind = self._next[second]
        self._tokens[at], self._tokens[second] = token, _GAP
        self._next[at], self._before[behind] = behind, at
        joined = int(self._weights[at].sum())
        self.total -= joined
        return joined, self._count(np.unique(np.concatenate([self._before[at], at])))

    def _name(self, symbol: int, token: int) -> tuple[int, list[int]]:
        at = self._unknown_places.pop(symbol, np.zeros(0, np.int64))
        if not len(at):
            return 0, []
        self._tokens[at] = token
        occurrences = int(self._weights[at].sum())
        self.total -= occurrences * (self._unknown_cost[symbol] - 1)
        return occurrences, self._count(np.unique(np.concatenate([self._before[at], at])))

    def _without_overlaps(self, at: Ints) -> Ints:
        """Remove overlapping pairs: in ``a a a`` only the first two are a pair."""
        kept, taken = [], -1
        for place, second in zip(at.tolist(), self._next[at].tolist(), strict=True):
            if place != taken:
                kept.append(place)
                taken = second
        return np.array(kept, np.int64)

    def _pairs(self, at: Ints) -> tuple[Ints, Ints]:
        """Return those of the places ``at`` that begin a pair, and the codes of the pairs."""
        left, right = self._tokens[at], self._tokens[self._next[at]]
        whole = (left >= 0) & (right >= 0)
        return at[whole], left[whole] << _SHIFT | right[whole]

    def _forget(self, at: Ints) -> None:
        places, codes = self._pairs(at)
        found, index = np.unique(codes, return_inverse=True)
        sums = np.bincount(index, self._weights[places], len(found))
        for code, lost in zip(found.tolist(), sums.tolist(), strict=True):
            if code in self.counts:
                self.counts[code] -= int(lost)

    def _count(self, at: Ints) -> list[int]:
        """Count the pairs that begin at ``at`` and have not been counted yet; return the codes of the frequent ones."""
        places, codes = self._pairs(at)
        frequent = []
        for code, group in _grouped(codes, places):
            count = int(self._weights[group].sum())
            # A pair without a new half never becomes more frequent: a rare one stays rare.
            if count >= self._min_count:
                self.counts[code], self._places[code] = count, group
                frequent.append(code)
        return frequent


def _grouped(keys: Ints, places: Ints) -> Iterator[tuple[int, Ints]]:
    """Yield the ``places`` of each key, in their order."""
    if not len(keys):
        return
    order = np.argsort(keys, kind="stable")
    keys, places = keys[order], places[order]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(keys)], strict=True):
        yield int(keys[start]), places[start:stop]


def code_of(left: int, right: int) -> int:
    """Return one number for a pair of ids."""
    return left << _SHIFT | right


def learn_merges(
    corpus: PairCorpus,
    first_id: int,
    num_tokens: int,
    texts: dict[int, str],
    taken: set[str],
    allowed: Callable[[str], bool],
    min_count: int,
    on_merge: Callable[[], object] = lambda: None,
) -> list[Merge]:
    """Return the next ``num_tokens`` merges, or fewer if no pair is frequent enough.

    The pair that saves most tokens, which is the most frequent one, comes first. Among equal ones the smaller left id
    wins, then the smaller right id. A token for a character that the vocabulary lacks saves its current cost minus one
    at each place.

    Args:
        corpus: is modified: afterwards it contains the new tokens.
        first_id: of the first new token.
        num_tokens: number of tokens to make.
        texts: vocabulary entry of every id and unknown symbol in the corpus; new ones are added.
        taken: existing entries that no merge may make: with a second way to an old token, old merges could follow new
            ones. New ones are added.
        allowed: returns whether an entry may be a token.
        min_count: minimum count of a merge.
    """
    heap: list[tuple[int, int, int]] = []

    def push(codes: Iterable[int]) -> None:
        for code in codes:
            heapq.heappush(heap, (-corpus.counts[code], code >> _SHIFT, code & (1 << _SHIFT) - 1))

    push(list(corpus.counts))
    for symbol, (occurrences, cost) in corpus.unknown.items():
        if occurrences >= min_count and allowed(texts[symbol]):
            heapq.heappush(heap, (-occurrences * max(1, cost - 1), symbol, NO_RIGHT))
    merges: list[Merge] = []
    while heap and len(merges) < num_tokens:
        saved, left, right = heapq.heappop(heap)
        text = texts[left] + ("" if right == NO_RIGHT else texts[right])
        if right != NO_RIGHT:
            now = corpus.counts.get(code_of(left, right), 0)
            if now < min_count or text in taken or not allowed(text):
                continue
            if now != -saved:
                heapq.heappush(heap, (-now, left, right))
                continue
        token = first_id + len(merges)
        count, codes = corpus.merge(left, right, token)
        assert count, (left, right)
        texts[token] = text
        taken.add(text)
        merges.append(Merge(left, right, token, count))
        push(codes)
        on_merge()
    return merges


def replay(corpus: PairCorpus, merges: Sequence[Merge]) -> list[int]:
    """Return the number of tokens of ``corpus`` before the first of ``merges``, and after each of them."""
    totals = [corpus.total]
    for merge in merges:
        corpus.merge(merge.left, merge.right, merge.token)
        totals.append(corpus.total)
    return totals
