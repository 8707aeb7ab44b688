"""Decode documents, find the text of each token, and detect broken text.

U+FFFD, the replacement character, appears in decoded text for two different reasons. Either it is *in the text*: an
earlier program replaced a character that it could not read. Or the ids are bytes that are *not valid UTF-8*: a document
was cut within a character or was made with another tokenizer. In a byte-level vocabulary a correct id may also be a
part of a character, and decodes to U+FFFD alone. So runs of consecutive ids that each decode to U+FFFD are judged
together. If the whole run decodes without U+FFFD, it is correct. Otherwise, if the tokenizer encodes that
text to the same ids, the character is in the text; if not, the bytes are broken.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from ....engine.data.indexed_dataset import IndexedDataset
from ...tokenizer.handle import TokenizerHandle
from .streams import document_edges

REPLACEMENT = "\ufffd"
_SAMPLE_DOCUMENTS = 1_000
_SAMPLE_TOKENS_OF_EACH = 1 << 16
_SAMPLE_TOKENS = 2_000_000


@dataclass(frozen=True)
class TextFacts:
    """Facts from decoding a sample of documents."""

    documents: int
    """Number of random documents that were decoded."""
    all_documents: bool
    """Whether these are all documents, each decoded completely, so that the facts are exact."""
    tokens: int
    """Tokens decoded, at most the first 65,536 of a document."""
    text_bytes: int
    """Size of their text in UTF-8."""
    replaced_documents: int
    """Documents whose text contains U+FFFD."""
    replaced_tokens: int
    """Tokens that are U+FFFD or a part of it."""
    broken_documents: int
    """Documents with bytes that are not UTF-8."""
    broken_tokens: int
    foreign_documents: int
    """Documents left out because the tokenizer lacks some of their ids."""
    unknown_documents: int
    """Documents with an unknown token."""


@dataclass(frozen=True)
class TokenText:
    """The text of one token, or of several that share a character."""

    tokens: tuple[int, ...]
    text: str
    trained: bool = True
    """Whether any of the tokens is a target; True without a loss mask."""


@dataclass(frozen=True)
class DecodedDocument:
    """The text of a document, from its first token."""

    document: int
    tokens: int
    sequences: int
    """Sequences in the index; the trainer treats each as a document."""
    shown: int
    """Number of tokens in ``pieces``."""
    pieces: list[TokenText]
    ends_with_eod: bool | None
    """Whether its last token is the one that ends documents; None if that is unknown or there are no tokens."""
    problem: str = ""
    """Why there is no text; empty if there is."""

    @property
    def text(self) -> str:
        """Return the text of all pieces."""
        return "".join(piece.text for piece in self.pieces)


def decode_document(
    dataset: IndexedDataset, tokenizer: TokenizerHandle, index: int, max_tokens: int, eod_id: int | None
) -> DecodedDocument:
    """Decode the first ``max_tokens`` tokens of document ``index``.

    Raises:
        UserError: there is no such document.
    """
    start, stop = document_edges(dataset, index)
    ids = dataset.tokens(start, min(stop, start + max_tokens))
    first, last = dataset.document_edges(index, index + 1).tolist()
    problem, found = "", []
    if len(unknown := ids[(ids < 0) | (ids >= tokenizer.vocab_size)]):
        problem = (
            f"document {index} holds token {unknown[0]}, but {tokenizer.name} has {tokenizer.vocab_size:,}: name the "
            "dataset's own tokenizer with --tokenizer"
        )
    else:
        mask = dataset.loss_mask(start, start + len(ids))
        found = _marked(tokenizer, ids.tolist(), None if mask is None else mask.tolist(), stop - start > len(ids))
    knows_end = eod_id is not None and stop > start
    return DecodedDocument(
        document=index,
        tokens=stop - start,
        sequences=last - first,
        shown=len(ids),
        pieces=found,
        ends_with_eod=bool(dataset.tokens(stop - 1, stop)[0] == eod_id) if knows_end else None,
        problem=problem,
    )


def _marked(tokenizer: TokenizerHandle, ids: list[int], mask: list[bool] | None, is_cut: bool) -> list[TokenText]:
    """Return the pieces of a document, marked with the loss mask."""
    found = pieces(tokenizer, ids)
    if "".join(piece.text for piece in found) != tokenizer.decode(ids):
        # The text is not the concatenation of the tokens' texts: decode whole runs instead.
        edges = [0, *(i for i in range(1, len(ids)) if mask is not None and mask[i] != mask[i - 1]), len(ids)]
        found = [TokenText(tuple(ids[i:j]), tokenizer.decode(ids[i:j])) for i, j in pairwise(edges)]
    if is_cut and found:  # a character that continues after the cut is not broken
        found[-1] = replace(found[-1], text=found[-1].text.rstrip(REPLACEMENT))
    if mask is not None:
        ends = accumulate(len(piece.tokens) for piece in found)
        found = [
            replace(piece, trained=any(mask[end - len(piece.tokens) : end]))
            for piece, end in zip(found, ends, strict=True)
        ]
    return found


def pieces(tokenizer: TokenizerHandle, tokens: Sequence[int]) -> list[TokenText]:
    """Return the text that each of ``tokens`` adds to the text of the earlier ones.

    Tokens that are parts of one character form one piece. A token is decoded together with the previous piece, so each
    token costs the same.
    """
    found: list[TokenText] = []
    before: Sequence[int] = ()
    first = 0
    for stop in range(1, len(tokens) + 1):
        known = tokenizer.decode(before)
        text = tokenizer.decode([*before, *tokens[first:stop]])
        if text.endswith(REPLACEMENT) and stop < len(tokens):
            continue
        found.append(TokenText(tuple(tokens[first:stop]), text[len(known) :]))
        before, first = tokens[first:stop], stop
    return found


def choose_documents(count: int, num_documents: int, seed: int) -> list[int]:
    """Return at most ``count`` random document numbers, ascending."""
    return sorted(random.Random(seed).sample(range(num_documents), min(count, num_documents)))


def measure_text(
    dataset: IndexedDataset, tokenizer: TokenizerHandle, unknown_id: int | None, eod_id: int | None, seed: int
) -> TextFacts:
    """Decode random documents, at most 1,000 documents and two million tokens."""
    count = min(_SAMPLE_DOCUMENTS, dataset.num_documents)
    soundness = Soundness(tokenizer)
    documents = tokens = text_bytes = with_unknown = foreign = 0
    is_all = True
    replaced, broken = [0, 0], [0, 0]  # documents, tokens
    for index in random.Random(seed).sample(range(dataset.num_documents), count):
        start, stop = document_edges(dataset, index)
        ids = dataset.tokens(start, min(stop, start + _SAMPLE_TOKENS_OF_EACH)).tolist()
        if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
            foreign += 1
            continue
        text = tokenizer.decode(ids[:-1] if ids and ids[-1] == eod_id else ids)
        documents, tokens, is_all = documents + 1, tokens + len(ids), is_all and start + len(ids) == stop
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
        all_documents=documents == dataset.num_documents and is_all,
        tokens=tokens,
        text_bytes=text_bytes,
        replaced_documents=replaced[0],
        replaced_tokens=replaced[1],
        broken_documents=broken[0],
        broken_tokens=broken[1],
        foreign_documents=foreign,
        unknown_documents=with_unknown,
    )


class Soundness:
    """Distinguishes U+FFFD in the text from bytes that are not UTF-8."""

    def __init__(self, tokenizer: TokenizerHandle) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, bool] = {}

    def count(self, ids: Sequence[int], is_whole: bool) -> tuple[int, int]:
        """Return (tokens of U+FFFD in the text, tokens of broken bytes) of a document.

        Args:
            ids: its first tokens.
            is_whole: whether these are all its tokens; if not, a run at the end is cut and not judged.
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
        """Return for each token of a correct run whether its piece contains U+FFFD; others in the run may not."""
        found: list[bool] = []
        first = 0
        for stop in range(1, len(run) + 1):
            text = self._tokenizer.decode(run[first:stop])
            # A piece is complete if its text encodes to these ids; a part of a character encodes to others.
            if stop == len(run) or REPLACEMENT not in text or self._encodes_to(text, run[first:stop]):
                found += [REPLACEMENT in text] * (stop - first)
                first = stop
        return found

    def _encodes_to(self, text: str, ids: list[int]) -> bool:
        encoded, _ = self._tokenizer.reference_encode([text])
        if encoded.tolist() == ids:
            return True
        # Sentencepiece may add a space before a text.
        return encoded[1:].tolist() == ids and not self._tokenizer.decode(encoded[:1]).strip()
