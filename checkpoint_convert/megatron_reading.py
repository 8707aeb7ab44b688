"""Read a Megatron-Core checkpoint of the ``torch_dist`` format under Hugging Face names, without Megatron.

Such a checkpoint is a folder of PyTorch's distributed checkpoint (DCP) with a ``metadata.json``, which is written last.
Any rows of any tensor can be read without the others. :mod:`megatron_layout` maps rows to tensors. Optimizer and random
states are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from retemper.engine.errors import UserError
from retemper.engine.files.regular import read_regular
from retemper.engine.model.families import DecoderArchitecture, parse_decoder_architecture
from retemper.engine.model.implementations import meta_model
from retemper.engine.weights.damage import METADATA_FILE, DamagedCheckpoint
from retemper.engine.weights.dcp_files import read_dcp_parts
from retemper.engine.weights.dcp_metadata import read_metadata
from retemper.engine.weights.hugging_face.weight_dtypes import WEIGHT_DTYPES, dtype_name
from retemper.engine.weights.parts import Part, TensorParts
from retemper.engine.weights.tensor_source import ReadRows, StoredTensor

from .megatron_config import (
    args_place,
    config_from_args,
    describe_disagreement,
    read_args,
    require_our_decoder,
    require_same_decoder,
)
from .megatron_layout import EMBEDDING_KEY, FusedTensor, RowRange, fused_tensors

FORMAT_FILE = "metadata.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_LEGACY_HINT = (
    "convert it with Megatron-LM first: load it and add --ckpt-convert-format torch_dist --ckpt-convert-save DIR"
)
_OPTIMIZER = re.compile(r"(^|\.)(optimizer|chained_\d+)\.")
_MOST_PADDING = 128 * 64
"""Default limit of padding rows of an embedding: Megatron's default on 64 ranks."""
_FOREIGN = {
    "a mixture of experts": (".experts.", ".router.", "shared_expert"),
    "multi-head latent attention": ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_", "linear_q_proj"),
    "multi-token prediction": ("mtp.",),
    "learned positions": ("position_embeddings",),
    "LayerNorm instead of RMSNorm": ("layer_norm_bias", "layernorm.bias"),
    "a state-space model": (".mixer.",),
}
"""Parts of keys that identify unsupported models."""


@dataclass(frozen=True)
class _Place:
    """The place of a tensor, or of a separately stored part of it, in the checkpoint."""

    name: str
    layer: int | None
    """Index on the first dimension of a stacked tensor."""
    is_separate: bool
    """True if it holds only one of the tensors that Megatron fuses."""


