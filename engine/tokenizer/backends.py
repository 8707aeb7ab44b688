"""Wrap the reference libraries ``tokenizers`` and ``sentencepiece`` in one interface (tiktoken has its own module).

Faster paths must give the same ids as these. Text is treated as data: special tokens in it are ordinary text unless
allowed, and no BOS or EOS is added. Truncation, padding and BPE dropout saved in a file are switched off. Each library
is imported only when one of its tokenizers is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import UserError, install_command
from .files import CONFIG_FILES, read_config, token_text
from .fingerprint import fingerprint_of, fingerprint_of_json, vocab_text
from .json_file import parse_tokenizer
from .probes import PROBES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FlatIds = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
"""Ids of all texts, concatenated, int32[T], and the number of ids of each, int64[texts]."""

DOCUMENT_END = "<|endoftext|>"
"""The document end of GPT-2, Qwen and many others. Qwen's chat models have another EOS token: ``<|im_end|>``."""


MAX_ID = 2**31 - 1
"""Largest id: ids are int32 here and in datasets."""


class Reference(Protocol):
    """A reference library with a loaded tokenizer. Its methods may be called from several threads at once."""

    library: str
    """Name and version, such as ``tokenizers 0.23.3``."""
    vocab_size: int
    """Upper bound of the ids (exclusive), including those after gaps in the numbering."""
    changes: int
    """Number of times that :meth:`document_end` has changed the encoding of text."""

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Return the ids of each text. A text that is not valid Unicode raises the library's own exception."""

    def decode(self, ids: Sequence[int], special_tokens: bool = True) -> str:
        """Return the text of ``ids``, with or without special tokens, and without unknown ids."""

    def fingerprint(self) -> str:
        """Return the fingerprint; see :mod:`tokenizer_fingerprint`."""

    def document_end(self, token: str | None) -> tuple[str, int]:
        """Return the token that ends a document (``token``, or by default the tokenizer's own), and its id."""

    def unknown_id(self) -> int | None:
        """Id of text that the vocabulary cannot express; None if it can express every text."""

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, or None if it does not exist."""


class TokenizersReference:
    """A ``tokenizer.json``, encoded by the ``tokenizers`` library exactly as the file defines.

    Added tokens that are not flagged special, such as Qwen3's ``<think>``, are matched in text. They are words of the
    vocabulary, and ``AutoTokenizer`` with ``split_special_tokens=True`` matches them too. A Unigram model also matches
    special tokens, because they are among its pieces. Such a token cannot be the end of documents.

    Raises:
        UserError: the library cannot read the file.
    """

    def __init__(self, name: str, file: Path, content: bytes, allow_special_tokens: bool) -> None:
        self._name = name
        self._folder = file.parent
        self.changes = 0
        self._tokenizer = parse_tokenizer(content, file)
        self.library = f"tokenizers {version('tokenizers')}"
        self._json: str | None = None
        self.vocab_size = max(self._largest_id_of_model(), *self._tokenizer.get_added_tokens_decoder(), -1) + 1
        self._matched = [
            (token_id, token.content, token.lstrip, token.rstrip, token.single_word, token.normalized)
            for token_id, token in sorted(self._tokenizer.get_added_tokens_decoder().items())
            if not token.special
        ]
        self._allow_special_tokens = allow_special_tokens
        self._tokenizer.encode_special_tokens = not allow_special_tokens
        # Only recent versions of the library have the variant that does not track character offsets.
        self._encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """See :class:`Reference`."""
        return flatten([encoding.ids for encoding in self._encode(list(texts), add_special_tokens=False)])

    def decode(self, ids: Sequence[int], special_tokens: bool = True) -> str:
        """See :class:`Reference`."""
        return self._tokenizer.decode(ids, skip_special_tokens=not special_tokens)

    def document_end(self, token: str | None) -> tuple[str, int]:
        """Return ``token``, else ``<|endoftext|>`` if the vocabulary has it, else the EOS in the configuration files.

        These are tokenizer_config.json and special_tokens_map.json next to the tokenizer. Unless special tokens are
        allowed in text, the token is ordinary text in text afterwards.

        Raises:
            UserError: the tokenizer has no such token, has no default, or produces it from ordinary text (Unigram
                models).
        """
        token = token if token is not None else self._default_document_end()
        if token is None:
            raise UserError(
                f"{self._name}: no {DOCUMENT_END} in the vocabulary and no eos_token in {' or '.join(CONFIG_FILES)} of "
                f"{self._folder}; name the token that ends a document with --eod-token"
            )
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(
                f"{self._name}: {token!r} is not in the vocabulary; give an existing token with --eod-token"
            )
        added = self._tokenizer.get_added_tokens_decoder().get(token_id)
        if not self._allow_special_tokens and not (added and added.special):
            # A token that is not flagged special would be recognized in a document's text and end it early.
            self._tokenizer.add_special_tokens([token])
            self._json = None
            self.changes += 1
        if not self._allow_special_tokens and token_id in self.encode([token])[0]:
            raise UserError(
                f"{self._name}: {token!r} written in a text becomes id {token_id} in this {self._model_type} model, so "
                "a text could end its document; use the sentencepiece .model of the same tokenizer, or give another "
                "token with --eod-token, or pass --allow-special-tokens"
            )
        return token, token_id

    def fingerprint(self) -> str:
        """Return the fingerprint, see :class:`Reference`. :meth:`document_end` does not change it."""
        state = self._model_json().encode("utf-8", "surrogatepass")
        return fingerprint_of_json(self._tokenizer, state, self._matched, self.encode(PROBES)[0].tolist())

    def unknown_id(self) -> int | None:
        """See :class:`Reference`."""
        model = self._tokenizer.model
        if self._model_type == "Unigram":  # which tells it in its JSON only
            found: int | None = json.loads(model.__getstate__())["unk_id"]
            return found
        return None if model.unk_token is None else self.id_of(model.unk_token)

    def id_of(self, token: str) -> int | None:
        """See :class:`Reference`."""
        return self._tokenizer.token_to_id(token)

    @property
    def library_tokenizer(self) -> Tokenizer:
        """The library's object, for reading its rules."""
        return self._tokenizer

    @property
    def matched(self) -> list[str]:
        """The added tokens of the file that are matched in text."""
        return [content for _, content, *_ in self._matched]

    def to_json(self) -> str:
        """Return the tokenizer in its current state, as a ``tokenizer.json``."""
        if self._json is None:  # writing a vocabulary of 150,000 takes 0.15 s
            self._json = self._tokenizer.to_str()
        return self._json

    def outline(self, tokens: Iterable[str]) -> dict[str, Any]:
        """Return :meth:`to_json` parsed, without merges, and with those of ``tokens`` in the vocabulary that it has.

        Parsing all of it takes 0.2 s for a vocabulary of 150,000.
        """
        text = self.to_json()
        # Quotes within strings are escaped, so this can only be the key. The model is the last value.
        outline: dict[str, Any] = json.loads(text[: text.index('"vocab":')] + '"vocab":{}}}')
        model = self._tokenizer.model
        ids = {token: model.token_to_id(token) for token in tokens}
        outline["model"]["vocab"] = {token: place for token, place in ids.items() if place is not None}
        return outline

    def _model_json(self) -> str:
        text = self.to_json()
        return text[text.index('"model":') + len('"model":') : -1]

    def _largest_id_of_model(self) -> int:
        # The library writes the vocabulary of a BPE by id. A dictionary of 150,000 would take it 0.15 s.
        last = re.search(r':(\d+)},"merges":', self.to_json()) if self._model_type == "BPE" else None
        if last is not None:
            return int(last[1])
        return max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)

    @property
    def _model_type(self) -> str:
        return type(self._tokenizer.model).__name__

    def _default_document_end(self) -> str | None:
        if self._tokenizer.token_to_id(DOCUMENT_END) is not None:
            return DOCUMENT_END
        for name in CONFIG_FILES:
            token = token_text(read_config(self._folder / name).get("eos_token"))
            if token is not None:
                return token
        return None


