"""Describe an adapter as a folder of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT (https://huggingface.co/docs/peft/developer_guides/checkpoint) names modules as transformers does. A projection
that transformers holds fused, such as ``qkv_proj``, consists of several layers with their own adapters here. Its
adapter there has the A of all of them below each other, and their B in the rows of each and in the columns of its A:
the product is the same. Its rank is the sum of theirs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...model.adapters import LORA_A, LORA_B, MAGNITUDE
from ...model.architecture import Architecture, Piece
from ...model.config_file import ADAPTER_FILE
from ..hugging_face.layout import Layout
from ..parts import Part, TensorParts
from ..tensor_source import StoredTensor
from .stored import WEIGHT, StoredAdapter

PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_REMEDY = "export the merged model instead"


@dataclass(frozen=True)
class PeftExport:
    """An adapter in the terms of PEFT.

    Args:
        adapter: on the disk.
        architecture: of the model.
        layout: of the model.
        base: the parameters of the base model.
        merged: those of the merged model.
    """

    adapter: StoredAdapter
    architecture: Architecture
    layout: Layout
    base: TensorParts
    merged: TensorParts

    def config(self, base_name: str) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``.

        Args:
            base_name: the base model, as PEFT is to find it: a folder or a name on the Hub.
        """
        config, saved = self.adapter.parameters.config, self._saved
        stacked = {module: len(parts) for module, parts in self._modules.items() if len(parts) > 1}
        grown = math.sqrt if config.rslora else float
        content = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "bias": "none",
            "fan_in_fan_out": False,
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "use_rslora": config.rslora,
            "use_dora": config.dora,
            "target_modules": _shortened(list(self._modules), self._all_modules),
            "modules_to_save": sorted(saved) or None,
            "rank_pattern": {module: count * config.rank for module, count in stacked.items()},
            "alpha_pattern": {module: grown(count) * config.alpha for module, count in stacked.items()},
        }
        if self._trains_tied:
            content["ensure_weight_tying"] = True
        return content

    def files(self, base_name: str) -> dict[str, bytes]:
        """Return name and content of ``adapter_config.json``."""
        return {ADAPTER_FILE: (json.dumps(self.config(base_name), indent=2) + "\n").encode()}

    @cached_property
    def tensors(self) -> TensorParts:
        """The tensors of ``adapter_model.safetensors``.

        Raises:
            UserError: PEFT cannot represent the adapter.
        """
        own, tensors, parts = self.adapter.tensors, {}, {}
        for module, names in self._modules.items():
            kinds = (LORA_A, LORA_B, MAGNITUDE) if self.adapter.parameters.config.dora else (LORA_A, LORA_B)
            for kind in kinds:
                target = f"{_PREFIX}{module}.{kind}"
                if len(names) == 1 and not self._is_fused(module):
                    tensors[target], parts[target] = own.tensors[f"{names[0]}.{kind}"], own.parts[f"{names[0]}.{kind}"]
                else:
                    tensors[target], parts[target] = self._fused(module, kind)
        published = self.layout.published(self.merged)
        for name in (name for names in self._saved.values() for name in names):
            tensors[_PREFIX + name], parts[_PREFIX + name] = published.tensors[name], published.parts[name]
        if self._trains_tied:  # PEFT looks for both
            name, head = self.architecture.embedding_name, _PREFIX + self.architecture.head_name
            tensors[head], parts[head] = self.merged.tensors[name], self.merged.parts[name]
        return TensorParts(own.where, tensors, parts)

    @cached_property
    def _pieces(self) -> Mapping[str, list[Piece]]:
        """For every weight of a module of transformers, the pieces of our parameters that it consists of."""
        if self.architecture.implementation == "transformers":  # the modules here are those of transformers
            whole = {name: (0,) * len(shape) for name, shape in self.layout.shapes.items()}
            return {name: [Piece(name, at, self.layout.shapes[name], at)] for name, at in whole.items()}
        return self.layout.parameters_in

    @property
    def _trains_tied(self) -> bool:
        """Whether the embedding is also the head, and was trained."""
        tied = self.architecture.tie_word_embeddings
        return tied and self.architecture.embedding_name in self.adapter.parameters.saved

    @property
    def _all_modules(self) -> list[str]:
        return [name.removesuffix(WEIGHT) for name in self._pieces if name.endswith(WEIGHT)]

    @cached_property
    def _modules(self) -> dict[str, list[str]]:
        """For every linear layer of transformers with an adapter, those of our layers in it that have one."""
        adapted, found = set(self.adapter.parameters.modules), {}
        for name, pieces in self._pieces.items():
            inside = list(dict.fromkeys(piece.tensor.removesuffix(WEIGHT) for piece in pieces))
            names = [part for part in inside if part in adapted]
            if names and name.endswith(WEIGHT):
                found[name.removesuffix(WEIGHT)] = names
        assert adapted == {name for names in found.values() for name in names}
        return found

    def _is_fused(self, module: str) -> bool:
        return len({piece.tensor for piece in self._pieces[module + WEIGHT]}) > 1

    @cached_property
    def _saved(self) -> dict[str, list[str]]:
        """For every module of transformers that was trained in full, its tensors.

        Raises:
            UserError: only a part of a tensor was trained.
        """
        trained, found = set(self.adapter.parameters.saved), {}
        for name, pieces in self._pieces.items():
            inside = {piece.tensor for piece in pieces}
            if not inside & trained:
                continue
            module = name.rpartition(".")[0]
            if not inside <= trained or module in self._modules:
                raise UserError(
                    f"{self.adapter.tensors.where.parent}: only a part of {name} was trained in full "
                    f"({min(inside & trained)}), which PEFT has no form for; {_REMEDY}"
                )
            found[module] = [other for other in self._pieces if other.rpartition(".")[0] == module]
        return found

    def _fused(self, module: str, kind: str) -> tuple[StoredTensor, list[Part]]:
        """Return a tensor of a layer that consists of several of ours."""
        names, stored = self._modules[module], self.adapter.tensors.tensors
        rank, (rows, columns) = self.adapter.parameters.config.rank, self._shape(module)
        shape = {LORA_A: (len(names) * rank, columns), LORA_B: (rows, len(names) * rank), MAGNITUDE: (rows,)}[kind]
        tensor = StoredTensor(shape, stored[f"{names[0]}.{kind}"].dtype)
        make = {LORA_A: self._fused_A, LORA_B: self._fused_B, MAGNITUDE: self._fused_magnitude}[kind]
        path = self.adapter.tensors.parts[f"{names[0]}.{kind}"][0].path
        return tensor, [Part((0,) * len(shape), shape, path, lambda descriptor: make(module))]

    def _shape(self, module: str) -> tuple[int, int]:
        pieces = self._pieces[module + WEIGHT]
        return sum(piece.sizes[0] for piece in pieces), pieces[0].sizes[1]

    def _fused_A(self, module: str) -> Tensor:
        return torch.cat([self.adapter.tensors.read(f"{name}.{LORA_A}") for name in self._modules[module]])

    def _fused_B(self, module: str) -> Tensor:
        names = self._modules[module]
        own = {name: self.adapter.tensors.read(f"{name}.{LORA_B}") for name in names}
        rank = self.adapter.parameters.config.rank
        whole = torch.zeros(self._shape(module)[0], len(names) * rank, dtype=own[names[0]].dtype)
        for piece in self._pieces[module + WEIGHT]:
            name = piece.tensor.removesuffix(WEIGHT)
            if name in own:
                first = names.index(name) * rank
                whole[_rows(piece.at, piece), first : first + rank] = own[name][_rows(piece.offsets, piece)]
        return whole

    def _fused_magnitude(self, module: str) -> Tensor:
        """Return the lengths of all rows: those without an adapter keep that of the base."""
        adapted, rows = set(self._modules[module]), self._shape(module)[0]
        whole = torch.empty(rows)
        for piece in self._pieces[module + WEIGHT]:
            name = piece.tensor.removesuffix(WEIGHT)
            if name in adapted:
                lengths = self.adapter.tensors.read(f"{name}.{MAGNITUDE}").float()
            else:
                lengths = torch.linalg.vector_norm(self.base.read(piece.tensor).float(), dim=1)
            whole[_rows(piece.at, piece)] = lengths[_rows(piece.offsets, piece)]
        return whole.to(self.adapter.tensors.tensors[f"{self._modules[module][0]}.{MAGNITUDE}"].dtype)


def require_same_config(folder: Path, base: Architecture, merged: Architecture) -> None:
    """Refuse an adapter whose model computes in another way than its base, which PEFT would load as it is.

    Raises:
        UserError: names a fact that differs.
    """
    here, there = base.facts(), merged.facts()
    if differing := next((name for name in there if here.get(name) != there[name]), None):
        raise UserError(
            f"{folder}: the run changed {differing} of the base model, which an adapter of PEFT cannot do; {_REMEDY}"
        )


def _rows(offsets: tuple[int, ...], piece: Piece) -> slice:
    return slice(offsets[0], offsets[0] + piece.sizes[0])


def _shortened(modules: list[str], every: Collection[str]) -> list[str]:
    """Return the last part of names for kinds of modules of which all are among ``modules``, as in PEFT's defaults."""
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in modules)
    chosen, short = set(modules), []
    for kind in kinds:
        names = [name for name in every if name.rpartition(".")[2] == kind]
        short += [kind] if chosen.issuperset(names) else [name for name in modules if name in names]
    return short
