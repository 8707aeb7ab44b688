"""What the ways to extend a tokenizer have in common: what is known of the old one, and what a new token is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import tokenizers

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


def by_piece(texts: Iterable[str], known: Container[str]) -> tuple[dict[str, str], list[str]]:
    """Listed texts by their pieces, and a line for each that is left out: a space and U+2581 make the same piece.

    Args:
        texts: as they are listed.
        known: pieces that there are.

    Raises:
        UserError: nothing is left.
    """
    new: dict[str, str] = {}
    notes: list[str] = []
    for text in texts:
        piece = text.replace(" ", WORD_START)
        if piece in known or piece in new:
            notes.append(f"{text!r} is a token already")
        else:
            new[piece] = text
    if not new:
        raise UserError("--tokens: all of them are tokens already; there is nothing to add")
    return new, notes


def read_object(files: Mapping[str, bytes], path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file beside a tokenizer; empty where there is no such file.

    Args:
        files: of the folder, by name.
        path: of the file.
        remedy: what to do where it is damaged.

    Raises:
        UserError: it is no JSON, or no object.
    """
    try:
        content = json.loads(files.get(path.name, b"{}"))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} instead of an object; {remedy}")
    return content


def dump_json(content: Any) -> bytes:
    """A JSON file of a tokenizer's folder."""
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def require_ids_as_read(tokenizer: tokenizers.Tokenizer, added: Mapping[str, int], path: Path) -> None:
    """See that added tokens have the ids that ``tokenizer.json`` says.

    Args:
        tokenizer: as the library reads the file. It numbers added tokens itself, unless they stand in the vocabulary.
        added: ids in the file.
        path: of the file.

    Raises:
        UserError: the library gives one of them another id.
    """
    for content, token in added.items():
        read = tokenizer.token_to_id(content)
        if read != token:
            raise UserError(
                f"{path}: added token {content!r} has id {token} in the file, but the tokenizers library reads it as "
                f"{read}; if the model was trained with {read}, save the file again with the library "
                "(Tokenizer.from_file(path).save(path)), or else correct its ids"
            )


class Tokenizer(Protocol):
    """An old tokenizer that can be extended."""

    kind: str
    """In words, for the console."""
    first_id: int
    """Of the first new token: above all ids there are."""

    def text_of(self, piece: str) -> str:
        """The text that an entry of the vocabulary stands for; the entry itself where it is not written as one."""

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
