"""The facts about a model that transformers computes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from ...errors import UserError
from ..architecture import Architecture, Implementation, Piece
from ..changed_config import dropouts
from ..config_file import INLINE
from ..config_keys import HARMLESS
from .config_keys import account_for_keys, unread_keys
from .library import Parts, find_parts, library_attention, library_config, meta_library_model
from .stored_names import float32_tensors, stored_pieces, unused_tensors
from .tiny import with_num_blocks

_MOST_PADDING = 8
"""Rows of a table of positions that are for no position: OPT has two."""
DocumentMode = Literal["packed", "one_by_one", "library_attention"]
"""How the documents of a batch are kept apart: by our attention; by computing each block one document at a time, with
our attention; or with that of transformers."""

_DESCRIBED = {
    "one_by_one": "blocks compute one document at a time",
    "library_attention": "blocks compute one document at a time, with the attention of transformers",
}


@dataclass(frozen=True, kw_only=True)
class TransformersArchitecture(Architecture):
    """A causal language model of transformers."""

    config: Mapping[str, Any]
    """Content of its ``config.json``, of the language model alone."""
    parameters: int
    matrices: int
    """See :attr:`block_matrices`."""
    inactive: int
    """Number of parameters of the experts that a token is not routed to."""
    names: tuple[str, str]
    """Of the embedding and of the head."""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """See :attr:`unused_tensors`."""
    float32: frozenset[str] = field(default=frozenset(), compare=False)
    """See :attr:`float32_tensors`."""
    documents: DocumentMode = "library_attention"
    """The slowest way, which every type supports; :mod:`.self_check` looks for a faster one."""
    reason: str = field(default="", compare=False)
    """Why transformers computes it."""
    remark: str = field(default="", compare=False)
    """Why documents are not packed."""

    def __hash__(self) -> int:
        return hash((self.model_type, json.dumps(dict(self.config), sort_keys=True, default=str)))

    @property
    def implementation(self) -> Implementation:
        """See :class:`Architecture`."""
        return "transformers"

    @property
    def num_parameters(self) -> int:
        """See :class:`Architecture`."""
        return self.parameters

    @property
    def num_active_parameters(self) -> int:
        """See :class:`Architecture`."""
        return self.parameters - self.inactive

    @property
    def block_matrices(self) -> int:
        """See :class:`Architecture`."""
        return self.matrices

    def active_elements(self, shape: tuple[int, ...]) -> float:
        """See :class:`Architecture`. Of stacked experts, those count that a token uses."""
        return _active_elements(shape, _experts_per_token(library_config(dict(self.config), self.model_type)))

    @property
    def embedding_name(self) -> str:
        """See :class:`Architecture`."""
        return self.names[0]

    @property
    def head_name(self) -> str:
        """See :class:`Architecture`."""
        return self.names[1]

    def shortened(self, layers: Sequence[int]) -> TransformersArchitecture:
        """See :class:`Architecture`. Instead of ``layers``, its blocks are spread evenly over those of this model."""
        config = library_config(dict(self.config), self.model_type).to_dict()
        short = parse_transformers_architecture(with_num_blocks(config, len(layers)), self.model_type, self.reason)
        return replace(short, documents=self.documents, remark=self.remark)

    def unread_keys(self, config: dict[str, Any]) -> list[str]:
        """See :class:`Architecture`."""
        return unread_keys(config, library_config(config, self.model_type))

    def stored_pieces(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        """See :class:`Architecture`."""
        return stored_pieces(_parts(json.dumps(dict(self.config), default=str)).model, shapes, self.model_type)

    @property
    def unused_tensors(self) -> tuple[str, ...]:
        """See :class:`Architecture`."""
        return self.unused

    @property
    def float32_tensors(self) -> frozenset[str]:
        """See :class:`Architecture`."""
        return self.float32

    @property
    def packs_documents(self) -> bool:
        """See :class:`Architecture`."""
        return self.documents == "packed"

    def describe_implementation(self) -> str:
        """See :class:`Architecture`."""
        import transformers

        how = f"; {_DESCRIBED[self.documents]}: {self.remark}" if self.documents != "packed" else ""
        return (
            f"transformers {transformers.__version__}, without tensor and pipeline parallelism, because {self.reason}"
            f"{how}"
        )

    def facts(self) -> dict[str, Any]:
        """See :class:`Architecture`."""
        return {name: value for name, value in self.config.items() if name not in HARMLESS}


def parse_transformers_architecture(config: dict[str, Any], where: str, reason: str) -> TransformersArchitecture:
    """Parse ``config``, the content of a ``config.json``; ``where`` names it in errors.

    ``reason`` says why transformers computes it.

    Raises:
        UserError: transformers cannot compute it, or we cannot train what it computes.
    """
    made = library_config(config, where)
    account_for_keys(config, made, where, inline=where == INLINE)
    dropped = dropouts(config, where)
    if dropped:
        key, value = next(iter(dropped.items()))
        raise UserError(
            f"{where}: {key} is {value:g}; dropout is not implemented: set model.dropout to 0 to train without it"
        )
    try:
        return replace(_facts(config, made, _parts(json.dumps(config, default=str))), reason=reason)
    except Exception as error:  # whatever the code of the type raises
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{where}: transformers cannot build a {made.model_type} model from it: {problem}") from None


@functools.lru_cache(maxsize=4)
def _parts(config: str) -> Parts:
    """Return the parts of a model without values, which must not be changed. Large ones take a second to build."""
    made = library_config(json.loads(config), "config.json")
    return find_parts(meta_library_model(made, library_attention(made)))


def _facts(config: dict[str, Any], made: Any, parts: Parts) -> TransformersArchitecture:
    names = {id(module): name for name, module in parts.model.named_modules()}
    heads = made.num_attention_heads if isinstance(getattr(made, "num_attention_heads", None), int) else 1
    kv_heads = getattr(made, "num_key_value_heads", None)
    modules, chosen = list(parts.backbone.modules()), _experts_per_token(made)
    matrices = [parameter.shape for parameter in parts.blocks.parameters() if parameter.dim() >= 2]
    active = round(sum(_active_elements(shape, chosen) for shape in matrices))
    return TransformersArchitecture(
        model_type=made.model_type,
        vocab_size=parts.embedding.num_embeddings,
        hidden_size=made.hidden_size,
        num_layers=len(parts.blocks),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads if isinstance(kv_heads, int) and not _is_latent(made) else heads,
        head_dim=max(_sizes(modules, ("head_dim", "qk_head_dim")), default=made.hidden_size // heads),
        tie_word_embeddings=parts.head.weight is parts.embedding.weight,
        sliding_windows=tuple(_window(block) for block in parts.blocks),
        config=config,
        parameters=sum(parameter.numel() for parameter in parts.model.parameters()),
        matrices=active,
        inactive=sum(map(math.prod, matrices)) - active,
        names=(f"{names[id(parts.embedding)]}.weight", f"{names[id(parts.head)]}.weight"),
        unused=unused_tensors(parts.model),
        float32=float32_tensors(parts.model, list(parts.model.state_dict())),
        attention_softcap=getattr(made, "attn_logit_softcapping", None),
        attention_sinks=any("sink" in name for name, _ in parts.blocks.named_parameters()),
        value_head_dim=max(_sizes(modules, ("v_head_dim",)), default=None),
        position_table=_position_table(parts, getattr(made, "max_position_embeddings", None)),
    )


def _position_table(parts: Parts, max_positions: Any) -> int | None:
    """Return ``max_positions`` if the backbone has a matrix of so many positions; some types pad theirs."""
    if not isinstance(max_positions, int):
        return None
    sizes = [
        len(matrix)
        for module in parts.backbone.modules()
        if module is not parts.embedding and not hasattr(module, "make_weights")  # xglm enlarges its table
        for matrix in _tables(module)
        if matrix.dim() == 2
    ]
    return max_positions if any(0 <= size - max_positions <= _MOST_PADDING for size in sizes) else None


def _tables(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a module that may be a table: learned, or computed when it was constructed."""
    if isinstance(module, nn.Embedding):
        yield module.weight
    yield from (buffer for buffer in module.buffers(recurse=False) if buffer is not None)
    yield from (value for value in vars(module).values() if isinstance(value, Tensor))  # ctrl


def _is_latent(made: Any) -> bool:
    """Return whether keys and values are projected from one latent vector to every head (MLA)."""
    return bool(getattr(made, "kv_lora_rank", None))


def _sizes(modules: list[Any], attributes: tuple[str, ...]) -> list[int]:
    found = (getattr(module, attribute, None) for module in modules for attribute in attributes)
    return [size for size in found if isinstance(size, int)]


def _window(block: Any) -> int | None:
    return min(_sizes(list(block.modules()), ("sliding_window",)), default=None)


def _experts_per_token(made: Any) -> int | None:
    chosen = getattr(made, "num_experts_per_tok", None)
    return chosen if isinstance(chosen, int) else None


def _active_elements(shape: Sequence[int], chosen: int | None) -> float:
    """Return the elements of a matrix that multiply each token: of stacked experts, those of the chosen ones."""
    if len(shape) < 2:
        return 0
    share = chosen / shape[0] if len(shape) == 3 and chosen is not None else 1.0
    return math.prod(shape) * min(1.0, share)
