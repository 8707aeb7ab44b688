"""Map the parameters of a Hugging Face model to a Megatron-Core GPT checkpoint.

The mapping is a table, used in both directions. Megatron stores every linear layer like Hugging Face, [out, in], and
fuses some of them along the rows:

- query, key and value by groups: the r = heads / groups query heads of group 0, its key head, its value head, then
  group 1. Both rotate halves of a head (no interleaving), so rows within a head keep their order;
- gate and up projection one after the other;
- the vocabulary is padded with rows to a multiple that suits tensor parallelism.

The experts of a layer are one tensor for each linear layer, [experts, out, in]. All of Megatron's modules for experts
(``SequentialMLP``, ``GroupedMLP``, ``TEGroupedMLP``) write them so.

Layers are stacked on a new first dimension of one tensor under ``decoder.layers.``, or each under
``decoder.layers.{i}.`` (``non_homogeneous_layers``). Keys are those that Megatron writes for both of its layer
specifications (local, and TransformerEngine, which fuses a norm into the linear layer after it).

Not supported: latent attention and multi-token prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retemper.engine.model.families import DecoderArchitecture

if TYPE_CHECKING:  # the command line reads this file, and needs no PyTorch for its help
    from retemper.engine.weights.hugging_face.layout import Layout

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
    parameters: tuple[str, ...]
    """The decoder's names of the parameters in it; in a layer, the part after ``model.layers.{i}.``."""
    order: Callable[[DecoderArchitecture, Sequence[int]], list[RowRange]] = _in_sequence
    """Returns the rows of the Megatron tensor in order, given the number of rows of each Hugging Face tensor."""
    exists: Callable[[DecoderArchitecture], bool] = lambda architecture: True
    aliases: tuple[str, ...] = ()
    """Other keys accepted when reading."""
    separate_keys: tuple[str, ...] = ()
    """Keys of the Hugging Face tensors, if they are stored separately (``singleton_local_shards``). ``{expert}`` stands
    for the number of the expert."""
    has_padding: bool = False
    """True if rows without tokens follow."""
    per_expert: bool = False
    """True if the first dimension counts experts."""


def has_shared_expert(architecture: DecoderArchitecture) -> bool:
    """Return whether layers with experts have one for all tokens."""
    return architecture.experts is not None and architecture.experts.shared_intermediate_size > 0


def is_mixture(architecture: DecoderArchitecture, layer: int) -> bool:
    """Return whether ``layer`` has experts."""
    return architecture.experts is not None and architecture.experts.layers[layer]


def is_homogeneous(architecture: DecoderArchitecture) -> bool:
    """Return whether layers can be stacked: either all have experts, or none."""
    return architecture.experts is None or all(architecture.experts.layers)


