"""The base model of an adapter: where it is, and what identifies it.

A checkpoint with an adapter does not contain the base. Its manifest records the folder of the base and a hash of the
names, shapes, dtypes and values of all parameters. The hash does not depend on how files divide the parameters: a base
that was saved again, or converted to a checkpoint, is still the same.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from ...errors import UserError
from ..block_copy import BLOCK_BYTES
from ..checkpoint.manifest import Manifest
from ..parts import TensorParts
from ..raw_bytes import bytes_of
from ..tensor_source import read_blocks
from ..workers import default_workers

Advance = Callable[[int], object]


@dataclass(frozen=True)
class BaseRecord:
    """What a manifest says about the base model."""

    folder: str
    hash: str

    @classmethod
    def of(cls, folder: str | Path, parameters: TensorParts, on_bytes: Advance = lambda count: None) -> BaseRecord:
        """Read and hash the ``parameters`` of the base model in ``folder``."""
        return cls(str(Path(folder).resolve()), content_hash(parameters, on_bytes))

    @classmethod
    def in_manifest(cls, manifest: Manifest) -> BaseRecord | None:
        """Return the record of a checkpoint with an adapter; None for one with all parameters."""
        return cls(manifest.base["folder"], manifest.base["hash"]) if manifest.base else None

    def to_dict(self) -> dict[str, str]:
        """Return the content of :attr:`Manifest.base`."""
        return asdict(self)

    def require(self, parameters: TensorParts, where: str | Path, on_bytes: Advance = lambda count: None) -> None:
        """Refuse a base model other than the recorded one. All of it is read.

        Args:
            parameters: of the model in ``where``.
            where: its folder.
            on_bytes: called with the number of bytes of each block, from any thread.

        Raises:
            UserError: with both hashes.
        """
        found = content_hash(parameters, on_bytes)
        if found != self.hash:
            raise UserError(
                f"{where}: not the base model that the adapter was trained on: the hash of its parameters is {found}, "
                f"not {self.hash}; name the original"
            )


def content_hash(parameters: TensorParts, on_bytes: Advance = lambda count: None) -> str:
    """Return the xxh3_128 of names, shapes, dtypes and values of ``parameters``, in hexadecimal."""

    def of_tensor(name: str) -> str:
        digest, stored = xxhash.xxh3_128(), parameters.tensors[name]
        for block in read_blocks(parameters, name, BLOCK_BYTES):
            data = bytes_of(block)
            digest.update(data)
            on_bytes(len(data))
        return f"{name} {list(stored.shape)} {stored.dtype} {digest.hexdigest()}\n"

    whole = xxhash.xxh3_128()
    with ThreadPoolExecutor(default_workers()) as pool:
        for line in pool.map(of_tensor, sorted(parameters.tensors)):
            whole.update(line.encode())
    return whole.hexdigest()
