"""Map the parameters of a Hugging Face model to a Megatron-Core GPT checkpoint.

The mapping is one table, used in both directions. Megatron stores every linear layer like Hugging Face, [out,
in], and fuses some of them along the rows:

- query, key and value by groups: the r = heads / groups query heads of group 0, its key head, its value head, then
  group 1. Both rotate halves of a head (no interleaving), so rows within a head keep their order;
- gate and up projection one after the other;
- the vocabulary is padded with rows to a multiple that suits tensor parallelism.

Layers are stacked on a new first dimension of one tensor under ``decoder.layers.``, or each under
``decoder.layers.{i}.`` (``non_homogeneous_layers``). Keys are those that Megatron writes for both of its layer
specifications (local, and TransformerEngine, which fuses a norm into the linear layer after it).

Not supported: mixture of experts, latent attention and multi-token prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from retemper.engine.model.families import DecoderArchitecture

LAYERS = "decoder.layers."
HF_LAYERS = "model.layers."
EMBEDDING_KEY = "embedding.word_embeddings.weight"
HEAD_KEY = "output_layer.weight"
EXTRA_STATE = "_extra_state"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of one of the fused tensors, which stay together."""

    tensor_index: int
    """Index of the Hugging Face tensor that has them."""
    start: int
    stop: int


def _in_sequence(architecture: DecoderArchitecture, rows: Sequence[int]) -> list[RowRange]:
    """Return each tensor whole, one after the other."""
    return [RowRange(index, 0, count) for index, count in enumerate(rows)]


def _by_groups(architecture: DecoderArchitecture, rows: Sequence[int]) -> list[RowRange]:
    """Return queries, keys and values (tensors 0, 1, 2), group after group."""
    d, groups = architecture.head_dim, architecture.num_key_value_heads
    queries = architecture.num_attention_heads // groups * d
    return [
        RowRange(index, group * size, (group + 1) * size)
        for group in range(groups)
        for index, size in enumerate((queries, d, d))
    ]


@dataclass(frozen=True)
class Entry:
    """One row of the table: a Megatron tensor and the Hugging Face tensors in it."""

    key: str
    """Megatron's key; in a layer, the part after ``decoder.layers.``."""
    hf_names: tuple[str, ...]
    """Hugging Face names; in a layer, the part after ``model.layers.{i}.``."""
    order: Callable[[DecoderArchitecture, Sequence[int]], list[RowRange]] = _in_sequence
    """Returns the rows of the Megatron tensor in order, given the number of rows of each Hugging Face tensor."""
    exists: Callable[[DecoderArchitecture], bool] = lambda architecture: True
    aliases: tuple[str, ...] = ()
    """Other keys accepted when reading."""
    separate_keys: tuple[str, ...] = ()
    """Keys of the Hugging Face tensors, if they are stored separately (``singleton_local_shards``)."""
    has_padding: bool = False
    """True if rows without tokens follow."""


