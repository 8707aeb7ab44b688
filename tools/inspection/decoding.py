"""Tokens as text: whole documents, the piece of text that each token stands for, and text that is not sound.

U+FFFD, the replacement character, appears in decoded text for two reasons that must not be confused. Either it *is in
the text*: some program before us put it where it could not read a character, and the tokenizer gave it ids as it does
to any character. Or the ids stand for bytes that are *not valid UTF-8*, because a document was cut within a character
or was made with another tokenizer. In a byte-level vocabulary a single id may be part of a character, so that it
decodes to U+FFFD alone though nothing is wrong. Ids are therefore judged by runs: neighbours that each decode with
U+FFFD. Where the run as a whole decodes without it, all is well. Otherwise, when the tokenizer gives that text the very
same ids, the character is in the text; when not, the bytes were broken.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engine.data.indexed_dataset import IndexedDataset
from ...engine.data.tokenizer import TokenizerHandle
from ...engine.errors import UserError
from .streams import document_edges, document_tokens

REPLACEMENT = "\ufffd"
_SAMPLE_DOCUMENTS = 1_000
_SAMPLE_TOKENS_OF_EACH = 1 << 16
_SAMPLE_TOKENS = 2_000_000


@dataclass(frozen=True)
class TextFacts:
    """What decoding a sample of documents shows."""

    documents: int
    """Drawn at random, or all that there are."""
    all_documents: bool
    tokens: int
    """Of them: of a document, at most the first 65,536."""
    text_bytes: int
    """Their text in UTF-8."""
    replaced_documents: int
    """Documents whose text holds U+FFFD."""
    replaced_tokens: int
    """Tokens that stand for it, or for a part of it."""
    broken_documents: int
    """Documents whose tokens stand for bytes that are not UTF-8."""
    broken_tokens: int
    unknown_documents: int
    """Documents with an unknown token."""


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of several that share a character."""

    tokens: tuple[int, ...]
    text: str


def decoded_documents(
    dataset: IndexedDataset, tokenizer: TokenizerHandle, indices: Sequence[int], max_tokens: int
) -> Iterator[str]:
    """Each of the documents ``indices`` as text under a line that names it, cut after ``max_tokens``."""
    for index in indices:
        tokens = known_tokens(dataset, tokenizer, index)
        cut = f", the first {max_tokens:,}" if len(tokens) > max_tokens else ""
        yield f"--- document {index}, {len(tokens):,} tokens{cut} ---\n{tokenizer.decode(tokens[:max_tokens])}"


def known_tokens(dataset: IndexedDataset, tokenizer: TokenizerHandle, index: int) -> npt.NDArray[np.int64]:
    """Tokens of document ``index``.

    Raises:
        UserError: there is no such document, or it holds ids that the tokenizer lacks.
    """
    tokens = document_tokens(dataset, index)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        bad = tokens.max() if tokens.max() >= tokenizer.vocab_size else tokens.min()
        raise UserError(
            f"{dataset.prefix}: document {index} holds token {bad}, but {tokenizer.name} has "
            f"{tokenizer.vocab_size:,}: name the dataset's own tokenizer with --tokenizer"
        )
    return tokens


def pieces(tokenizer: TokenizerHandle, tokens: Sequence[int]) -> list[Piece]:
    """The text that each of ``tokens`` adds to those before it.

    Tokens that are parts of one character are one piece. What a token adds is found by decoding it with those of the
    piece before, which costs the same for every token.
    """
    found: list[Piece] = []
    before: Sequence[int] = ()
    first = 0
    for stop in range(1, len(tokens) + 1):
        known = tokenizer.decode(before)
        text = tokenizer.decode([*before, *tokens[first:stop]])
        if text.endswith(REPLACEMENT) and stop < len(tokens):
            continue
        found.append(Piece(tuple(tokens[first:stop]), text[len(known) :]))
        before, first = tokens[first:stop], stop
    return found


