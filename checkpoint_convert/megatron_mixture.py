"""Convert the settings of a mixture of experts between Megatron-LM's ``args`` and a Hugging Face config.

Megatron's router takes the softmax of all logits and then the largest k (``moe_router_pre_softmax``), or the largest k
logits and then their softmax. The second is the same as the first with weights that are divided by their sum
(``norm_topk_prob``): exp(l_i) / sum of the chosen exp(l_j) in both. Sigmoid scores (``dots1``, ``glm4_moe``) are always
divided by their sum, except for one expert per token. Groups of experts count by the sum of their largest
``moe_router_topk // moe_router_group_topk`` scores, in Hugging Face's models of their largest two. Source:
``topk_routing_with_score_function`` in ``megatron/core/transformer/moe/moe_utils.py`` of megatron-core 0.16.1.

The losses that balance experts are training settings, and are not converted: Megatron's coefficients mean something
else (docs/training_methods.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retemper.engine.errors import UserError
from retemper.engine.model.expert_keys import MOST_EXPERTS, layer_keys
from retemper.engine.model.expert_settings import ExpertSettings
from retemper.engine.model.families import DecoderArchitecture
from retemper.engine.model.family_table import FAMILIES

from .megatron_args import Args, refuse, shown, taking_away

MIXTURE_TYPES = ("qwen2_moe", "qwen3_moe", "mixtral", "dots1", "glm4_moe")
"""The families with experts that the tables of this format describe."""
_ARCHITECTURES = {
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "mixtral": "Mixtral",
    "dots1": "Dots1",
    "glm4_moe": "Glm4Moe",
}
FIXED: dict[str, Any] = {
    "moe_router_topk_limited_devices": None,
    "moe_router_force_load_balancing": False,
    "moe_expert_capacity_factor": None,
    "moe_token_dropping": False,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}
"""Our mixture in the settings of megatron-core 0.16.1 that change the computation, except for those that a config can
express. Another value is another model."""
SOFTMAX_ONLY: dict[str, Any] = {
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
}
"""What a router with softmax scores has instead of the settings that go with sigmoid scores."""
_SCORE, _FACTOR = "moe_router_score_function", "moe_router_topk_scaling_factor"
_SINKHORN = "sinkhorn"
_WIDEST = 2**24
_LARGEST_FACTOR = 1e30


def require_our_mixture(args: Args, where: str) -> None:
    """Refuse ``args`` with which Megatron builds a mixture that no config can express. Dense models pass.

    Raises:
        UserError: names the setting.
    """
    if args.get("num_experts") is None:
        return
    for name, expected in FIXED.items():
        if not _is(name, args.get(name, expected), expected):
            refuse(where, name, args[name], f"supported: {expected}")
    kinds = args.get("moe_router_load_balancing_type")
    if kinds == _SINKHORN or (isinstance(kinds, list | tuple) and _SINKHORN in kinds):
        refuse(where, "moe_router_load_balancing_type", kinds, f"supported: any but {_SINKHORN}, which routes by it")
    score = args.get(_SCORE, "softmax")
    if score not in ("softmax", "sigmoid"):
        refuse(where, _SCORE, score, "supported: softmax, sigmoid")
    if score == "softmax":
        for name, expected in SOFTMAX_ONLY.items():
            if name != "moe_router_num_groups" and not _is(name, args.get(name), expected):
                refuse(where, name, args[name], f"supported with softmax scores: {expected}")
        return
    if args.get("moe_router_enable_expert_bias") is not True:
        value = args.get("moe_router_enable_expert_bias", False)
        refuse(where, "moe_router_enable_expert_bias", value, "supported with sigmoid scores: True")
    factor, chosen = args.get(_FACTOR), _groups(args)[1]
    if factor is not None and (type(factor) not in (int, float) or not 0 <= factor < _LARGEST_FACTOR):
        refuse(where, _FACTOR, factor, "supported: a positive number")
    if chosen is not None and _per_token(args, where) // chosen != 2:
        most = f"supported with moe_router_topk {_per_token(args, where)}: half of that"
        refuse(where, "moe_router_group_topk", chosen, most)


def has_partial_rotary(args: Args) -> bool:
    """Return whether a supported family with the router of ``args`` may rotate a part of each head (``glm4_moe``)."""
    return args.get("num_experts") is not None and args.get(_SCORE) == "sigmoid"


def _groups(args: Args) -> tuple[int | None, int | None]:
    """Return the number of groups of experts, and of those from which a token chooses; None if that is all of them."""
    count, chosen = args.get("moe_router_num_groups"), args.get("moe_router_group_topk")
    if type(count) is not int or type(chosen) is not int or not 0 < chosen < count:
        return None, None
    return count, chosen


def _is(name: str, value: Any, expected: Any) -> bool:
    """Return whether a setting means the same as ``expected``."""
    if value is None:
        return not expected
    number = type(value) in (int, float)
    if name == "moe_expert_capacity_factor" and number and value < 0:
        return True  # Megatron reads it as None.
    if name == _FACTOR and number:
        return bool(value in (0, 1))
    return bool(value == expected)


def mixture_args(experts: ExpertSettings | None, where: str) -> dict[str, Any]:
    """Return the settings with which Megatron builds ``experts``; None: those of a dense model.

    Raises:
        UserError: Megatron has no such mixture.
    """
    if experts is None:
        return {"num_experts": None}
    if experts.normalize and experts.per_token == 1:
        raise UserError(
            f"{where}: num_experts_per_tok is 1 and norm_topk_prob true, so that the weight of an expert is always 1; "
            "Megatron has no such router"
        )
    if experts.scoring == "sigmoid" and not experts.normalize and experts.per_token > 1:
        raise UserError(
            f"{where}: norm_topk_prob is false, but Megatron divides sigmoid scores by their sum; only true can be "
            "converted"
        )
    is_grouped = experts.groups_per_token < experts.groups
    if is_grouped and experts.per_token // experts.groups_per_token != 2:
        raise UserError(
            f"{where}: num_experts_per_tok is {experts.per_token} and topk_group {experts.groups_per_token}; Megatron "
            "compares groups by the same sum, that of two scores, only if topk_group is half of num_experts_per_tok"
        )
    return {
        "num_experts": experts.num_experts,
        "moe_layer_freq": 1 if all(experts.layers) else [int(has_experts) for has_experts in experts.layers],
        "moe_ffn_hidden_size": experts.intermediate_size,
        **_router_args(experts),
        "moe_shared_expert_intermediate_size": experts.shared_intermediate_size or None,
        "moe_shared_expert_gate": experts.shared_gate,
        **FIXED,
    }


def _router_args(experts: ExpertSettings) -> dict[str, Any]:
    is_grouped, softmax = experts.groups_per_token < experts.groups, experts.scoring == "softmax"
    return {
        "moe_router_topk": experts.per_token,
        _SCORE: experts.scoring,
        "moe_router_pre_softmax": softmax and not experts.normalize,
        "moe_router_enable_expert_bias": experts.selection_bias,
        _FACTOR: None if experts.scale == 1 else experts.scale,
        "moe_router_num_groups": experts.groups if is_grouped else None,
        "moe_router_group_topk": experts.groups_per_token if is_grouped else None,
    }


def _stored_router(args: Args, where: str) -> dict[str, Any]:
    """Return the settings of :func:`_router_args` in ``args``; the same for all spellings of a router."""
    score, factor, (groups, chosen) = args.get(_SCORE, "softmax"), args.get(_FACTOR), _groups(args)
    return {
        "moe_router_topk": _per_token(args, where),
        _SCORE: score,
        "moe_router_pre_softmax": score == "softmax" and bool(args.get("moe_router_pre_softmax")),
        "moe_router_enable_expert_bias": bool(args.get("moe_router_enable_expert_bias")),
        _FACTOR: None if factor in (0, 1) else factor,
        "moe_router_num_groups": groups,
        "moe_router_group_topk": chosen,
    }


def mixture_options(args: Mapping[str, Any]) -> str:
    """Return the command line's options for the settings of :func:`mixture_args`."""
    valued = (
        "num_experts",
        "moe_ffn_hidden_size",
        "moe_router_topk",
        _FACTOR,
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_shared_expert_intermediate_size",
    )
    flags = ("moe_router_pre_softmax", "moe_router_enable_expert_bias", "moe_shared_expert_gate")
    options = [f"--{name.replace('_', '-')} {args[name]}" for name in valued if args[name] is not None]
    options += [f"--{_SCORE.replace('_', '-')} {args[_SCORE]}"] if args[_SCORE] != "softmax" else []
    options += [f"--{name.replace('_', '-')}" for name in flags if args[name]]
    if args["moe_layer_freq"] != 1:
        options.append(f"--moe-layer-freq '{args['moe_layer_freq']}'".replace(", ", ","))
    return " ".join(options)


