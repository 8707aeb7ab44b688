"""Write DCP metadata of tensors that consist of parts, each in a file of its own.

Megatron stores a stacked tensor as one part for every layer and tensor-parallel rank. Its loader combines parts as
needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OutputPart:
    """A box of a tensor."""

    tensor: str
    shape: Shape
    """Shape of the whole tensor."""
    dtype: torch.dtype
    offsets: Shape
    sizes: Shape
    """Shape in its file."""

    @property
    def index(self) -> MetadataIndex:
        """DCP's name for it."""
        return MetadataIndex(self.tensor, torch.Size(self.offsets))


Place = tuple[str, int]
"""A file's name, and its size in bytes."""


def write_part_metadata(
    folder: Path, parts: Sequence[tuple[OutputPart, Place]], objects: Mapping[str, Place] | None = None
) -> None:
    """Write DCP's ``.metadata`` into ``folder``.

    Args:
        folder: of the checkpoint.
        parts: of all tensors, which they must cover, and the files that hold them.
        objects: items that are not tensors, by name: the files with their ``torch.save`` output.
    """
    items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects or {}]
    places = {MetadataIndex(name): place for name, place in (objects or {}).items()}
    for part, place in parts:
        box = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
        data = TensorWriteData(box, TensorProperties(part.dtype), torch.Size(part.shape))
        items.append(WriteItem(part.index, WriteItemType.SHARD, tensor_data=data))
        places[part.index] = place
    with warnings.catch_warnings():  # DCP's own, about having no process group
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.save({}, storage_writer=_PlacedWriter(folder, places), planner=_PartPlanner(items), no_dist=True)


class _PartPlanner(DefaultSavePlanner):
    """Plans the given parts. DCP checks that the parts of every tensor cover it once."""

    def __init__(self, items: list[WriteItem]):
        super().__init__(flatten_state_dict=False)
        self._items = items

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan


class _PlacedWriter(dcp.FileSystemWriter):
    """Writes no values, only their places."""

    def __init__(self, folder: Path, places: Mapping[MetadataIndex, Place]):
        super().__init__(str(folder))
        self._places = places

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for item in plan.items:
            file, size = self._places[item.index]
            results.append(WriteResult(item.index, size, _StorageInfo(file, 0, size)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done
