"""The table of native families: what all models of a ``model_type`` have in common, and which keys tell them apart.

A row is data; :mod:`.families` reads a ``config.json`` by it, and :mod:`.decoder` computes the result. This module does
not import PyTorch, because the command line checks keys of inline configs by this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .expert_settings import ExpertFamily

NormKind = Literal["rms", "rms_fp32", "rms_plus_one", "layer_norm"]
"""rms_fp32 scales before it casts back from fp32, rms scales after. rms_plus_one scales by one plus the weight."""
QkNorm = Literal["head", "full"]
"""Whether queries and keys are normalized per head, or over all heads together."""
WindowPattern = Literal["none", "all", "qwen", "from_layer", "periodic", "without_rope"]
"""none: no layer has a window. all: every layer has. qwen: see ``use_sliding_window`` and ``max_window_layers``.
from_layer: those from ``max_window_layers`` on. periodic: ``layer_types``, by default all but every n-th. without_rope:
layers without rotary positions, if ``use_sliding_window``."""
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
    qk_norm_flag: str | None = None
    """Key of a flag without which queries and keys are not normalized."""
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
    rope_in_fp32: bool = False
    """Whether queries and keys rotate in fp32."""
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
    """Keys of flags and limits that the decoder does not implement; false and null mean that there are none."""
    later_tokens: str = ""
    """Keys of the number of layers that predict later tokens. Files hold these layers, and the decoder leaves them
    out."""

    names: Mapping[str, str] = field(default_factory=dict)
    """Parts of the decoder's names, and how files spell them."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Projections in files that are several projections of the decoder, one after the other."""
    fused_by_head: bool = False
    """Whether fused projections alternate head by head."""
    experts: ExpertFamily | None = None
    """The experts of a mixture-of-experts model."""

    @property
    def read_keys(self) -> frozenset[str]:
        """Return the keys that this family reads, apart from those of all families."""
        flags = (self.parallel, self.qkv_bias, self.output_bias, self.mlp_bias)
        names = [self.norm_eps, self.activation, self.rope_theta_key, self.partial_rotary_key]
        names += [flag for flag in (*flags, self.qk_norm_flag) if isinstance(flag, str)]
        lists = f"{self.keys} {self.dropouts} {self.unimplemented} {self.later_tokens}".split()
        return frozenset((*names, *self.scalars, *lists, *(self.experts.read_keys if self.experts else ())))


_ATTENTION_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_LLAMA_BIASES: dict[str, Any] = {**_ATTENTION_BIAS, "mlp_bias": "mlp_bias"}
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768}

_QWEN_MOE = {"max_position_embeddings": 32768, "use_sliding_window": False, "router_aux_loss_coef": 0.001}
_DEEPSEEK_EXPERTS = ExpertFamily("n_routed_experts", layers="first_dense", shared="number", scoring="sigmoid")
_SHARED_EXPERTS = {"mlp.shared_expert.": "mlp.shared_experts."}

