"""The weights of a Hugging Face folder: safetensors files in, safetensors files out.

Reading maps the files into memory: opening a folder of any size costs nothing, and a tensor costs memory only while it
is in use. Pickled weights (``pytorch_model.bin``) are never opened, because loading them can run code.

What the tensors mean to a decoder stands in :mod:`model`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.tensors import StoredTensor
from ..errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_MAX_SHARD_SIZE = "5GB"
_SHARD_PATTERN = "model{suffix}.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class HfWeights:
    """The tensors of a Hugging Face folder, as the index says, or as they stand in ``model.safetensors``.

    The index decides: a safetensors file that it does not list, left by an earlier save, is not opened.

    Raises:
        UserError: there are no safetensors weights, the index is wrong, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a Hugging Face folder (config.json, {WEIGHTS_FILE})")
        index = self.folder / INDEX_FILE
        if index.is_file():
            listed = _read_index(index)
            self._files = {file: self._open(file, f"{INDEX_FILE} lists it") for file in dict.fromkeys(listed.values())}
            self._require_listed(listed)
        else:
            self._require_safetensors()
            self._files = {WEIGHTS_FILE: self._open(WEIGHTS_FILE, "it holds the weights")}
            listed = dict.fromkeys(self._files[WEIGHTS_FILE].keys(), WEIGHTS_FILE)
        self._file_of = listed
        self.tensors = {name: self._describe(name) for name in listed}
        """Names, shapes and dtypes."""
        present = (entry.name for entry in self.folder.glob("*.safetensors"))
        self.ignored_files = sorted(name for name in present if name not in self._files)
        """Safetensors files that are not part of the model."""

    def read(self, name: str) -> Tensor:
        """The CPU tensor ``name``, mapped from its file: read-only by agreement, paged in when used."""
        return self._files[self._file_of[name]].get_tensor(name)

    def _describe(self, name: str) -> StoredTensor:
        tensor = self.read(name)
        return StoredTensor(tuple(tensor.shape), tensor.dtype)

    def _open(self, file: str, why: str) -> Any:
        path = self.folder / file
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{path}: missing, though {why}; fetch the folder again") from None
        except SafetensorError as error:
            raise UserError(f"{path}: truncated or not a safetensors file ({error}); fetch it again") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None

    def _require_listed(self, listed: Mapping[str, str]) -> None:
        """Every tensor of the index must be in the file that the index names."""
        names = {file: set(opened.keys()) for file, opened in self._files.items()}
        for name, file in listed.items():
            if name not in names[file]:
                raise UserError(
                    f"{self.folder / file}: holds no {name}, though {INDEX_FILE} says so; fetch the folder again"
                )

    def _require_safetensors(self) -> None:
        if (self.folder / WEIGHTS_FILE).exists():
            return
        pickled = sorted(path.name for pattern in _PICKLED for path in self.folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{self.folder}: only pickled weights ({pickled[0]}), which can run code when loaded; save them as "
                "safetensors with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)"
            )
        raise UserError(f"{self.folder}: holds neither {INDEX_FILE} nor {WEIGHTS_FILE}; name a Hugging Face folder")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, both checked to be what they should be.

    File names come from strangers: one that leaves the folder is refused.
    """
    remedy = "fetch the folder again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; {remedy}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map of tensor names to files; {remedy}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or file in (".", "..") or re.search(r"[/\\\0]", file):
            raise UserError(f"{path}: {name} is in {file!r}, which is not the name of a file beside it; {remedy}")
    return weight_map


def parse_shard_size(size: str) -> int:
    """Bytes in a size such as ``5GB`` (decimal units, as the Hub counts).

    Raises:
        UserError: it is not a positive number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", size, re.IGNORECASE)
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if num_bytes < 1:
        raise UserError(f"--max-shard-size {size}: expected a positive size in KB, MB, GB or TB, such as 5GB")
    return num_bytes


def write_shards(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    max_shard_size: int,
    read: Callable[[dict[str, StoredTensor]], dict[str, Tensor]],
) -> None:
    """Write safetensors files with the names that the Hub uses, and their index when there are several.

    Args:
        folder: where to.
        tensors: names, shapes and dtypes, in the order in which they are laid out.
        max_shard_size: bytes of tensors in a file; a larger tensor gets a file of its own.
        read: gives the CPU tensors of one file. One file's tensors at a time are in memory.

    Raises:
        UserError: a file cannot be written.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern=_SHARD_PATTERN,
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        path = folder / file
        # save_file makes files that only their owner can read; these get the mode of any other new file.
        path.touch()
        mode = path.stat().st_mode
        # transformers refuses files that do not say which framework wrote them.
        try:
            save_file(read({name: tensors[name] for name in names}), path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{path.name}: cannot be written: {error}") from error
        path.chmod(mode)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