_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
LAYER_ENTRIES = (
    Entry(f"{_QKV}.layer_norm_weight", ("input_layernorm.weight",), aliases=("input_layernorm.weight",)),
    Entry(f"{_QKV}.weight", tuple(f"self_attn.{p}_proj.weight" for p in "qkv"), _by_groups),
    Entry(f"{_QKV}.bias", tuple(f"self_attn.{p}_proj.bias" for p in "qkv"), _by_groups, lambda a: a.qkv_bias),
    Entry("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), exists=lambda a: a.qk_norm is not None),
    Entry("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), exists=lambda a: a.qk_norm is not None),
    Entry("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    Entry("self_attention.linear_proj.bias", ("self_attn.o_proj.bias",), exists=lambda a: a.output_bias),
    Entry(f"{_FC1}.layer_norm_weight", ("post_attention_layernorm.weight",), aliases=("pre_mlp_layernorm.weight",)),
    Entry(
        f"{_FC1}.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        separate_keys=(f"{_FC1}.weight_w", f"{_FC1}.weight_v"),
    ),
    Entry(
        f"{_FC1}.bias",
        ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
        exists=lambda a: a.mlp_bias,
        separate_keys=(f"{_FC1}.bias_w", f"{_FC1}.bias_v"),
    ),
    Entry("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
    Entry("mlp.linear_fc2.bias", ("mlp.down_proj.bias",), exists=lambda a: a.mlp_bias),
)
MODEL_ENTRIES = (
    Entry(EMBEDDING_KEY, ("model.embed_tokens.weight",), has_padding=True),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Entry(HEAD_KEY, ("lm_head.weight",), exists=lambda a: not a.tie_word_embeddings, has_padding=True),
)
_LAYER_MODULES = ("self_attention.core_attention", _QKV, "self_attention.linear_proj", _FC1, "mlp.linear_fc2")
_QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")


@dataclass(frozen=True)
class FusedTensor:
    """One Megatron tensor of one layer, or of the model as a whole."""

    entry: Entry
    layer: int | None
    hf_names: tuple[str, ...]
    """Full Hugging Face names."""
    shapes: tuple[Shape, ...]
    """Shapes of the Hugging Face tensors."""
    row_ranges: tuple[RowRange, ...]
    """Its rows, from the first to the last, without padding."""

    @property
    def shape(self) -> Shape:
        """Shape for one layer, without padding."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def places(self) -> Iterator[tuple[int, RowRange]]:
        """Yield every range with the row at which it begins."""
        at = 0
        for rows in self.row_ranges:
            yield at, rows
            at += rows.stop - rows.start

    def key(self, layer_keys: bool, key: str | None = None) -> str:
        """Return the key without any prefix; with ``layer_keys`` the key of its own layer. ``key`` replaces the
        entry's.
        """
        key = self.entry.key if key is None else key
        if self.layer is None:
            return key
        return f"{LAYERS}{self.layer}.{key}" if layer_keys else f"{LAYERS}{key}"


def fused_tensors(architecture: DecoderArchitecture, shapes: Mapping[str, Shape]) -> list[FusedTensor]:
    """Return the Megatron tensors of a model, which hold each of its Hugging Face tensors once.

    Args:
        architecture: of the model.
        shapes: of its tensors, by Hugging Face name.
    """
    fused = []
    for layer in (None, *range(architecture.num_layers)):
        prefix = "" if layer is None else f"{HF_LAYERS}{layer}."
        for entry in MODEL_ENTRIES if layer is None else LAYER_ENTRIES:
            if not entry.exists(architecture):
                continue
            names = tuple(prefix + name for name in entry.hf_names)
            row_ranges = entry.order(architecture, [shapes[name][0] for name in names])
            fused.append(FusedTensor(entry, layer, names, tuple(shapes[name] for name in names), tuple(row_ranges)))
    held = [name for tensor in fused for name in tensor.hf_names]
    assert len(held) == len(set(held)) and set(held) == shapes.keys(), set(held) ^ shapes.keys()
    return fused


@dataclass(frozen=True)
class Vocabulary:
    """The number of rows of Megatron's embedding."""

    divisible_by: int = 128
    """Megatron's ``--make-vocab-size-divisible-by``."""
    tensor_parallel: int = 1

    def padded(self, vocab_size: int) -> int:
        """Return ``vocab_size`` rounded up to a multiple of the product of both."""
        multiple = self.divisible_by * self.tensor_parallel
        return math.ceil(vocab_size / multiple) * multiple


def extra_state_keys(architecture: DecoderArchitecture, layer_keys: bool) -> list[str]:
    """Return the keys of the objects that Megatron's modules keep next to their weights, which its loader requires.

    They hold scales for float8 and are empty otherwise. Keys of modules that a model does not have are not included.
    """
    modules = (*_LAYER_MODULES, *(_QK_NORMS if architecture.qk_norm else ()))
    count = architecture.num_layers
    keys = [f"decoder.final_layernorm.{EXTRA_STATE}/shard_0_1"]
    for layer in range(count):
        if layer_keys:
            keys += [f"{LAYERS}{layer}.{module}.{EXTRA_STATE}/shard_0_1" for module in modules]
        else:
            keys += [f"{LAYERS}{module}.{EXTRA_STATE}/shard_{layer}_{count}" for module in modules]
    return keys
