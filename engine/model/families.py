"""Parse a Hugging Face ``config.json`` into the architecture of the native decoder, without running remote code.

Only settings that the decoder implements are accepted. A setting that would change the numbers and is not implemented
is refused by name, never ignored. :mod:`.family_table` says what the families are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from .architecture import Architecture, BlockSize, Implementation, Piece
from .config_file import INLINE
from .config_keys import account_for_keys, require_known_keys, unread_keys
from .config_reader import ConfigReader
from .config_reader import NotNative as NotNative  # raised here; the reader of keys defines it
from .expert_keys import read_experts
from .expert_settings import ExpertSettings
from .family_table import FAMILIES, BlockNorms, Family, NormKind, QkNorm
from .layer_pattern import rotary_layers, sliding_windows
from .rope_settings import RopeSettings, read_rope
from .stored_names import stored_pieces

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
"""The implemented activations by their names in a config."""

# Far above all existing models. Beyond these limits, even a model without values takes minutes, or overflows PyTorch's
# sizes.
LARGEST_SIZE = 2**24
"""Limit of a vocabulary, a width or a number of heads."""
MOST_LAYERS = 1_000
_MOST_PARAMETERS = 10**13


@dataclass(frozen=True)
class DecoderArchitecture(Architecture):
    """A decoder-only transformer: its sizes, and the options of its parts."""

    intermediate_size: int
    initializer_range: float
    norm: NormKind
    norm_bias: bool
    norm_eps: float
    block_norms: BlockNorms
    parallel: bool
    """Whether attention and feed-forward layer read the same hidden states, and are added together."""
    qkv_bias: bool
    output_bias: bool
    qk_norm: QkNorm | None
    mlp_bias: bool
    activation: str
    """One of the values of :data:`ACTIVATIONS`."""
    gated: bool
    """Whether the activation of one projection multiplies another one."""
    ropes: tuple[RopeSettings | None, ...]
    """Rotary positions of every layer; None: it has none."""
    embedding_scale: float = 1.0
    rounds_embedding_scale: bool = False
    """Whether the factor of the embeddings is rounded to their dtype."""
    residual_scale: float = 1.0
    """Factor of what a block adds to the hidden states."""
    attention_scale: float | None = None
    """Factor of the attention scores; None: 1 / sqrt(head_dim)."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    experts: ExpertSettings | None = None
    """The experts; None: every layer has one feed-forward layer."""

    @property
    def implementation(self) -> Implementation:
        """See :class:`Architecture`."""
        return "native"

    @property
    def num_parameters(self) -> int:
        """See :class:`Architecture`."""
        h, d = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        norm = h * (1 + self.norm_bias)
        biases = (q + 2 * kv) * self.qkv_bias + h * self.output_bias
        qk_norms = {None: 0, "head": 2 * d, "full": q + kv}[self.qk_norm]
        norms = sum(name is not None for name in self.block_norms) * norm + qk_norms
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        vectors = self.num_layers * (biases + norms) + self._feed_forward_biases + norm
        return self._attention_matrices + self._feed_forward_matrices(active=False) + vectors + embeddings

    @property
    def num_active_parameters(self) -> int:
        """See :class:`Architecture`."""
        every, used = self._feed_forward_matrices(active=False), self._feed_forward_matrices(active=True)
        return self.num_parameters - (every - used)

    @property
    def block_sizes(self) -> tuple[BlockSize, ...]:
        """See :class:`Architecture`."""
        sizes, experts = super().block_sizes, self.experts
        if experts is None:
            return sizes
        every, active = self._mixture_matrices(active=False), self._mixture_matrices(active=True)
        rest = (self.num_layers * sizes[0].parameters - self._feed_forward_matrices(active=False)) // self.num_layers
        mixture = BlockSize(rest + every, rest + active)
        dense = BlockSize(rest + self._dense_matrices, rest + self._dense_matrices)
        return tuple(mixture if has_experts else dense for has_experts in experts.layers)

    @property
    def block_matrices(self) -> int:
        """See :class:`Architecture`."""
        return self._attention_matrices + self._feed_forward_matrices(active=True)

    def active_elements(self, shape: tuple[int, ...]) -> float:
        """See :class:`Architecture`. Of stacked experts, those count that a token uses."""
        elements = super().active_elements(shape)
        if len(shape) == 3 and self.experts is not None:
            return elements * self.experts.per_token / self.experts.num_experts
        return elements

    @property
    def _attention_matrices(self) -> int:
        h, d = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        return self.num_layers * (h * (q + 2 * kv) + q * h)

    def _feed_forward_matrices(self, active: bool) -> int:
        """Return the elements of the feed-forward layers, of all experts or only of those that a token uses."""
        dense = self._dense_layers * self._dense_matrices
        return dense if self.experts is None else dense + self.experts.num_layers * self._mixture_matrices(active)

    def _mixture_matrices(self, active: bool) -> int:
        """Return the elements of the feed-forward layer of a block with experts, see above."""
        h, experts = self.hidden_size, self.experts
        assert experts is not None
        count = experts.per_token if active else experts.num_experts
        inner = count * experts.intermediate_size + experts.shared_intermediate_size
        return (self._inner_projections + 1) * h * inner + h * experts.num_experts + h * experts.shared_gate

    @property
    def _dense_matrices(self) -> int:
        """Return the elements of the feed-forward layer of a block without experts."""
        return (self._inner_projections + 1) * self.hidden_size * self.intermediate_size

    @property
    def _feed_forward_biases(self) -> int:
        biases = (self._inner_projections * self.intermediate_size + self.hidden_size) * self.mlp_bias
        return self._dense_layers * biases

    @property
    def _dense_layers(self) -> int:
        return self.num_layers - (0 if self.experts is None else self.experts.num_layers)

    @property
    def _inner_projections(self) -> int:
        return 2 if self.gated else 1

    @property
    def longest_unscaled(self) -> int | None:
        """See :class:`Architecture`."""
        lengths = [rope.unscaled_length for rope in self.ropes if rope is not None]
        return min((length for length in lengths if length is not None), default=None)

    @property
    def attention_options(self) -> dict[str, float]:
        """Return the arguments of the attention operation that are not its defaults."""
        options = {"softmax_scale": self.attention_scale, "softcap": self.attention_softcap}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def head_options(self) -> dict[str, Any]:
        """Return the arguments of the output head's loss that are not its defaults."""
        options = {} if self.logit_softcap is None else {"logit_softcap": self.logit_softcap}
        return options if self.logit_scale == 1.0 else {**options, "logit_scale": self.logit_scale}

    def shortened(self, layers: Sequence[int]) -> DecoderArchitecture:
        """See :class:`Architecture`. Their attention is that of the first one."""
        experts, windows = self.experts, self.sliding_windows[:1] * len(layers)
        if experts is not None:
            chosen = tuple(experts.layers[number] for number in layers)
            experts = replace(experts, layers=chosen) if any(chosen) else None
        return replace(self, num_layers=len(layers), sliding_windows=windows, experts=experts)

    def unread_keys(self, config: dict[str, Any]) -> list[str]:
        """See :class:`Architecture`."""
        return unread_keys(config)

    @property
    def unused_tensors(self) -> tuple[str, ...]:
        """See :class:`Architecture`: the layer that predicts the token after the next one, which follows the last."""
        return (rf"^model\.layers\.{self.num_layers}\.",) if FAMILIES[self.model_type].later_tokens else ()

    @property
    def float32_tensors(self) -> frozenset[str]:
        """See :class:`Architecture`: rounded biases of the choice would choose other experts."""
        experts = self.experts
        if experts is None or not experts.selection_bias:
            return frozenset()
        numbers = [number for number, is_mixture in enumerate(experts.layers) if is_mixture]
        return frozenset(f"model.layers.{number}.mlp.gate.e_score_correction_bias" for number in numbers)

    def stored_pieces(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        """See :class:`Architecture`."""
        return stored_pieces(FAMILIES[self.model_type], shapes, self.head_dim)


def parse_decoder_architecture(config: dict[str, Any], where: str = INLINE) -> DecoderArchitecture:
    """Parse ``config``, the content of a Hugging Face ``config.json``; ``where`` names it in errors.

    Raises:
        UserError: a missing, impossible or contradictory value.
        NotNative: a setting that the decoder does not implement.
    """
    model_type = ConfigReader(config, where).choice("model_type", tuple(FAMILIES))
    family = FAMILIES[model_type]
    _refuse_quantized(ConfigReader(config, where))
    if where == INLINE:  # from a run's configuration, not from a published file
        require_known_keys(config, where)
    account_for_keys(config, where, model_type)
    reader = ConfigReader({**family.defaults, **config}, where)
    _refuse_unimplemented(reader, family)
    reader.integer("max_position_embeddings")
    heads, kv_heads, head_dim = _head_sizes(reader, family)
    num_layers = reader.size("num_hidden_layers", MOST_LAYERS)
    windows = sliding_windows(reader, model_type, num_layers)
    parallel = _flag(reader, family.parallel)
    architecture = DecoderArchitecture(
        model_type=model_type,
        vocab_size=reader.size("vocab_size", LARGEST_SIZE),
        hidden_size=reader.size("hidden_size", LARGEST_SIZE),
        intermediate_size=reader.size("intermediate_size", LARGEST_SIZE),
        num_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        sliding_windows=windows,
        initializer_range=reader.number("initializer_range", default=0.02, or_zero=True),
        norm=family.norm,
        norm_bias=family.norm_bias,
        norm_eps=reader.number(family.norm_eps, default=family.default_norm_eps, or_zero=True),
        block_norms=family.parallel_norms if parallel and family.parallel_norms else family.norms,
        parallel=parallel,
        qkv_bias=_flag(reader, family.qkv_bias),
        output_bias=_flag(reader, family.output_bias),
        qk_norm=family.qk_norm if family.qk_norm_flag is None or reader.flag(family.qk_norm_flag) else None,
        mlp_bias=_flag(reader, family.mlp_bias),
        activation=ACTIVATIONS[reader.choice(family.activation, tuple(ACTIVATIONS), default=family.default_activation)],
        gated=family.gated,
        ropes=_ropes(reader, family, head_dim, windows),
        rounds_embedding_scale=family.rounds_embedding_scale,
        experts=read_experts(reader, family, num_layers),
        **_scalars(reader, family),
    )
    if architecture.num_parameters > _MOST_PARAMETERS:
        problem = (
            f"the sizes make {architecture.num_parameters:,} parameters, at most {_MOST_PARAMETERS:,} are supported"
        )
        reader.fail("hidden_size", architecture.hidden_size, f"{problem}; correct them")
    return architecture


def require_native(architecture: Architecture, where: str) -> DecoderArchitecture:
    """Return ``architecture`` if the native decoder computes it.

    Raises:
        UserError: it does not; names ``where`` the model is.
    """
    if not isinstance(architecture, DecoderArchitecture):
        raise UserError(
            f"{where}: model_type {architecture.model_type} is not supported here; supported: {', '.join(FAMILIES)}"
        )
    return architecture


def _flag(reader: ConfigReader, flag: bool | str) -> bool:
    """Return a constant of the family, or the value of its key."""
    return flag if isinstance(flag, bool) else reader.flag(flag)


def _refuse_unimplemented(reader: ConfigReader, family: Family) -> None:
    """Refuse biases that the family has not, dropout, and options that only transformers implements."""
    for key, flag in (("attention_bias", family.qkv_bias), ("mlp_bias", family.mlp_bias)):
        if not flag and reader.flag(key):
            remedy = f"{reader.config['model_type']} models have no such biases; remove it, or set another model_type"
            reader.fail(key, True, remedy)
    for key in family.dropouts.split():
        if reader.config.get(key) is not None and reader.number(key, or_zero=True) != 0:
            reader.not_native(
                key, reader.config[key], "dropout is not implemented; set model.dropout to 0 to train without it"
            )
    for key in family.unimplemented.split():
        if type(reader.config.get(key)) in (int, float) or reader.flag(key):
            reader.not_native(key, reader.config[key], "the native decoder does not implement it")


def _head_sizes(reader: ConfigReader, family: Family) -> tuple[int, int, int]:
    """Return the number of query heads and of key/value heads, and the size of a head."""
    hidden_size = reader.size("hidden_size", LARGEST_SIZE)
    heads = reader.size("num_attention_heads", LARGEST_SIZE)
    kv_heads = heads
    if "num_key_value_heads" not in family.ignored.split():
        kv_heads = reader.size("num_key_value_heads", LARGEST_SIZE, default=heads)
    if heads % kv_heads:
        reader.fail("num_attention_heads", heads, f"it must be a multiple of num_key_value_heads = {kv_heads}")
    if reader.config.get("head_dim") is None and hidden_size % heads:
        reader.fail("hidden_size", hidden_size, f"it must be a multiple of num_attention_heads = {heads}")
    head_dim = reader.size("head_dim", LARGEST_SIZE, default=hidden_size // heads)
    if family.fixed_head_dim and head_dim * heads != hidden_size:
        reader.fail("head_dim", head_dim, f"it is hidden_size / num_attention_heads = {hidden_size / heads:g} here")
    if head_dim % 2:
        reader.fail("head_dim", head_dim, "rotary positions need an even one")
    return heads, kv_heads, head_dim


def _ropes(
    reader: ConfigReader, family: Family, head_dim: int, windows: tuple[int | None, ...]
) -> tuple[RopeSettings | None, ...]:
    """Return the rotary positions of every layer."""
    usual = read_rope(reader, family, head_dim)
    windowed = read_rope(reader, family, head_dim, windowed=True) if family.rope == "by_layer_type" else usual
    rotary = rotary_layers(reader, family, windows)
    return tuple(
        None if not rotates else usual if window is None else windowed
        for rotates, window in zip(rotary, windows, strict=True)
    )


def _scalars(reader: ConfigReader, family: Family) -> dict[str, Any]:
    """Return the factors and caps by field of the architecture; absent ones have no effect."""
    values = {}
    for key, (name, exponent) in family.scalars.items():
        if reader.config.get(key) is not None:
            values[name] = reader.number(key) ** exponent
    return values


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
