"""Let PyTorch's distributed checkpoint (DCP) load our checkpoints: ``dcp.load(tensors, storage_reader=...)``.

Only public interfaces of DCP are used. The trainer itself does not use them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from ..checkpoint.manifest import MANIFEST_FILE
from ..checkpoint.tensors import open_tensors
from ..checkpoint.verify import require_undamaged
from ..parts import TensorParts


class CheckpointReader(StorageReader):
    """Reads the tensors of a checkpoint, for any layout and dtype of the tensors that are loaded into.

    Args:
        folder: of the checkpoint; of any manifest format.
        verify: compare every byte with its hash first, on the coordinating rank.
    """

    def __init__(self, folder: str | os.PathLike[str], verify: bool = True):
        self._folder, self._verify = Path(folder), verify
        self._stored: TensorParts | None = None

    @property
    def stored(self) -> TensorParts:
        """The tensors, opened at first use.

        Raises:
            UserError: they are damaged or cannot be read.
        """
        if self._stored is None:
            stored = open_tensors(self._folder)
            stored.require_full_coverage()
            self._stored = stored
        return self._stored

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read from another folder, if ``checkpoint_id`` names one."""
        self._folder, self._stored = Path(checkpoint_id or self._folder), None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Describe every stored tensor to DCP."""
        names = self.stored.tensors
        return Metadata({name: self._describe(name) for name in names}, planner_data={name: (name,) for name in names})

    def _describe(self, name: str) -> TensorStorageMetadata:
        tensor, axes = self.stored.tensors[name], len(self.stored.tensors[name].shape)
        chunks = [
            ChunkStorageMetadata(torch.Size(part.offsets[:axes]), torch.Size(part.sizes[:axes]))
            for part in self.stored.parts[name]
        ]
        return TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Verify the checkpoint on one rank, if that was asked for."""
        if is_coordinator and self._verify:
            require_undamaged(self._folder)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan of this rank unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans of all ranks unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the boxes of the plan into the tensors that the planner provides."""
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR and item.storage_index.offset is not None
            target = planner.resolve_tensor(item)
            offsets = [a + b for a, b in zip(item.storage_index.offset, item.storage_offsets, strict=True)]
            self.stored.read_box(item.storage_index.fqn, offsets, target.detach())
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether the folder is a checkpoint of this engine."""
        return (Path(checkpoint_id) / MANIFEST_FILE).is_file()
