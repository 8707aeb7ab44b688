"""Convert a model's settings between Megatron-LM's ``args`` (of its command line) and a Hugging Face config.

:mod:`.megatron_args` reads them from a checkpoint, :mod:`.megatron_mixture` converts those of experts.

Settings that do not show in the tensors are compared one by one with a given config. Those that both sides can express
(norm epsilon, rotary base and scaling, windows) may differ, and the difference is logged. Those that define another
decoder are refused, with or without a config: no other check would notice them.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from retemper.engine.errors import UserError
from retemper.engine.model.families import DecoderArchitecture
from retemper.engine.model.rope_settings import LinearScaling, Llama3Scaling, RopeSettings

from .megatron_args import refuse, shown, taking_away
from .megatron_layout import Vocabulary
from .megatron_mixture import (
    MIXTURE_TYPES,
    has_partial_rotary,
    mixture_args,
    mixture_config,
    require_our_mixture,
    require_same_mixture,
)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", *MIXTURE_TYPES)
"""The families that the tables of this format describe."""
# The settings with a counterpart: Hugging Face's key and Megatron's.
_SAME = (
    ("num_hidden_layers", "num_layers"),
    ("hidden_size", "hidden_size"),
    ("intermediate_size", "ffn_hidden_size"),
    ("num_attention_heads", "num_attention_heads"),
    ("head_dim", "kv_channels"),
    ("rms_norm_eps", "norm_epsilon"),
    ("rope_theta", "rotary_base"),
    ("max_position_embeddings", "max_position_embeddings"),
    ("initializer_range", "init_method_std"),
)
_OPTIONAL = ("max_position_embeddings", "initializer_range")
# Our decoder in Megatron's settings: all settings of megatron-core 0.16.1 (TransformerConfig, GPTModel) that change the
# computation, except for those that a config can express. Another value is another model. A version without a setting
# behaves as listed here, and some settings are None if they are off.
_FIXED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "swiglu": True,
    "squared_relu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
}
# Megatron's use_rope_scaling is Llama 3's rule with these settings; only the factor can be set.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
_ROTARY = "rotary_percent"
_INTERPOLATION = "rotary_seq_len_interpolation_factor"
_LARGEST = 1e30
"""Limit of a numeric setting."""
_MOST_LAYERS = 10_000


def config_from_args(args: Mapping[str, Any], padded_vocab_size: int, where: str) -> dict[str, Any]:
    """Return the Hugging Face config of the model that Megatron builds from ``args``.

    If Megatron does not store how many rows of the embedding are tokens, all are.

    Raises:
        UserError: something is missing, or the model is not a supported one.
    """
    config: dict[str, Any] = {}
    for key, name in _SAME:
        value = args.get(name)
        if isinstance(value, int | float) and type(value) is not bool and abs(value) < _LARGEST:
            config[key] = value
        elif key not in _OPTIONAL:
            raise UserError(f"{where}: its args have no {name}; name the model's config.json with --config")
    if not 0 < config["num_hidden_layers"] <= _MOST_LAYERS:
        raise UserError(f"{where}: its args have num_layers {shown(args['num_layers'])}; name a config with --config")
    if any(_windows(args, config["num_hidden_layers"], where)):
        raise UserError(
            f"{where}: its args have window_size {shown(args['window_size'])}, whose meaning depends on the family; "
            "name the model's config.json with --config"
        )
    config["num_key_value_heads"] = _groups(args)
    known = args.get("vocab_size")
    config["vocab_size"] = known if type(known) is int and 0 < known <= padded_vocab_size else padded_vocab_size
    config["tie_word_embeddings"] = not args.get("untie_embeddings_and_output_weights", False)
    if args.get("num_experts") is None:
        config |= _family(args, where)
    else:
        config |= mixture_config(args, config["num_hidden_layers"], where)
    factor, scaling = _rope_scaling(args, where)
    if scaling:
        config["rope_scaling"] = {"rope_type": "llama3", **asdict(scaling)}
    elif factor != 1:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return {**config, "hidden_act": "silu"}


def _family(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    biased = bool(args.get("add_bias_linear", True))
    if args.get("qk_layernorm"):
        if biased or args.get("add_qkv_bias"):
            raise UserError(
                f"{where}: its args have both qk_layernorm and biases, but no supported model has; name the model's "
                "config.json with --config"
            )
        return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    if args.get("add_qkv_bias") and not biased:
        return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {**llama, "attention_bias": biased, "mlp_bias": biased}


def _groups(args: Mapping[str, Any]) -> Any:
    grouped = args.get("group_query_attention") and type(args.get("num_query_groups")) is int
    return args["num_query_groups"] if grouped else args.get("num_attention_heads")


def _rope_scaling(args: Mapping[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
    """Return the factor of linear scaling (1: none), and Llama 3's settings."""
    if args.get("use_rope_scaling"):
        return 1.0, Llama3Scaling(_factor(args, "rope_scaling_factor", 8.0, where), _LOW, _HIGH, _ORIGINAL)
    if args.get(_INTERPOLATION) is None:
        return 1.0, None
    return _factor(args, _INTERPOLATION, 1.0, where), None