class SentencePieceReference:
    """A sentencepiece ``.model``. Control pieces (``<s>``, ``</s>``) are never produced from text.

    User-defined symbols always are, since they are words of the vocabulary. A dummy prefix that the model was trained
    with is kept. The library encodes only in the calling thread, and releases the GIL.

    Raises:
        UserError: the file is not a sentencepiece model, or the package is not installed.
    """

    def __init__(self, name: str, file: Path, content: bytes) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise UserError(f"{file}: a .model file needs sentencepiece: {install_command('sentencepiece')}") from error

        self._name = name
        self.changes = 0
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
            self.vocab_size = int(self._model.GetPieceSize())
        except Exception as error:  # RuntimeError, or others in other versions
            raise UserError(f"{file}: not a sentencepiece model: {_why_not(content, error)}") from error
        if self.vocab_size == 0:
            raise UserError(f"{file}: not a sentencepiece model: {_why_not(content, 'it holds no pieces')}")
        self.library = f"sentencepiece {version('sentencepiece')}"

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """See :class:`Reference`."""
        return flatten(self._model.Encode(list(texts), out_type=int, add_bos=False, add_eos=False, num_threads=1))

    def decode(self, ids: Sequence[int], special_tokens: bool = True) -> str:
        """Decode, see :class:`Reference`. Each run of ids between control pieces is decoded separately."""
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                continue
            if not self._model.IsControl(token):
                run.append(token)
                continue
            if special_tokens:
                parts += [self._model.Decode(run) if run else "", self._model.IdToPiece(token)]
                run = []
        return "".join([*parts, self._model.Decode(run) if run else ""])

    def fingerprint(self) -> str:
        """See :class:`Reference`."""
        model, ids = self._model, range(self.vocab_size)
        pieces = {str(model.IdToPiece(place)): place for place in ids}
        kinds = [(model.GetScore(i), model.IsControl(i), model.IsUnused(i), model.IsByte(i)) for i in ids]
        rules = json.dumps(kinds).encode()
        return fingerprint_of("sentencepiece", vocab_text(pieces), [], rules, self.encode(PROBES)[0].tolist())

    def document_end(self, token: str | None) -> tuple[str, int]:
        """Return ``token``, or the EOS piece.

        Raises:
            UserError: the model has no such piece, no EOS, or the piece is not a control piece and may be produced from
                text.
        """
        if token is None:
            token_id = int(self._model.eos_id())
            if token_id < 0:
                raise UserError(f"{self._name}: the model has no EOS piece; name a control piece with --eod-token")
            return str(self._model.IdToPiece(token_id)), token_id
        token_id = int(self._model.PieceToId(token))
        if self._model.IdToPiece(token_id) != token:  # missing pieces are looked up as the unknown piece
            raise UserError(
                f"{self._name}: {token!r} is not in the vocabulary; give an existing piece with --eod-token"
            )
        if not self._model.IsControl(token_id):
            raise UserError(
                f"{self._name}: {token!r} is not a control piece, so it may occur in a document's text; name a control "
                "piece, such as the EOS, with --eod-token"
            )
        return token, token_id

    def unknown_id(self) -> int | None:
        """See :class:`Reference`."""
        token_id = int(self._model.unk_id())
        return token_id if token_id >= 0 else None

    def id_of(self, token: str) -> int | None:
        """See :class:`Reference`."""
        token_id = int(self._model.PieceToId(token))
        return token_id if self._model.IdToPiece(token_id) == token else None


def flatten(ids: Sequence[Sequence[int]]) -> FlatIds:
    """Return concatenated lists of ids: int32[T], and their lengths, int64[lists]."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat: Iterable[int] = chain.from_iterable(ids)
    return np.fromiter(flat, np.int32, int(lengths.sum())), lengths


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a Rust library: not an ``Exception``, and of a class that cannot be
    imported.
    """
    return type(error).__name__ == "PanicException"


def one_line(error: object) -> str:
    """Return a library's message without its line breaks."""
    return " ".join(str(error).split())


def _why_not(content: bytes, error: object) -> str:
    """Return ``error``, or the actual kind of the file if it is recognised: Llama 3 ships its ranks as
    ``tokenizer.model``.
    """
    first = content[:200].split(b"\n", 1)[0].split(b" ")
    if len(first) == 2 and first[1].strip().isdigit():
        return (
            "it holds tiktoken ranks; use the tokenizer.json of the same model, or copy the file to a name that ends "
            "in .tiktoken, with its pattern and special tokens in a .json file of the same stem"
        )
    return one_line(error)
