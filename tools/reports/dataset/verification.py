"""Verify that a dataset's files are unchanged since they were written."""

from __future__ import annotations

from ....engine.data.indexed_dataset import IndexedDataset
from ....engine.data.sidecar import Sidecar, require_same_dataset
from ....engine.errors import UserError
from ....engine.files.hashing import hash_file
from ...preprocessing.dataset_writer import METADATA
from ...preprocessing.progress import ProgressReport
from ...tokenizer.handle import TokenizerHandle
from .streams import BLOCK_TOKENS

_REMEDY = "the files were changed after they were written; build or copy all of them again"


def verify_dataset(dataset: IndexedDataset, sidecar: Sidecar | None, tokenizer: TokenizerHandle | None = None) -> str:
    """Check all files against the hashes in the sidecar, and every token id; return what was checked.

    Args:
        dataset: opened with ``check_whole``, so its index is already checked.
        sidecar: of the dataset. None: every token is read to check its id.
        tokenizer: its vocabulary bounds the ids. None: the sidecar's vocabulary; without either, no id may be negative.

    Raises:
        UserError: names the first problem found.
    """
    index = "every length, pointer and document index"
    if sidecar is None:
        ids = _check_ids(dataset, None if tokenizer is None else tokenizer.vocab_size)
        lines = [f"verified: {index}, and every token id: {ids} (no sidecar, so no hashes to compare)"]
        return "\n".join([*lines, *(f"note: {remark}" for remark in dataset.remarks)])
    vocab_size = sidecar.vocab_size if tokenizer is None else tokenizer.vocab_size
    if sidecar.max_token_id >= vocab_size:
        raise UserError(
            f"{dataset.prefix}: holds token id {sidecar.max_token_id:,}, outside the tokenizer's vocabulary of "
            f"{vocab_size:,}; preprocess the corpus with the model's own tokenizer"
        )
    require_same_dataset(sidecar, dataset)
    files = {
        dataset.bin_path: sidecar.bin_xxh3_128,
        dataset.idx_path: sidecar.idx_xxh3_128,
        dataset.mask_path: sidecar.mask_xxh3_128,
        f"{dataset.prefix}{METADATA}": sidecar.metadata_xxh3_128,
    }
    files = {path: recorded for path, recorded in files.items() if recorded}
    for path, recorded in files.items():
        try:
            found = hash_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}: build or copy the dataset again") from error
        if found != recorded:
            raise UserError(f"{path}: hash is {found}, but the sidecar says {recorded}: {_REMEDY}")
    names = ", ".join(path.removeprefix(dataset.prefix) for path in files)
    return f"verified: {index}, and the content hashes of {names}"


def _check_ids(dataset: IndexedDataset, vocab_size: int | None) -> str:
    """Read all tokens, and describe the range of their ids."""
    low, high = 0, -1
    with ProgressReport("reading tokens", dataset.num_tokens * dataset.dtype.itemsize) as progress:
        for start in range(0, dataset.num_tokens, BLOCK_TOKENS):
            ids = dataset.stored_tokens(start, min(start + BLOCK_TOKENS, dataset.num_tokens))
            low, high = min(low, int(ids.min())), max(high, int(ids.max()))
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                place = int(((ids < 0) | (ids > (high if vocab_size is None else vocab_size - 1))).argmax())
                outside = "negative" if vocab_size is None else f"outside the tokenizer's vocabulary of {vocab_size:,}"
                raise UserError(
                    f"{dataset.bin_path}: token id {ids[place]} at token {start + place:,} is {outside}: made with "
                    "another tokenizer, or damaged; preprocess the corpus with the model's own tokenizer"
                )
            progress.show((start + len(ids)) * dataset.dtype.itemsize, start + len(ids))
    if high < 0:
        return "there are no tokens"
    against = "name --tokenizer to compare them with its vocabulary" if vocab_size is None else f"below {vocab_size:,}"
    return f"at most {high:,}, {against}"
