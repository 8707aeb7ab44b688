"""Parse a Hugging Face ``config.json`` into the architecture of the native decoder, without running remote code.

Only settings that the decoder implements are accepted. A setting that would change the numbers and is not implemented
is refused by name, never ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import UserError
from .config_file import INLINE
from .config_keys import account_for_keys
from .config_reader import ConfigReader
from .language_model import Architecture, Implementation
from .rope_settings import RopeScaling, read_rope

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_SILU = ("silu", "swish")
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}
"""Defaults of transformers for keys that a ``config.json`` leaves out, as far as they differ between families."""

# Far above all existing models. Beyond these limits, even a model without values takes minutes, or overflows PyTorch's
# sizes.
LARGEST_SIZE = 2**24
"""Limit of a vocabulary, a width or a number of heads."""
MOST_LAYERS = 1_000
_MOST_PARAMETERS = 10**13


@dataclass(frozen=True)
class DecoderArchitecture(Architecture):
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_linear_factor: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    initializer_range: float

    @property
    def implementation(self) -> Implementation:
        """See :class:`Architecture`."""
        return "native"

    @property
    def num_parameters(self) -> int:
        """See :class:`Architecture`."""
        h, d = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        attention = h * (q + 2 * kv) + q * h
        attention += (q + 2 * kv) * self.qkv_bias + h * self.output_bias + 2 * d * self.qk_norm
        mlp = 3 * h * self.intermediate_size + (2 * self.intermediate_size + h) * self.mlp_bias
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * h) + embeddings + h

    @property
    def block_matrices(self) -> int:
        """See :class:`Architecture`."""
        h, d = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        return self.num_layers * (h * (q + 2 * kv) + q * h + 3 * h * self.intermediate_size)


def parse_decoder_architecture(config: dict[str, Any], where: str = INLINE) -> DecoderArchitecture:
    """Parse ``config``, the content of a Hugging Face ``config.json``; ``where`` names it in errors.

    Raises:
        UserError: a missing or impossible value, or a setting that the decoder does not implement.
    """
    model_type = ConfigReader(config, where).choice("model_type", MODEL_TYPES)
    _refuse_quantized(ConfigReader(config, where))
    account_for_keys(config, where, model_type)
    config = {**_FAMILY_DEFAULTS[model_type], **config}
    reader = ConfigReader(config, where)
    reader.choice("hidden_act", _SILU, default=_SILU[0])
    reader.refuse_unless("attention_dropout", 0.0)
    hidden_size = reader.size("hidden_size", LARGEST_SIZE)
    num_layers = reader.size("num_hidden_layers", MOST_LAYERS)
    heads = reader.size("num_attention_heads", LARGEST_SIZE)
    kv_heads = reader.size("num_key_value_heads", LARGEST_SIZE, default=heads)
    if heads % kv_heads:
        reader.fail("num_attention_heads", heads, f"it must be a multiple of num_key_value_heads = {kv_heads}")
    if config.get("head_dim") is None and hidden_size % heads:
        reader.fail("hidden_size", hidden_size, f"it must be a multiple of num_attention_heads = {heads}")
    head_dim = reader.size("head_dim", LARGEST_SIZE, default=hidden_size // heads)
    if head_dim % 2:
        reader.fail("head_dim", head_dim, "rotary positions need an even one")
    rope = read_rope(reader, reader.integer("max_position_embeddings"))
    biases = _biases(reader, model_type)
    architecture = DecoderArchitecture(
        model_type=model_type,
        vocab_size=reader.size("vocab_size", LARGEST_SIZE),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size", LARGEST_SIZE),
        num_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", default=1e-6, or_zero=True),
        rope_theta=rope.theta,
        rope_linear_factor=rope.linear_factor,
        rope_scaling=rope.scaling,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        qkv_bias=biases.qkv,
        output_bias=biases.output,
        mlp_bias=biases.mlp,
        qk_norm=model_type == "qwen3",
        sliding_windows=_sliding_windows(reader, model_type, num_layers),
        initializer_range=reader.number("initializer_range", default=0.02, or_zero=True),
    )
    if architecture.num_parameters > _MOST_PARAMETERS:
        problem = (
            f"the sizes make {architecture.num_parameters:,} parameters, at most {_MOST_PARAMETERS:,} are supported"
        )
        reader.fail("hidden_size", hidden_size, f"{problem}; correct them")
    return architecture


def require_native(architecture: Architecture, where: str) -> DecoderArchitecture:
    """Return ``architecture`` if the native decoder computes it.

    Raises:
        UserError: it does not; names ``where`` the model is.
    """
    if not isinstance(architecture, DecoderArchitecture):
        raise UserError(
            f"{where}: model_type {architecture.model_type} is not supported here; supported: {', '.join(MODEL_TYPES)}"
        )
    return architecture


class _Biases(NamedTuple):
    """The linear layers that have biases."""

    qkv: bool
    output: bool
    mlp: bool


def _biases(reader: ConfigReader, model_type: str) -> _Biases:
    attention, mlp = reader.flag("attention_bias"), reader.flag("mlp_bias")
    if mlp and model_type != "llama":
        reader.fail("mlp_bias", mlp, f"{model_type} models have no biases in the MLP; remove it")
    if attention and model_type == "mistral":
        reader.fail("attention_bias", attention, "mistral models have no biases; remove it, or set model_type: llama")
    if model_type == "qwen2":  # on query, key and value; attention_bias is ignored
        return _Biases(qkv=True, output=False, mlp=False)
    return _Biases(qkv=attention, output=attention, mlp=mlp)


def _refuse_quantized(reader: ConfigReader) -> None:
    """Refuse quantization settings: other programs choose by this key how they read weights, and ours are plain
    numbers.
    """
    quantization = reader.config.get("quantization_config")
    if quantization is None:
        return
    remedy = (
        "quantized weights must be dequantized first; if these are not quantized, remove quantization_config from the "
        "config"
    )
    if isinstance(quantization, dict) and "quant_method" in quantization:
        ConfigReader(quantization, f"{reader.where}: quantization_config").fail(
            "quant_method", quantization["quant_method"], remedy
        )
    reader.fail("quantization_config", quantization, remedy)


def _sliding_windows(reader: ConfigReader, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Return the window of each layer.

    Mistral's ``sliding_window`` applies to all layers, Llama has none. Qwen's applies only with ``use_sliding_window``,
    and from layer ``max_window_layers`` on (or according to ``layer_types``).
    """
    config, kinds = reader.config, _layer_types(reader, num_layers)
    wanted, window = reader.flag("use_sliding_window"), None
    if config.get("sliding_window") is not None:
        window = reader.integer("sliding_window", least=0)
    first = reader.integer("max_window_layers", default=28, least=0)
    windows: tuple[int | None, ...] = (None,) * num_layers
    if model_type == "llama":
        if wanted or (window is not None and config.get("use_sliding_window") is None):
            key = "use_sliding_window" if wanted else "sliding_window"
            reader.fail(key, config[key], "Llama models have no sliding windows; remove it, or set model_type: mistral")
    elif model_type == "mistral":
        if window is not None and not wanted and config.get("use_sliding_window") is not None:
            remedy = f"Mistral models have their sliding_window ({window}) in all layers; set sliding_window to null"
            reader.fail("use_sliding_window", False, remedy)
        if window is not None and config.get("max_window_layers"):
            reader.fail("max_window_layers", first, "Mistral models have their window in all layers; remove it")
        windows = (window,) * num_layers
    elif wanted and kinds is not None:
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    elif wanted:
        windows = tuple(window if layer >= first else None for layer in range(num_layers))
    if any(size is not None for size in windows):
        reader.integer("sliding_window")  # if used, 0 would hide everything
    if kinds is not None and [kind == "sliding_attention" for kind in kinds] != [bool(window) for window in windows]:
        has = f"sliding_window {config.get('sliding_window')} and use_sliding_window {str(wanted).lower()}"
        remedy = f"with model_type {model_type}, {has}, other layers have windows; correct or remove layer_types"
        reader.fail("layer_types", kinds, remedy)
    return windows


def _layer_types(reader: ConfigReader, num_layers: int) -> list[str] | None:
    kinds = reader.config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        reader.fail("layer_types", kinds, f"it must name num_hidden_layers = {num_layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            reader.fail("layer_types", kind, "supported: full_attention, sliding_attention")
    return kinds


def inverse_frequencies(architecture: DecoderArchitecture) -> list[float]:
    """Return radians per position of each of the head_dim / 2 rotary pairs, with Llama 3's scaling if configured.

    The llama3 rule keeps wavelengths shorter than ``original / high_freq_factor``. It divides frequencies with
    wavelengths longer than ``original / low_freq_factor`` by ``factor``, and interpolates in between
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
