"""Plan safetensors files as on the Hub: the distribution of tensors to files, and the header of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory

from ...files.outputs import open_new
from ..block_copy import OutputFile
from ..safetensors_format import in_file_order, make_header
from ..tensor_source import StoredTensor
from .folder import INDEX_FILE

_SHARD_PATTERN = "model{suffix}.safetensors"


class ShardPlan:
    """The distribution of tensors to files.

    Args:
        tensors: names, shapes and dtypes, in the order of their distribution.
        max_shard_size: bytes of tensors in a file; a larger tensor gets a file of its own.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], max_shard_size: int):
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.num_bytes,
            filename_pattern=_SHARD_PATTERN,
            max_shard_size=max_shard_size,
        )
        self.files = [
            safetensors_file(file, {name: tensors[name] for name in names})
            for file, names in split.filename_to_tensors.items()
        ]
        """The files, for :func:`~retemper.engine.weights.block_copy.copy_files`."""
        self._index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}

    def write_index(self, folder: Path) -> None:
        """Write the index if there are several files."""
        if len(self.files) > 1:
            (folder / INDEX_FILE).write_text(json.dumps(self._index, indent=2) + "\n", encoding="utf-8")


def safetensors_file(file: str, tensors: Mapping[str, StoredTensor]) -> OutputFile:
    """Return a file of ``tensors`` for :func:`~retemper.engine.weights.block_copy.copy_files`."""
    ordered = in_file_order(tensors)  # which gives byte for byte the file of the library

    def begin(path: Path) -> dict[str, int]:
        header, offsets, end = make_header(ordered)
        with open_new(path) as output:
            output.write(header)
            output.truncate(end)
        return offsets

    return OutputFile(file, ordered, begin)
