"""Merge an adapter into its base model while the weights are read.

The merged model is a table of tensors like any other, a ``TensorParts`` whose values are
computed box by box. So converters stream it in blocks, and every rank of a run reads its own shards of it. Sums are
computed in float32, whatever the dtypes of base and adapter are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...model.adapters import LORA_A, LORA_B, MAGNITUDE
from ..hugging_face.layout import Layout
from ..parts import ComputeBox, Part, TensorParts
from ..tensor_source import StoredTensor, rows_of
from .peft_config import WEIGHT
from .stored import StoredAdapter


def merged_parameters(base: TensorParts, adapter: StoredAdapter, layout: Layout) -> TensorParts:
    """Return the parameters of ``base`` with ``adapter`` merged into them.

    Parameters that differ from the base are float32, and so are those that share a tensor of Hugging Face files with
    them. All others have the dtype and the bytes of the base.

    Args:
        base: all parameters of the base model.
        adapter: on the disk.
        layout: of the model.
    """
    changed = set(adapter.changed)
    mixed = {piece.tensor for name in changed for piece in layout.pieces[name]}
    tensors: dict[str, StoredTensor] = {}
    parts: dict[str, list[Part]] = {}
    for name, shape in layout.shapes.items():
        if any(piece.tensor in mixed for piece in layout.pieces[name]):
            tensors[name], parts[name] = StoredTensor(shape, torch.float32), [_part(name, shape, base, adapter)]
        else:
            tensors[name], parts[name] = base.tensors[name], base.parts[name]
    return TensorParts(adapter.tensors.where, tensors, parts)


def _part(name: str, shape: tuple[int, ...], base: TensorParts, adapter: StoredAdapter) -> Part:
    """Return the only part of a parameter of the merged model."""
    module = name.removesuffix(WEIGHT)
    begin: Callable[[int], ComputeBox]
    if name.endswith(WEIGHT) and module in adapter.parameters.modules:
        sum_ = _begin_sum if adapter.parameters.modules[module].num_experts is None else _begin_sum_of_experts
        source, begin = base, partial(sum_, base, adapter, module)
    else:
        source = adapter.tensors if name in adapter.parameters.saved else base
        begin = partial(_begin_copy, source, name)
    return Part((0,) * len(rows_of(shape)), rows_of(shape), _path_of(source, name), begin)


def _path_of(source: TensorParts, name: str) -> Path:
    return next((part.path for part in source.parts[name]), source.where)


def _begin_copy(source: TensorParts, name: str, descriptor: int) -> ComputeBox:
    return lambda offsets, box: source.read_box(name, offsets, box)


def _begin_sum_of_experts(base: TensorParts, adapter: StoredAdapter, module: str, descriptor: int) -> ComputeBox:
    """Return the function that computes boxes of the merged weight [experts, rows, columns] of ``module``."""
    scaling, rank = adapter.parameters.scaling, adapter.parameters.config.rank

    rows_of_expert = adapter.parameters.modules[module].out_features

    def compute(offsets: tuple[int, ...], box: Tensor) -> None:
        if box.dim() == 2:  # of one expert, which files hold as a matrix: the array has the rows of all experts
            offsets, box = (*divmod(offsets[0], rows_of_expert), offsets[1]), box[None]
        first, row, column = offsets
        base.read_box(f"{module}{WEIGHT}", offsets, box)
        num_experts, rows, columns = box.shape
        A, B = torch.empty(1, rank, columns), torch.empty(1, rows, rank)
        for number in range(num_experts):
            adapter.tensors.read_box(f"{module}.{LORA_A}", (first + number, 0, column), A)
            adapter.tensors.read_box(f"{module}.{LORA_B}", (first + number, row, 0), B)
            box[number].addmm_(B[0], A[0], alpha=scaling)

    return compute


def _begin_sum(base: TensorParts, adapter: StoredAdapter, module: str, descriptor: int) -> ComputeBox:
    """Return the function that computes boxes of the merged weight of ``module``."""
    scaling, dora = adapter.parameters.scaling, adapter.parameters.config.dora
    A = adapter.tensors.read(f"{module}.{LORA_A}").float()
    rank, columns = A.shape

    def compute(offsets: tuple[int, ...], box: Tensor) -> None:
        row, column = offsets
        # DoRA needs the length of whole rows.
        first, width = (0, columns) if dora else (column, box.shape[1])
        sum_ = torch.empty(len(box), width) if width != box.shape[1] else box
        base.read_box(f"{module}{WEIGHT}", (row, first), sum_)
        B = torch.empty(len(box), rank)
        adapter.tensors.read_box(f"{module}.{LORA_B}", (row, 0), B)
        sum_.addmm_(B, A[:, first : first + width], alpha=scaling)
        if dora:
            magnitude = torch.empty(len(box))
            adapter.tensors.read_box(f"{module}.{MAGNITUDE}", (row,), magnitude)
            sum_ *= (magnitude / torch.linalg.vector_norm(sum_, dim=1))[:, None]
        if sum_ is not box:
            box.copy_(sum_[:, column : column + box.shape[1]])

    return compute
