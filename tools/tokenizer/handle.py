"""Load tokenizers for pretraining data; models and chat are not handled here.

A tokenizer is one file: a Hugging Face ``tokenizer.json``, a sentencepiece ``.model`` or a ``.tiktoken``. Its ids are
those of the library of that format; a faster library is used if it gives the same ids. Text is treated as data: special
tokens in a document's text are ordinary text unless allowed, and no BOS or EOS is added.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engine.errors import UserError
from ...engine.tokenizer.added_tokens import unlisted
from ...engine.tokenizer.backends import FlatIds, TokenizersReference, is_panic, one_line
from ...engine.tokenizer.files import tokenizer_kind
from ...engine.tokenizer.frame import TokenizerFrame, read_tokenizer_frame
from ...engine.tokenizer.reference import open_reference
from ...engine.tokenizer.tiktoken_reference import TiktokenReference
from .document_frame import DocumentFrame
from .fast import FastEncoder, NotFast, is_missing_for
from .finding import find_tokenizer_file
from .serving_check import is_known_alike, serving_note

BACKENDS = ("auto", "reference")
"""``auto``: the fast path if an exact one exists; ``reference``: always the library of the format."""


@dataclass(frozen=True)
class TokenizerSpec:
    """The arguments with which a worker process builds the same tokenizer. Small and picklable."""

    name: str
    file: Path
    allow_special_tokens: bool = False
    backend: str = "auto"
    eod_token: str | None = None
    """Argument of an earlier call of :meth:`TokenizerHandle.eod`; this token is ordinary text in text, even if not
    flagged special."""

    def load(self) -> TokenizerHandle:
        """Build the tokenizer.

        Raises:
            UserError: as :func:`load_tokenizer` and :meth:`TokenizerHandle.eod`.
        """
        handle = TokenizerHandle(
            self.name, self.file, allow_special_tokens=self.allow_special_tokens, backend=self.backend
        )
        if self.eod_token is not None:
            handle.eod(self.eod_token)
        return handle


class TokenizerHandle:
    """A tokenizer for documents. All ``encode`` methods may be called from several threads at once.

    Texts must be valid Unicode: a lone surrogate raises :class:`UserError`. The fast path takes a second to load, so it
    is loaded at the first use, in the process that encodes.

    Args:
        name: folder, file or Hub name, as the user gave it.
        file: the tokenizer's file; its suffix determines the format.
        allow_special_tokens: special tokens written in a text become control tokens.
        backend: see :data:`BACKENDS`.

    Raises:
        UserError: the file cannot be read or is not such a tokenizer, its library is not installed, or an id is too
            large for a dataset; or special tokens are allowed for sentencepiece, which has none in text.
    """

    def __init__(self, name: str, file: Path, *, allow_special_tokens: bool = False, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise UserError(f"tokenizer backend {backend!r}: must be one of {', '.join(BACKENDS)}")
        self.name = name
        self.file = file
        self.kind = tokenizer_kind(file)
        self._allow_special_tokens = allow_special_tokens
        self._backend = backend
        self._reference, self.sha256 = open_reference(name, file, allow_special_tokens)
        self.vocab_size = self._reference.vocab_size
        """Upper bound of the ids (exclusive), including those of added tokens and those after gaps in the numbering."""
        self.fast_path_failures = 0
        """Number of batches on which the fast path failed. The reference encoded them instead: slower, with the same
        ids."""
        self._eod_token: str | None = None
        self._lock = threading.Lock()
        self._fast: FastEncoder | None = None
        self._fast_is_settled = False
        self._fallback_reason: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return self.file.parent

    @property
    def spec(self) -> TokenizerSpec:
        """Return the arguments to build this tokenizer in another process, after :meth:`eod` and
        :meth:`use_reference`.
        """
        return TokenizerSpec(self.name, self.file, self._allow_special_tokens, self._backend, self._eod_token)

    @property
    def fingerprint(self) -> str:
        """Return a fingerprint that does not depend on the file's bytes (engine/tokenizer/fingerprint.py).

        Takes a tenth of a second for a vocabulary of 150,000.
        """
        return self._reference.fingerprint()

    @property
    def unknown_id(self) -> int | None:
        """The id that stands for what the vocabulary cannot express; None where there is none, as with byte-level
        ones.
        """
        return self._reference.unknown_id()

    @property
    def notes(self) -> list[str]:
        """Return remarks about the files, one line each."""
        if not isinstance(self._reference, TokenizersReference):
            return []
        missing = unlisted(self.file, self._reference.matched)
        if not missing:
            return []
        return [
            f"note: {self.file} matches the added token {missing[0]!r} in text ({len(missing)} such), but "
            "added_tokens_decoder of tokenizer_config.json next to it does not list it: transformers' classes for "
            "Qwen and Llama would give other ids when the model is served; add it there"
        ]

    @property
    def is_served_alike(self) -> bool:
        """Whether the files show that transformers gives the same ids when the model is served."""
        # transformers does not read .tiktoken files.
        return self.kind == "tiktoken" or is_known_alike(self.file, self._library_tokenizer)

    def serving_note(self) -> str | None:
        """Return how the ids of transformers differ from ours when the model is served; None if they do not.

        Takes seconds unless :attr:`is_served_alike`; see :mod:`~.serving_check`.
        """
        if self.is_served_alike:
            return None
        return serving_note(self.file, lambda text: self.reference_encode([text])[0].tolist())

    @property
    def _library_tokenizer(self) -> Any | None:
        return self._reference.library_tokenizer if isinstance(self._reference, TokenizersReference) else None

    @property
    def encoder(self) -> str:
        """Return library and version of the current encoder, such as ``fastokens 0.3.5``. Loads the fast path."""
        return (self._fast_path() or self._reference).library

    @property
    def fallback_reason(self) -> str | None:
        """Return why the reference encodes instead of the fast path; None if the fast path is used. Loads the fast
        path.
        """
        self._fast_path()
        return self._fallback_reason

    @property
    def lacks_fast_package(self) -> bool:
        """Return whether the fast path is not used only because its package is not installed."""
        reference = self._reference
        return self._backend == "auto" and isinstance(reference, TokenizersReference) and is_missing_for(reference)

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """Return the ids of all ``texts``, concatenated, int32[T], possibly read-only, and their numbers, int64[texts].

        Raises:
            UserError: a text holds a lone surrogate, or tiktoken fails on it.
        """
        fast = self._fast_path()
        if fast is not None:
            try:
                return fast.encode(texts)
            except Exception:  # errors of a young library; if the text is invalid, the reference reports it below
                self.fast_path_failures += 1
        return self.reference_encode(texts)

    def encode_documents(self, texts: Sequence[str], frame: DocumentFrame) -> FlatIds:
        """Return the ids of ``texts`` with ``frame`` around each, concatenated, int32[T], writable, and their numbers,
        int64[texts].

        A text without tokens gets no frame: length 0.

        Raises:
            UserError: as :meth:`encode_flat`.
        """
        return frame.around(*self.encode_flat(texts))

    def reference_encode(self, texts: Sequence[str]) -> FlatIds:
        """Encode like :meth:`encode_flat`, always with the library of the file's format."""
        try:
            return self._reference.encode(texts)
        except UserError:
            raise
        except Exception:  # TypeError, RuntimeError or UnicodeEncodeError, depending on the library
            self._refuse_surrogates(texts)
            raise
        except BaseException as error:
            if not is_panic(error):
                raise
            raise UserError(
                f"{self.name}: {self._reference.library} cannot encode a text: {one_line(error)}; leave it out, or use "
                "another tokenizer"
            ) from error

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Return the ids of each text, int32.

        Raises:
            UserError: as :meth:`encode_flat`.
        """
        if not texts:
            return []
        flat, lengths = self.encode_flat(texts)
        return np.split(flat, np.cumsum(lengths)[:-1])

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer], *, special_tokens: bool = True) -> str:
        """Return the text of ``ids``, with or without special tokens, and without ids that the vocabulary lacks."""
        return self._reference.decode([int(token) for token in ids], special_tokens)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, or None if it does not exist."""
        return self._reference.id_of(token)

    def eod(self, eod_token: str | None = None) -> tuple[str, int]:
        """Return the token that ends a document, and its id. Afterwards this token is ordinary text in text.

        The last does not apply if special tokens are allowed in text. The token is ``eod_token`` if it is given. Else
        it depends on the format. tokenizer.json: ``<|endoftext|>`` if the vocabulary has it, or the EOS in
        tokenizer_config.json or special_tokens_map.json next to it. sentencepiece: the EOS piece. tiktoken:
        ``<|endoftext|>``.

        Raises:
            UserError: the tokenizer has no such token, has no default, or may produce it from text (sentencepiece,
                Unigram).
        """
        with self._lock:
            changes = self._reference.changes
            token, token_id = self._reference.document_end(eod_token)
            self._eod_token = token
            if self._fast is not None and self._reference.changes != changes:
                self._fast, self._fast_is_settled = None, False  # it was built before the change
        return token, token_id

    def check_fast_path(self, texts: Sequence[str]) -> str | None:
        """Encode ``texts`` with the fast path and the reference; return the first difference in words, or None.

        Also returns None if no fast path is active. After a difference, :meth:`use_reference` is called.

        Raises:
            UserError: as :meth:`encode_flat`.
        """
        fast = self._fast_path()
        if fast is None:
            return None
        right, right_lengths = self.reference_encode(texts)
        try:
            ids, lengths = fast.encode(texts)
        except Exception as error:
            return f"{fast.library} fails on a text that {self._reference.library} encodes: {error}"
        if np.array_equal(lengths, right_lengths) and np.array_equal(ids, right):
            return None
        ends, right_ends = np.cumsum(lengths)[:-1], np.cumsum(right_lengths)[:-1]
        pairs = zip(texts, np.split(ids, ends), np.split(right, right_ends), strict=True)
        text, ours, theirs = next(pair for pair in pairs if not np.array_equal(pair[1], pair[2]))
        shared = min(len(ours), len(theirs))
        at = int(np.append(ours[:shared] != theirs[:shared], True).argmax())
        return (
            f"{fast.library} differs from {self._reference.library} at token {at} of the text {text[:60]!r}: "
            f"{ours[at : at + 5].tolist()}, not {theirs[at : at + 5].tolist()}"
        )

    def use_reference(self, reason: str) -> None:
        """Use the reference library from now on, in this process and in processes that get :attr:`spec`."""
        with self._lock:
            self._backend = "reference"
            self._fast, self._fast_is_settled, self._fallback_reason = None, True, reason

    def frame(self, model_config: Mapping[str, Any] | None = None) -> TokenizerFrame:
        """Return the tokens that the tokenizer adds to a text, according to its files.

        Args:
            model_config: content of the model's config.json if it is elsewhere; None or empty: that of the folder.

        Raises:
            UserError: one of the files cannot be read.
        """
        special_tokens = self._reference.special_tokens if isinstance(self._reference, TiktokenReference) else None
        return read_tokenizer_frame(self.file, special_tokens, model_config)

    def _fast_path(self) -> FastEncoder | None:
        """Return the fast encoder, loaded at the first call; None if the reference is used."""
        if not self._fast_is_settled:
            with self._lock:
                if not self._fast_is_settled:
                    self._load_fast_path()
        return self._fast

    def _load_fast_path(self) -> None:
        if self._backend == "auto" and isinstance(self._reference, TokenizersReference):
            try:
                self._fast = FastEncoder(self._reference, self._allow_special_tokens)
            except NotFast as refusal:
                self._fallback_reason = str(refusal)
        self._fast_is_settled = True

    def _refuse_surrogates(self, texts: Sequence[str]) -> None:
        for index, text in enumerate(texts):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{self.name}: text {index} of the batch holds a lone surrogate (U+{ord(text[error.start]):04X} at "
                    f"character {error.start:,}), which is not valid Unicode and has no tokens"
                ) from None


