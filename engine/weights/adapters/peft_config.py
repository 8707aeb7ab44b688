"""Describe an adapter in the terms of PEFT: the modules of transformers, and ``adapter_config.json``.

PEFT (https://huggingface.co/docs/peft/developer_guides/checkpoint) names modules as transformers does. A projection
that transformers holds fused, such as ``qkv_proj``, consists of several layers with their own adapters here. Its rank
there is the sum of theirs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...model.adapters import AdapterParameters
from ...model.architecture import Architecture, Piece
from ...model.config_file import ADAPTER_FILE, CONFIG_FILE, read_hf_config
from ...model.implementations import parse_architecture
from ...model.wrappers import text_config_of
from ..checkpoint.assets import is_hf_folder
from ..hugging_face.layout import Layout

WEIGHT = ".weight"
_REMEDY = "export the merged model instead"


@dataclass(frozen=True)
class PeftConfig:
    """An adapter in the terms of PEFT.

    Args:
        parameters: of the adapter.
        architecture: of the model.
        layout: of the model.

    Raises:
        UserError: by ``saved`` and all that needs it, if PEFT has no form for the adapter.
    """

    parameters: AdapterParameters
    architecture: Architecture
    layout: Layout

    def content(self, base_name: str) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``.

        Args:
            base_name: the base model, as PEFT is to find it: a folder or a name on the Hub.
        """
        config, saved = self.parameters.config, self.saved
        stacked = {module: len(parts) for module, parts in self.modules.items() if len(parts) > 1}
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
            "target_modules": shortened(list(self.modules), self._all_modules),
            "modules_to_save": sorted(saved) or None,
            "rank_pattern": {module: count * config.rank for module, count in stacked.items()},
            "alpha_pattern": {module: grown(count) * config.alpha for module, count in stacked.items()},
        }
        return content | ({"ensure_weight_tying": True} if self.trains_tied else {})

    def files(self, base_name: str) -> dict[str, bytes]:
        """Return name and content of ``adapter_config.json``."""
        return {ADAPTER_FILE: (json.dumps(self.content(base_name), indent=2) + "\n").encode()}

    def require_form(self, base_folder: Path, model_config: dict[str, Any]) -> None:
        """Refuse an adapter that PEFT cannot load.

        Args:
            base_folder: of the base model.
            model_config: content of the ``config.json`` of the model with the adapter.

        Raises:
            UserError: says why.
        """
        self.require_names(model_config, _REMEDY)
        if not is_hf_folder(base_folder):
            raise UserError(
                f"the base model {base_folder} is a checkpoint, which PEFT cannot load; convert it with dcp_to_hf.py, "
                f"and name the result as the base, or {_REMEDY}"
            )
        base = parse_architecture(read_hf_config(base_folder / CONFIG_FILE), str(base_folder / CONFIG_FILE)).facts()
        there = parse_architecture(model_config).facts()
        if differing := next((name for name in there if base.get(name) != there[name]), None):
            raise UserError(
                f"the run changes {differing} of the base model, which an adapter of PEFT cannot do; {_REMEDY}"
            )
        assert self.saved is not None  # refuses parts

    def require_names(self, model_config: dict[str, Any], remedy: str) -> None:
        """Refuse an adapter of layers for which PEFT has no names, or other ones.

        Args:
            model_config: content of the ``config.json`` of the model with the adapter.
            remedy: what to do.

        Raises:
            UserError: says why.
        """
        stack = next((name for name, linear in self.parameters.modules.items() if linear.num_experts is not None), None)
        if stack is not None:
            raise UserError(
                f"the experts of {stack} have an adapter, and PEFT has other forms for experts than one for each "
                f"matrix; {remedy}, or target other layers"
            )
        if text_config_of(model_config)[1]:
            raise UserError(
                "the adapter is for the text model inside of another model, whose layers have other names in PEFT; "
                f"{remedy}"
            )

    @cached_property
    def own_layout(self) -> Layout:
        """The layout of the parameters in modules of transformers, by whose names PEFT knows them."""
        if self.architecture.implementation == "transformers":  # the modules here are those of transformers
            return Layout.with_pieces(self.layout.shapes, {})
        return self.layout

    @property
    def pieces(self) -> Mapping[str, list[Piece]]:
        """For every parameter of a module of transformers, the pieces of our parameters that it consists of."""
        return self.own_layout.parameters_in

    @cached_property
    def modules(self) -> dict[str, list[str]]:
        """For every linear layer of transformers with an adapter, those of our layers in it that have one."""
        adapted, found = set(self.parameters.modules), {}
        for name, pieces in self.pieces.items():
            inside = list(dict.fromkeys(piece.tensor.removesuffix(WEIGHT) for piece in pieces))
            names = [part for part in inside if part in adapted]
            if names and name.endswith(WEIGHT):
                found[name.removesuffix(WEIGHT)] = names
        assert adapted == {name for names in found.values() for name in names}
        return found

    @cached_property
    def saved(self) -> dict[str, list[str]]:
        """For every module of transformers that is trained in full, its tensors.

        Raises:
            UserError: only a part of a tensor is trained, or a bias next to an adapter.
        """
        trained, found = set(self.parameters.saved), {}
        for name, pieces in self.pieces.items():
            inside = {piece.tensor for piece in pieces}
            if not inside & trained:
                continue
            module = name.rpartition(".")[0]
            if not inside <= trained or module in self.modules:
                raise UserError(
                    f"adapter.modules_to_save trains {min(inside & trained)}, which is only a part of {module}, and "
                    f"PEFT has no form for that; {_REMEDY}"
                )
            found[module] = [other for other in self.pieces if other.rpartition(".")[0] == module]
        return found

    @property
    def trains_tied(self) -> bool:
        """Whether the embedding is also the head, and is trained."""
        return self.architecture.tie_word_embeddings and self.architecture.embedding_name in self.parameters.saved

    def is_fused(self, module: str) -> bool:
        """Return whether the layer ``module`` of transformers consists of several layers here."""
        return len({piece.tensor for piece in self.pieces[module + WEIGHT]}) > 1

    @property
    def _all_modules(self) -> list[str]:
        return [name.removesuffix(WEIGHT) for name in self.pieces if name.endswith(WEIGHT)]


def shortened(modules: list[str], every: Collection[str]) -> list[str]:
    """Return the last part of names for kinds of modules of which all are among ``modules``, as in PEFT's defaults."""
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in modules)
    chosen, short = set(modules), []
    for kind in kinds:
        names = [name for name in every if name.rpartition(".")[2] == kind]
        short += [kind] if chosen.issuperset(names) else [name for name in modules if name in names]
    return short