def mixture_config(args: Args, num_layers: int, where: str) -> dict[str, Any]:
    """Return ``model_type`` and the keys of a Hugging Face config for the experts of ``args``.

    Raises:
        UserError: something is missing, or no supported family has such a mixture.
    """
    layers = mixture_layers(args, num_layers, where)
    if args.get("add_bias_linear", True):
        refuse(where, "add_bias_linear", args.get("add_bias_linear"), "supported with experts: False")
    width = "ffn_hidden_size" if args.get("moe_ffn_hidden_size") is None else "moe_ffn_hidden_size"
    inner = _size(args, width, _WIDEST, where)
    is_sigmoid = args.get(_SCORE, "softmax") == "sigmoid"
    found = (_with_sigmoid if is_sigmoid else _with_softmax)(args, layers, inner, where)
    if found is None:
        shared, gated = args.get("moe_shared_expert_intermediate_size"), bool(args.get("moe_shared_expert_gate"))
        qk_norm, before = bool(args.get("qk_layernorm")), bool(args.get("moe_router_pre_softmax"))
        raise UserError(
            f"{where}: its args have experts with moe_shared_expert_intermediate_size {shown(shared)}, "
            f"moe_shared_expert_gate {gated}, qk_layernorm {qk_norm}, {_SCORE} {shown(args.get(_SCORE, 'softmax'))}, "
            f"moe_router_pre_softmax {before} and moe_layer_freq {shown(args.get('moe_layer_freq', 1))}, which "
            f"none of {', '.join(MIXTURE_TYPES)} has; name the model's config.json with --config"
        )
    family, more = found
    row = FAMILIES[family].experts
    assert row is not None
    if isinstance(row.normalize, str):
        normalize = _per_token(args, where) > 1 if is_sigmoid else not args.get("moe_router_pre_softmax")
        more[row.normalize] = normalize
    return {
        "model_type": family,
        "architectures": [f"{_ARCHITECTURES[family]}ForCausalLM"],
        row.num_experts: _size(args, "num_experts", MOST_EXPERTS, where),
        "num_experts_per_tok": _per_token(args, where),
        **layer_keys(row, layers),
        row.intermediate_size: inner,
        **more,
    }


