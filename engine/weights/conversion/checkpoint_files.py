"""Plan and complete the checkpoints that conversions write: one file for each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .... import __version__
from ..block_copy import WrittenFile
from ..checkpoint.manifest import Manifest, write_manifest
from ..hugging_face.shards import safetensors_file
from ..safetensors_format import SUFFIX
from ..table import TableEntry, write_table
from ..tensor_source import StoredTensor


class CheckpointPlan:
    """The files of a checkpoint to write, one for each tensor.

    Args:
        tensors: names, shapes and dtypes.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors
        self.files = [
            safetensors_file(f"tensor-{number:05d}{SUFFIX}", {name: tensor})
            for number, (name, tensor) in enumerate(tensors.items())
        ]
        """The files, for :func:`~retemper.engine.weights.block_copy.copy_files`."""

    def write_table(self, folder: Path, done: Iterable[WrittenFile]) -> None:
        """Write the table, which maps tensors to files, after all files are ``done``."""
        files = {name: file.name for file in done for name in file.tensors}
        write_table(
            folder,
            {
                name: TableEntry(tensor, [(files[name], ((0,) * len(tensor.shape), tensor.shape))])
                for name, tensor in self._tensors.items()
            },
        )


def write_converted_manifest(folder: Path, done: Iterable[WrittenFile]) -> None:
    """Write the manifest, which completes a checkpoint of the files ``done`` and all other files in ``folder``.

    Raises:
        UserError: a file is missing, or has another size than was written.
    """
    hashed = {file.name: file.record for file in done}
    write_manifest(folder, Manifest(kind="converted", retemper_version=__version__), hashed)
