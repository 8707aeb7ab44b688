"""What a dataset holds, in text: counts, lengths of documents, a histogram, decoded documents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ...engine.data.indexed_dataset import IndexedDataset
from ...engine.data.sidecar import Sidecar, hash_file
from ...engine.data.tokenizer import TokenizerHandle
from ...engine.errors import UserError

_BAR_WIDTH = 40


def document_lengths(dataset: IndexedDataset) -> npt.NDArray[np.int64]:
    """Tokens of each document, int64[documents], the end-of-document token included."""
    starts = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
    return np.diff(starts[dataset.document_indices])


def describe_dataset(dataset: IndexedDataset, sidecar: Sidecar | None) -> str:
    """Counts and length statistics, one a line."""
    lengths = document_lengths(dataset)
    rows = {
        "dataset": dataset.prefix,
        "documents": f"{dataset.num_documents:,}",
        "sequences": f"{dataset.num_sequences:,}",
        "tokens": f"{dataset.num_tokens:,}",
        "dtype": dataset.dtype.name,
        ".bin": f"{dataset.num_tokens * dataset.dtype.itemsize:,} bytes",
    }
    if len(lengths):
        rows["tokens in a document"] = (
            f"mean {lengths.mean():,.1f}, median {np.median(lengths):,.0f}, 95% up to "
            f"{np.percentile(lengths, 95):,.0f}, longest {lengths.max():,}"
        )
    if sidecar is None:
        rows["sidecar"] = "none (made by another program): tokenizer unknown"
    else:
        end = f"{sidecar.eod_token} ({sidecar.eod_id})" if sidecar.append_eod else "none appended"
        rows["tokenizer"] = f"{sidecar.tokenizer} (sha256 {sidecar.tokenizer_sha256[:12]}...)"
        rows["document end"] = end
        rows["bytes per token"] = f"{sidecar.text_bytes / max(sidecar.tokens, 1):.2f}"
        paths = [source.path for source in sidecar.sources]
        more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
        rows["sources"] = ", ".join(paths[:4]) + more
    return "\n".join(f"{name:<21} {value}" for name, value in rows.items())


def length_histogram(lengths: npt.NDArray[np.int64]) -> str:
    """Documents by length, one line for each power of two from the shortest to the longest."""
    if len(lengths) == 0:
        return "no documents"
    # Bit length of each: 0 -> 0, 1 -> 1, 2..3 -> 2, 4..7 -> 3 and so on; exact, unlike a logarithm.
    classes = np.searchsorted(2 ** np.arange(40), lengths, side="right")
    counts = np.bincount(classes)
    lines = []
    for power in range(int(classes.min()), len(counts)):
        first, last = (0, 0) if power == 0 else (2 ** (power - 1), 2**power - 1)
        bar = "#" * -(-int(counts[power]) * _BAR_WIDTH // int(counts.max()))
        lines.append(f"{first:>13,} .. {last:>13,} {counts[power]:>13,} {bar}".rstrip())
    return "\n".join(["tokens in a document, documents", *lines])


def document_tokens(dataset: IndexedDataset, index: int) -> npt.NDArray[np.int64]:
    """Tokens of document ``index``, int64.

    Raises:
        UserError: there is no such document.
    """
    if not 0 <= index < dataset.num_documents:
        raise UserError(f"--index {index}: {dataset.prefix} has documents 0 to {dataset.num_documents - 1}")
    first, last = dataset.document_indices[index : index + 2].tolist()
    return dataset.tokens(dataset.sequence_start(first), dataset.sequence_start(last))


def decoded_documents(
    dataset: IndexedDataset, tokenizer: TokenizerHandle, indices: list[int], max_tokens: int
) -> Iterator[str]:
    """Each of the documents ``indices`` as text under a line that names it, cut after ``max_tokens``."""
    for index in indices:
        tokens = document_tokens(dataset, index)
        if len(tokens) and tokens.max() >= tokenizer.vocab_size:
            raise UserError(
                f"{dataset.prefix}: document {index} holds token {tokens.max()}, but {tokenizer.name} has "
                f"{tokenizer.vocab_size:,}: name the dataset's own tokenizer with --tokenizer"
            )
        cut = f", the first {max_tokens:,}" if len(tokens) > max_tokens else ""
        yield f"--- document {index}, {len(tokens):,} tokens{cut} ---\n{tokenizer.decode(tokens[:max_tokens])}"


def verify_dataset(dataset: IndexedDataset, sidecar: Sidecar | None) -> str:
    """Check every index entry, and both files against the hashes of the sidecar; say what was checked.

    Raises:
        UserError: the first thing that does not fit.
    """
    dataset.verify()
    if sidecar is None:
        return "verified: every length, pointer and document index (no sidecar, so no hashes to compare)"
    facts = (
        ("documents", sidecar.documents, dataset.num_documents),
        ("tokens", sidecar.tokens, dataset.num_tokens),
        ("dtype", sidecar.dtype, dataset.dtype.name),
        ("hash of .bin", sidecar.bin_xxh3_128, hash_file(dataset.bin_path)),
        ("hash of .idx", sidecar.idx_xxh3_128, hash_file(dataset.idx_path)),
    )
    for name, recorded, found in facts:
        if recorded != found:
            raise UserError(
                f"{dataset.prefix}: {name} is {found}, but its sidecar says {recorded}: the files were changed after "
                "they were written; build or copy all three again"
            )
    return "verified: every length, pointer and document index, and both files' content hashes"