def load_tokenizer(
    name: str | os.PathLike[str], *, allow_special_tokens: bool = False, backend: str = "auto"
) -> TokenizerHandle:
    """Load a tokenizer by the name of a folder, of a file, or of a Hugging Face Hub repository.

    In a folder it is ``tokenizer.json``, else ``tokenizer.model`` (sentencepiece), else the only ``*.tiktoken``. A Hub
    name is looked up in the local cache first: a cached tokenizer needs no network and does not change.

    Args:
        name: the folder, file or Hub name.
        allow_special_tokens, backend: see :class:`TokenizerHandle`.

    Raises:
        UserError: nothing is found there, it is not a tokenizer, or it is not in the cache and the Hub cannot be
            reached.
    """
    text = os.fspath(name)
    return TokenizerHandle(text, find_tokenizer_file(text), allow_special_tokens=allow_special_tokens, backend=backend)


def load_prompt_tokenizer(name: str | os.PathLike[str]) -> TokenizerHandle:
    """Load a tokenizer for prompts, like :func:`load_tokenizer`, but with special tokens in text as control tokens.

    A sentencepiece model has no such tokens in text; its prompts are plain text.

    Raises:
        UserError: as :func:`load_tokenizer`.
    """
    text = os.fspath(name)
    file = find_tokenizer_file(text)
    return TokenizerHandle(
        text, file, allow_special_tokens=tokenizer_kind(file) != "sentencepiece", backend="reference"
    )
