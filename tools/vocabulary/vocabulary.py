"""What the ways to extend a tokenizer have in common: what is known of the old one, and what a new token is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ...engine.errors import UserError

WORD_START = "\u2581"
"""What sentencepiece writes for a space."""


@dataclass(frozen=True)
class NewToken:
    """A token to append."""

    id: int
    piece: str
    """The vocabulary's entry."""
    text: str
    """What it stands for; a part of a character shows as U+FFFD."""
    subtokens: tuple[int, ...]
    """What the old tokenizer makes of it: the mean of their rows is its first embedding."""
    kind: Literal["merge", "character", "piece", "part", "added"]
    """merge: of two tokens; character: one that had no token; piece: of a unigram model; part: a token on the way to a
    listed one; added: matched in text before anything else."""
    count: int = 0
    """Occurrences in the text that it was learned from, when it was chosen; 0 where it was listed."""


@dataclass(frozen=True)
class Extension:
    """New tokens, and the files of the tokenizer that has them."""

    tokens: list[NewToken]
    files: dict[str, bytes | None]
    """What replaces the old files of these names; None: the file is left out."""
    notes: list[str] = field(default_factory=list)
    """For the console, a line each."""
    curve: list[int] = field(default_factory=list)
    """Tokens of the held-out words after 0, 1, 2 ... new tokens, where that is known."""


@dataclass(frozen=True)
class Wanted:
    """Which tokens are to be learned."""

    num_tokens: int
    min_count: int
    """Occurrences in the corpus, at least."""
    max_characters: int
    """Of a token, the space before it included."""


def require_some(found: int, wanted: Wanted) -> str | None:
    """A line where fewer tokens were ``found`` than asked for; None otherwise.

    Raises:
        UserError: none was found.
    """
    if found == 0:
        raise UserError(
            f"--num-tokens {wanted.num_tokens:,}: no new token occurs {wanted.min_count} times in the corpus; give "
            "more text, or lower --min-count"
        )
    if found < wanted.num_tokens:
        return (
            f"made {found:,} new tokens instead of the --num-tokens {wanted.num_tokens:,}: no other occurs "
            f"{wanted.min_count} times in the corpus (--min-count)"
        )
    return None


class Tokenizer(Protocol):
    """An old tokenizer that can be extended."""

    kind: str
    """In words, for the console."""
    first_id: int
    """Of the first new token: above all ids there are."""

    def words(self, text: str) -> Iterable[str]:
        """The parts of a text that tokens do not cross, normalized, as entries of the vocabulary are written."""

    def learn(
        self, words: Counter[str], held_out: Counter[str], wanted: Wanted, on_token: Callable[[], object]
    ) -> Extension:
        """New tokens.

        Args:
            words: of the corpus, and how often each stands there.
            held_out: the same of text to measure with.
            wanted: which are to be learned.
            on_token: hears of each one that is found, where they are found one by one.

        Raises:
            UserError: none can be learned.
        """

    def take(self, texts: Sequence[str]) -> Extension:
        """The given tokens."""
