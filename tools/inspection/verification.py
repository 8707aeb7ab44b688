"""Checking that a dataset is what it was when it was written."""

from __future__ import annotations

from ...engine.data.dataset_writer import METADATA
from ...engine.data.indexed_dataset import IndexedDataset
from ...engine.data.sidecar import Sidecar, hash_file, require_same_dataset
from ...engine.errors import UserError

_REMEDY = "the files were changed after they were written; build or copy all of them again"


def verify_dataset(dataset: IndexedDataset, sidecar: Sidecar | None) -> str:
    """Check every index entry, and all files against the hashes of the sidecar; say what was checked.

    Raises:
        UserError: the first thing that does not fit.
    """
    dataset.verify()
    if sidecar is None:
        return "verified: every length, pointer and document index (no sidecar, so no hashes to compare)"
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
    return f"verified: every length, pointer and document index, and the content hashes of {names}"
