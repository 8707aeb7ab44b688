"""New pieces for a unigram model.

A unigram model (Kudo, 2018, https://arxiv.org/abs/1804.10959) gives every piece a log-probability and cuts text where
their sum is highest. A second model is trained on the corpus alone. Of its pieces those are taken that save most
tokens, at their log-probabilities, moved by one number: the median difference of the pieces that both models have. A
new piece is then as likely beside the old ones as the corpus says.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

import tokenizers

from .splitting import may_be_piece
from .vocabulary import Wanted, require_some

_BATCH = 10_000
_LARGEST_FEED = 20_000_000
"""Words that the trainer is given; of a larger corpus it gets a share of each."""


@dataclass(frozen=True)
class NewPiece:
    """A piece to append."""

    text: str
    score: float
    count: int
    """Occurrences in the corpus as the second model cuts it."""


def learn_unigram(
    scores: Mapping[str, float],
    taken: Container[str],
    pieces_of: Callable[[str], list[int]],
    words: Counter[str],
    wanted: Wanted,
) -> tuple[list[NewPiece], list[str]]:
    """The pieces that save most tokens, and lines for the console.

    Args:
        scores: log-probabilities of the old pieces.
        taken: entries that may not become pieces.
        pieces_of: what the old model makes of a piece.
        words: of the corpus, and their numbers.
        wanted: how many, how frequent and how long.

    Raises:
        UserError: no piece is left.
    """
    trained, counts = _train(words, max(8_000, 4 * wanted.num_tokens))
    shared = [scores[piece] - score for piece, score in trained.items() if piece in scores and counts[piece]]
    shift = statistics.median(shared) if shared else 0.0
    saving = {
        # A character without a piece is one unknown token: a piece for it saves none, and yet is wanted.
        piece: counts[piece] * (len(pieces_of(piece)) - 1 or len(piece) == 1)
        for piece in trained
        if piece not in taken and counts[piece] >= wanted.min_count and may_be_piece(piece, wanted.max_characters)
    }
    best = sorted((piece for piece, saved in saving.items() if saved > 0), key=lambda piece: (-saving[piece], piece))
    chosen = best[: wanted.num_tokens]
    note = require_some(len(chosen), wanted)
    found = [NewPiece(piece, trained[piece] + shift, counts[piece]) for piece in chosen]
    line = (
        f"log-probabilities of the corpus's own unigram model moved by {shift:.3f}, the median of {len(shared)} pieces"
    )
    return found, [line, *([note] if note else [])]


def rarest_part(scores: Mapping[str, float], parts: Iterable[str]) -> float:
    """The log-probability for a listed piece: that of the rarest of its ``parts``. It is more than their sum, so the
    piece wins over them."""
    return min((scores[part] for part in parts if part in scores), default=min(scores.values()))


def _train(words: Counter[str], vocab_size: int) -> tuple[dict[str, float], Counter[str]]:
    """Log-probabilities of a model of ``words`` alone, and how often each piece stands in them."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(_batches(words), trainer)
    trained = {piece: score for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"] if piece != "<unk>"}
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for token in tokenizer.model.tokenize(word):
            counts[token.value] += count
    return trained, counts


def _batches(words: Counter[str]) -> Iterator[list[str]]:
    share = min(1.0, _LARGEST_FEED / max(1, words.total()))
    batch: list[str] = []
    for word, count in words.items():
        batch += [word] * max(1, round(count * share))
        if len(batch) >= _BATCH:
            yield batch
            batch = []
    yield batch
