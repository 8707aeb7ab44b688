"""Checking that a dataset is what it was when it was written."""

from __future__ import annotations

from ...engine.data.dataset_writer import METADATA
from ...engine.data.indexed_dataset import IndexedDataset
from ...engine.data.sidecar import Sidecar, hash_file
from ...engine.errors import UserError

_REMEDY = "the files were changed after they were written; build or copy all of them again"


def check_sidecar(dataset: IndexedDataset, sidecar: Sidecar) -> None:
    """Check in no time that ``sidecar`` speaks of ``dataset``.

    Raises:
        UserError: the first thing that does not fit.
    """
    facts: tuple[tuple[str, object, object], ...] = (
        ("documents", sidecar.documents, dataset.num_documents),
        ("tokens", sidecar.tokens, dataset.num_tokens),
        ("dtype", sidecar.dtype, dataset.dtype.name),
        ("loss mask", bool(sidecar.mask_xxh3_128), dataset.has_loss_mask),
    )
    for name, recorded, found in facts:
        if recorded != found:
            raise UserError(
                f"{dataset.prefix}: {name} is {found}, but its sidecar {dataset.prefix}.json says {recorded}: "
                f"{_REMEDY}, or remove the sidecar to go without"
            )


def verify_dataset(dataset: IndexedDataset, sidecar: Sidecar | None) -> str:
    """Check every index entry, and all files against the hashes of the sidecar; say what was checked.

    Raises:
        UserError: the first thing that does not fit.
    """
    dataset.verify()
    if sidecar is None:
        return "verified: every length, pointer and document index (no sidecar, so no hashes to compare)"
    check_sidecar(dataset, sidecar)
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
    return f"verified: every length, pointer and document index, and the content hashes of {names}"
