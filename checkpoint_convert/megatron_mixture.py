"""Convert the settings of a mixture of experts between Megatron-LM's ``args`` and a Hugging Face config.

Megatron's router takes the softmax of all logits and then the largest k (``moe_router_pre_softmax``), or the largest k
logits and then their softmax. The second is the same as the first with weights that are divided by their sum
(``norm_topk_prob``): exp(l_i) / sum of the chosen exp(l_j) in both. Source: ``topk_routing_with_score_function`` in
``megatron/core/transformer/moe/moe_utils.py`` of megatron-core 0.16.1.

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

MIXTURE_TYPES = ("qwen2_moe", "qwen3_moe", "mixtral")
"""The families with experts that the tables of this format describe."""
_ARCHITECTURES = {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral"}
FIXED: dict[str, Any] = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_group_topk": None,
    "moe_router_topk_limited_devices": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_force_load_balancing": False,
    "moe_expert_capacity_factor": None,
    "moe_token_dropping": False,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}
"""Our mixture in the settings of megatron-core 0.16.1 that change the computation, except for those that a config can
express. Another value is another model."""
_SINKHORN = "sinkhorn"
_WIDEST = 2**24


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


def _is(name: str, value: Any, expected: Any) -> bool:
    """Return whether a setting means the same as ``expected``."""
    if value is None:
        return not expected
    number = type(value) in (int, float)
    if name == "moe_expert_capacity_factor" and number and value < 0:
        return True  # Megatron reads it as None.
    if name == "moe_router_topk_scaling_factor" and number:
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
            "Megatron refuses such a router"
        )
    return {
        "num_experts": experts.num_experts,
        "moe_layer_freq": 1 if all(experts.layers) else [int(has_experts) for has_experts in experts.layers],
        "moe_ffn_hidden_size": experts.intermediate_size,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalize,
        "moe_shared_expert_intermediate_size": experts.shared_intermediate_size or None,
        "moe_shared_expert_gate": experts.shared_gate,
        **FIXED,
    }


def mixture_options(args: Mapping[str, Any]) -> str:
    """Return the command line's options for the settings of :func:`mixture_args`."""
    options = [
        f"--{name.replace('_', '-')} {args[name]}"
        for name in ("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size")
        if args[name] is not None
    ]
    options += [
        f"--{name.replace('_', '-')}" for name in ("moe_router_pre_softmax", "moe_shared_expert_gate") if args[name]
    ]
    if args["moe_layer_freq"] != 1:
        options.append(f"--moe-layer-freq '{args['moe_layer_freq']}'".replace(", ", ","))
    return " ".join(options)


def mixture_config(args: Args, num_layers: int, where: str) -> dict[str, Any]:
    """Return ``model_type`` and the keys of a Hugging Face config for the experts of ``args``.

    Raises:
        UserError: something is missing, or no supported family has such a mixture.
    """
    shared, gated = args.get("moe_shared_expert_intermediate_size"), bool(args.get("moe_shared_expert_gate"))
    qk_norm, normalize = bool(args.get("qk_layernorm")), not args.get("moe_router_pre_softmax")
    layers = mixture_layers(args, num_layers, where)
    if args.get("add_bias_linear", True):
        refuse(where, "add_bias_linear", args.get("add_bias_linear"), "supported with experts: False")
    width = "ffn_hidden_size" if args.get("moe_ffn_hidden_size") is None else "moe_ffn_hidden_size"
    inner = _size(args, width, _WIDEST, where)
    more: dict[str, Any]
    if shared and gated and not qk_norm:
        family = "qwen2_moe"
        more = {
            "shared_expert_intermediate_size": _size(args, "moe_shared_expert_intermediate_size", _WIDEST, where),
            "qkv_bias": bool(args.get("add_qkv_bias")),
        }
    elif not shared and qk_norm and not args.get("add_qkv_bias"):
        family, more = "qwen3_moe", {}
    elif not (shared or qk_norm or args.get("add_qkv_bias")) and normalize and all(layers):
        family, more = "mixtral", {"intermediate_size": inner, "sliding_window": None}
    else:
        raise UserError(
            f"{where}: its args have experts with moe_shared_expert_intermediate_size {shown(shared)}, "
            f"moe_shared_expert_gate {gated}, qk_layernorm {qk_norm} and moe_router_pre_softmax {not normalize}, which "
            f"none of {', '.join(MIXTURE_TYPES)} has; name the model's config.json with --config"
        )
    row = FAMILIES[family].experts
    assert row is not None
    if row.intermediate_size not in more:
        more[row.intermediate_size] = inner
    if isinstance(row.normalize, str):
        more[row.normalize] = normalize
    return {
        "model_type": family,
        "architectures": [f"{_ARCHITECTURES[family]}ForCausalLM"],
        row.num_experts: _size(args, "num_experts", MOST_EXPERTS, where),
        "num_experts_per_tok": _per_token(args, where),
        **layer_keys(row, layers),
        **more,
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
        here |= {"moe_router_topk": experts.per_token, "moe_router_pre_softmax": not experts.normalize}
        there["moe_router_topk"] = _per_token(args, where)
        there["moe_router_pre_softmax"] = bool(args.get("moe_router_pre_softmax"))
    for name, value in there.items():
        if value != here[name]:
            raise UserError(
                f"{where}: its args have {name} {shown(value)}, --config has {here[name]}: the tokens would choose "
                f"other experts or weights; name this model's config.json{taking_away(where)}"
            )
