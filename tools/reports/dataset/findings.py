"""Derive warnings from the facts about a dataset, and list what cannot be shown."""

from __future__ import annotations

from collections.abc import Iterator

from ....engine.data.indexed_dataset import IndexedDataset
from ....engine.data.sidecar import Sidecar
from .decoding import TextFacts
from .lengths import LengthFacts
from .token_counts import PassFacts

_OTHER_TOKENIZER = "they were made with another one, or the file is damaged"


def find_warnings(
    dataset: IndexedDataset,
    sidecar: Sidecar | None,
    lengths: LengthFacts | None,
    counts: PassFacts,
    text: TextFacts | None,
) -> Iterator[str]:
    """Yield a line for each likely problem of ``dataset``."""
    yield from dataset.remarks
    tokens, about = counts.tokens, "about " if counts.tokens.sampled else ""
    if outside := (tokens.outside_any if tokens.outside_vocab is None else tokens.outside_vocab):
        vocabulary = "any" if tokens.vocab_size is None else f"the tokenizer's {tokens.vocab_size:,} ids"
        yield f"{about}{outside / tokens.tokens:.2%} of the tokens lie outside {vocabulary}: {_OTHER_TOKENIZER}"
    if tokens.unknown:
        yield (
            f"{about}{tokens.unknown / tokens.tokens:.2%} of the tokens are the unknown token: the vocabulary lacks "
            "characters of this text"
        )
    if text is not None and text.broken_documents:
        yield (
            f"{text.broken_documents:,} of the {text.documents:,} documents decoded hold bytes that are not UTF-8: "
            "they were cut within a character or made with another tokenizer"
        )
    if text is not None and text.replaced_documents:
        yield (
            f"{text.replaced_documents:,} of the {text.documents:,} documents decoded hold U+FFFD, the replacement "
            "character: their text was damaged before it was tokenized"
        )
    if sidecar is not None and sidecar.append_eod and counts.ends is not None:
        empty = lengths.empty if lengths is not None else 0
        if (without := dataset.num_documents - empty - counts.ends.ended) > 0:
            yield f"{without:,} documents do not end with {sidecar.eod_token}, though the sidecar says that all do"
    if counts.ends is not None and counts.ends.inside:
        yield (
            f"the token that ends documents (id {counts.ends.eod_id}) occurs {counts.ends.inside:,} times inside "
            "documents"
        )
    if counts.mask is not None and counts.mask.silent_documents:
        yield f"{counts.mask.silent_documents:,} documents have no target: the loss mask excludes all their tokens"
    if lengths is not None and lengths.empty:
        yield f"{about if lengths.sampled else ''}{lengths.empty / lengths.documents:.2%} of the documents are empty"


def find_missing(
    sidecar: Sidecar | None, has_tokenizer: bool, counts: PassFacts, text: TextFacts | None, has_config: bool
) -> Iterator[str]:
    """Yield a line for each thing that cannot be shown, with how to get it."""
    if sidecar is None:
        yield ("totals per source and documents left out: the dataset has no sidecar; tools/preprocess.py writes one")
    if not has_tokenizer:
        yield (
            "decoded documents, texts of tokens, bytes per token, unknown and replacement characters: name the "
            "dataset's tokenizer with --tokenizer"
            if sidecar is None
            else "decoded documents, texts of tokens, unknown and replacement characters: name the tokenizer with "
            "--tokenizer"
        )
    if text is not None and text.foreign_documents:
        yield f"{text.foreign_documents:,} sampled documents: they contain ids outside the tokenizer's vocabulary"
    if counts.duplicates is None:
        yield "duplicates and document ends: these need every token; leave out --quick"
    if not has_config:
        yield "steps and epochs of a run: name its configuration with --config"
