"""The interface of a language model: what data, parallelism, checkpoints and reports need to know about it.

Two implementations exist: the native decoder (:mod:`.decoder`), and a module of the transformers library
(:mod:`.generic`). :mod:`.implementations` chooses between them and builds them.

Shapes: T tokens, H hidden, N query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Batch

Implementation = Literal["native", "transformers"]
Attend = Callable[..., Tensor]
"""An attention operation with the arguments of :func:`retemper.kernels.attention.attention`."""


class LayerRange(NamedTuple):
    """Consecutive blocks of a model. The first block has the embedding with it, the last one norm and head."""

    start: int
    stop: int


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
    def shortened(self, num_layers: int) -> Architecture:
        """Return a model with fewer blocks, from whose costs those of this one are extrapolated."""

    @abstractmethod
    def unread_keys(self, config: dict[str, Any]) -> list[str]:
        """Return the keys of the ``config.json`` of this model that have no effect, and that no table explains."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Number of distinct parameters (tied embeddings count once)."""

    @property
    @abstractmethod
    def block_matrices(self) -> int:
        """Number of elements of all matrices in the blocks that multiply a token; of experts, those that it uses."""

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


class LanguageModel(nn.Module, ABC):
    """A causal language model on packed documents. It returns the summed loss of a batch and never forms all logits.

    Its parameters have the names of the transformers library. The number of ranks is unknown here: if ranks share the
    work, ``engine/parallel`` transforms the blocks, wraps the attention or replaces :attr:`loss`.
    """

    architecture: Architecture
    is_first: bool
    """Whether this part of the model has the first block, and so takes tokens."""
    is_last: bool
    """Whether this part has the last block, and so returns losses."""
    constants: frozenset[str] = frozenset()
    """Names of parameters that are stored but never trained. They are not sharded, and keep their dtype."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of this part, in their order."""

    @property
    @abstractmethod
    def embedding(self) -> nn.Module | None:
        """The token embedding, if this part has one."""

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """The [V, H] weight of the output head."""

    @abstractmethod
    def forward(self, batch: Batch, hidden_TH: Tensor | None = None) -> Tensor:
        """Run the model.

        Args:
            batch: packed documents.
            hidden_TH: [T, H] hidden states of the preceding block, for a part without the first block.

        Returns:
            [] fp32 sum of the losses; [T, H] hidden states of a part without the last block.
        """

    @abstractmethod
    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the [T, H] hidden states of a whole model, from which the head computes logits."""

    @abstractmethod
    def head_logits(self, hidden_TH: Tensor) -> Tensor:
        """Map [T, H] hidden states to [T, V] logits."""

    def logits(self, batch: Batch) -> Tensor:
        """Return the [T, V] logits of a whole model."""
        return self.head_logits(self.hidden_states(batch))

    @abstractmethod
    def wrap_attention(self, wrap: Callable[[Attend], Attend]) -> None:
        """Replace the attention operation of every block by ``wrap`` of it."""

    @abstractmethod
    def initialize_(self, seed: int, copy_: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Initialize weights randomly as the model's family does.

        Every parameter is drawn whole from its own stream, a function of the seed and its place in the whole model. So
        the values do not depend on the distribution of parameters to ranks. ``copy_(parameter, values)`` writes a whole
        tensor into a parameter; this rank may hold only a part of it.
        """

    def cast_parameters(self, dtype: torch.dtype) -> LanguageModel:
        """Cast the parameters, which are on the meta device, and return this model. Constants keep their dtype."""
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if f"{prefix}.{name}" not in self.constants:
                    cast = nn.Parameter(parameter.to(dtype), requires_grad=parameter.requires_grad)
                    module.register_parameter(name, cast)
        return self

    def table_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of this part that are in :attr:`Architecture.tables`."""
        return [parameter for name, parameter in self.named_parameters() if name in self.architecture.tables]

    def materialize(self, device: torch.device, weights_device: torch.device | None = None) -> LanguageModel:
        """Allocate the parameters, which are on the meta device, and return this model. They are not initialized.

        Args:
            device: that computes the model. Constants are there.
            weights_device: of all other parameters between their uses; None for ``device``.
        """
        self.to_empty(device=weights_device or device)
        return self
