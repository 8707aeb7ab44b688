"""Write the parameters of a decoder as a Megatron-Core checkpoint of the ``torch_dist`` format, without Megatron.

The output is a folder for Megatron-LM's ``--load``. ``latest_checkpointed_iteration.txt`` contains ``release``, so
Megatron loads only the weights and begins at iteration 0; ``release/`` is the checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from retemper.engine.errors import UserError
from retemper.engine.model.architecture import Architecture
from retemper.engine.weights.block_copy import OutputFile, WrittenFile
from retemper.engine.weights.dcp_files import begin_tensor_file
from retemper.engine.weights.hugging_face.weight_dtypes import dtype_name
from retemper.engine.weights.tensor_source import ReadRows, StoredTensor, TensorSource

from .megatron_config import COMMON_FILE
from .megatron_layout import FusedTensor, Vocabulary, extra_state_keys, fused_tensors
from .megatron_reading import FORMAT, FORMAT_FILE, TRACKER_FILE
from .pieces import Piece, write_piece_metadata

RELEASE = "release"
_OBJECTS_FILE = "__1_0.distcp"
_CHECKPOINT_VERSION = 3.0
"""Determines the order of the rows of query, key and value: since 3.0 as here."""


@dataclass(frozen=True)
class Layout:
    """How Megatron finds the tensors."""

    vocabulary: Vocabulary
    """Padding of the embedding."""
    per_layer: bool = False
    """Separate keys for each layer, which Megatron calls non-homogeneous, instead of stacked tensors."""


class MegatronPieces:
    """The output in Megatron's terms: a ``TensorSource`` of pieces, one for each tensor of each layer.

    Args:
        source: every parameter of the decoder under its Hugging Face name.
        targets: the same, in the dtypes of the output.
        architecture: of the decoder.
        layout: of the output.

    Raises:
        UserError: tensors that Megatron keeps as one have several dtypes.
    """

    def __init__(
        self,
        source: TensorSource,
        targets: Mapping[str, StoredTensor],
        architecture: Architecture,
        layout: Layout,
    ):
        self._source = source
        self._fused: dict[str, FusedTensor] = {}
        self.tensors: dict[str, StoredTensor] = {}
        """Tensors by the names of pieces: rows of one layer in the source's dtype, with padding."""
        self.unpadded: dict[str, StoredTensor] = {}
        """The same without padding, as in the source."""
        self.targets: dict[str, StoredTensor] = {}
        """The same as written."""
        self.pieces: dict[str, Piece] = {}
        """The place of each piece in its tensor."""
        self.hashed_rows: dict[str, int] = {}
        """For each padded piece: number of rows that come from the source."""
        dtypes: dict[str, tuple[torch.dtype, str]] = {}
        for fused in fused_tensors(architecture, {name: tensor.shape for name, tensor in targets.items()}):
            key, first = fused.key(layout.per_layer), fused.parts[0]
            dtype, _ = dtypes.setdefault(key, (targets[first].dtype, first))
            for part in fused.parts:
                _require_same(part, targets[part].dtype, dtypes[key], key, "choose one with --dtype")
                _require_same(part, source.tensors[part].dtype, (source.tensors[first].dtype, first), key, "cast them")
            rows, *rest = fused.shape
            padded = layout.vocabulary.padded(rows) if fused.entry.has_padding else rows
            stacked = fused.layer is not None and not layout.per_layer
            name = f"{key}[{fused.layer}]" if stacked else key
            lead, count = ((fused.layer,), (architecture.num_layers,)) if stacked else ((), ())
            self._fused[name] = fused
            self.unpadded[name] = StoredTensor(fused.shape, source.tensors[first].dtype)
            self.tensors[name] = StoredTensor((padded, *rest), source.tensors[first].dtype)
            self.targets[name] = StoredTensor((padded, *rest), dtype)
            shape, offsets = (*count, padded, *rest), (*lead, 0, *(0 for _ in rest))
            self.pieces[name] = Piece(key, shape, dtype, offsets, (*(1 for _ in lead), padded, *rest))
            if padded > rows:
                self.hashed_rows[name] = rows

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~retemper.engine.weights.tensor_source.TensorSource`. Rows of padding are zeros."""
        fused = self._fused[name]
        places = list(fused.places())
        with ExitStack() as stack:
            readers = [stack.enter_context(self._source.rows(part)) for part in fused.parts]

            def read(first: int, rows: Tensor) -> None:
                for at, run in places:
                    start, stop = max(first, at), min(first + rows.shape[0], at + run.stop - run.start)
                    if start < stop:
                        readers[run.part](run.start + start - at, rows[start - first : stop - first])
                rows[max(0, fused.shape[0] - first) :] = 0

            yield read

    def files(self) -> list[OutputFile]:
        """Return the files to write, one for each piece."""
        return [
            OutputFile(
                f"{RELEASE}/__0_{number}.distcp", {name: self.targets[name]}, partial(_begin, name, self.pieces[name])
            )
            for number, name in enumerate(self.pieces)
        ]


def _begin(name: str, piece: Piece, path: Path) -> dict[str, int]:
    path.parent.mkdir(exist_ok=True)
    return {name: begin_tensor_file(path, StoredTensor(piece.sizes, piece.dtype))}


def _require_same(part: str, dtype: torch.dtype, other: tuple[torch.dtype, str], key: str, remedy: str) -> None:
    if dtype != other[0]:
        raise UserError(
            f"{part} is {dtype_name(dtype)} and {other[1]} {dtype_name(other[0])}, but Megatron keeps both in {key}; "
            + remedy
        )


def complete_checkpoint(
    folder: Path,
    pieces: MegatronPieces,
    written: Mapping[str, WrittenFile],
    architecture: Architecture,
    args: argparse.Namespace,
    layout: Layout,
) -> None:
    """Write into ``folder`` the files that complete a checkpoint, after the files of ``pieces`` were ``written``."""
    release = folder / RELEASE
    places = {
        name: (file.name.removeprefix(f"{RELEASE}/"), file.record.bytes)
        for file in written.values()
        for name in file.tensors
    }
    torch.save([None], release / _OBJECTS_FILE)
    empty = (_OBJECTS_FILE, (release / _OBJECTS_FILE).stat().st_size)
    write_piece_metadata(
        release,
        [(piece, places[name]) for name, piece in pieces.pieces.items()],
        dict.fromkeys(extra_state_keys(architecture, layout.per_layer), empty),
    )
    common = {
        "args": args,
        "checkpoint_version": _CHECKPOINT_VERSION,
        "iteration": 0,
        "content_metadata": {"non_homogeneous_layers": layout.per_layer, "singleton_local_shards": False},
    }
    torch.save(common, release / COMMON_FILE)
    (release / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")
    (folder / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
