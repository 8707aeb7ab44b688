"""Find the weights of a Hugging Face folder.

Only headers are read here, so opening a folder of any size is cheap. Pickled weights (``pytorch_model.bin``) are never
opened, because loading them can run code.

:mod:`model` matches the tensors to a decoder; :mod:`shards` writes files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import UserError
from ...files.regular import open_regular, read_regular
from ...model.config_file import ADAPTER_FILE, ADAPTER_REMEDY
from ..damage import DamagedCheckpoint
from ..parts import Part, TensorParts
from ..safetensors_format import DTYPE_OF_CODE, HeaderEntry, read_header
from ..tensor_source import StoredTensor, rows_of

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")
_OTHER_FORMATS = {
    "*.gguf": "the llama.cpp format: get the model as safetensors",
    "model-*.safetensors": f"shards without their {INDEX_FILE}: fetch the folder again",
    "consolidated*.safetensors": "the publisher's own layout: get the model as saved by transformers",
    "*.safetensors": f"a file of another name: name a folder that holds {WEIGHTS_FILE}",
    "*.h5": "TensorFlow weights: save them as safetensors with transformers",
    "*.msgpack": "Flax weights: save them as safetensors with transformers",
}
_MOST_INDEX_BYTES = 256 << 20


class HfWeights(TensorParts):
    """The tensors of a Hugging Face folder, under their names in the files. Each is one part.

    Files are chosen as in transformers: ``model.safetensors``, else the files in the index. A folder with both is
    refused unless they are the same, because other programs prefer the index. Other safetensors files, left by an
    earlier save, are not opened.

    Raises:
        UserError: there are no safetensors weights, or two sets of them; the index is wrong, or a file is missing or
            damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a Hugging Face folder (config.json, {WEIGHTS_FILE})")
        self._refuse_adapter()
        index = self.folder / INDEX_FILE
        if index.is_file():
            listed = _read_index(index)
            self._require_one_set(listed)
            why = f"{INDEX_FILE} lists it"
            self._files = {file: _header(self.folder / file, why) for file in dict.fromkeys(listed.values())}
            self._require_listed(listed)
        else:
            self._require_safetensors()
            self._files = {WEIGHTS_FILE: _header(self.folder / WEIGHTS_FILE, "it holds the weights")}
        file_of = self._file_of_each_tensor()
        tensors, parts = {}, {}
        for name, file in file_of.items():
            path, entry = self.folder / file, self._files[file][name]
            tensors[name], parts[name] = _described(path, name, entry), [_whole(path, entry)]
        super().__init__(self.folder, tensors, parts)
        patterns = ("*.safetensors", *_PICKLED)
        present = {entry.name for pattern in patterns for entry in self.folder.glob(pattern)}
        self.ignored_files = sorted(name for name in present - self._files.keys() if _holds_weights(name))
        """Weight files that are not read, neither here nor in transformers."""

    @property
    def files(self) -> list[Path]:
        """Return the files that determine the tensors: the safetensors files of the model, and the index."""
        index = self.folder / INDEX_FILE
        return [*(self.folder / file for file in self._files), *([index] if index.is_file() else [])]

    def _refuse_adapter(self) -> None:
        """Refuse a folder with an adapter and weights: transformers loads the adapter's base model instead of the
        weights.
        """
        if not (self.folder / ADAPTER_FILE).exists():
            return
        weights = next((name for name in (WEIGHTS_FILE, INDEX_FILE) if (self.folder / name).exists()), None)
        if weights is None:
            raise UserError(f"{self.folder}: {ADAPTER_REMEDY}")
        raise UserError(
            f"{self.folder}: holds {ADAPTER_FILE} next to {weights}: transformers loads the base model of the adapter "
            f"instead of {weights}; move the adapter away, or merge it and name the result"
        )

    def _require_one_set(self, listed: Mapping[str, str]) -> None:
        others = [file for file in listed.values() if file != WEIGHTS_FILE]
        if others and (self.folder / WEIGHTS_FILE).exists():
            raise UserError(
                f"{self.folder}: holds two sets of weights, {WEIGHTS_FILE} and those of {INDEX_FILE} ({others[0]}): "
                "transformers uses the first, other programs the second; remove one of them"
            )

    def _require_listed(self, listed: Mapping[str, str]) -> None:
        """Check that every tensor of the index is in the file that the index names."""
        for name, file in listed.items():
            if name not in self._files[file]:
                raise UserError(
                    f"{self.folder / file}: holds no {name}, although {INDEX_FILE} lists it there; fetch the folder "
                    "again"
                )

    def _file_of_each_tensor(self) -> dict[str, str]:
        """Return the file of each tensor; like transformers, use all tensors in the files, even if the index lacks
        them.
        """
        found: dict[str, str] = {}
        for file, header in self._files.items():
            for name in header:
                if name in found:
                    raise UserError(f"{self.folder}: {found[name]} and {file} both hold {name}; fetch the folder again")
                found[name] = file
        return found

    def _require_safetensors(self) -> None:
        if (self.folder / WEIGHTS_FILE).exists():
            return
        pickled = sorted(path.name for pattern in _PICKLED for path in self.folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{self.folder}: only pickled weights ({pickled[0]}), which can run code when loaded; save them as "
                "safetensors with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)"
            )
        problem = f"{self.folder}: holds neither {INDEX_FILE} nor {WEIGHTS_FILE}"
        for pattern, remedy in _OTHER_FORMATS.items():
            found = sorted(path.name for path in self.folder.glob(pattern))
            if found:
                raise UserError(f"{problem}, but {found[0]}, {remedy}")
        raise UserError(f"{problem}; name a Hugging Face folder")