class MegatronModel:
    """The parameters of a decoder in a Megatron checkpoint.

    Args:
        path: the folder of a checkpoint, or the one above it that names the latest.
        config: content of a Hugging Face config.json; None: derived from the settings that Megatron has stored.
        where: names the config in errors.

    Raises:
        UserError: it is not such a checkpoint, is damaged, or holds another model.
    """

    def __init__(self, path: str | Path, config: dict[str, Any] | None = None, where: str = "--config"):
        self.folder = find_checkpoint(Path(path))
        metadata = read_metadata(self.folder)
        weights, self.left_out, self.notes = _weights(metadata)
        self._prefix = _prefix(weights, self.folder)
        _refuse_foreign(weights, self.folder)
        embedding = weights[self._prefix + EMBEDDING_KEY].shape
        args, said_in = read_args(self.folder, metadata), args_place(self.folder)
        if args is not None:
            require_our_decoder(args, said_in)
        if config is None:
            if args is None:
                raise UserError(f"{self.folder}: its args cannot be read; name the model's config.json with --config")
            config, where = config_from_args(args, embedding[0], said_in), f"args of {self.folder}"
            self.notes.append(f"no --config: derived from the checkpoint's args, vocab_size {config['vocab_size']}")
        self.config: dict[str, Any] = config
        """Content of a Hugging Face ``config.json``."""
        self.architecture: DecoderArchitecture = parse_decoder_architecture(config, where)
        require_same_decoder(self.architecture, where)
        if args is not None:
            self.notes += describe_disagreement(args, self.architecture, said_in)
        shapes = {name: tuple(item.shape) for name, item in meta_model(self.architecture).named_parameters()}
        self._fused = {name: fused for fused in fused_tensors(self.architecture, shapes) for name in fused.hf_names}
        self._places = self._locate(weights, where, _most_padding(args))
        self.tensors: dict[str, StoredTensor] = {
            name: StoredTensor(shape, weights[self._places[name].name].dtype) for name, shape in shapes.items()
        }
        """Names, shapes and dtypes, in the decoder's order."""
        padding = embedding[0] - self.architecture.vocab_size
        if padding:
            self.notes.append(f"cut {padding} rows of padding from the vocabulary of {embedding[0]}")
        stacked = {place.name for place in self._places.values() if place.layer is not None}
        parts = read_dcp_parts(self.folder, weights.keys())
        parts.require_full_coverage()
        self._rows = _flattened(parts, stacked)
        for path in sorted(self._rows.paths):
            if not path.is_file():
                raise DamagedCheckpoint(f"{path}: missing, although {METADATA_FILE} lists tensors in it")

    @property
    def files(self) -> list[Path]:
        """Return the files that determine the tensors."""
        return [self.folder / FORMAT_FILE, self.folder / METADATA_FILE, *sorted(self._rows.paths)]

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~retemper.engine.weights.tensor_source.TensorSource`."""
        fused, place = self._fused[name], self._places[name]
        index = fused.hf_names.index(name)
        if place.is_separate:
            num_rows = fused.shapes[index][0]
            row_ranges = [(0, RowRange(index, 0, num_rows))]
        else:
            num_rows = fused.shape[0]
            row_ranges = [(at, kept) for at, kept in fused.places() if kept.tensor_index == index]
        before = (place.layer or 0) * num_rows
        with self._rows.rows(place.name) as read_stored:

            def read(first: int, rows: Tensor) -> None:
                for at, kept in row_ranges:
                    start, stop = max(first, kept.start), min(first + rows.shape[0], kept.stop)
                    if start < stop:
                        read_stored(before + at + start - kept.start, rows[start - first : stop - first])

            yield read

    def _locate(self, weights: Mapping[str, StoredTensor], where: str, most_padding: int) -> dict[str, _Place]:
        """Return the place of every Hugging Face tensor; every tensor in the checkpoint must belong to one."""
        places, problems, used = {}, [], set()
        for fused in dict.fromkeys(self._fused.values()):
            found = self._find(fused, weights)
            if found is None:
                problems.append(f"missing {self._prefix}{fused.key(False)}")
                continue
            for name, shape, place in zip(fused.hf_names, fused.shapes, found, strict=True):
                places[name] = place
                used.add(place.name)
                wanted = shape if place.is_separate else fused.shape
                problems += self._misfit(fused, place, weights[place.name], wanted, most_padding)
        problems += [f"unexpected {name}" for name in weights if name not in used]
        problems = list(dict.fromkeys(problems))  # a stacked tensor is checked once for each layer
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"{self.folder}: the tensors do not fit {where}: " + "; ".join(problems[:3]) + more)
        return places

    def _find(self, fused: FusedTensor, weights: Mapping[str, StoredTensor]) -> list[_Place] | None:
        """Return the place of every Hugging Face tensor, the same for all if they are fused; None if there is none."""
        entry = fused.entry
        for layer_keys in (False, True) if fused.layer is not None else (False,):
            index = fused.layer if not layer_keys else None
            for key in (entry.key, *entry.aliases):
                if (name := self._prefix + fused.key(layer_keys, key)) in weights:
                    return [_Place(name, index, False)] * len(fused.hf_names)
            names = [self._prefix + fused.key(layer_keys, key) for key in entry.separate_keys]
            if names and all(name in weights for name in names):
                return [_Place(name, index, True) for name in names]
        return None

    def _misfit(
        self,
        fused: FusedTensor,
        place: _Place,
        stored: StoredTensor,
        wanted: tuple[int, ...],
        most_padding: int,
    ) -> list[str]:
        """Return the problems of a tensor that should have the shape ``wanted``, or that shape for each layer."""
        if stored.dtype not in WEIGHT_DTYPES.values():
            return [f"{place.name} is {dtype_name(stored.dtype)}, supported: {', '.join(WEIGHT_DTYPES)}"]
        if place.layer is not None:
            wanted = (self.architecture.num_layers, *wanted)
        if stored.shape == wanted:
            return []
        rows = stored.shape[0] - wanted[0] if stored.shape else -1
        if fused.entry.has_padding and stored.shape[1:] == wanted[1:] and rows >= 0:
            if rows < most_padding:
                return []
            return [f"{place.name} has {stored.shape[0]} rows, vocab_size is {wanted[0]}: too many to be padding"]
        return [f"{place.name} is {list(stored.shape)}, the model needs {list(wanted)}"]


def find_checkpoint(path: Path) -> Path:
    """Return the folder of the checkpoint ``path``: itself, or the one that the tracker file in it names.

    Raises:
        UserError: there is no checkpoint of the format ``torch_dist``.
    """
    if not path.is_dir():
        raise UserError(f"--megatron {path}: no such folder")
    folder, tracker = path, path / TRACKER_FILE
    if not (path / FORMAT_FILE).exists() and tracker.is_file():
        said = tracker.read_bytes()[:100].decode(errors="replace").strip()
        if said != "release" and not re.fullmatch(r"[0-9]{1,12}", said):
            raise UserError(f"{tracker}: holds {said!r}, neither an iteration nor release; name a checkpoint's folder")
        folder = path / (said if said == "release" else f"iter_{int(said):07d}")
        if not folder.is_dir():
            raise UserError(f"{folder}: missing, although {TRACKER_FILE} names it; name a checkpoint's folder")
    if any(folder.glob("mp_rank_*")):
        raise UserError(f"{folder}: a checkpoint in Megatron's old format, one pickle for each rank; {_LEGACY_HINT}")
    try:
        content = json.loads(read_regular(folder / FORMAT_FILE))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: not a Megatron checkpoint, or one that was not saved completely: {FORMAT_FILE} is missing"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / FORMAT_FILE}: cannot be read as JSON: {error}") from None
    backend = content.get("sharded_backend") if isinstance(content, dict) else None
    if backend != FORMAT["sharded_backend"]:
        raise UserError(f"{folder / FORMAT_FILE}: sharded_backend is {backend!r}, not torch_dist; {_LEGACY_HINT}")
    return folder


def _weights(metadata: Metadata) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor], list[str]]:
    """Return the tensors of the model, those of the optimizer, and lines about what is left out."""
    items = metadata.state_dict_metadata
    tensors = {
        name: StoredTensor(tuple(item.size), item.properties.dtype)
        for name, item in items.items()
        if isinstance(item, TensorStorageMetadata)
    }
    states = {name: tensor for name, tensor in tensors.items() if _OPTIMIZER.search(name)}
    notes = [f"left out {len(states)} tensors of the optimizer"] if states else []
    if len(tensors) < len(items):
        notes.append(f"left out {len(items) - len(tensors)} objects that are not tensors (extra and random states)")
    return {name: tensor for name, tensor in tensors.items() if name not in states}, states, notes


def _prefix(weights: Iterable[str], folder: Path) -> str:
    """Return the common prefix of all keys, usually empty."""
    found = [name.removesuffix(EMBEDDING_KEY) for name in weights if name.endswith(EMBEDDING_KEY)]
    if len(found) != 1:
        raise UserError(
            f"{folder}: holds {len(found)} tensors *{EMBEDDING_KEY}, a GPT model has one; its first keys are "
            + ", ".join(sorted(weights)[:3])
        )
    return found[0]


def _refuse_foreign(weights: Iterable[str], folder: Path) -> None:
    for what, marks in _FOREIGN.items():
        keys = [name for name in weights if any(mark in name for mark in marks)]
        if keys:
            raise UserError(
                f"{folder}: holds {what} ({', '.join(keys[:3])}), which is not supported; supported are dense models "
                "of the families Llama, Mistral, Qwen2 and Qwen3"
            )


def _flattened(source: TensorParts, names: Iterable[str]) -> TensorParts:
    """Return ``source`` with the shapes of ``names`` changed from [L, R, ...] to [L * R, ...].

    Raises:
        UserError: a shard has parts of several of the L.
    """
    tensors, parts = dict(source.tensors), dict(source.parts)
    for name in names:
        count, rows, *rest = tensors[name].shape
        tensors[name] = StoredTensor((count * rows, *rest), tensors[name].dtype)
        parts[name] = [_flat(source.where.parent, name, part, rows) for part in parts[name]]
    return TensorParts(source.where, tensors, parts)


def _flat(folder: Path, name: str, part: Part, rows: int) -> Part:
    (index, first, *offsets), (count, num_rows, *sizes) = part.offsets, part.sizes
    if count > 1 and num_rows != rows:
        raise UserError(f"{folder}: a shard of {name} covers {num_rows} of the {rows} rows of several layers")
    return replace(part, offsets=(index * rows + first, *offsets), sizes=(count * num_rows, *sizes))


def _most_padding(args: Mapping[str, Any] | None) -> int:
    """Return the (exclusive) limit of padding rows of a vocabulary."""
    values = [(args or {}).get(key) for key in ("make_vocab_size_divisible_by", "tensor_model_parallel_size")]
    if all(type(value) is int and 0 < value < 2**20 for value in values):
        return max(_MOST_PADDING, values[0] * values[1])  # type: ignore[operator]
    return _MOST_PADDING
