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
from retemper.engine.model.families import DecoderArchitecture
from retemper.engine.model.implementations import meta_model
from retemper.engine.weights.block_copy import OutputFile, WrittenFile
from retemper.engine.weights.dcp_files import begin_tensor_file
from retemper.engine.weights.hugging_face.layout import Layout
from retemper.engine.weights.hugging_face.weight_dtypes import dtype_name
from retemper.engine.weights.tensor_source import ReadRows, StoredTensor, TensorSource

from .dcp_writing import OutputPart, write_part_metadata
from .megatron_args import COMMON_FILE
from .megatron_layout import FusedTensor, Vocabulary, extra_state_keys, fused_tensors
from .megatron_reading import FORMAT, FORMAT_FILE, TRACKER_FILE

RELEASE = "release"
_OBJECTS_FILE = "__1_0.distcp"
_CHECKPOINT_VERSION = 3.0
"""Determines the order of the rows of query, key and value: since 3.0 as here."""


@dataclass(frozen=True)
class MegatronLayout:
    """How Megatron finds the tensors."""

    vocabulary: Vocabulary
    """Padding of the embedding."""
    per_layer: bool = False
    """Separate keys for each layer, which Megatron calls non-homogeneous, instead of stacked tensors."""


class MegatronParts:
    """The output in Megatron's terms: a ``TensorSource`` of parts, one for each tensor of each layer.

    Args:
        source: every parameter of the decoder, as tensors of Hugging Face files.
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
        architecture: DecoderArchitecture,
        layout: MegatronLayout,
    ):
        self._source = source
        self._fused: dict[str, FusedTensor] = {}
        self.tensors: dict[str, StoredTensor] = {}
        """Tensors by the names of parts: rows of one layer in the source's dtype, with padding. The rows of all experts
        are in one dimension."""
        self.unpadded: dict[str, StoredTensor] = {}
        """The same without padding, as in the source."""
        self.targets: dict[str, StoredTensor] = {}
        """The same as written."""
        self.parts: dict[str, OutputPart] = {}
        """The place of each part in its tensor."""
        self.hashed_rows: dict[str, int] = {}
        """For each padded part: number of rows that come from the source."""
        dtypes: dict[str, tuple[torch.dtype, str]] = {}
        for fused in fused_tensors(architecture, Layout.of(architecture, meta_model(architecture))):
            key, first = fused.key(layout.per_layer), fused.hf_names[0]
            dtype, _ = dtypes.setdefault(key, (targets[first].dtype, first))
            stored_as = (source.tensors[first].dtype, first)
            for hf_name in fused.hf_names:
                _require_same(hf_name, targets[hf_name].dtype, dtypes[key], key, "choose one with --dtype")
                _require_same(hf_name, source.tensors[hf_name].dtype, stored_as, key, "cast them")
            rows, *rest = fused.rows_shape
            padded = layout.vocabulary.padded(rows) if fused.entry.has_padding else rows
            stacked = fused.layer is not None and not layout.per_layer
            name = f"{key}[{fused.layer}]" if stacked else key
            lead, count = ((fused.layer,), (architecture.num_layers,)) if stacked else ((), ())
            self._fused[name] = fused
            self.unpadded[name] = StoredTensor(fused.rows_shape, source.tensors[first].dtype)
            self.tensors[name] = StoredTensor((padded, *rest), source.tensors[first].dtype)
            self.targets[name] = StoredTensor((padded, *rest), dtype)
            sizes = fused.shape if fused.num_experts is not None else (padded, *rest)
            offsets = (*lead, *(0 for _ in sizes))
            self.parts[name] = OutputPart(key, (*count, *sizes), dtype, offsets, (*(1 for _ in lead), *sizes))
            if padded > rows:
                self.hashed_rows[name] = rows

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~retemper.engine.weights.tensor_source.TensorSource`. Rows of padding are zeros."""
        fused = self._fused[name]
        places = list(fused.places())
        with ExitStack() as stack:
            readers = [stack.enter_context(self._source.rows(hf_name)) for hf_name in fused.hf_names]

            def read(first: int, rows: Tensor) -> None:
                for at, kept in places:
                    start, stop = max(first, at), min(first + rows.shape[0], at + kept.stop - kept.start)
                    if start < stop:
                        readers[kept.tensor_index](kept.start + start - at, rows[start - first : stop - first])
                rows[max(0, fused.rows_shape[0] - first) :] = 0

            yield read

    def files(self) -> list[OutputFile]:
        """Return the files to write, one for each part."""
        return [
            OutputFile(
                f"{RELEASE}/__0_{number}.distcp", {name: self.targets[name]}, partial(_begin, name, self.parts[name])
            )
            for number, name in enumerate(self.parts)
        ]


def _begin(name: str, part: OutputPart, path: Path) -> dict[str, int]:
    path.parent.mkdir(exist_ok=True)
    return {name: begin_tensor_file(path, StoredTensor(part.sizes, part.dtype))}


def _require_same(hf_name: str, dtype: torch.dtype, other: tuple[torch.dtype, str], key: str, remedy: str) -> None:
    if dtype != other[0]:
        raise UserError(
            f"{hf_name} is {dtype_name(dtype)} and {other[1]} {dtype_name(other[0])}, but Megatron keeps both in "
            f"{key}; {remedy}"
        )


def complete_checkpoint(
    folder: Path,
    parts: MegatronParts,
    written: Mapping[str, WrittenFile],
    architecture: DecoderArchitecture,
    args: argparse.Namespace,
    layout: MegatronLayout,
) -> None:
    """Write into ``folder`` the files that complete a checkpoint, after the files of ``parts`` were ``written``."""
    release = folder / RELEASE
    places = {
        name: (file.name.removeprefix(f"{RELEASE}/"), file.record.bytes)
        for file in written.values()
        for name in file.tensors
    }
    torch.save([None], release / _OBJECTS_FILE)
    empty = (_OBJECTS_FILE, (release / _OBJECTS_FILE).stat().st_size)
    write_part_metadata(
        release,
        [(part, places[name]) for name, part in parts.parts.items()],
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