def _with_softmax(args: Args, layers: tuple[bool, ...], inner: int, where: str) -> tuple[str, dict[str, Any]] | None:
    """Return the family of a mixture with softmax scores and its other keys; None: there is no such family."""
    shared, gated = args.get("moe_shared_expert_intermediate_size"), bool(args.get("moe_shared_expert_gate"))
    qk_norm, qkv_bias = bool(args.get("qk_layernorm")), bool(args.get("add_qkv_bias"))
    if shared and gated and not qk_norm:
        width = _size(args, "moe_shared_expert_intermediate_size", _WIDEST, where)
        return "qwen2_moe", {"shared_expert_intermediate_size": width, "qkv_bias": qkv_bias}
    if not shared and qk_norm and not qkv_bias:
        return "qwen3_moe", {}
    if not (shared or qk_norm or qkv_bias) and not args.get("moe_router_pre_softmax") and all(layers):
        return "mixtral", {"sliding_window": None}
    return None


def _with_sigmoid(args: Args, layers: tuple[bool, ...], inner: int, where: str) -> tuple[str, dict[str, Any]] | None:
    """Return the same for sigmoid scores, where the first layers may be dense.

    A model that is both is called ``dots1``.
    """
    shared = args.get("moe_shared_expert_intermediate_size")
    if not shared or args.get("moe_shared_expert_gate") or list(layers) != sorted(layers):
        return None
    width, (groups, chosen) = _size(args, "moe_shared_expert_intermediate_size", _WIDEST, where), _groups(args)
    if width % inner:
        return None
    more = {
        "n_shared_experts": width // inner,
        "routed_scaling_factor": float(args.get(_FACTOR) or 1),
        "n_group": groups or 1,
        "topk_group": chosen or 1,
    }
    qk_norm, qkv_bias = bool(args.get("qk_layernorm")), bool(args.get("add_qkv_bias"))
    part = args.get("rotary_percent", 1.0)
    if qk_norm and not qkv_bias and part == 1:
        return "dots1", {**more, "sliding_window": None}
    return "glm4_moe", {
        **more,
        "attention_bias": qkv_bias,
        "use_qk_norm": qk_norm,
        "partial_rotary_factor": part,
        "num_nextn_predict_layers": 0,
    }


def mixture_layers(args: Args, num_layers: int, where: str) -> tuple[bool, ...]:
    """Return whether each layer has experts, as ``get_gpt_decoder_layer_specs``: every n-th from the first, or a list.

    Raises:
        UserError: ``moe_layer_freq`` is neither.
    """
    every = args.get("moe_layer_freq", 1)
    if type(every) is int and every > 0:
        return tuple(layer % every == 0 for layer in range(num_layers))
    if isinstance(every, list | tuple) and len(every) == num_layers and all(item in (0, 1) for item in every):
        return tuple(bool(item) for item in every)
    raise UserError(
        f"{where}: its args have moe_layer_freq {shown(every)}, a number or a list of {num_layers} zeros and ones is "
        "needed; name the model's config.json with --config"
    )


def _per_token(args: Args, where: str) -> int:
    return _size({"moe_router_topk": 2, **args}, "moe_router_topk", MOST_EXPERTS, where)


def _size(args: Args, name: str, largest: int, where: str) -> int:
    value = args.get(name)
    if type(value) is not int or not 0 < value <= largest:
        raise UserError(
            f"{where}: its args have {name} {shown(value)}, a number from 1 to {largest:,} is needed; name the model's "
            "config.json with --config"
        )
    return value


def require_same_mixture(args: Args, architecture: DecoderArchitecture, where: str) -> None:
    """Refuse ``args`` whose router differs from the config's.

    Raises:
        UserError: names the setting and both values.
    """
    experts = architecture.experts
    here = {"num_experts": None if experts is None else experts.num_experts}
    there = {"num_experts": args.get("num_experts")}
    if experts is not None and there["num_experts"] is not None:
        here |= _router_args(experts)
        there |= _stored_router(args, where)
    for name, value in there.items():
        if value != here[name]:
            raise UserError(
                f"{where}: its args have {name} {shown(value)}, --config has {here[name]}: the tokens would choose "
                f"other experts or weights; name this model's config.json{taking_away(where)}"
            )
