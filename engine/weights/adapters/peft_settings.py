"""Compare a folder of PEFT with the adapter of a run that starts from it, setting by setting."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...model.adapters import LORA_A, LORA_B, MAGNITUDE
from ...model.config_file import ADAPTER_FILE
from ..tensor_source import StoredTensor
from .peft_config import WEIGHT, PeftConfig, shortened

_NOT_IMPLEMENTED = (
    *("lora_bias", "target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "monteclora_config", "kasa_config", "velora_config", "arrow_config"),
)
"""Settings of PEFT's ``LoraConfig`` that change what an adapter computes."""
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` with which PEFT changes the weights of the base when it loads the adapter."""


@dataclass(frozen=True)
class PeftNames:
    """The tensors of a folder of PEFT by name, without PEFT's prefix."""

    adapted: dict[str, dict[str, StoredTensor]]
    """For every linear layer of transformers, the tensors of its adapter by their names below it."""
    saved: dict[str, StoredTensor]
    """All others: parameters that are trained in full."""

    @classmethod
    def of(cls, tensors: Mapping[str, StoredTensor]) -> PeftNames:
        """Divide ``tensors``."""
        adapted: dict[str, dict[str, StoredTensor]] = {}
        saved = {}
        for name, tensor in tensors.items():
            kind = next((kind for kind in (LORA_A, LORA_B, MAGNITUDE) if name.endswith(f".{kind}")), None)
            if kind is None:
                saved[name] = tensor
            else:
                adapted.setdefault(name.removesuffix(f".{kind}"), {})[kind] = tensor
        return cls(adapted, saved)


@dataclass(frozen=True)
class _Difference:
    key: str
    here: Any
    there: str
    setting: str | None
    """The value of ``key`` that describes the folder; None: there is none."""


def require_same(folder: Path, content: Mapping[str, Any], names: PeftNames, peft: PeftConfig) -> None:
    """Refuse a folder with another adapter than that of the run.

    Args:
        folder: of PEFT.
        content: of its ``adapter_config.json``.
        names: of its tensors.
        peft: the adapter of the run, in the terms of PEFT.

    Raises:
        UserError: names the settings that differ, both values, and what to set; ranks and alphas if layers agree.
    """
    _require_implemented(folder / ADAPTER_FILE, content)
    found = [*_switches(content, peft), *_saved(folder, names, peft)]
    targets = list(_targets(folder, names, peft))
    found += targets or _sizes(content, names, peft)  # sizes are known for the same layers only
    if not found:
        return
    differ = ", ".join(f"{each.key} is {_shown(each.here)} here and {each.there} there" for each in found)
    several = next((each.key for each in found if each.setting is None), None)
    if several is not None:
        raise UserError(f"{folder}: {differ}, and a run has one {several} for all layers; merge it into its base first")
    remedy = " and ".join(f"{each.key} to {each.setting}" for each in found)
    raise UserError(f"{folder}: holds another adapter than this run: {differ}; set {remedy}")


def _require_implemented(where: Path, content: Mapping[str, Any]) -> None:
    merge = "merge the adapter into its base with PEFT first"
    if content.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {_shown(content.get('peft_type'))}, and a run trains LORA; {merge}")
    if content.get("bias", "none") != "none":
        raise UserError(f"{where}: bias is {content['bias']}, and biases do not train here with an adapter; {merge}")
    if key := next((key for key in _NOT_IMPLEMENTED if content.get(key)), None):
        raise UserError(f"{where}: has {key}, which is not implemented here; {merge}")
    initial = content.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGE_BASE):
        raise UserError(
            f"{where}: init_lora_weights is {initial}, with which PEFT changes the weights of the base; save the "
            f"adapter with path_initial_model_for_weight_conversion, or {merge}"
        )


def _switches(content: Mapping[str, Any], peft: PeftConfig) -> Iterator[_Difference]:
    for ours, theirs in (("rslora", "use_rslora"), ("dora", "use_dora")):
        here, there = getattr(peft.parameters.config, ours), bool(content.get(theirs))
        if here != there:
            yield _Difference(f"adapter.{ours}", here, _shown(there), _shown(there))


def _targets(folder: Path, names: PeftNames, peft: PeftConfig) -> Iterator[_Difference]:
    """Yield the difference between the adapted layers, if there is one."""
    here, there = set(peft.modules), set(names.adapted)
    if here == there:
        return
    unknown = next((module for module in names.adapted if module + WEIGHT not in peft.pieces), None)
    if unknown is not None:
        raise UserError(f"{folder}: adapts {unknown}, which is no linear layer of the model; name its base model")
    if not there:
        raise UserError(f"{folder}: holds no {LORA_A}; save the adapter again with save_pretrained of PEFT")
    ours = dict.fromkeys(
        piece.tensor.removesuffix(WEIGHT) for module in names.adapted for piece in peft.pieces[module + WEIGHT]
    )
    matrices = [name.removesuffix(WEIGHT) for name, shape in peft.layout.shapes.items() if len(shape) > 1]
    kinds = [name if "." in name else f"*.{name}" for name in shortened(list(ours), matrices)]
    more, less = sorted(there - here), sorted(here - there)
    which = f"with {more[0]}" if more else f"without {less[0]}"
    patterns = f"[{', '.join(map(repr, kinds))}]"
    yield _Difference("adapter.targets", peft.parameters.config.targets, f"{len(there)} layers ({which})", patterns)


def _saved(folder: Path, names: PeftNames, peft: PeftConfig) -> Iterator[_Difference]:
    """Yield the difference between the parameters that are trained in full, if there is one."""
    here = {name for group in peft.saved.values() for name in group}
    tied = {peft.architecture.head_name} if peft.trains_tied else set()
    there = set(names.saved) - tied
    if here == there:
        return
    unknown = next((name for name in names.saved if name not in peft.pieces and name not in tied), None)
    if unknown is not None:
        raise UserError(
            f"{folder}: holds {unknown}, which is neither a matrix of an adapter of a linear layer nor a parameter of "
            "the model; merge it into its base with PEFT first"
        )
    ours = sorted({piece.tensor for name in there for piece in peft.pieces[name]})
    shown = f"[{', '.join(ours)}]"
    yield _Difference("adapter.modules_to_save", peft.parameters.config.modules_to_save, shown, shown)


def _sizes(content: Mapping[str, Any], names: PeftNames, peft: PeftConfig) -> Iterator[_Difference]:
    """Yield the differences between ranks and alphas. The layers of a fused projection have one alpha and one rank."""
    config = peft.parameters.config
    ranks, alphas = set(), set()
    for module, tensors in names.adapted.items():
        if LORA_A not in tensors:
            continue
        rank, count = tensors[LORA_A].shape[0], len(peft.modules[module])
        alpha = float(_of_pattern(content.get("alpha_pattern"), module, content.get("lora_alpha", 8)))
        if is_stacked(rank, content.get("r"), count):
            rank, alpha = rank // count, alpha / (math.sqrt(count) if config.rslora else count)
        ranks.add(rank)
        alphas.add(config.alpha if math.isclose(alpha, config.alpha, rel_tol=1e-9) else alpha)
    for key, here, there in (("rank", config.rank, ranks), ("alpha", config.alpha, alphas)):
        if there != {here}:
            shown = [f"{value:g}" for value in sorted(there)]
            yield _Difference(f"adapter.{key}", here, " or ".join(shown), shown[0] if len(shown) == 1 else None)


def is_stacked(rank: int, of_layer: Any, num_layers: int) -> bool:
    """Return whether the A of a fused projection, of ``rank`` rows, has ``of_layer`` rows for each of its layers.

    Else all of its layers share one A, as in a folder that PEFT has trained.
    """
    return num_layers > 1 and rank == num_layers * of_layer


def _of_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of ``module`` in PEFT's ``rank_pattern`` or ``alpha_pattern`` (``get_pattern_key`` of PEFT)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, _limited(value)))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def _limited(values: Iterable[Any]) -> list[Any]:
    values = list(values)
    return values if len(values) <= 8 else [*values[:8], "..."]
