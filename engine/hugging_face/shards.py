"""Plan safetensors files as on the Hub: the distribution of tensors to files, and the header of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..checkpoint.tensors import StoredTensor
from ..outputs import open_new
from ..streaming.block_copy import OutputFile
from .folder import INDEX_FILE

_SHARD_PATTERN = "model{suffix}.safetensors"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of dtypes in a header, in the order of their tensors in a file."""


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
            _shard_file(file, {name: tensors[name] for name in names})
            for file, names in split.filename_to_tensors.items()
        ]
        """For :func:`~retemper.engine.streaming.block_copy.copy_files`."""
        self._index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}

    def write_index(self, folder: Path) -> None:
        """Write the index if there are several files."""
        if len(self.files) > 1:
            (folder / INDEX_FILE).write_text(json.dumps(self._index, indent=2) + "\n", encoding="utf-8")


def _shard_file(file: str, tensors: Mapping[str, StoredTensor]) -> OutputFile:
    # The order of the safetensors library, which gives byte for byte the same file. Wide dtypes come first, so that
    # values begin at multiples of their width: readers map the file.
    ordered = dict(sorted(tensors.items(), key=lambda item: (list(_DTYPES).index(item[1].dtype), item[0])))

    def begin(path: Path) -> dict[str, int]:
        header, offsets, end = shard_header(ordered)
        with open_new(path) as output:
            output.write(header)
            output.truncate(end)
        return offsets

    return OutputFile(file, ordered, begin)


def shard_header(tensors: Mapping[str, StoredTensor]) -> tuple[bytes, dict[str, int], int]:
    """Return the bytes before the values in a safetensors file (https://huggingface.co/docs/safetensors).

    These are 8 bytes of length, little-endian, and a JSON object, padded with spaces to a multiple of 8 bytes.

    Returns:
        Those bytes, the offset of each tensor in the file, and the size of the file, in bytes.
    """
    # transformers refuses files that do not name the framework that wrote them.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for name, tensor in tensors.items():
        starts[name], end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + at for name, at in starts.items()}, first + end
