"""The weights of a Hugging Face folder: what tensors there are, and their values, whole or in parts.

Opening a folder of any size costs nothing. :meth:`HfWeights.read` maps a tensor, which costs memory only while it is in
use; :meth:`HfWeights.rows` reads rows into memory that the caller owns, and maps nothing. Pickled weights
(``pytorch_model.bin``) are never opened, because loading them can run code.

What the tensors mean to a decoder stands in :mod:`model`; files are written by :mod:`shards`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint.tensors import StoredTensor
from ..errors import UserError
from ..streaming.raw_bytes import opened_for_reading, read_exactly
from ..streaming.tensor_source import ReadRows

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")


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
        self._offsets = {file: _tensor_offsets(self.folder / file) for file in self._files}
        self.tensors = {name: self._describe(name) for name in listed}
        """Names, shapes and dtypes."""
        present = (entry.name for entry in self.folder.glob("*.safetensors"))
        self.ignored_files = sorted(name for name in present if name not in self._files)
        """Safetensors files that are not part of the model."""

    @property
    def files(self) -> list[Path]:
        """What decides the tensors: the safetensors files that are part of the model, and the index."""
        index = self.folder / INDEX_FILE
        return [*(self.folder / file for file in self._files), *([index] if index.is_file() else [])]

    def read(self, name: str) -> Tensor:
        """The CPU tensor ``name``, mapped from its file: read-only by agreement, paged in when used."""
        return self._files[self._file_of[name]].get_tensor(name)

    def place(self, name: str) -> tuple[Path, int]:
        """The file of the tensor ``name``, and where in it its values begin, in bytes."""
        path = self.folder / self._file_of[name]
        return path, self._offsets[path.name][name]

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """See :class:`~retemper.engine.streaming.tensor_source.TensorSource`."""
        path, stored = self.folder / self._file_of[name], self.tensors[name]
        start = self._offsets[path.name][name]
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        with opened_for_reading(path) as descriptor:
            yield lambda first, rows: read_exactly(descriptor, start + first * row_bytes, rows, path)

    def _describe(self, name: str) -> StoredTensor:
        try:
            tensor = self.read(name)
        except Exception as error:  # the library has no narrower class for what PyTorch cannot hold
            path, stored = self.folder / self._file_of[name], self._files[self._file_of[name]].get_slice(name)
            raise UserError(
                f"{path}: {name} is {stored.get_dtype()} {stored.get_shape()}, which cannot be read "
                f"({str(error).partition(chr(10))[0]}); quantized weights must be dequantized first"
            ) from None
        return StoredTensor(tuple(tensor.shape), tensor.dtype)

    def _open(self, file: str, why: str) -> Any:
        path = self.folder / file
        try:
            with open(path, "rb"):  # safe_open calls every file missing that it cannot open
                pass
            # It refuses headers of more than 100 MB, and places of tensors that overlap or lie outside the file.
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{path}: missing, though {why}; fetch the folder again") from None
        except SafetensorError as error:
            if "unknown variant" in str(error):  # of its list of dtypes, the only one that it has
                known = f"safetensors {safetensors.__version__}"
                raise UserError(
                    f"{path}: has a dtype that {known} does not know ({error}); dequantize the weights first"
                ) from None
            raise UserError(f"{path}: truncated or not a safetensors file ({error}); fetch it again") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}; make it readable") from None

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
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; make it readable") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; {remedy}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map of tensor names to files; {remedy}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or file in (".", "..") or re.search(r"[/\\\0]", file):
            raise UserError(f"{path}: {name} is in {file!r}, which is not the name of a file beside it; {remedy}")
    return weight_map


def _tensor_offsets(path: Path) -> dict[str, int]:
    """Where the values of every tensor begin in the file, in bytes.

    The layout (https://huggingface.co/docs/safetensors): 8 bytes of header length, little-endian; the header, a JSON
    object of ``{name: {dtype, shape, data_offsets}}``; the values. ``safe_open`` has checked it.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + item["data_offsets"][0] for name, item in header.items() if name != "__metadata__"}
