"""Carry the tensors of a Hugging Face folder that are not trained, such as a vision tower, from there to the export.

A checkpoint does not copy them. Its ``hf/carried.json`` records their folder and the SHA-256 of each:

    {"folder": "/models/gemma-3-4b-pt", "sha256": {"vision_tower....weight": "...", ...}}

The export streams them from that folder, and verifies them while it reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import UserError
from ...model.wrappers import names_in_wrapper, text_config_of
from ..block_copy import BLOCK_BYTES
from ..checkpoint.assets import ASSET_FOLDER, CARRIED_FILE, HfAssets
from ..raw_bytes import bytes_of
from ..tensor_source import ReadRows, StoredTensor, TensorSource, read_blocks, rows_of
from ..workers import default_workers
from .folder import HfWeights
from .model import HfModel

OPTION = "--carried-from"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Carried:
    """The record of carried tensors."""

    folder: str
    """Where they are."""
    sha256: Mapping[str, str]
    """Of the bytes of each tensor, by its name in the files of the folder."""

    @classmethod
    def of(cls, model: HfModel) -> Carried:
        """Read and hash the carried tensors of ``model``."""
        weights = model.weights.only(model.carried)
        with ThreadPoolExecutor(default_workers()) as pool:
            digests = pool.map(lambda name: _sha256(weights, name), model.carried)
            return cls(str(model.weights.folder.resolve()), dict(zip(model.carried, digests, strict=True)))

    @classmethod
    def in_checkpoint(cls, assets: HfAssets, checkpoint: Path) -> Carried | None:
        """Return the record in the ``assets`` of a checkpoint; None without one.

        Raises:
            UserError: it is damaged.
        """
        data = assets.files.get(CARRIED_FILE)
        if data is None:
            return None
        try:
            content = json.loads(data)
            folder, sha256 = content["folder"], content["sha256"]
            if not isinstance(folder, str) or not all(_SHA256.fullmatch(digest) for digest in sha256.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{checkpoint / ASSET_FOLDER / CARRIED_FILE}: damaged; use another checkpoint") from None
        return cls(folder, sha256)

    def added_to(self, assets: HfAssets) -> HfAssets:
        """Return ``assets`` with this record."""
        content = {"folder": self.folder, "sha256": dict(self.sha256)}
        return HfAssets({**assets.files, CARRIED_FILE: (json.dumps(content, indent=1) + "\n").encode()})

    def open(self, folder: str | Path | None = None) -> HfWeights:
        """Open the carried tensors, in ``folder`` if they have been moved there.

        Raises:
            UserError: the folder or some of them are missing.
        """
        place = Path(folder or self.folder)
        try:
            weights = HfWeights(place)
        except UserError as error:
            raise UserError(f"{_needed(len(self.sha256), place)}: {error}; {_remedy(folder)}") from None
        missing = [name for name in self.sha256 if name not in weights.tensors]
        if missing:
            raise UserError(f"{_needed(len(self.sha256), place)}: {missing[0]} is missing there; {_remedy(folder)}")
        return weights


def _needed(number: int, folder: Path) -> str:
    return f"{number} tensors that are not trained are needed from {folder}"


def _remedy(folder: str | Path | None) -> str:
    if folder is not None:
        return "name another folder"
    return f"put it back, or export with dcp_to_hf.py {OPTION} and the folder of the original model"


class WithCarried:
    """Trained tensors, and those that are carried from another folder (a ``TensorSource``).

    The carried ones are verified while they are read, in blocks from the first row to the last.

    Args:
        trained: the tensors of the text model, as files of it alone hold them.
        carried: the record.
        config: content of the ``config.json`` of the whole model.
        folder: where the carried tensors are now; None: where they were.
    """

    def __init__(self, trained: TensorSource, carried: Carried, config: dict[str, Any], folder: str | None = None):
        weights = carried.open(folder)
        self.where, self._files = weights.folder, weights.files
        self.names = names_in_wrapper(config, weights.tensors) if text_config_of(config)[1] else {}
        """Names here of the trained tensors that have other names in ``trained``."""
        self._trained, self._own = trained, {self.names.get(name, name): name for name in trained.tensors}
        self._weights, self._sha256 = weights.only(carried.sha256), carried.sha256
        own = {name: trained.tensors[there] for name, there in self._own.items()}
        self.tensors: Mapping[str, StoredTensor] = {**own, **self._weights.tensors}

    @property
    def identity(self) -> dict[str, Any]:
        """The folder and its files, for the record of a conversion."""
        return {"folder": str(self.where.resolve()), "files": {path.name: path.stat().st_size for path in self._files}}

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~retemper.engine.weights.tensor_source.TensorSource`."""
        if name in self._own:
            with self._trained.rows(self._own[name]) as read:
                yield read
            return
        with self._weights.rows(name) as read:
            yield self._verified(name, read)

    def _verified(self, name: str, read: ReadRows) -> ReadRows:
        digest, num_rows = hashlib.sha256(), rows_of(self.tensors[name].shape)[0]

        def read_verified(first: int, rows: Tensor) -> None:
            read(first, rows)
            digest.update(bytes_of(rows))
            if first + len(rows) == num_rows and digest.hexdigest() != self._sha256[name]:
                raise UserError(
                    f"{self.where}: {name} is not what the run started with (its SHA-256 is {digest.hexdigest()}, not "
                    f"{self._sha256[name]}); {_remedy(None)}"
                )

        return read_verified


def _sha256(source: TensorSource, name: str) -> str:
    digest = hashlib.sha256()
    for block in read_blocks(source, name, BLOCK_BYTES):
        digest.update(bytes_of(block))
    return digest.hexdigest()
