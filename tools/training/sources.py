"""Tokenize the texts of ``retemper train``, or estimate how many tokens they have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.config.settings import SourceConfig
from ...engine.data.text_sources import TRAIN, VALID, TextSource, is_text
from ...engine.data.tokenizing import CachedDataset, TokenizingJob, side_of
from ...engine.errors import UserError
from ...engine.files.paths import is_url
from ..preprocess import parse_arguments
from ..preprocessing.cache import find_in_cache
from ..preprocessing.dataset.publishing import EMPTY_SIDE
from ..preprocessing.inputs.files import describe_inputs
from ..preprocessing.options import PreprocessOptions

BYTES_PER_TOKEN = 4.0
"""Of text that is not tokenized yet: typical of English with vocabularies of 100,000 tokens and more."""
_FEW_BYTES = 8 << 20
"""Texts of up to this size are counted before the split, because a small part of a few documents may be empty."""
_HELD_OUT_DOCUMENTS = 8
"""Documents that a validation part should have at least, on average."""
_LEAST_DOCUMENTS = 20
"""Texts with fewer documents have no validation part."""


@dataclass(frozen=True)
class SizedSource:
    """A source of the run, and its size."""

    entry: dict[str, Any]
    """Of ``data.train``, with ``path`` and ``name``."""
    tokens: int
    """For training."""
    documents: int | None = None
    """For training; None if they are not counted."""
    validation_documents: int = 0
    estimated: bool = False
    """True if the text is not tokenized yet, and ``tokens`` is a guess from its size."""

    @property
    def shown_size(self) -> str:
        """The size in words."""
        if self.estimated:
            return f"about {self.tokens:,} tokens (estimated: {BYTES_PER_TOKEN:g} bytes a token)"
        documents = "" if self.documents is None else f"{self.documents:,} documents, "
        return f"{documents}{self.tokens:,} tokens"


class Sizing:
    """Finds the sizes of sources.

    Args:
        tokenizer: options of tools/preprocess.py that name the tokenizer.
        cache: folder of the datasets.
        validation: fraction of the documents to hold out.
        dry: estimate texts that are not in the cache, instead of tokenizing them.
    """

    def __init__(self, tokenizer: Sequence[str], cache: Path, validation: float, dry: bool) -> None:
        self._tokenizer, self._cache, self._validation, self._dry = tokenizer, cache, validation, dry

    def sized(self, option: str, entry: dict[str, Any]) -> SizedSource:
        """Return the source of ``entry`` with its size, and with the fraction that is held out.

        Raises:
            UserError: it does not exist, or cannot be tokenized.
        """
        if not is_text(entry["path"]):
            return _sized_dataset(option, entry)
        entry = {"validation_fraction": self._validation, **entry}
        if entry["validation_fraction"] == self._validation > 0 and self._is_small(option, entry):
            if (whole := self._datasets(option, {**entry, "validation_fraction": 0.0})) is None:
                return self._estimated(option, entry)
            entry["validation_fraction"] = _fitting_fraction(self._validation, whole[""].documents)
        try:
            made = self._datasets(option, entry)
        except UserError as error:
            if EMPTY_SIDE not in str(error) or entry["validation_fraction"] != self._validation:
                raise
            entry["validation_fraction"] = 0.0  # few but large documents
            made = self._datasets(option, entry)
        if made is None:
            return self._estimated(option, entry)
        train = made.get(TRAIN) or made[""]
        return SizedSource(entry, train.tokens, train.documents, made[VALID].documents if VALID in made else 0)

    def _datasets(self, option: str, entry: dict[str, Any]) -> dict[str, CachedDataset] | None:
        """Return the datasets of a text by side; None if they are not in the cache and this is a dry run."""
        if not self._dry:
            return TokenizingJob(_text(option, entry), self._tokenizer, self._cache).run()
        found = find_in_cache(self._options(option, entry))
        datasets = {
            prefix: CachedDataset(prefix, sidecar.documents, sidecar.tokens) for prefix, sidecar in found.items()
        }
        return {side_of(prefix): dataset for prefix, dataset in datasets.items()} or None

    def _estimated(self, option: str, entry: dict[str, Any]) -> SizedSource:
        return SizedSource(entry, max(1, round(self._input_bytes(option, entry) / BYTES_PER_TOKEN)), estimated=True)

    def _is_small(self, option: str, entry: dict[str, Any]) -> bool:
        return not is_url(entry["path"]) and self._input_bytes(option, entry) <= _FEW_BYTES

    def _input_bytes(self, option: str, entry: dict[str, Any]) -> int:
        options = self._options(option, entry)
        return sum(facts.size for facts in describe_inputs(options.input, options.inputs, option))

    def _options(self, option: str, entry: dict[str, Any]) -> PreprocessOptions:
        words = [*_text(option, entry).arguments(), *self._tokenizer, "--cache-folder", str(self._cache)]
        return parse_arguments(words)


def with_shares(data: Sequence[SizedSource], replay: Sequence[tuple[SizedSource, float]]) -> list[dict[str, Any]]:
    """Return the entries of ``data.train``: ``data`` in proportion to its tokens, and ``replay`` with its shares."""
    left = 1.0 - sum(share for _, share in replay)
    total = sum(source.tokens for source in data)
    entries = [{**source.entry, "weight": float(f"{left * source.tokens / total:.6g}")} for source in data]
    return entries + [{**source.entry, "weight": share} for source, share in replay]


def _text(option: str, entry: dict[str, Any]) -> TextSource:
    source = SourceConfig(**entry)
    return TextSource(f"{option} {source.path}", source.path, source.for_text)


def _sized_dataset(option: str, entry: dict[str, Any]) -> SizedSource:
    from ...engine.data.index_format import dataset_prefix
    from ...engine.data.indexed_dataset import IndexedDataset

    source = SourceConfig(**entry)
    if source.for_text:
        raise UserError(
            f"{option} {source.path}: is not text that exists, and {next(iter(source.for_text))} is for text"
        )
    if not os.path.exists(f"{dataset_prefix(source.path)}.idx"):
        raise UserError(f"{option} {source.path}: no such file, folder or dataset")
    try:
        dataset = IndexedDataset(source.path)
    except UserError as error:
        raise UserError(f"{option} {error}") from None
    return SizedSource(entry, dataset.num_tokens, dataset.num_documents)


def _fitting_fraction(wanted: float, documents: int) -> float:
    """Return a fraction that holds out ``_HELD_OUT_DOCUMENTS`` on average; 0 if there are too few documents."""
    if documents < _LEAST_DOCUMENTS:
        return 0.0
    return max(wanted, min(0.25, round(_HELD_OUT_DOCUMENTS / documents, 4)))
