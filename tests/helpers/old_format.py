"""Checkpoints of manifest formats 1 and 2, whose tensors PyTorch's distributed checkpoint (DCP) wrote.

Written by DCP's own writer, as the releases did that knew no other format.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from retemper.engine.weights.checkpoint.manifest import read_manifest, write_manifest
from retemper.engine.weights.checkpoint.tensors import load_tensors, stored_tensors


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` into ``folder``: ``__0_0.distcp`` and ``.metadata``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(str(folder), sync_files=True), no_dist=True)


def rewrite(folder: Path) -> Path:
    """Make a checkpoint of the present format one of format 2; returns ``folder``."""
    tensors = {name: torch.empty(item.shape, dtype=item.dtype) for name, item in stored_tensors(folder).items()}
    load_tensors(folder, tensors, distributed=False)
    for path in (*folder.glob("*.safetensors"), folder / "tensors.json"):
        path.unlink()
    write_tensors(folder, tensors)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), format_version=2))
    return folder
