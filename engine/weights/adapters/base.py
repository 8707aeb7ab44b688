"""The base model of an adapter: where it is, and what identifies it.

A checkpoint with an adapter does not contain the base. Its manifest records the folder of the base and the hash of its
weights, see :mod:`~retemper.engine.weights.base_identity`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import UserError
from ..base_identity import content_hash
from ..checkpoint.manifest import Manifest
from ..tensor_source import TensorSource

Advance = Callable[[int], object]


@dataclass(frozen=True)
class BaseRecord:
    """What a manifest says about the base model."""

    folder: str
    hash: str

    @classmethod
    def of(cls, folder: str | Path, weights: TensorSource, on_bytes: Advance = lambda count: None) -> BaseRecord:
        """Read and hash the ``weights`` of the base model in ``folder``."""
        return cls(str(Path(folder).resolve()), content_hash(weights, on_bytes))

    @classmethod
    def in_manifest(cls, manifest: Manifest) -> BaseRecord | None:
        """Return the record of a checkpoint with an adapter; None for one with all parameters."""
        return cls(manifest.base["folder"], manifest.base["hash"]) if manifest.base else None

    def to_dict(self) -> dict[str, str]:
        """Return the content of :attr:`Manifest.base`."""
        return asdict(self)

    def require(self, weights: TensorSource, where: str | Path, on_bytes: Advance = lambda count: None) -> None:
        """Refuse a base model other than the recorded one. All of it is read.

        Args:
            weights: of the model in ``where``.
            where: its folder.
            on_bytes: called with the number of bytes of each block, from any thread.

        Raises:
            UserError: with both hashes.
        """
        found = content_hash(weights, on_bytes)
        if found != self.hash:
            raise UserError(
                f"{where}: not the base model that the adapter was trained on: the hash of its weights is {found}, "
                f"not {self.hash}; name the original"
            )
