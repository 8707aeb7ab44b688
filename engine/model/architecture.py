"""The facts about a language model that do not depend on the code that computes it. No PyTorch is needed for them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

Implementation = Literal["native", "transformers"]


class LayerRange(NamedTuple):
    """Consecutive blocks of a model. The first block has the embedding with it, the last one norm and head."""

    start: int
    stop: int


class BlockSize(NamedTuple):
    """The size of a block. Blocks of one size also cost the same."""

    parameters: int
    active: int
    """Number of the parameters that a token uses."""


class Piece(NamedTuple):
    """A box of a parameter, and the box of a tensor in Hugging Face files that holds the same values."""

    tensor: str
    """Name in the files."""
    offsets: tuple[int, ...]
    """Where the box begins in that tensor."""
    sizes: tuple[int, ...]
    """Of the box in that tensor. If the parameter has more dimensions or fewer, the leading ones have size 1."""
    at: tuple[int, ...]
    """Where the box begins in the parameter."""


@dataclass(frozen=True)
class Architecture(ABC):
    """The facts about a model that do not depend on its implementation."""

    _: KW_ONLY
    model_type: str
    """Of its ``config.json``."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    """Size of queries and keys; the largest one if layers differ."""
    tie_word_embeddings: bool
    """Whether the embedding is also the output head. The head then has no parameter of its own."""
    sliding_windows: tuple[int | None, ...]
    """Attention window of every layer; None attends to the whole document."""
    attention_softcap: float | None = None
    """Cap of the attention scores, ``cap * tanh(score / cap)``; None without one."""
    attention_sinks: bool = False
    """Whether each head has a learned logit that takes part in its softmax without a value."""
    value_head_dim: int | None = None
    """Size of values; None for ``head_dim``."""
    position_table: int | None = None
    """Number of positions in a table, learned or not: no document is longer. None: positions are computed."""

    @property
    @abstractmethod
    def implementation(self) -> Implementation:
        """The implementation that computes the model."""

    @property
    def packs_documents(self) -> bool:
        """Whether blocks compute all documents of a batch at once, and mix tokens only in our attention."""
        return True

    def describe_implementation(self) -> str:
        """Return which implementation computes the model, why, and what that costs."""
        return "native decoder"

    def facts(self) -> dict[str, Any]:
        """Return what distinguishes the model from another one, by name."""
        return dict(vars(self))

    @abstractmethod
    def unread_keys(self, config: dict[str, Any]) -> list[str]:
        """Return the keys of the ``config.json`` of this model that have no effect, and that no table explains."""

    @abstractmethod
    def shortened(self, layers: Sequence[int]) -> Architecture:
        """Return a model with only these blocks, by number, from whose costs those of this one are extrapolated."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Number of distinct parameters (tied embeddings count once)."""

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters that a token uses: all except those of the experts that it is not routed to."""
        return self.num_parameters

    @property
    def block_sizes(self) -> tuple[BlockSize, ...]:
        """The sizes of all blocks; by default they are equal."""
        vocabulary = self.vocab_size * self.hidden_size
        # num_parameters counts a tied embedding once.
        tables = vocabulary if self.tie_word_embeddings else 2 * vocabulary
        every, active = self.num_parameters - tables, self.num_active_parameters - tables
        return (BlockSize(every // self.num_layers, active // self.num_layers),) * self.num_layers

    @property
    @abstractmethod
    def block_matrices(self) -> int:
        """Number of elements of all matrices in the blocks that multiply a token; of experts, those that it uses."""

    def active_elements(self, shape: tuple[int, ...]) -> float:
        """Return how many elements of a block's parameter of this ``shape`` multiply a token; of a vector none do."""
        return math.prod(shape) if len(shape) >= 2 else 0

    @property
    def longest_unscaled(self) -> int | None:
        """Length of a document above which its positions depend on that length; None: they never do."""
        return None

    def stored_pieces(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        """Return the parameters that Hugging Face files hold under other names or divided differently.

        Fused projections and stacked experts are examples. All other parameters are stored as they are.

        Args:
            shapes: of all parameters of the model, by name.

        Returns:
            By parameter, the pieces that cover it, each element once.
        """
        return {}

    @property
    def unused_tensors(self) -> tuple[str, ...]:
        """Regular expressions, searched in names of tensors that Hugging Face files may hold and this model lacks.

        The layers of multi-token prediction are an example.
        """
        return ()

    @property
    def float32_tensors(self) -> frozenset[str]:
        """Names of the parameters that files hold in float32, whatever the dtype of the others is."""
        return frozenset()

    @property
    def embedding_name(self) -> str:
        """Name of the embedding's parameter."""
        return "model.embed_tokens.weight"

    @property
    def head_name(self) -> str:
        """Name of the output head's parameter; a tied head has none, but files may contain it under this name."""
        return "lm_head.weight"

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the parameters with one row for each token of the vocabulary."""
        return (self.embedding_name,) if self.tie_word_embeddings else (self.embedding_name, self.head_name)
