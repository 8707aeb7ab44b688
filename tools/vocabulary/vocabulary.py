"""Define what all extensions of a tokenizer share: the interface of an old tokenizer, and a new token."""

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
"""Sentencepiece's character for a space."""


@dataclass(frozen=True)
class NewToken:
    """A token to append."""

    id: int
    piece: str
    """The vocabulary entry."""
    text: str
    """The text that it represents; a part of a character shows as U+FFFD."""
    subtokens: tuple[int, ...]
    """The old tokenizer's ids of it: the mean of their rows is its initial embedding."""
    kind: Literal["merge", "character", "piece", "part", "added"]
    """merge: of two tokens; character: one that had no token; piece: of a unigram model; part: an intermediate token of
    a listed one; added: matched in text before anything else."""
    count: int = 0
    """Number of occurrences in the training text when it was chosen; 0 for a listed token."""


@dataclass(frozen=True)
class Extension:
    """New tokens, and the files of the extended tokenizer."""

    tokens: list[NewToken]
    files: dict[str, bytes | None]
    """Replacements of the old files; None removes a file."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the console, a line each."""
    curve: list[int] = field(default_factory=list)
    """Number of tokens of the held-out words after 0, 1, 2 ... new tokens, if known."""


@dataclass(frozen=True)
class Wanted:
    """Limits of the tokens to learn."""

    num_tokens: int
    min_count: int
    """Minimum number of occurrences in the corpus."""
    max_characters: int
    """Maximum length of a token, with the space before it."""


def require_some(found: int, wanted: Wanted) -> str | None:
    """Return a line if fewer tokens were ``found`` than requested; None otherwise.

    Raises:
        UserError: no token was found.
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
    """Return listed texts by their pieces, and a line for each omitted one: a space and U+2581 make the same piece.

    Args:
        texts: as they are listed.
        known: existing pieces.

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
    """Return the JSON object in a file next to a tokenizer; empty if the file does not exist.

    Args:
        files: of the folder, by name.
        path: of the file.
        remedy: what to do if it is damaged.

    Raises:
        UserError: it is not JSON, or not an object.
    """
    try:
        content = json.loads(files.get(path.name, b"{}"))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} instead of an object; {remedy}")
    return content


def dump_json(content: Any) -> bytes:
    """Return a JSON file of a tokenizer's folder."""
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def require_ids_as_read(tokenizer: tokenizers.Tokenizer, added: Mapping[str, int], path: Path) -> None:
    """Check that the library reads added tokens with the ids in ``tokenizer.json``.

    Args:
        tokenizer: as the library reads the file. It numbers added tokens itself, unless they are in the vocabulary.
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


class ExtensibleTokenizer(Protocol):
    """An old tokenizer that can be extended."""

    kind: str
    """Description for the console."""
    first_id: int
    """Id of the first new token: above all existing ids."""

    def text_of(self, piece: str) -> str:
        """Return the text of a vocabulary entry; the entry itself if it is not written as one."""

    def words(self, text: str) -> Iterable[str]:
        """Return the parts of a text that tokens do not cross, normalized, in the form of vocabulary entries."""

    def learn(
        self, words: Counter[str], held_out: Counter[str], wanted: Wanted, on_token: Callable[[], object]
    ) -> Extension:
        """Learn new tokens.

        Args:
            words: of the corpus, and their counts.
            held_out: the same for text to measure with.
            wanted: limits of the tokens to learn.
            on_token: called for each token found, if they are found one by one.

        Raises:
            UserError: no token can be learned.
        """

    def take(self, texts: Sequence[str]) -> Extension:
        """Add the given tokens."""
