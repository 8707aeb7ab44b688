"""Learn new pieces for a unigram model.

A unigram model (Kudo, 2018, https://arxiv.org/abs/1804.10959) gives every piece a log-probability and splits text so
that their sum is highest. A second model is trained on the corpus alone. Those of its pieces that save most tokens are
added, with their log-probabilities shifted by one number. The shift is the median difference of the pieces that both
models have. So new pieces are as likely, relative to the old ones, as in the corpus.
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
"""Maximum number of words for the trainer; a larger corpus is scaled down proportionally."""


@dataclass(frozen=True)
class NewPiece:
    """A piece to append."""

    text: str
    score: float
    count: int
    """Number of occurrences in the corpus as split by the second model."""


def learn_unigram(
    scores: Mapping[str, float],
    taken: Container[str],
    pieces_of: Callable[[str], list[int]],
    words: Counter[str],
    wanted: Wanted,
) -> tuple[list[NewPiece], list[str]]:
    """Return the pieces that save most tokens, and lines for the console.

    Args:
        scores: log-probabilities of the old pieces.
        taken: entries that may not become pieces.
        pieces_of: returns the old model's ids of a piece.
        words: of the corpus, and their counts.
        wanted: number, frequency and length of the new pieces.

    Raises:
        UserError: no piece is left.
    """
    trained, counts = _train(words, max(8_000, 4 * wanted.num_tokens))
    shared = [scores[piece] - score for piece, score in trained.items() if piece in scores and counts[piece]]
    shift = statistics.median(shared) if shared else 0.0
    saving = {
        # A character without a piece is one unknown token: a piece for it saves no tokens, but is still useful.
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
    """Return the log-probability for a listed piece: that of the rarest of its ``parts``.

    It is more than their sum, so the tokenizer prefers the piece.
    """
    return min((scores[part] for part in parts if part in scores), default=min(scores.values()))


def _train(words: Counter[str], vocab_size: int) -> tuple[dict[str, float], Counter[str]]:
    """Return the log-probabilities of a model trained on ``words`` alone, and the number of occurrences of each
    piece.
    """
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