_QKV, _FC1, _FC2 = "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"
_MLP_NORM, _FUSED_MLP_NORM = "pre_mlp_layernorm.weight", f"{_FC1}.layer_norm_weight"
_EXPERTS, _SHARED = "mlp.experts.experts", "mlp.shared_experts"
_ATTENTION_ENTRIES = (
    Entry(f"{_QKV}.layer_norm_weight", ("input_layernorm.weight",), aliases=("input_layernorm.weight",)),
    Entry(f"{_QKV}.weight", tuple(f"self_attn.{p}_proj.weight" for p in "qkv"), _by_groups),
    Entry(f"{_QKV}.bias", tuple(f"self_attn.{p}_proj.bias" for p in "qkv"), _by_groups, lambda a: a.qkv_bias),
    Entry("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), exists=lambda a: a.qk_norm is not None),
    Entry("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), exists=lambda a: a.qk_norm is not None),
    Entry("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    Entry("self_attention.linear_proj.bias", ("self_attn.o_proj.bias",), exists=lambda a: a.output_bias),
)
_DENSE_ENTRIES = (
    Entry(_FUSED_MLP_NORM, ("post_attention_layernorm.weight",), aliases=(_MLP_NORM,)),
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
    Entry(f"{_FC2}.weight", ("mlp.down_proj.weight",)),
    Entry(f"{_FC2}.bias", ("mlp.down_proj.bias",), exists=lambda a: a.mlp_bias),
)
# TransformerEngine has no linear layer to fuse the norm with if a router follows; the local specification renames it
# as in a dense layer.
_MIXTURE_ENTRIES = (
    Entry(_MLP_NORM, ("post_attention_layernorm.weight",), aliases=(_FUSED_MLP_NORM,)),
    Entry("mlp.router.weight", ("mlp.gate.weight",)),
    Entry(
        "mlp.router.expert_bias",
        ("mlp.gate.e_score_correction_bias",),
        exists=lambda a: a.experts is not None and a.experts.selection_bias,
    ),
    Entry(
        f"{_EXPERTS}.linear_fc1.weight",
        ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight"),
        separate_keys=tuple(f"{_EXPERTS}.{{expert}}.linear_fc1.weight_{part}" for part in "wv"),
        per_expert=True,
    ),
    Entry(
        f"{_EXPERTS}.linear_fc2.weight",
        ("mlp.experts.down_proj.weight",),
        separate_keys=(f"{_EXPERTS}.{{expert}}.linear_fc2.weight",),
        per_expert=True,
    ),
    Entry(
        f"{_SHARED}.linear_fc1.weight",
        ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        exists=has_shared_expert,
        separate_keys=tuple(f"{_SHARED}.linear_fc1.weight_{part}" for part in "wv"),
    ),
    Entry(
        f"{_SHARED}.linear_fc2.weight",
        ("mlp.shared_expert.down_proj.weight",),
        exists=has_shared_expert,
    ),
    Entry(
        f"{_SHARED}.gate_weight",
        ("mlp.shared_expert_gate.weight",),
        exists=lambda a: a.experts is not None and a.experts.shared_gate,
    ),
)
MODEL_ENTRIES = (
    Entry(EMBEDDING_KEY, ("model.embed_tokens.weight",), has_padding=True),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Entry(HEAD_KEY, ("lm_head.weight",), exists=lambda a: not a.tie_word_embeddings, has_padding=True),
)
_ATTENTION_MODULES = ("self_attention.core_attention", _QKV, "self_attention.linear_proj")
_QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_DENSE_MODULES = (_FC1, _FC2)
_MIXTURE_MODULES = ("pre_mlp_layernorm",)
_SHARED_MODULES = (f"{_SHARED}.linear_fc1", f"{_SHARED}.linear_fc2")
_EXPERT_MODULES = (f"{_EXPERTS}.linear_fc1", f"{_EXPERTS}.linear_fc2")


def _entries(architecture: DecoderArchitecture, layer: int | None) -> tuple[Entry, ...]:
    """Return the rows of the table for a layer; None: for the rest of the model."""
    entries: tuple[Entry, ...] = MODEL_ENTRIES
    if layer is not None:
        entries = _ATTENTION_ENTRIES + (_MIXTURE_ENTRIES if is_mixture(architecture, layer) else _DENSE_ENTRIES)
    return tuple(entry for entry in entries if entry.exists(architecture))


@dataclass(frozen=True)
class FusedTensor:
    """One Megatron tensor of one layer, or of the model as a whole."""

    entry: Entry
    layer: int | None
    hf_names: tuple[str, ...]
    """Full Hugging Face names. Of experts: those of the first one, then those of the second one, ..."""
    shapes: tuple[Shape, ...]
    """Shapes of the Hugging Face tensors."""
    row_ranges: tuple[RowRange, ...]
    """Its rows, from the first to the last, without padding; of all experts, one after the other."""

    @property
    def num_experts(self) -> int | None:
        """Size of the dimension that counts experts; None: there is none."""
        return len(self.hf_names) // len(self.entry.parameters) if self.entry.per_expert else None

    @property
    def rows_shape(self) -> Shape:
        """Shape for one layer with the rows of all experts in one dimension, without padding."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    @property
    def shape(self) -> Shape:
        """Shape for one layer, without padding."""
        rows, *rest = self.rows_shape
        return (rows, *rest) if self.num_experts is None else (self.num_experts, rows // self.num_experts, *rest)

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

    def separate_keys(self, layer_keys: bool) -> list[str]:
        """Return the key of each Hugging Face tensor without any prefix, if they are stored separately."""
        keys = [
            key.format(expert=expert) for expert in range(self.num_experts or 1) for key in self.entry.separate_keys
        ]
        return [self.key(layer_keys, key) for key in keys]


def fused_tensors(architecture: DecoderArchitecture, layout: Layout) -> list[FusedTensor]:
    """Return the Megatron tensors of a model, which hold each of its Hugging Face tensors once.

    Args:
        architecture: of the model.
        layout: its parameters and Hugging Face tensors. Parameters that Megatron keeps together consist of equally many
            tensors: one for each expert, else one.
    """
    fused, shapes = [], layout.published_shapes
    for layer in (None, *range(architecture.num_layers)):
        prefix = "" if layer is None else f"{HF_LAYERS}{layer}."
        for entry in _entries(architecture, layer):
            pieces = zip(*(layout.pieces[prefix + name] for name in entry.parameters), strict=True)
            names = tuple(piece.tensor for together in pieces for piece in together)
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
    keys = [f"decoder.final_layernorm.{EXTRA_STATE}/shard_0_1"]
    count, experts = architecture.num_layers, architecture.experts
    for layer in range(count):
        prefix = f"{LAYERS}{layer}." if layer_keys else LAYERS
        at, of = ((), ()) if layer_keys else ((layer,), (count,))
        keys += [_object_key(f"{prefix}{module}", at, of) for module in _modules(architecture, layer)]
        if experts is not None and experts.layers[layer]:
            keys += [
                _object_key(f"{prefix}{module}", (*at, expert), (*of, experts.num_experts))
                for module in _EXPERT_MODULES
                for expert in range(experts.num_experts)
            ]
    return keys


def _modules(architecture: DecoderArchitecture, layer: int) -> tuple[str, ...]:
    """Return the modules of a layer that keep such objects, except those that are in every expert."""
    modules = (*_ATTENTION_MODULES, *(_QK_NORMS if architecture.qk_norm else ()))
    if not is_mixture(architecture, layer):
        return (*modules, *_DENSE_MODULES)
    return (*modules, *_MIXTURE_MODULES, *(_SHARED_MODULES if has_shared_expert(architecture) else ()))


def _object_key(module: str, at: Shape, of: Shape) -> str:
    """Return Megatron's key of one of the objects of a module, as its ``ShardedObject.unique_key``."""
    offset, shape = (".".join(map(str, numbers)) for numbers in (at or (0,), of or (1,)))
    return f"{module}.{EXTRA_STATE}/shard_{offset}_{shape}"