def open_file(path: Path, why: str) -> TensorParts:
    """Return the tensors of one safetensors file, under their names in it.

    Args:
        path: of the file.
        why: it is needed, for the error.

    Raises:
        UserError: it is missing, damaged or unreadable, or has a dtype that cannot be read.
    """
    header = _header(path, why)
    tensors = {name: _described(path, name, entry) for name, entry in header.items()}
    return TensorParts(path, tensors, {name: [_whole(path, entry)] for name, entry in header.items()})


def _header(path: Path, why: str) -> dict[str, HeaderEntry]:
    """Return the header of a file."""
    try:
        with open_regular(path) as opened:
            return read_header(path, opened.fileno())
    except FileNotFoundError:
        raise UserError(f"{path}: missing, though {why}; fetch the folder again") from None
    except DamagedCheckpoint as error:
        raise UserError(str(error).replace("use another checkpoint", "fetch it again")) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; make it readable") from None


def _holds_weights(name: str) -> bool:
    """Return whether a file with such an ending may hold a model's weights; training_args.bin and the like do not."""
    return name.endswith(".safetensors") or name.startswith(("pytorch_model", "consolidated", "model"))


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file name, both checked.

    File names are untrusted: one that leaves the folder is refused.
    """
    remedy = "fetch the folder again"
    try:
        content = json.loads(read_regular(path, _MOST_INDEX_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; make it readable") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; {remedy}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map of tensor names to files; {remedy}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or file in (".", "..") or re.search(r"[/\\\0]", file):
            raise UserError(f"{path}: {name} is in {file!r}, which is not the name of a file next to it; {remedy}")
    return weight_map


def _described(path: Path, name: str, entry: HeaderEntry) -> StoredTensor:
    if entry.dtype not in DTYPE_OF_CODE:
        raise UserError(
            f"{path}: {name} is {entry.dtype} {list(entry.shape)}, which cannot be read; quantized weights must be "
            "dequantized first"
        )
    return StoredTensor(entry.shape, DTYPE_OF_CODE[entry.dtype])


def _whole(path: Path, entry: HeaderEntry) -> Part:
    """Return the only part of a tensor that is stored whole."""
    sizes = rows_of(entry.shape)
    return Part((0,) * len(sizes), sizes, path, lambda descriptor: entry.start)
