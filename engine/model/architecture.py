"""What a Hugging Face ``config.json`` says about a decoder, parsed by us: no remote code is ever run.

Only what the decoder implements is accepted; a setting that would change the numbers and is not implemented is
refused by name, never ignored.
"""

from __future__ import annotations

import json
import math
import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
CONFIG_FILE = "config.json"
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
"""What transformers takes for keys that a ``config.json`` leaves out, where it differs between families."""

# Far above all models there are. Beyond them, even a model without values takes minutes, or overflows PyTorch's sizes.
LARGEST_SIZE = 2**24
"""Of a vocabulary, a width or a number of heads."""
_MOST_LAYERS = 10_000
_MOST_PARAMETERS = 2**48
_DEEPEST = 50
"""Levels of objects and lists in a config. Writing one takes more of Python's stack than reading it."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent stretching of rotary wavelengths (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_linear_factor: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    """Attention window of every layer; None attends to the whole document."""
    initializer_range: float

    @property
    def num_parameters(self) -> int:
        """Number of distinct parameters (tied embeddings count once)."""
        h, d = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        attention = h * (q + 2 * kv) + q * h
        attention += (q + 2 * kv) * self.qkv_bias + h * self.output_bias + 2 * d * self.qk_norm
        mlp = 3 * h * self.intermediate_size + (2 * self.intermediate_size + h) * self.mlp_bias
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * h) + embeddings + h


def read_hf_config(source: dict[str, Any] | str | Path) -> dict[str, Any]:
    """The raw ``config.json``: given as a dictionary, a file or a folder that holds one.

    Raises:
        UserError: the file cannot be read, or is not a JSON object.
    """
    if isinstance(source, dict):
        return source
    path = Path(source)
    too_deep = f"nested more than {_DEEPEST} levels deep; a Hugging Face config.json is needed"
    try:
        if path.is_dir():
            path = path / CONFIG_FILE
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; a Hugging Face config.json is needed") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; fetch it again") from None
    except RecursionError:
        raise UserError(f"{path}: {too_deep}") from None
    if _is_deeper(content, _DEEPEST):
        raise UserError(f"{path}: {too_deep}")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    """Whether JSON ``content`` has objects or lists more than ``levels`` deep in each other."""
    level = [content]
    for _ in range(levels + 1):
        nested = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [child for children in nested for child in children]
    return bool(level)


def parse_architecture(config: dict[str, Any], where: str = "model.architecture") -> Architecture:
    """Read ``config``, the content of a Hugging Face ``config.json``; ``where`` names it in errors.

    Raises:
        UserError: a missing or impossible value, or a setting that the decoder does not implement.
    """
    model_type = _Reader(config, where).choice("model_type", MODEL_TYPES)
    config = {**_FAMILY_DEFAULTS[model_type], **config}
    reader = _Reader(config, where)
    reader.refuse_unless("hidden_act", "silu", default="silu")
    reader.refuse_unless("attention_dropout", 0.0, default=0.0)
    reader.refuse_unless("partial_rotary_factor", 1.0, default=1.0)
    _refuse_quantized(reader)
    hidden_size = reader.size("hidden_size")
    num_layers = reader.size("num_hidden_layers", most=_MOST_LAYERS)
    heads = reader.size("num_attention_heads")
    kv_heads = reader.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        reader.fail("num_attention_heads", heads, f"it must be a multiple of num_key_value_heads = {kv_heads}")
    if config.get("head_dim") is None and hidden_size % heads:
        reader.fail("hidden_size", hidden_size, f"it must be a multiple of num_attention_heads = {heads}")
    head_dim = reader.size("head_dim", default=hidden_size // heads)
    if head_dim % 2:
        reader.fail("head_dim", head_dim, "rotary positions need an even one")
    theta, linear_factor, scaling = _rope(reader)
    # Qwen2 has biases on q, k, v only; Llama's and Qwen3's attention_bias puts one on the output as well.
    attention_bias = model_type != "mistral" and reader.flag("attention_bias")
    architecture = Architecture(
        model_type=model_type,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_linear_factor=linear_factor,
        rope_scaling=scaling,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        qkv_bias=model_type == "qwen2" or attention_bias,
        output_bias=model_type != "qwen2" and attention_bias,
        mlp_bias=model_type == "llama" and reader.flag("mlp_bias"),
        qk_norm=model_type == "qwen3",
        sliding_windows=_sliding_windows(reader, model_type, num_layers),
        initializer_range=reader.number("initializer_range", default=0.02),
    )
    if architecture.num_parameters > _MOST_PARAMETERS:
        problem = (
            f"the sizes make {architecture.num_parameters:,} parameters, at most {_MOST_PARAMETERS:,} are supported"
        )
        reader.fail("hidden_size", hidden_size, f"{problem}; correct them")
    return architecture


def _refuse_quantized(reader: _Reader) -> None:
    """transformers and others choose by this key how they read the weights; ours are plain numbers, in and out."""
    quantization = reader.config.get("quantization_config")
    if quantization is None:
        return
    remedy = (
        "quantized weights must be dequantized first; if these are plain, remove quantization_config from the config"
    )
    if isinstance(quantization, dict) and "quant_method" in quantization:
        _Reader(quantization, f"{reader.where}: quantization_config").fail(
            "quant_method", quantization["quant_method"], remedy
        )
    reader.fail("quantization_config", quantization, remedy)


def _rope(reader: _Reader) -> tuple[float, float, RopeScaling | None]:
    """(theta, linear factor, llama3 scaling) from either spelling: ``rope_parameters`` or ``rope_theta`` with
    ``rope_scaling``."""
    parameters = {"rope_theta": reader.config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        value = reader.config.get(key) or {}
        if not isinstance(value, dict):
            reader.fail(key, value, "an object of rotary settings is needed")
        parameters.update(value)
    nested = _Reader(parameters, f"{reader.where}: rope_parameters")
    nested.refuse_unless("partial_rotary_factor", 1.0, default=1.0)
    theta = nested.number("rope_theta", default=10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, 1.0, None
    if kind == "linear":
        return theta, nested.number("factor"), None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=nested.number("factor"),
            low_freq_factor=nested.number("low_freq_factor"),
            high_freq_factor=nested.number("high_freq_factor"),
            original_max_position_embeddings=nested.integer("original_max_position_embeddings"),
        )
        if not scaling.low_freq_factor < scaling.high_freq_factor:
            nested.fail("high_freq_factor", scaling.high_freq_factor, "it must be above low_freq_factor")
        return theta, 1.0, scaling
    nested.fail("rope_type", kind, "supported: default, linear, llama3")


def _sliding_windows(reader: _Reader, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Windows by layer. Mistral's ``sliding_window`` holds for all layers; Qwen's counts only with
    ``use_sliding_window`` and from layer ``max_window_layers`` on (or as ``layer_types`` says)."""
    window = reader.config.get("sliding_window")
    enabled = model_type == "mistral" or (model_type != "llama" and reader.config.get("use_sliding_window", False))
    if not enabled or window is None:
        return (None,) * num_layers
    window = reader.integer("sliding_window")
    if model_type == "mistral":
        return (window,) * num_layers
    layer_types = reader.config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            reader.fail("layer_types", layer_types, f"it must name num_hidden_layers = {num_layers} layers")
        for kind in layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                reader.fail("layer_types", kind, "supported: full_attention, sliding_attention")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = reader.integer("max_window_layers", default=28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def inverse_frequencies(architecture: Architecture) -> list[float]:
    """Radians per position of each of the head_dim / 2 rotary pairs, with Llama 3's stretching where configured.

    The llama3 rule leaves wavelengths shorter than ``original / high_freq_factor`` alone, divides frequencies with
    wavelengths longer than ``original / low_freq_factor`` by ``factor`` and interpolates between
    (https://arxiv.org/abs/2407.21783, section 3.2; Hugging Face ``rope_type: llama3``).
    """
    d, theta = architecture.head_dim, architecture.rope_theta
    frequencies = [theta ** -(2 * i / d) / architecture.rope_linear_factor for i in range(d // 2)]
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    stretched = []
    for frequency in frequencies:
        rotations = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = min(1.0, max(0.0, (rotations - scaling.low_freq_factor) / span))
        stretched.append(keep * frequency + (1 - keep) * frequency / scaling.factor)
    return stretched


_SHORT = reprlib.Repr()
"""Cuts what a stranger's config may hold, for a line."""
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100


class _Reader:
    """Typed access to a config dictionary with errors that name the place, the key and the value."""

    def __init__(self, config: dict[str, Any], where: str):
        self.config = config
        self.where = where

    def fail(self, key: str, value: Any, remedy: str) -> NoReturn:
        raise UserError(f"{self.where}: {key} is {_SHORT.repr(value)}; {remedy}")

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.config.get(key)
        if value not in allowed:
            self.fail(key, value, f"supported: {', '.join(allowed)}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, value, "a positive integer is needed")
        return value

    def size(self, key: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
        value = self.integer(key, default)
        if value > most:
            self.fail(key, value, f"at most {most:,} is supported")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            self.fail(key, value, "a positive number is needed")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value not in (None, True, False):
            self.fail(key, value, "true or false is needed")
        return bool(value)

    def refuse_unless(self, key: str, expected: Any, default: Any) -> None:
        value = self.config.get(key, default)
        if value != expected:
            self.fail(key, value, f"only {expected!r} is implemented")
