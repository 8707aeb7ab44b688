"""The interface of a language model: what parallelism, checkpoints and tools need of its module.

Two implementations exist: the native decoder (:mod:`.decoder`), and a module of the transformers library
(:mod:`.generic`). :mod:`.implementations` chooses between them and builds them.

Shapes: T tokens, H hidden, N query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear_cross_entropy import IGNORE_INDEX, LinearCrossEntropy
from ..batch import Batch
from .architecture import Architecture

Attend = Callable[..., Tensor]
"""An attention operation with the arguments of :func:`retemper.kernels.attention.attention`."""

Loss = Callable[..., Tensor]
"""Maps [T, H] hidden states, the [V, H] weight of the head, [T] targets and, for :attr:`LanguageModel.loss`, their [T]
fp32 weights or None, to losses."""

ChangeEmbeddings = Callable[[Tensor, Batch], Tensor]
"""Maps [..., T, H] embeddings of the tokens of a batch to those that the first block takes."""

NextTokens = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps [T, H] hidden states, the [V, H] weight of the head and [T] targets to the [n] most likely token after each
position whose target is not masked."""


class LanguageModel(nn.Module, ABC):
    """A causal language model on packed documents. It returns the summed loss of a batch and never forms all logits.

    Its parameters have the names of the transformers library. The number of ranks is unknown here: if ranks share the
    work, ``engine/parallel`` transforms the blocks, wraps the attention or replaces :attr:`loss`,
    :attr:`token_losses` and :attr:`next_tokens`.
    """

    architecture: Architecture
    is_first: bool
    """Whether this part of the model has the first block, and so takes tokens."""
    is_last: bool
    """Whether this part has the last block, and so returns losses."""
    loss: Loss
    """Returns the [] fp32 sum of the losses, with gradients."""
    token_losses: Loss
    """Returns the [T] fp32 terms of that sum, zero where the target is masked, without gradients."""
    z_loss: float = 0.0
    """Factor of the z-loss of :func:`retemper.kernels.linear_cross_entropy.linear_cross_entropy`. Only gradients
    contain it: the value of :attr:`loss` is the cross-entropy."""
    on_z_loss: Callable[[Tensor], None] | None = None
    """Called in passes with gradients with the [] fp32 sum of the z-losses of a batch, on the device."""
    constants: frozenset[str] = frozenset()
    """Names of parameters that are stored but never trained. They are not sharded, and keep their dtype."""
    base_names: frozenset[str] = frozenset()
    """Names of the frozen parameters of the base of an adapter. Checkpoints do not contain them."""

    def __init__(self) -> None:
        super().__init__()
        self.next_tokens: NextTokens = self._most_likely

    @property
    def active_z_loss(self) -> float:
        """The factor of the z-loss in this pass: zero without gradients."""
        return self.z_loss if torch.is_grad_enabled() else 0.0

    def training_loss(self, result: LinearCrossEntropy) -> Tensor:
        """Return the value of :attr:`loss` for the ``result`` of the head, whose z-loss is reported apart."""
        if self.on_z_loss is not None and self.active_z_loss:
            self.on_z_loss(result.z_loss_sum)
        return result.cross_entropy_sum

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

    def _most_likely(self, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
        return self.head_logits(hidden_TH[targets_T != IGNORE_INDEX]).argmax(-1)

    @abstractmethod
    def wrap_attention(self, wrap: Callable[[Attend], Attend]) -> None:
        """Replace the attention operation of every block by ``wrap`` of it."""

    @abstractmethod
    def change_embeddings(self, change: ChangeEmbeddings) -> None:
        """Let every forward pass call ``change`` on the result of the token embedding, with the batch.

        The result is that of the embedding module of transformers, which contains the scale of some families.
        """

    @abstractmethod
    def before_block(self, block: nn.Module, see: Callable[[Batch], object]) -> None:
        """Call ``see(batch)`` whenever ``block`` begins to compute the tokens of ``batch``, also in recomputation.

        Call this before the forward of the block is wrapped by others.
        """

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

    def table_names(self) -> set[str]:
        """Return the names of the parameters of this part that are looked up or make logits: those in
        :attr:`Architecture.tables`, and other embeddings, such as of positions.
        """
        embeddings = {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, nn.Embedding)
            for name, _ in module.named_parameters(recurse=False)
        }
        return embeddings.union(self.architecture.tables)

    def materialize(self, device: torch.device, weights_device: torch.device | None = None) -> LanguageModel:
        """Allocate the parameters, which are on the meta device, and return this model. They are not initialized.

        Args:
            device: that computes the model. Constants are there.
            weights_device: of all other parameters between their uses; None for ``device``.
        """
        self.to_empty(device=weights_device or device)
        for name in self.constants:
            owner, _, attribute = name.rpartition(".")
            constant = nn.Parameter(self.get_parameter(name).to(device), requires_grad=False)
            self.get_submodule(owner).register_parameter(attribute, constant)
        return self


class SameInput(nn.Module):
    """A module with linear layers that have the same input, so that one product can compute them.

    While ``fused_weight`` and ``fused_bias`` are set, they are used instead of the layers' own: the same values, one
    layer's rows below the other's.
    """

    fused_weight: nn.Parameter | None
    """[sum of outputs, H]."""
    fused_bias: nn.Parameter | None
    """[sum of outputs]."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("fused_weight", None)
        self.register_parameter("fused_bias", None)

    @property
    @abstractmethod
    def layers_with_same_input(self) -> list[nn.Linear]:
        """The layers; fewer than two if there is nothing to fuse."""

    def project(self, hidden_TH: Tensor) -> Sequence[Tensor]:
        """Return [T, outputs] of each layer."""
        layers = self.layers_with_same_input
        if self.fused_weight is None:
            return [layer(hidden_TH) for layer in layers]
        outputs = [layer.out_features for layer in layers]
        return F.linear(hidden_TH, self.fused_weight, self.fused_bias).split(outputs, -1)
