"""Read the tensors of an adapter as ``adapter_model.safetensors`` of PEFT holds them.

The layers of a fused projection have one adapter there: the A of all of them are below each other, and their B are in
the rows of each and in the columns of its A. The product is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...model.adapters import LORA_A, LORA_B, MAGNITUDE
from ...model.architecture import Piece
from ..parts import Part, TensorParts
from ..tensor_source import StoredTensor
from .peft_config import WEIGHT, PeftConfig
from .stored import StoredAdapter

PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftExport:
    """The tensors of an adapter in the terms of PEFT.

    Args:
        config: their names.
        adapter: on the disk.
        base: the parameters of the base model.
        merged: those of the merged model.
    """

    config: PeftConfig
    adapter: StoredAdapter
    base: TensorParts
    merged: TensorParts

    @cached_property
    def tensors(self) -> TensorParts:
        """The tensors of ``adapter_model.safetensors``.

        Raises:
            UserError: PEFT has no form for the adapter.
        """
        own, tensors, parts = self.adapter.tensors, {}, {}
        kinds = (LORA_A, LORA_B, MAGNITUDE) if self.adapter.parameters.config.dora else (LORA_A, LORA_B)
        for module, names in self.config.modules.items():
            for kind in kinds:
                target = f"{PREFIX}{module}.{kind}"
                if self.config.is_fused(module):
                    tensors[target], parts[target] = self._fused(module, kind)
                else:
                    tensors[target], parts[target] = own.tensors[f"{names[0]}.{kind}"], own.parts[f"{names[0]}.{kind}"]
        published = self.config.layout.published(self.merged)
        for name in (name for names in self.config.saved.values() for name in names):
            tensors[PREFIX + name], parts[PREFIX + name] = published.tensors[name], published.parts[name]
        if self.config.trains_tied:  # PEFT looks for both
            architecture = self.config.architecture
            name, head = architecture.embedding_name, PREFIX + architecture.head_name
            tensors[head], parts[head] = self.merged.tensors[name], self.merged.parts[name]
        return TensorParts(own.where, tensors, parts)

    def _fused(self, module: str, kind: str) -> tuple[StoredTensor, list[Part]]:
        """Return a tensor of a layer that consists of several of ours."""
        names, own = self.config.modules[module], self.adapter.tensors
        rank, (rows, columns) = self.adapter.parameters.config.rank, self._shape(module)
        shape = {LORA_A: (len(names) * rank, columns), LORA_B: (rows, len(names) * rank), MAGNITUDE: (rows,)}[kind]
        make = {LORA_A: self._fused_A, LORA_B: self._fused_B, MAGNITUDE: self._fused_magnitude}[kind]
        path = own.parts[f"{names[0]}.{kind}"][0].path
        tensor = StoredTensor(shape, own.tensors[f"{names[0]}.{kind}"].dtype)
        return tensor, [Part((0,) * len(shape), shape, path, lambda descriptor: make(module))]

    def _shape(self, module: str) -> tuple[int, int]:
        pieces = self.config.pieces[module + WEIGHT]
        return sum(piece.sizes[0] for piece in pieces), pieces[0].sizes[1]

    def _fused_A(self, module: str) -> Tensor:
        return torch.cat([self.adapter.tensors.read(f"{name}.{LORA_A}") for name in self.config.modules[module]])

    def _fused_B(self, module: str) -> Tensor:
        names = self.config.modules[module]
        own = {name: self.adapter.tensors.read(f"{name}.{LORA_B}") for name in names}
        rank = self.adapter.parameters.config.rank
        whole = torch.zeros(self._shape(module)[0], len(names) * rank, dtype=own[names[0]].dtype)
        for piece in self.config.pieces[module + WEIGHT]:
            name = piece.tensor.removesuffix(WEIGHT)
            if name in own:
                first = names.index(name) * rank
                whole[_rows(piece.at, piece), first : first + rank] = own[name][_rows(piece.offsets, piece)]
        return whole

    def _fused_magnitude(self, module: str) -> Tensor:
        """Return the lengths of all rows: those without an adapter keep that of the base."""
        adapted = set(self.config.modules[module])
        whole = torch.empty(self._shape(module)[0])
        for piece in self.config.pieces[module + WEIGHT]:
            name = piece.tensor.removesuffix(WEIGHT)
            if name in adapted:
                lengths = self.adapter.tensors.read(f"{name}.{MAGNITUDE}").float()
            else:
                lengths = torch.linalg.vector_norm(self.base.read(piece.tensor).float(), dim=1)
            whole[_rows(piece.at, piece)] = lengths[_rows(piece.offsets, piece)]
        return whole.to(self.adapter.tensors.tensors[f"{self.config.modules[module][0]}.{MAGNITUDE}"].dtype)


def _rows(offsets: tuple[int, ...], piece: Piece) -> slice:
    return slice(offsets[0], offsets[0] + piece.sizes[0])
