"""Load weights of a Hugging Face folder directly into sharded parameters: every rank reads only its own part.

PyTorch's distributed checkpoint (DCP) computes which part of which tensor each rank has. This module presents the
safetensors files to it as a checkpoint whose tensors are stored whole.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ..checkpoint.tensors import load_through
from ..streaming.finite import OPTION, require_finite
from ..streaming.raw_bytes import opened_for_reading, read_exactly
from .model import HfModel

BLOCK_BYTES = 64 << 20
"""Bytes read at a time if they are converted to another dtype or device."""
_NONFINITE_REMEDY = (
    "get another copy of the weights; to start from them nonetheless, convert the folder with "
    f"checkpoint_convert/hf_to_dcp.py {OPTION}"
)


def load_hf_tensors(model: HfModel, tensors: dict[str, Tensor], distributed: bool = True) -> int:
    """Read parameters of ``model`` into ``tensors`` in place, casting to their dtypes; each may be sharded in any way.

    Args:
        model: the folder.
        tensors: by name.
        distributed: whether there are other ranks, which then must call this as well.

    Returns:
        Number of bytes that this rank has read.

    Raises:
        UserError: a file cannot be read, or holds values that are not finite.
    """
    reader = SliceReader(model)
    load_through(reader, model.tensors, tensors, str(model.weights.folder), "cannot be used", distributed)
    return reader.bytes_read


class SliceReader(StorageReader):
    """Gives DCP the tensors of a Hugging Face folder."""

    def __init__(self, model: HfModel):
        self.model = model
        self.bytes_read = 0

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Return False: a reader is made from an open model, not from a name."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Do nothing: the reader has no state to reset."""

    # Not called kwargs: DCP would then look for metadata of single ranks.
    def read_metadata(self, *_: object, **options: object) -> Metadata:
        """Return metadata in which every tensor is stored once and whole."""
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    TensorProperties(dtype=stored.dtype),
                    torch.Size(stored.shape),
                    [ChunkStorageMetadata(torch.Size([0] * len(stored.shape)), torch.Size(stored.shape))],
                )
                for name, stored in self.model.tensors.items()
            },
            storage_meta=StorageMeta(),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: object, **options: object) -> None:
        """Do nothing: everything is known already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Sort the reads by the order of the files."""
        place = self.model.weights.place
        plan.items.sort(key=lambda item: (*place(item.storage_index.fqn), tuple(item.storage_offsets)))
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged: ranks do not share their reading."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the parts named by ``plan`` into the tensors that ``planner`` provides."""
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            self._read(item, target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, target: Tensor) -> None:
        """Read one box; a few rows at a time if ``target`` has another dtype or is on another device."""
        name = item.storage_index.fqn
        stored = self.model.tensors[name]
        path, start = self.model.weights.place(name)
        assert tuple(target.shape) == tuple(item.lengths), name
        self.bytes_read += target.numel() * stored.dtype.itemsize
        if target.numel() == 0:
            return
        first, *corner = item.storage_offsets or [0]
        target = target.reshape(1) if not stored.shape else target
        direct = target.dtype == stored.dtype and target.device.type == "cpu" and target.is_contiguous()
        row_bytes = math.prod(target.shape[1:]) * stored.dtype.itemsize
        step = target.shape[0] if direct else max(1, BLOCK_BYTES // row_bytes)
        with opened_for_reading(path) as descriptor:
            for row in range(0, target.shape[0], step):
                part = target[row : row + step]
                block = part if direct else torch.empty(part.shape, dtype=stored.dtype)
                _read_box(descriptor, path, start, stored.shape, stored.dtype, (first + row, *corner), block)
                require_finite(name, block, _NONFINITE_REMEDY)
                if not direct:
                    part.copy_(block)


def _read_box(
    descriptor: int,
    path: Path,
    start: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    offsets: tuple[int, ...],
    block: Tensor,
) -> None:
    """Fill ``block`` with the box at ``offsets`` of a tensor of ``shape`` whose values begin at byte ``start``."""
    strides = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(offsets))]
    place = start + sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    # Contiguous parts: the whole box, if it has whole rows.
    if tuple(block.shape[1:]) == tuple(shape[1:]):
        read_exactly(descriptor, place, block, path)
        return
    for number, part in enumerate(block):
        _read_box(descriptor, path, place + number * strides[0], shape[1:], dtype, (0,) * (len(shape) - 1), part)
