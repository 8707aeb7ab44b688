"""Write ``conversion.json``: source and output of a conversion, tensor by tensor, next to the output.

It contains source, options and versions; for every tensor the shape, and dtype and xxh3_128 of its bytes as stored on
both sides; and the omitted tensors, with reasons. It is evidence, and not needed to use the output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .... import __version__
from ..block_copy import WrittenFile
from ..checkpoint.manifest import code_versions
from ..checkpoint.names import CONVERSION_FILE as CONVERSION_FILE
from ..hugging_face.weight_dtypes import dtype_name
from ..partial_folder import DiscardOutput
from ..tensor_source import StoredTensor

_FORMAT_VERSION = 1
_LAYOUT_VERSION = 1
"""Version of the files that conversions write. After an increase, files left by an older program are not reused."""


@dataclass
class ConversionRecord:
    """The content of ``conversion.json``."""

    tool: str
    source: dict[str, Any]
    """Path and identity of the source."""
    options: dict[str, Any]
    vocabulary: dict[str, Any] | None = None
    """Rows added to or cut off the embeddings, if any."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Names of the source's tensors that are not in the output, by reason."""
    logits: dict[str, Any] | None = None
    """Result of ``--verify``."""
    versions: dict[str, str] = field(default_factory=code_versions)
    """Versions of the program and its libraries."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything that determines the output's bytes."""
        versions = {"layout": _LAYOUT_VERSION, "retemper": __version__, "torch": torch.__version__}
        return {"tool": self.tool, "source": self.source, "options": self.options, "versions": versions}

    def write(
        self,
        folder: Path,
        source: Mapping[str, StoredTensor],
        target: Mapping[str, StoredTensor],
        files: Iterable[WrittenFile],
    ) -> None:
        """Write it into ``folder``.

        Args:
            folder: the output.
            source: every tensor of the source, as stored there.
            target: every tensor of the model, as stored in the output.
            files: the files that hold them.
        """
        written = {name: (file.name, hashes) for file in files for name, hashes in file.tensors.items()}
        left_out = {name for names in self.left_out.values() for name in names}
        # The two halves of the proof; the steps before have established both.
        assert written.keys() == target.keys()
        assert source.keys() == target.keys() | left_out and not target.keys() & left_out
        tensors = {}
        for name, after in target.items():
            file, hashes = written[name]
            before = source[name]
            kept = before.dtype == after.dtype and before.shape == after.shape
            assert not kept or hashes.source == hashes.written, name
            tensors[name] = {
                "shape": list(after.shape),
                "file": file,
                "from": {"dtype": dtype_name(before.dtype), "xxh3_128": hashes.source},
                "to": {"dtype": dtype_name(after.dtype), "xxh3_128": hashes.written},
            }
        content = {
            "format_version": _FORMAT_VERSION,
            "tool": self.tool,
            "retemper_version": __version__,
            "versions": {**self.versions, "safetensors": version("safetensors")},
            "source": self.source,
            "options": self.options,
            "vocabulary": self.vocabulary,
            "logits": self.logits,
            "left_out": self.left_out,
            "tensors": tensors,
        }
        (folder / CONVERSION_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def require_same_source(what: str | Path, before: dict[str, Any], identify: Callable[[], dict[str, Any]]) -> None:
    """Refuse an output whose source has changed since the conversion began.

    Args:
        what: the source, for the error.
        before: identity of the source at the beginning, :attr:`ConversionRecord.source`.
        identify: returns its identity now.

    Raises:
        DiscardOutput: it has changed or is gone.
    """
    try:
        same = identify() == before
    except OSError:
        same = False
    if not same:
        raise DiscardOutput(f"{what}: was changed during the conversion; do not change it, and start again")


def file_identity(path: Path) -> dict[str, Any]:
    """Return size and modification time of a large file, which identify it without reading it."""
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