_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}
_GEMMA_ROW: dict[str, Any] = {
    **_ATTENTION_BIAS,
    "norm": "rms_plus_one",
    "norms": _SANDWICH,
    "activation": "hidden_activation",
    "default_activation": "gelu_pytorch_tanh",
    "windows": "periodic",
    "rounds_embedding_scale": True,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(defaults={"max_position_embeddings": 2048}, **_LLAMA_BIASES),
    "mistral": Family(
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}, windows="all"
    ),
    "ministral3": Family(
        defaults={"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144},
        default_norm_eps=1e-5,
        windows="all",
        default_rope=_MINISTRAL3_ROPE,
        grows_queries=True,
    ),
    "qwen2": Family(defaults=_QWEN, qkv_bias=True, windows="qwen"),
    "qwen3": Family(defaults={**_QWEN, "head_dim": 128}, **_ATTENTION_BIAS, qk_norm="head", windows="qwen"),
    "qwen2_moe": Family(
        defaults={
            **_QWEN_MOE,
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        qkv_bias="qkv_bias",
        unimplemented="use_sliding_window",
        ignored="sliding_window max_window_layers",
        experts=ExpertFamily(default_num_experts=60, shared="own_size"),
    ),
    "qwen3_moe": Family(
        defaults={
            **_QWEN_MOE,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        **_ATTENTION_BIAS,
        qk_norm="head",
        unimplemented="use_sliding_window",
        ignored="sliding_window",
        experts=ExpertFamily(default_num_experts=128),
    ),
    "mixtral": Family(
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        default_norm_eps=1e-5,
        windows="all",
        rope_theta=1e6,
        dropouts="attention_dropout router_jitter_noise",
        names={"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        experts=ExpertFamily("num_local_experts", "num_experts", 8, "intermediate_size", layers="all", normalize=True),
    ),
    "olmoe": Family(
        defaults={
            "max_position_embeddings": 4096,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.01,
        },
        default_norm_eps=1e-5,
        **_ATTENTION_BIAS,
        qk_norm="full",
        unimplemented="clip_qkv",
        experts=ExpertFamily(default_num_experts=64, intermediate_size="intermediate_size", layers="all"),
    ),
    "glm4_moe": Family(
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
        default_norm_eps=1e-5,
        qkv_bias="attention_bias",
        qk_norm="head",
        qk_norm_flag="use_qk_norm",
        partial_rotary=0.5,
        later_tokens="num_nextn_predict_layers num_mtp_layers",
        names=_SHARED_EXPERTS,
        experts=_DEEPSEEK_EXPERTS._replace(default_num_experts=128),
    ),
    "dots1": Family(
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "sliding_window": 4096,
            "max_window_layers": 62,
            "moe_intermediate_size": 1408,
        },
        **_ATTENTION_BIAS,
        qk_norm="head",
        windows="from_layer",
        names=_SHARED_EXPERTS,
        experts=_DEEPSEEK_EXPERTS,
    ),
    "olmo2": Family(
        defaults={"max_position_embeddings": 2048},
        **_ATTENTION_BIAS,
        norm="rms_fp32",
        default_norm_eps=1e-5,
        norms=_POST,
        qk_norm="full",
        rope_in_fp32=True,
    ),
    "olmo3": Family(
        defaults={"max_position_embeddings": 2048, "sliding_window": 4096},
        **_ATTENTION_BIAS,
        norm="rms_fp32",
        default_norm_eps=1e-5,
        norms=_POST,
        qk_norm="full",
        windows="periodic",
        full_attention_every=4,
        rope="by_layer_type",
        rope_in_fp32=True,
        rope_theta=5e5,
        window_rope_theta=5e5,
    ),
    "smollm3": Family(
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True},
        keys="no_rope_layers no_rope_layer_interval",
        **_LLAMA_BIASES,
        windows="without_rope",
        rope="no_rope_layers",
        rope_theta=2e6,
    ),
    "granite": Family(
        defaults={"max_position_embeddings": 2048, "attention_multiplier": 1.0},
        **_LLAMA_BIASES,
        scalars={
            "embedding_multiplier": ("embedding_scale", 1),
            "residual_multiplier": ("residual_scale", 1),
            "attention_multiplier": ("attention_scale", 1),
            "logits_scaling": ("logit_scale", -1),
        },
    ),
    "phi3": Family(
        defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        default_norm_eps=1e-5,
        windows="all",
        partial_rotary=1.0,
        dropouts="attention_dropout resid_pdrop embd_pdrop",
        fused={"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), **_GATE_UP},
        rope_types=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},
    ),
    "gemma2": Family(
        defaults={
            **_GEMMA,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        **_GEMMA_ROW,
        full_attention_every=2,
        scalars={**_GEMMA_SCALARS, "attn_logit_softcapping": ("attention_softcap", 1)},
    ),
    "gemma3_text": Family(
        defaults={**_GEMMA, "max_position_embeddings": 131072, "sliding_window": 4096},
        keys="sliding_window_pattern rope_local_base_freq",
        ignored="_sliding_window_pattern",
        **_GEMMA_ROW,
        qk_norm="head",
        full_attention_every=6,
        rope="by_layer_type",
        rope_theta=1e6,
        scalars=_GEMMA_SCALARS,
    ),
    "seed_oss": Family(
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_dropout": 0.1,
            "residual_dropout": 0.1,
        },
        qkv_bias="attention_bias",
        output_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        dropouts="attention_dropout residual_dropout",
    ),
    "gpt_neox": Family(
        defaults={"max_position_embeddings": 2048, "attention_bias": True, "use_parallel_residual": True},
        ignored="num_key_value_heads",
        norm="layer_norm",
        norm_bias=True,
        norm_eps="layer_norm_eps",
        default_norm_eps=1e-5,
        parallel="use_parallel_residual",
        fixed_head_dim=True,
        **_ATTENTION_BIAS,
        mlp_bias=True,
        default_activation="gelu",
        gated=False,
        rope_theta_key="rotary_emb_base",
        partial_rotary=0.25,
        partial_rotary_key="rotary_pct",
        dropouts="attention_dropout hidden_dropout",
        names={
            "self_attn.o_proj": "attention.dense",
            "self_attn.": "attention.",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.norm": "gpt_neox.final_layer_norm",
            "model.layers": "gpt_neox.layers",
            "lm_head": "embed_out",
        },
        fused={"self_attn.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
        fused_by_head=True,
    ),
    "glm4": Family(
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "attention_bias": True,
        },
        default_norm_eps=1.5625e-07,
        norms=_GLM_SANDWICH,
        qkv_bias="attention_bias",
        partial_rotary=0.5,
        rope_interleaved=True,
        fused=_GATE_UP,
    ),
    "cohere2": Family(
        defaults={
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "logit_scale": 0.0625,
        },
        keys="sliding_window_pattern",
        norm="layer_norm",
        norm_eps="layer_norm_eps",
        default_norm_eps=1e-5,
        norms=_ONE,
        parallel=True,
        fixed_head_dim=True,
        **_ATTENTION_BIAS,
        windows="periodic",
        full_attention_every=4,
        rope="windowed",
        rope_interleaved=True,
        scalars={"logit_scale": ("logit_scale", 1)},
    ),
    "starcoder2": Family(
        defaults={
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.018042,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
        ignored="activation_function layer_norm_epsilon",
        norm="layer_norm",
        norm_bias=True,
        norm_eps="norm_epsilon",
        default_norm_eps=1e-5,
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        default_activation="gelu_pytorch_tanh",
        gated=False,
        windows="all",
        dropouts="attention_dropout residual_dropout embedding_dropout",
        names={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    ),
    "stablelm": Family(
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 4096},
        norm="layer_norm",
        norm_bias=True,
        norm_eps="layer_norm_eps",
        default_norm_eps=1e-5,
        parallel="use_parallel_residual",
        parallel_norms=_ONE,
        fixed_head_dim=True,
        qkv_bias="use_qkv_bias",
        partial_rotary=0.25,
        dropouts="attention_dropout hidden_dropout",
        unimplemented="qk_layernorm",
    ),
}
"""The native families by ``model_type``."""
