"""Collect everything known about a dataset, for the terminal, the page and the JSON."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....engine.data.indexed_dataset import IndexedDataset
from ....engine.data.sidecar import InputSource, Sidecar, require_same_dataset
from ....engine.errors import UserError
from ...preprocessing.dataset_files import existing_outputs
from ...tokenizer.handle import TokenizerHandle
from .decoding import DecodedDocument, TextFacts, choose_documents, decode_document, measure_text
from .findings import find_missing, find_warnings
from .lengths import LengthFacts, count_lengths, sample_lengths
from .streams import DatasetStream
from .token_counts import PassFacts, count_tokens, sample_tokens
from .tokenizers import TokenizerFacts, choose_tokenizer, describe_tokenizer, find_eod_id

if TYPE_CHECKING:
    from .training_plan import TrainingPlan

_DOCUMENTS = 3
"""Documents decoded by default."""


@dataclass(frozen=True)
class InspectOptions:
    """Options of the command."""

    dataset: str
    tokenizer: str | None = None
    """Name. None: the tokenizer in the sidecar."""
    quick: bool = False
    """Whether to read only samples of a large dataset."""
    documents: int | None = None
    """Number of random documents to decode. None: a few, if there is a tokenizer."""
    seed: int = 0
    max_tokens: int = 300
    """Maximum number of tokens decoded per document."""
    config: str | None = None
    """Configuration file of a run."""


@dataclass(frozen=True)
class FrequentToken:
    """One of the most frequent tokens."""

    id: int
    count: int
    """Occurrences among the tokens read."""
    share: float
    """Fraction of the tokens read."""
    text: str | None
    """None without a tokenizer, or if its vocabulary lacks the id."""


@dataclass(frozen=True)
class DatasetReport:
    """All facts about a dataset."""

    prefix: str
    documents: int
    sequences: int
    """Sequences in the index; the trainer treats each as a document."""
    tokens: int
    dtype: str
    bytes: int
    """Total size of the dataset's files."""
    has_loss_mask: bool
    sidecar: Sidecar | None
    bytes_per_token: float | None
    """UTF-8 bytes of text per token; None if unknown."""
    bytes_per_token_is_exact: bool
    """True if the sidecar counts all text; otherwise the value is estimated from decoded documents."""
    tokenizer: TokenizerFacts | None
    lengths: LengthFacts | None
    """None if there are no documents."""
    counts: PassFacts
    most_frequent: list[FrequentToken]
    text: TextFacts | None
    """None without a tokenizer or documents."""
    decoded: list[DecodedDocument]
    training: TrainingPlan | None
    """None without a configuration."""
    warnings: list[str]
    """Likely problems."""
    missing: list[str]
    """What cannot be shown, and how to get it."""

    @property
    def filled_documents(self) -> int:
        """Number of non-empty documents; all documents if only a sample was read."""
        return self.documents - (self.lengths.empty if self.lengths is not None and not self.lengths.sampled else 0)

    @property
    def sources(self) -> tuple[InputSource, ...]:
        """Input sources in the sidecar; empty without a sidecar."""
        return () if self.sidecar is None else self.sidecar.sources

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        record = dataclasses.asdict(self)
        for decoded, item in zip(self.decoded, record["decoded"], strict=True):
            item["text"] = decoded.text
        return record


def inspect_dataset(options: InspectOptions) -> DatasetReport:
    """Read the dataset and return all facts about it.

    Raises:
        UserError: a file is missing or damaged, or an option cannot be satisfied.
    """
    dataset = IndexedDataset(options.dataset, check_whole=True)
    sidecar = Sidecar.read(dataset.prefix)
    if sidecar is not None:
        require_same_dataset(sidecar, dataset)
    training = _plan_training(options.config, dataset.prefix)
    tokenizer, reason = _find_tokenizer(options, sidecar, dataset.prefix)
    eod_id = find_eod_id(tokenizer, sidecar)
    unknown_id = None if tokenizer is None else tokenizer.unknown_id
    if unknown_id == eod_id:
        unknown_id = None  # GPT-2 names one token for both, and a byte-level vocabulary has no unknown text
    stream = DatasetStream(dataset)
    lengths = sample_lengths(stream) if options.quick else count_lengths(stream)
    vocab_size = tokenizer.vocab_size if tokenizer is not None else sidecar.vocab_size if sidecar is not None else None
    counts = (sample_tokens if options.quick else count_tokens)(dataset, vocab_size, unknown_id, eod_id)
    text = None
    if tokenizer is not None and dataset.num_documents:
        text = measure_text(dataset, tokenizer, unknown_id, eod_id, options.seed)
    return DatasetReport(
        prefix=dataset.prefix,
        documents=dataset.num_documents,
        sequences=dataset.num_sequences,
        tokens=dataset.num_tokens,
        dtype=dataset.dtype.name,
        bytes=sum(os.path.getsize(path) for path in existing_outputs(dataset.prefix)),
        has_loss_mask=dataset.has_loss_mask,
        sidecar=sidecar,
        bytes_per_token=_bytes_per_token(sidecar, text),
        bytes_per_token_is_exact=sidecar is not None or (text is not None and text.all_documents),
        tokenizer=None if tokenizer is None else describe_tokenizer(tokenizer),
        lengths=lengths,
        counts=counts,
        most_frequent=_most_frequent(counts, tokenizer),
        text=text,
        decoded=[] if tokenizer is None else _decode(dataset, tokenizer, options, eod_id),
        training=training,
        warnings=list(find_warnings(dataset, sidecar, lengths, counts, text)),
        missing=[
            *([reason] if reason else []),
            *find_missing(sidecar, tokenizer is not None, counts, text, training is not None),
        ],
    )


def _plan_training(config: str | None, prefix: str) -> TrainingPlan | None:
    if config is None:
        return None
    from .training_plan import plan_training  # imports PyTorch, which takes seconds

    return plan_training(config, prefix)


def _find_tokenizer(
    options: InspectOptions, sidecar: Sidecar | None, prefix: str
) -> tuple[TokenizerHandle | None, str | None]:
    """Return the tokenizer; or None and the reason, if the user did not ask for one."""
    try:
        return choose_tokenizer(options.tokenizer, sidecar, prefix), None
    except UserError as error:
        if options.tokenizer is not None or options.documents:
            raise
        return None, None if sidecar is None else str(error)


def _decode(
    dataset: IndexedDataset, tokenizer: TokenizerHandle, options: InspectOptions, eod_id: int | None
) -> list[DecodedDocument]:
    count = _DOCUMENTS if options.documents is None else options.documents
    indices = choose_documents(count, dataset.num_documents, options.seed)
    return [decode_document(dataset, tokenizer, index, options.max_tokens, eod_id) for index in indices]


def _bytes_per_token(sidecar: Sidecar | None, text: TextFacts | None) -> float | None:
    if sidecar is not None:
        return sidecar.text_bytes / sidecar.tokens if sidecar.tokens else None
    return text.text_bytes / text.tokens if text is not None and text.tokens else None


def _most_frequent(counts: PassFacts, tokenizer: TokenizerHandle | None) -> list[FrequentToken]:
    return [
        FrequentToken(
            token,
            count,
            count / counts.tokens.tokens,
            tokenizer.decode([token]) if tokenizer is not None and token < tokenizer.vocab_size else None,
        )
        for token, count in counts.tokens.most_frequent
    ]
