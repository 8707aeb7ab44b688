"""The table of native families: what all models of a ``model_type`` have in common, and which keys tell them apart.

A row is data; :mod:`.families` reads a ``config.json`` by it, and :mod:`.decoder` computes the result. This module does
not import PyTorch, because the command line checks keys of inline configs by this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

NormKind = Literal["rms", "rms_fp32", "rms_plus_one", "layer_norm"]
"""rms_fp32 scales before it casts back from fp32, rms scales after. rms_plus_one scales by one plus the weight."""
QkNorm = Literal["head", "full"]
"""Whether queries and keys are normalized per head, or over all heads together."""
WindowPattern = Literal["none", "all", "qwen", "periodic", "without_rope"]
"""none: no layer has a window. all: every layer has. qwen: see ``use_sliding_window`` and ``max_window_layers``.
periodic: ``layer_types``, by default all but every n-th. without_rope: layers without rotary positions, if
``use_sliding_window``."""
RopePattern = Literal["all", "by_layer_type", "windowed", "no_rope_layers"]
"""The layers with rotary positions. by_layer_type: all, but ``rope_parameters`` differ between layers with a window and
without. windowed: those with a window. no_rope_layers: those with a 1 in that key, by default all but every n-th."""


class BlockNorms(NamedTuple):
    """Names of a block's norms by their place; None: no norm there."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    """None in a parallel block: the feed-forward layer reads what the attention reads."""
    after_mlp: str | None


_PRE = BlockNorms("input_layernorm", None, "post_attention_layernorm", None)
_POST = BlockNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_ONE = BlockNorms("input_layernorm", None, None, None)
_SANDWICH = BlockNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_GLM_SANDWICH = BlockNorms(
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
)

Scalar = tuple[str, float]
"""A field of the architecture, and the exponent that is applied to the key's value to get it."""
_GEMMA_SCALARS: dict[str, Scalar] = {
    "hidden_size": ("embedding_scale", 0.5),
    "query_pre_attn_scalar": ("attention_scale", -0.5),
    "final_logit_softcapping": ("logit_softcap", 1),
}
_GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}


@dataclass(frozen=True)
class Family:
    """The facts about a ``model_type``. The defaults are Llama's.

    A flag is a constant, or the name of the key that has it.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of transformers for keys that a ``config.json`` leaves out, as far as they differ between families."""
    keys: str = ""
    """Keys that take effect in this family only, besides those named in the other fields."""
    ignored: str = ""
    """Keys of published files that change nothing in this family, but would in others."""

    norm: NormKind = "rms"
    norm_bias: bool = False
    norm_eps: str = "rms_norm_eps"
    """Key of the norms' epsilon."""
    default_norm_eps: float = 1e-6
    norms: BlockNorms = _PRE
    parallel: bool | str = False
    """Whether attention and feed-forward layer read the same hidden states."""
    parallel_norms: BlockNorms | None = None
    """Norms of a parallel block, if they differ."""

    fixed_head_dim: bool = False
    """Whether the size of a head follows from the others."""
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    qk_norm: QkNorm | None = None
    mlp_bias: bool | str = False
    activation: str = "hidden_act"
    """Key of the activation."""
    default_activation: str = "silu"
    gated: bool = True

    windows: WindowPattern = "none"
    full_attention_every: int = 0
    """Of periodic windows: every n-th layer has none."""
    rope: RopePattern = "all"
    rope_theta: float = 10_000.0
    """Default base of the rotary frequencies."""
    window_rope_theta: float = 10_000.0
    """The same for layers with a window, if the layers differ (``by_layer_type``)."""
    rope_theta_key: str = "rope_theta"
    partial_rotary: float | None = None
    """Default part of a head that rotates; None: always the whole head."""
    partial_rotary_key: str = "partial_rotary_factor"
    rope_interleaved: bool = False
    """Whether dimension 2i rotates with 2i + 1, and not i with i + half."""
    rope_types: tuple[str, ...] = ()
    """The rotary types; empty: all."""
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of rotary types."""
    grows_queries: bool = False
    """Whether queries grow with their position, by ``llama_4_scaling_beta`` of the rotary settings."""
    default_rope: Mapping[str, Any] | None = None
    """Rotary settings of a config without any."""

    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    """Factors and caps by key."""
    rounds_embedding_scale: bool = False
    """Whether the embedding's factor is rounded to the dtype of the hidden states, as in the published models."""
    dropouts: str = "attention_dropout"
    """Keys of dropout rates, which must be zero."""
    unimplemented: str = ""
    """Keys of flags that the decoder does not implement."""

    names: Mapping[str, str] = field(default_factory=dict)
    """Parts of the decoder's names, and how files spell them."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Projections in files that are several projections of the decoder, one after the other."""
    fused_by_head: bool = False
    """Whether fused projections alternate head by head."""

    @property
    def read_keys(self) -> frozenset[str]:
        """Return the keys that this family reads, apart from those of all families."""
        flags = (self.parallel, self.qkv_bias, self.output_bias, self.mlp_bias)
        names = [self.norm_eps, self.activation, self.rope_theta_key, self.partial_rotary_key]
        names += [flag for flag in flags if isinstance(flag, str)]
        lists = f"{self.keys} {self.dropouts} {self.unimplemented}".split()
        return frozenset((*names, *self.scalars, *lists))


_ATTENTION_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_LLAMA_BIASES: dict[str, Any] = {**_ATTENTION_BIAS, "mlp_bias": "mlp_bias"}
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768}

FAMILIES: dict[str, Family] = {
    "llama": Family(defaults={"max_position_embeddings": 2048}, **_LLAMA_BIASES),
    "mistral": Family(
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}, windows="all"
    ),
    "qwen2": Family(defaults=_QWEN, qkv_bias=True, windows="qwen"),
    "qwen3": Family(defaults={**_QWEN, "head_dim": 128}, **_ATTENTION_BIAS, qk_norm="head", windows="qwen"),
}
"""The native families by ``model_type``."""

MODEL_TYPES = tuple(FAMILIES)
