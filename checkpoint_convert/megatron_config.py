"""A model's settings as Megatron-LM keeps them (the ``args`` of its command line) and as a Hugging Face config.

Megatron stores them beside the tensors in a pickle, ``common.pt`` or the object ``common_state``. It is read without
executing anything: every class in it is taken for one that does nothing (:func:`read_args`).
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.metadata import Metadata

from retemper.engine.checkpoint.safety import file_inside, inert_class
from retemper.engine.errors import UserError
from retemper.engine.model.architecture import Architecture, RopeScaling, parse_architecture

from .megatron_layout import Vocabulary

COMMON_FILE = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"
_MAX_PICKLE_BYTES = 256 << 20

# The settings that have a counterpart: Hugging Face's key and Megatron's.
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
# What our decoder is, in Megatron's words. Another value is another model.
_FIXED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "swiglu": True,
    "squared_relu": False,
    "qk_l2_norm": False,
    "window_size": None,
    "num_experts": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
}
# Megatron's use_rope_scaling is Llama 3's rule with these settings; only the factor can be set.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self._inert = inert_class()

    def find_class(self, module: str, name: str) -> Any:
        return self._inert

    def persistent_load(self, pid: Any) -> None:
        return None


def read_args(folder: Path, metadata: Metadata) -> dict[str, Any] | None:
    """The command line's settings that the Megatron checkpoint ``folder`` was written with, None if it has none.

    Values of unknown classes are objects that are of no use. Nothing is executed.

    Raises:
        UserError: the file leads out of ``folder``.
    """
    path = file_inside(folder, COMMON_FILE)
    try:
        if path.is_file():
            content = _unpickle(path.read_bytes()) if path.stat().st_size <= _MAX_PICKLE_BYTES else None
        else:
            content = _unpickle(_stored_object(folder, metadata))
    except Exception:  # Bytes that are no pickle raise nearly anything; the config must come from elsewhere then.
        return None
    content = content[0] if isinstance(content, list) and content else content
    args = content.get("args") if isinstance(content, dict) else None
    found = getattr(args, "__dict__", None)
    return dict(found) if found else None


def _stored_object(folder: Path, metadata: Metadata) -> bytes:
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == _COMMON_OBJECT)
    with open(file_inside(folder, place.relative_path), "rb") as file:
        file.seek(place.offset)
        return file.read(min(place.length, _MAX_PICKLE_BYTES))


def _unpickle(saved: bytes) -> Any:
    """What ``torch.save`` wrote, without its tensors."""
    with zipfile.ZipFile(BytesIO(saved)) as archive:
        (member,) = (item for item in archive.infolist() if item.filename.split("/", 1)[-1] == "data.pkl")
        if member.file_size > _MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError
        return _InertUnpickler(BytesIO(archive.read(member))).load()


def config_from_args(args: Mapping[str, Any], padded_vocab_size: int, where: str) -> dict[str, Any]:
    """The Hugging Face config of the model that Megatron was told to build by ``args``.

    Megatron may not say how many rows of the embedding stand for tokens: then all do.

    Raises:
        UserError: something is missing, or the model is none of those that we know.
    """
    config: dict[str, Any] = {}
    for key, name in _SAME:
        value = args.get(name)
        if type(value) in (int, float):
            config[key] = value
        elif key not in _OPTIONAL:
            raise UserError(f"{where}: its args hold no {name}; name the model's config.json with --config")
    for name, expected in _FIXED.items():
        if (value := args.get(name, expected)) != expected:
            raise UserError(
                f"{where}: its args say {name} {_shown(value)}, supported: {expected}; if that is wrong, name the "
                "model's config.json with --config"
            )
    grouped = args.get("group_query_attention") and type(args.get("num_query_groups")) is int
    config["num_key_value_heads"] = args["num_query_groups"] if grouped else config["num_attention_heads"]
    known = args.get("vocab_size")
    config["vocab_size"] = known if type(known) is int and 0 < known <= padded_vocab_size else padded_vocab_size
    config["tie_word_embeddings"] = not args.get("untie_embeddings_and_output_weights", False)
    config |= _family(args, where)
    config["rope_scaling"] = _rope_scaling(args)
    return {**config, "hidden_act": "silu"}


def _family(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    biased = bool(args.get("add_bias_linear", True))
    if args.get("qk_layernorm"):
        if biased or args.get("add_qkv_bias"):
            raise UserError(
                f"{where}: its args say qk_layernorm and biases, which no supported model has together; name the "
                "model's config.json with --config"
            )
        return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    if args.get("add_qkv_bias") and not biased:
        return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {**llama, "attention_bias": biased, "mlp_bias": biased}


def _rope_scaling(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if args.get("use_rope_scaling"):
        return {
            "rope_type": "llama3",
            "factor": float(args.get("rope_scaling_factor", 8.0)),
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": _ORIGINAL,
        }
    factor = args.get("rotary_seq_len_interpolation_factor")
    return {"rope_type": "linear", "factor": float(factor)} if factor is not None else None


def args_from_config(
    config: Mapping[str, Any], architecture: Architecture, vocabulary: Vocabulary, where: str
) -> argparse.Namespace:
    """The settings with which Megatron builds the model of a Hugging Face ``config``.

    Raises:
        UserError: Megatron has no such model.
    """
    a, scaling = architecture, architecture.rope_scaling
    if a.output_bias != a.mlp_bias or (a.mlp_bias and not a.qkv_bias):
        raise UserError(
            f"{where}: biases are on " + ("attention" if a.output_bias else "the MLP") + " only; Megatron has them on "
            "all linear layers, on query, key and value, or on none"
        )
    if scaling and scaling != RopeScaling(scaling.factor, _LOW, _HIGH, _ORIGINAL):
        raise UserError(
            f"{where}: rope_scaling is {scaling}; Megatron's has low_freq_factor {_LOW}, high_freq_factor {_HIGH} and "
            f"original_max_position_embeddings {_ORIGINAL}"
        )
    values = {key: getattr(a, key) for key in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")}
    values |= {"num_hidden_layers": a.num_layers, "rms_norm_eps": a.rms_norm_eps, "rope_theta": a.rope_theta}
    values |= {"initializer_range": a.initializer_range, "max_position_embeddings": config.get(_OPTIONAL[0])}
    windows = [window for window in a.sliding_windows if window is not None]
    return argparse.Namespace(
        **{name: values[key] for key, name in _SAME if values[key] is not None},
        **{**_FIXED, "window_size": (windows[0] - 1, 0) if windows else None},
        seq_length=values["max_position_embeddings"],
        num_query_groups=a.num_key_value_heads,
        group_query_attention=a.num_key_value_heads != a.num_attention_heads,
        untie_embeddings_and_output_weights=not a.tie_word_embeddings,
        add_bias_linear=a.mlp_bias,
        add_qkv_bias=a.qkv_bias and not a.mlp_bias,
        qk_layernorm=a.qk_norm,
        use_rope_scaling=scaling is not None,
        rope_scaling_factor=scaling.factor if scaling else 8.0,
        rotary_seq_len_interpolation_factor=a.rope_linear_factor if a.rope_linear_factor != 1 else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        vocab_size=a.vocab_size,
        padded_vocab_size=vocabulary.padded(a.vocab_size),
        make_vocab_size_divisible_by=vocabulary.divisible_by,
        tensor_model_parallel_size=vocabulary.tensor_parallel,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
    )


def describe_disagreement(args: Mapping[str, Any], config: Mapping[str, Any], where: str) -> list[str]:
    """A line for every number that ``args`` and ``config`` give otherwise and that no shape would betray."""
    try:
        there = parse_architecture(config_from_args(args, 1, where))
    except UserError:
        return []
    here = parse_architecture(dict(config), where)
    return [
        f"{name} is {getattr(here, name)} in config.json, which is taken; the checkpoint's args say "
        f"{getattr(there, name)}"
        for name in ("rms_norm_eps", "rope_theta", "rope_linear_factor", "rope_scaling")
        if getattr(here, name) != getattr(there, name)
    ]


def _shown(value: Any) -> str:
    text = repr(value) if type(value) in (int, float, str, bool, tuple, type(None)) else "something else"
    return text if len(text) <= 50 else text[:50] + "..."
