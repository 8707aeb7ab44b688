"""Read a Megatron-Core checkpoint of the ``torch_dist`` format under Hugging Face names, without Megatron.

Such a checkpoint is a folder of PyTorch's distributed checkpoint (DCP) with a ``metadata.json``, which is written last.
:mod:`megatron_layout` says which pieces of Megatron's tensors the tensors of Hugging Face are. Any rows of these can be
read without the others. Optimizer and random states are left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from retemper.engine.errors import UserError
from retemper.engine.files.regular import read_regular
from retemper.engine.model.architecture import Piece
from retemper.engine.model.families import DecoderArchitecture, parse_decoder_architecture
from retemper.engine.model.implementations import meta_model
from retemper.engine.weights.conversion.stored_model import float32_names
from retemper.engine.weights.damage import METADATA_FILE, DamagedCheckpoint
from retemper.engine.weights.dcp_files import read_dcp_parts
from retemper.engine.weights.dcp_metadata import read_metadata
from retemper.engine.weights.hugging_face.layout import Layout
from retemper.engine.weights.hugging_face.weight_dtypes import WEIGHT_DTYPES, dtype_name
from retemper.engine.weights.parts import Part, TensorParts
from retemper.engine.weights.tensor_source import StoredTensor

from .megatron_args import args_place, read_args
from .megatron_config import (
    MODEL_TYPES,
    config_from_args,
    describe_disagreement,
    require_our_decoder,
    require_same_decoder,
)
from .megatron_layout import EMBEDDING_KEY, FusedTensor, fused_tensors

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
    "multi-head latent attention": ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_", "linear_q_proj"),
    "multi-token prediction": ("mtp.",),
    "learned positions": ("position_embeddings",),
    "LayerNorm instead of RMSNorm": ("layer_norm_bias", "layernorm.bias"),
    "a state-space model": (".mixer.",),
    "experts with latent projections": ("_latent_proj",),
    "a router with biases of its logits": (".router.bias",),
}
"""Parts of keys that identify unsupported models."""


@dataclass(frozen=True)
class _Place:
    """The place of a Hugging Face tensor in the checkpoint."""

    name: str
    """The tensor that holds it."""
    index: tuple[int, ...] = ()
    """Its indices on the first dimensions of that: number of the layer, if layers are stacked, and of the expert."""
    is_separate: bool = False
    """True if no other of the tensors that Megatron fuses is there."""


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
        if self.architecture.experts is None:
            _refuse_experts(weights, self.folder, where)
        if args is not None:
            self.notes += describe_disagreement(args, self.architecture, said_in)
        layout = Layout.of(self.architecture, meta_model(self.architecture))
        self.float32 = float32_names(layout, self.architecture)
        """Names of tensors that no option rounds."""
        fused = fused_tensors(self.architecture, layout)
        places = self._locate(fused, weights, where, _most_padding(args))
        padding = embedding[0] - self.architecture.vocab_size
        if padding:
            self.notes.append(f"cut {padding} rows of padding from the vocabulary of {embedding[0]}")
        stored = read_dcp_parts(self.folder, weights.keys())
        stored.require_full_coverage()
        dims = {place.name: len(place.index) for place in places.values()}
        pieces = {name: piece for tensor in fused for name, piece in _pieces(tensor, places).items()}
        self.published: TensorParts = Layout(layout.published_shapes, pieces).parameters(_unstacked(stored, dims))
        """The tensors of Hugging Face files."""
        self.parameters: TensorParts = layout.parameters(self.published)
        """The decoder's parameters."""
        for path in sorted(self.published.paths):
            if not path.is_file():
                raise DamagedCheckpoint(f"{path}: missing, although {METADATA_FILE} lists tensors in it")

    @property
    def files(self) -> list[Path]:
        """Return the files that determine the tensors."""
        return [self.folder / FORMAT_FILE, self.folder / METADATA_FILE, *sorted(self.published.paths)]

    def _locate(
        self, tensors: Iterable[FusedTensor], weights: Mapping[str, StoredTensor], where: str, most_padding: int
    ) -> dict[str, _Place]:
        """Return the place of every Hugging Face tensor; every tensor in the checkpoint must belong to one."""
        places: dict[str, _Place] = {}
        problems: list[str] = []
        used: set[str] = set()
        for fused in tensors:
            found = self._find(fused, weights)
            names = {place.name for place in found}
            used |= names
            missing = [name for name in names if name not in weights]
            if missing:
                problems += [f"missing {name}" for name in sorted(missing)]
                continue
            places |= dict(zip(fused.hf_names, found, strict=True))
            for shape, place in zip(fused.shapes, found, strict=True):
                wanted = shape if place.is_separate else fused.shape
                problems += self._misfit(fused, place, weights[place.name], wanted, most_padding)
        problems += [f"unexpected {name}" for name in weights if name not in used]
        problems = list(dict.fromkeys(problems))  # a stacked tensor is checked once for each layer
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"{self.folder}: the tensors do not fit {where}: " + "; ".join(problems[:3]) + more)
        return places

    def _find(self, fused: FusedTensor, weights: Mapping[str, StoredTensor]) -> list[_Place]:
        """Return the place of every Hugging Face tensor. If none of the keys is there, those of a stacked tensor."""
        experts, count = fused.num_experts, len(fused.hf_names)
        indices = [() if experts is None else (number * experts // count,) for number in range(count)]
        usual = fused.key(False)
        for layer_keys in (False, True) if fused.layer is not None else (False,):
            layer = () if layer_keys or fused.layer is None else (fused.layer,)
            for key in (fused.entry.key, *fused.entry.aliases):
                if (name := self._prefix + fused.key(layer_keys, key)) in weights:
                    return [_Place(name, (*layer, *index)) for index in indices]
            names = [self._prefix + key for key in fused.separate_keys(layer_keys)]
            if any(name in weights for name in names):
                return [_Place(name, layer, is_separate=True) for name in names]
        return [_Place(self._prefix + usual)] * count

    def _misfit(
        self,
        fused: FusedTensor,
        place: _Place,
        stored: StoredTensor,
        wanted: tuple[int, ...],
        most_padding: int,
    ) -> list[str]:
        """Return the problems of a tensor that should have the shape ``wanted``, or that shape for each layer."""
        is_stacked = len(place.index) > (fused.num_experts is not None and not place.is_separate)
        if stored.dtype not in WEIGHT_DTYPES.values():
            return [f"{place.name} is {dtype_name(stored.dtype)}, supported: {', '.join(WEIGHT_DTYPES)}"]
        if is_stacked:
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
                f"{folder}: holds {what} ({', '.join(keys[:3])}), which is not supported; supported are models of "
                f"the types {', '.join(MODEL_TYPES)}"
            )


def _refuse_experts(weights: Iterable[str], folder: Path, where: str) -> None:
    keys = [name for name in weights if ".experts." in name or ".router." in name]
    if keys:
        raise UserError(
            f"{folder}: holds a mixture of experts ({', '.join(keys[:3])}), but {where} is of a model without experts; "
            "name this model's config.json"
        )


def _unit(name: str, index: tuple[int, ...]) -> str:
    """Return the name of one of the tensors that are stacked in the tensor ``name``."""
    return f"{name}[{', '.join(map(str, index))}]" if index else name


def _unstacked(source: TensorParts, dims: Mapping[str, int]) -> TensorParts:
    """Return the tensors that are stacked on the first dimensions of those of ``source``, ``dims`` of each.

    One pass over the parts: a tensor of all experts of all layers has thousands, and as many tensors are in it.
    """
    tensors: dict[str, StoredTensor] = {}
    parts: dict[str, list[Part]] = {}
    for name, count in dims.items():
        stored = source.tensors[name]
        for index in product(*map(range, stored.shape[:count])):
            tensors[_unit(name, index)] = StoredTensor(stored.shape[count:], stored.dtype)
            parts[_unit(name, index)] = []
        for part in source.parts[name]:
            ranges = [range(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True)][:count]
            rows, *rest = part.sizes[count:]
            whole = (math.prod(part.sizes[: count + 1]), *rest)
            for number, index in enumerate(product(*ranges)):
                begin = (number * rows, *(0 for _ in rest))
                unit = Part(part.offsets[count:], (rows, *rest), part.path, part.find, (begin, whole))
                parts[_unit(name, index)].append(unit)
    return TensorParts(source.where, tensors, parts)


def _pieces(fused: FusedTensor, places: Mapping[str, _Place]) -> dict[str, list[Piece]]:
    """Return the pieces of the unstacked tensors of which each Hugging Face tensor in ``fused`` consists."""
    pieces: dict[str, list[Piece]] = {name: [] for name in fused.hf_names}
    rows_of_unit = fused.rows_shape[0] // (fused.num_experts or 1)
    for at, rows in fused.places():
        name, (_, *rest) = fused.hf_names[rows.tensor_index], fused.shapes[rows.tensor_index]
        place, zeros = places[name], (0,) * len(rest)
        first = rows.start if place.is_separate else at % rows_of_unit
        sizes = (rows.stop - rows.start, *rest)
        pieces[name].append(Piece(_unit(place.name, place.index), (first, *zeros), sizes, (rows.start, *zeros)))
    return pieces


def _most_padding(args: Mapping[str, Any] | None) -> int:
    """Return the (exclusive) limit of padding rows of a vocabulary."""
    values = [(args or {}).get(key) for key in ("make_vocab_size_divisible_by", "tensor_model_parallel_size")]
    if all(type(value) is int and 0 < value < 2**20 for value in values):
        return max(_MOST_PADDING, values[0] * values[1])  # type: ignore[operator]
    return _MOST_PADDING
