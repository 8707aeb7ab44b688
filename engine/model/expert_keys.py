"""Read the experts of a mixture-of-experts model from its ``config.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config_reader import ConfigReader
from .expert_settings import ExpertFamily, ExpertSettings
from .family_table import Family

MOST_EXPERTS = 10_000
_LARGEST_WIDTH = 2**24


def read_experts(reader: ConfigReader, family: Family, num_layers: int) -> ExpertSettings | None:
    """Return the experts of a model; None if no layer has any.

    Raises:
        UserError: a missing, impossible or contradictory value.
    """
    row = family.experts
    if row is None:
        return None
    layers = _layers(reader, row, num_layers)
    if not any(layers):
        return None
    count = reader.size(_count_key(reader, row), MOST_EXPERTS, default=row.default_num_experts)
    width = reader.size(row.intermediate_size, _LARGEST_WIDTH)
    groups = 1 if row.scoring == "softmax" else reader.size("n_group", MOST_EXPERTS, default=1)
    groups_per_token = 1 if row.scoring == "softmax" else reader.size("topk_group", MOST_EXPERTS, default=1)
    _check_groups(reader, row, count, groups, groups_per_token)
    per_token = reader.size("num_experts_per_tok", MOST_EXPERTS)
    most = count // groups * groups_per_token
    if per_token > most:
        reader.fail("num_experts_per_tok", per_token, f"a token can choose among {most} experts; use a smaller number")
    shared = row.shared == "own_size"
    return ExpertSettings(
        layers=layers,
        num_experts=count,
        per_token=per_token,
        intermediate_size=width,
        shared_intermediate_size=_shared_size(reader, row, width),
        shared_gate=shared,
        scoring=row.scoring,
        normalize=row.normalize if isinstance(row.normalize, bool) else reader.flag(row.normalize),
        scale=1.0 if row.scoring == "softmax" else reader.number("routed_scaling_factor", default=1.0),
        groups=groups,
        groups_per_token=groups_per_token,
        selection_bias=row.scoring == "sigmoid",
        aux_loss_coef=reader.number("router_aux_loss_coef", default=0.0, or_zero=True),
    )


def _count_key(reader: ConfigReader, row: ExpertFamily) -> str:
    """Return the key that has the number of experts."""
    key, alias = row.num_experts, row.num_experts_alias
    if alias is None or reader.config.get(alias) is None:
        return key
    here, there = reader.config.get(key), reader.config[alias]
    if here is not None and here != there:
        reader.fail(key, here, f"{alias}, another name of it, is {there}; remove one of them")
    return alias


def _layers(reader: ConfigReader, row: ExpertFamily, num_layers: int) -> tuple[bool, ...]:
    if row.layers == "all":
        return (True,) * num_layers
    if row.layers == "first_dense":
        dense = reader.integer("first_k_dense_replace", default=0, least=0)
        return tuple(number >= dense for number in range(num_layers))
    step = reader.integer("decoder_sparse_step", default=1)
    dense_layers = reader.config.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list) or not all(type(number) is int for number in dense_layers):
        reader.fail("mlp_only_layers", dense_layers, "it is a list of numbers of layers")
    return tuple((number + 1) % step == 0 and number not in dense_layers for number in range(num_layers))


def layer_keys(row: ExpertFamily, layers: Sequence[bool]) -> dict[str, Any]:
    """Return the keys of a ``config.json`` that say that ``layers`` are those with experts: the reverse of reading.

    A family may be unable to say so; reading the keys back tells.
    """
    if row.layers == "all":
        return {}
    dense = [number for number, has_experts in enumerate(layers) if not has_experts]
    if row.layers == "first_dense":
        return {"first_k_dense_replace": len(dense)}
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _check_groups(reader: ConfigReader, row: ExpertFamily, count: int, groups: int, groups_per_token: int) -> None:
    if count % groups or (groups > 1 and count // groups < 2):
        problem = f"it must divide {row.num_experts} = {count} into groups of at least two"
        reader.fail("n_group", groups, problem)
    if groups_per_token > groups:
        reader.fail("topk_group", groups_per_token, f"it must be at most n_group = {groups}")


def _shared_size(reader: ConfigReader, row: ExpertFamily, width: int) -> int:
    if row.shared == "own_size":
        return reader.size("shared_expert_intermediate_size", _LARGEST_WIDTH)
    if row.shared == "number":
        return width * reader.integer("n_shared_experts", default=0, least=0)
    return 0