def measure_text(
    dataset: IndexedDataset, tokenizer: TokenizerHandle, unknown_id: int | None, eod_id: int | None, seed: int
) -> TextFacts:
    """Decode documents at random, at most 1,000 and two million tokens in all."""
    count = min(_SAMPLE_DOCUMENTS, dataset.num_documents)
    soundness = Soundness(tokenizer)
    documents = tokens = text_bytes = with_unknown = 0
    replaced, broken = [0, 0], [0, 0]  # documents, tokens
    for index in random.Random(seed).sample(range(dataset.num_documents), count):
        start, stop = document_edges(dataset, index)
        ids = dataset.tokens(start, min(stop, start + _SAMPLE_TOKENS_OF_EACH)).tolist()
        text = tokenizer.decode(ids[:-1] if ids and ids[-1] == eod_id else ids)
        documents, tokens = documents + 1, tokens + len(ids)
        text_bytes += len(text.encode("utf-8", "replace"))
        with_unknown += unknown_id in ids
        if REPLACEMENT in text:
            is_whole = stop - start <= len(ids)
            for total, number in zip((replaced, broken), soundness.count(ids, is_whole), strict=True):
                total[0] += number > 0
                total[1] += number
        if tokens >= _SAMPLE_TOKENS:
            break
    return TextFacts(
        documents=documents,
        all_documents=documents == dataset.num_documents,
        tokens=tokens,
        text_bytes=text_bytes,
        replaced_documents=replaced[0],
        replaced_tokens=replaced[1],
        broken_documents=broken[0],
        broken_tokens=broken[1],
        unknown_documents=with_unknown,
    )


class Soundness:
    """Tells U+FFFD that is in the text from bytes that are not UTF-8."""

    def __init__(self, tokenizer: TokenizerHandle) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, bool] = {}

    def count(self, ids: Sequence[int], is_whole: bool) -> tuple[int, int]:
        """(tokens that stand for a U+FFFD of the text, tokens of broken bytes) in a document.

        Args:
            ids: its tokens, from the first on.
            is_whole: whether these are all; otherwise a run that reaches the last of them is cut and not judged.
        """
        replaced = broken = 0
        for run, at_end in self._runs(ids):
            text = self._tokenizer.decode(run)
            if REPLACEMENT not in text or (at_end and not is_whole):
                continue
            if self._encodes_to(text, run):
                replaced += sum(self._is_of_replacement(run))
            else:
                broken += len(run)
        return replaced, broken

    def _runs(self, ids: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
        run: list[int] = []
        for token in ids:
            if self._is_doubtful(token):
                run.append(token)
            elif run:
                yield run, False
                run = []
        if run:
            yield run, True

    def _is_doubtful(self, token: int) -> bool:
        if token not in self._alone:
            self._alone[token] = REPLACEMENT in self._tokenizer.decode([token])
        return self._alone[token]

    def _is_of_replacement(self, run: list[int]) -> list[bool]:
        """For each token of a run of sound text, whether its piece holds U+FFFD: other characters are in runs too."""
        found: list[bool] = []
        first = 0
        for stop in range(1, len(run) + 1):
            text = self._tokenizer.decode(run[first:stop])
            # A piece is complete where the tokenizer gives its text these ids: parts of characters give it others.
            if stop == len(run) or REPLACEMENT not in text or self._encodes_to(text, run[first:stop]):
                found += [REPLACEMENT in text] * (stop - first)
                first = stop
        return found

    def _encodes_to(self, text: str, ids: list[int]) -> bool:
        encoded, _ = self._tokenizer.reference_encode([text])
        if encoded.tolist() == ids:
            return True
        # Sentencepiece may put a space before a text.
        return encoded[1:].tolist() == ids and not self._tokenizer.decode(encoded[:1]).strip()


def find_unknown_id(tokenizer: TokenizerHandle) -> int | None:
    """The id that stands for whatever the vocabulary cannot express; None where there is none, as in byte-level ones.

    Raises:
        UserError: the tokenizer's file cannot be read any more.
    """
    if tokenizer.kind == "sentencepiece":
        from sentencepiece import SentencePieceProcessor

        token = int(SentencePieceProcessor(model_file=str(tokenizer.file)).unk_id())
        return token if token >= 0 else None
    if tokenizer.kind == "tiktoken":
        return None
    try:
        content = json.loads(tokenizer.file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{tokenizer.file}: cannot be read: {error}") from error
    return _unknown_of_json(content)


def _unknown_of_json(content: dict[str, Any]) -> int | None:
    """As it stands in a ``tokenizer.json``."""
    model = content.get("model", {})
    if isinstance(model.get("unk_id"), int):
        return model["unk_id"]
    name = model.get("unk_token")
    if name is None:
        return None
    added = {token.get("content"): token.get("id") for token in content.get("added_tokens", [])}
    vocabulary = model.get("vocab", {})
    return added.get(name, vocabulary.get(name) if isinstance(vocabulary, dict) else None)
