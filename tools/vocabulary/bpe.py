"""Learn the next merges of a BPE vocabulary from words, independently of the vocabulary's file format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .pair_merges import FIRST_UNKNOWN, NO_RIGHT, Merge, PairCorpus, learn_merges, replay
from .vocabulary import Wanted, require_some

Kind = Literal["merge", "character"]


@dataclass(frozen=True)
class Learned:
    """The result of learning."""

    tokens: list[tuple[Merge, str, Kind]]
    """Each new token's merge, entry of the vocabulary, and kind."""
    pairs: list[tuple[str, str]]
    """The merges as vocabulary entries, in their order."""
    notes: list[str] = field(default_factory=list)
    curve: list[int] = field(default_factory=list)
    """Number of tokens of the held-out words after 0, 1, 2 ... new tokens."""


def learn_bpe(
    vocab: dict[str, int],
    taken: set[str],
    pieces_of: Callable[[str], list[int]],
    first_id: int,
    words: Counter[str],
    held_out: Counter[str],
    wanted: Wanted,
    allowed: Callable[[str], bool],
    on_token: Callable[[], object],
) -> Learned:
    """Learn merges, see :func:`~retemper.tools.vocabulary.pair_merges.learn_merges`.

    Args:
        vocab: ids of the old entries.
        taken: entries that may not become tokens.
        pieces_of: returns the old tokenizer's ids of a word, or of a part of one.
        first_id: of the first new token.
        words, held_out: words to learn from and to measure with, and their counts.
        wanted: number, frequency and length of the new tokens.
        allowed: returns whether an entry may be a token.
        on_token: called for each new token.

    Raises:
        UserError: nothing can be learned.
    """
    texts = {token: piece for piece, token in vocab.items()}
    symbols = _Symbols(vocab, pieces_of, texts)
    corpus = symbols.corpus(words, wanted.min_count)
    merges = learn_merges(corpus, first_id, wanted.num_tokens, texts, taken, allowed, wanted.min_count, on_token)
    note = require_some(len(merges), wanted)
    tokens: list[tuple[Merge, str, Kind]] = [
        (merge, texts[merge.token], "character" if merge.right == NO_RIGHT else "merge") for merge in merges
    ]
    pairs = [(texts[merge.left], texts[merge.right]) for merge in merges if merge.right != NO_RIGHT]
    curve = replay(symbols.corpus(held_out), merges) if held_out else []
    return Learned(tokens, pairs, [note] if note else [], curve)


class _Symbols:
    """Words as ids; characters that the vocabulary lacks become negative symbols."""

    def __init__(self, vocab: dict[str, int], pieces_of: Callable[[str], list[int]], texts: dict[int, str]):
        self._vocab, self._pieces_of, self._texts = vocab, pieces_of, texts
        self._unknown: dict[str, int] = {}
        self._cost: dict[int, int] = {}

    def corpus(self, words: Counter[str], min_count: int = 1) -> PairCorpus:
        """Return the corpus for :func:`learn_merges`."""
        rows = [self._symbols(word) for word in words]
        return PairCorpus(rows, list(words.values()), min_count, self._cost)

    def _symbols(self, word: str) -> list[int]:
        if all(character in self._vocab for character in word):
            return self._pieces_of(word)
        symbols, known = [], ""
        for character in word:
            if character in self._vocab:
                known += character
                continue
            symbols += [*(self._pieces_of(known) if known else ()), self._symbol_of(character)]
            known = ""
        return symbols + (self._pieces_of(known) if known else [])

    def _symbol_of(self, character: str) -> int:
        if character not in self._unknown:
            symbol = self._unknown[character] = FIRST_UNKNOWN - len(self._unknown)
            self._texts[symbol] = character
            self._cost[symbol] = len(self._pieces_of(character))
        return self._unknown[character]