def _factor(args: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = args.get(name, default)
    if type(value) not in (int, float) or not 0 < value < _LARGEST:
        raise UserError(
            f"{where}: its args have {name} {shown(value)}, a positive number is needed; name the model's config.json "
            "with --config"
        )
    return float(value)


def _windows(args: Mapping[str, Any], num_layers: Any, where: str) -> tuple[int | None, ...]:
    """Return how many tokens every layer attends to, itself included; None: all before.

    As ``megatron.core.transformer.utils.is_layer_window_attention`` and ``get_sliding_window_causal_mask`` (0.16.1):
    with a window of (w, 0) a token sees the w tokens before it. Layers count from 1, and every n-th of
    ``window_attn_skip_freq`` = n has no window; a list gives it for each layer.
    """
    size, skip = args.get("window_size"), args.get("window_attn_skip_freq")
    if not size or type(num_layers) is not int:
        return ()
    sound = type(size) in (tuple, list) and [type(side) for side in size] == [int, int] and size[1] in (-1, 0)
    if not sound or size[0] < -1:
        raise UserError(
            f"{where}: its args have window_size {shown(size)}, supported: (tokens before, 0); "
            "config.json cannot express that"
        )
    if type(skip) is int and skip > 0:
        windowed = [layer % skip != 0 for layer in range(1, num_layers + 1)]
    elif type(skip) is list and len(skip) == num_layers:
        windowed = [bool(item) for item in skip]
    elif skip is None:
        windowed = [True] * num_layers
    else:
        raise UserError(
            f"{where}: its args have window_attn_skip_freq {shown(skip)}, a number or a list of {num_layers} is needed"
        )
    return tuple(size[0] + 1 if has and size[0] >= 0 else None for has in windowed)


def require_our_decoder(args: Mapping[str, Any], where: str) -> None:
    """Refuse ``args`` with which Megatron builds a model that no config can express.

    Raises:
        UserError: names the setting.
    """
    for name, expected in _FIXED.items():
        if not _is(name, args.get(name, expected), expected, args):
            refuse(where, name, args[name], f"supported: {expected}")
    require_our_mixture(args, where)
    part = args.get(_ROTARY, 1.0)
    if part != 1 and not has_partial_rotary(args):
        refuse(where, _ROTARY, part, "supported: 1.0")
    if type(part) not in (int, float) or not 0 < part <= 1:
        refuse(where, _ROTARY, part, "supported: above 0 and up to 1.0")
    if args.get("use_rope_scaling") and args.get(_INTERPOLATION) not in (None, 1):
        refuse(
            where, _INTERPOLATION, args[_INTERPOLATION], "and use_rope_scaling as well; only one of them is supported"
        )


def _is(name: str, value: Any, expected: Any, args: Mapping[str, Any]) -> bool:
    """Return whether a setting means the same as ``expected``."""
    if value is None:
        return not expected
    if name == "no_rope_freq" and type(value) is list:
        return not any(value)
    if name == "softmax_scale" and type(args.get("kv_channels")) is int and 0 < args["kv_channels"] < _MOST_LAYERS:
        usual = args["kv_channels"] ** -0.5  # The default.
        return type(value) in (int, float) and math.isclose(value, usual, rel_tol=1e-6)
    if name in ("no_rope_freq", "mtp_num_layers"):
        return type(value) is int and value == 0
    return bool(value == expected)


def args_from_config(
    config: Mapping[str, Any], architecture: DecoderArchitecture, vocabulary: Vocabulary, where: str
) -> argparse.Namespace:
    """Return the settings with which Megatron builds the model of a Hugging Face ``config``.

    Raises:
        UserError: Megatron has no such model.
    """
    a = architecture
    require_same_decoder(a, where)
    rope, factor, scaling = _rope_of(a, where)
    if a.output_bias != a.mlp_bias or (a.mlp_bias and not a.qkv_bias):
        raise UserError(
            f"{where}: biases are on "
            + ("attention" if a.output_bias else "the MLP")
            + " only; Megatron has them on all linear layers, on query, key and value, or nowhere"
        )
    if scaling and scaling != Llama3Scaling(scaling.factor, _LOW, _HIGH, _ORIGINAL):
        raise UserError(
            f"{where}: rope_scaling is {scaling}; Megatron's has low_freq_factor {_LOW}, high_freq_factor {_HIGH} and "
            f"original_max_position_embeddings {_ORIGINAL}"
        )
    values = {key: getattr(a, key) for key in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")}
    values |= {"num_hidden_layers": a.num_layers, "rms_norm_eps": a.norm_eps, "rope_theta": rope.theta}
    values |= {"initializer_range": a.initializer_range, "max_position_embeddings": config.get(_OPTIONAL[0])}
    return argparse.Namespace(
        **{name: values[key] for key, name in _SAME if values[key] is not None},
        **_FIXED,
        **mixture_args(a.experts, where),
        **_window_args(a.sliding_windows),
        seq_length=values["max_position_embeddings"],
        num_query_groups=a.num_key_value_heads,
        group_query_attention=a.num_key_value_heads != a.num_attention_heads,
        untie_embeddings_and_output_weights=not a.tie_word_embeddings,
        add_bias_linear=a.mlp_bias,
        add_qkv_bias=a.qkv_bias and not a.mlp_bias,
        qk_layernorm=a.qk_norm is not None,
        rotary_percent=_rotary_percent(rope.dim, a.head_dim),
        use_rope_scaling=scaling is not None,
        rope_scaling_factor=scaling.factor if scaling else 8.0,
        rotary_seq_len_interpolation_factor=factor if factor != 1 else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        vocab_size=a.vocab_size,
        padded_vocab_size=vocabulary.padded(a.vocab_size),
        make_vocab_size_divisible_by=vocabulary.divisible_by,
        tensor_model_parallel_size=vocabulary.tensor_parallel,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
    )


def require_same_decoder(architecture: DecoderArchitecture, where: str) -> None:
    """Refuse a model of another kind than those that the tables of this format describe.

    Raises:
        UserError: names the model's type or activation.
    """
    if architecture.model_type not in MODEL_TYPES:
        raise UserError(
            f"{where}: model_type {architecture.model_type} cannot be converted to Megatron's format; supported: "
            f"{', '.join(MODEL_TYPES)}; for others see Megatron Bridge (https://github.com/NVIDIA-NeMo/Megatron-Bridge)"
        )
    if architecture.activation != "silu":
        raise UserError(f"{where}: the activation is {architecture.activation}; only silu can be converted")


def _rope_of(architecture: DecoderArchitecture, where: str) -> tuple[RopeSettings, float, Llama3Scaling | None]:
    """Return the rotary settings of all layers, the factor of linear scaling (1: none), and Llama 3's settings."""
    rope = architecture.ropes[0]
    assert rope is not None
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return rope, scaling.factor, None
    if scaling is None or isinstance(scaling, Llama3Scaling):
        return rope, 1.0, scaling
    raise UserError(
        f"{where}: its rotary positions have {scaling}; Megatron's args have linear and llama3 scaling only"
    )


def _rotary_percent(dim: int, head_dim: int) -> float:
    """Return the smallest float with which Megatron's ``int(head_dim * rotary_percent)`` is ``dim``."""
    part = dim / head_dim
    return part if int(head_dim * part) == dim else math.nextafter(part, 1)


def _window_args(windows: Sequence[int | None]) -> dict[str, Any]:
    """Return the inverse of :func:`_windows`."""
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return {"window_size": None, "window_attn_skip_freq": None}
    (size,) = sizes  # All families have one size.
    some = [int(window is not None) for window in windows] if None in windows else None
    return {"window_size": (size - 1, 0), "window_attn_skip_freq": some}


def window_options(args: argparse.Namespace) -> str:
    """Return the options that give Megatron the windows of ``args``, which it does not read from a checkpoint."""
    before, after = args.window_size
    options = f"--window-size {before},{after}"
    if args.window_attn_skip_freq is None:
        return options
    runs = [f"[{has}]*{len(list(run))}" for has, run in itertools.groupby(args.window_attn_skip_freq)]
    return f"{options} --window-attn-skip-freq '{'+'.join(runs)}'"


def describe_disagreement(args: Mapping[str, Any], architecture: DecoderArchitecture, where: str) -> list[str]:
    """Return a line for every difference between ``args`` and the given config that no shape shows.

    Raises:
        UserError: they divide query, key and value into other heads, so that the tensors cannot be the config's model.
    """
    a = architecture
    heads = {"num_attention_heads": a.num_attention_heads, "kv_channels": a.head_dim}
    there = {name: args.get(name) for name in heads}
    if "group_query_attention" in args:
        heads["num_query_groups"], there["num_query_groups"] = a.num_key_value_heads, _groups(args)
    for name, here in heads.items():
        if type(there[name]) is int and there[name] != here:
            raise UserError(
                f"{where}: its args have {name} {shown(there[name])}, --config has {here}: tensors of these shapes "
                f"fit both, but the heads differ; name this model's config.json{taking_away(where)}"
            )
    require_same_mixture(args, a, where)
    rope, factor_here, scaling_here = _rope_of(a, where)
    if int(a.head_dim * args.get(_ROTARY, 1.0)) != rope.dim:
        raise UserError(
            f"{where}: its args have {_ROTARY} {shown(args.get(_ROTARY, 1.0))}, --config has {rope.dim / a.head_dim}: "
            f"other dimensions would rotate; name this model's config.json{taking_away(where)}"
        )
    lines = [
        _difference(key, here, args[name])
        for key, here, name in (("rms_norm_eps", a.norm_eps, "norm_epsilon"), ("rope_theta", rope.theta, "rotary_base"))
        if type(args.get(name)) in (int, float) and args[name] != here
    ]
    try:
        factor, scaling = _rope_scaling(args, where)
    except UserError as error:
        lines.append(f"{str(error).split(';')[0]}; the config's rotary scaling is used")
    else:
        if factor != factor_here:
            lines.append(_difference("rope_linear_factor", factor_here, factor))
        if scaling != scaling_here:
            lines.append(_difference("rope_scaling", scaling_here, scaling))
    windows = _windows(args, a.num_layers, where) or (None,) * a.num_layers
    if windows != a.sliding_windows:
        layer = next(i for i in range(a.num_layers) if windows[i] != a.sliding_windows[i])
        lines.append(_difference(f"the sliding window of layer {layer}", a.sliding_windows[layer], windows[layer]))
    return lines


def _difference(name: str, here: Any, there: Any) -> str:
    said = there if isinstance(there, Llama3Scaling) else shown(there)
    return f"{name} is {here} in config.json, which is used; the checkpoint's args have {said}"
