"""The linear layers of all experts with a low-rank adapter for each expert.

An expert with the matrix W [out, in] computes W x + s B A x with its own A [r, in] and B [out, r]. They are stacked
over experts as W is, so the product is two grouped ones.

Shapes: T tokens, R rows sorted by expert, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...kernels.random_bits import stream_key, token_uniform
from ...kernels.token_permutation import RowOrder
from .experts import GroupedLinear
from .lora import TokenNumbers


class LoraGroupedLinear(GroupedLinear):
    """Linear layers of experts, and their adapters. :meth:`attach` makes one of a :class:`GroupedLinear`.

    The base is frozen, and the parts of all stacks may be those of one rank (DTensor).
    """

    lora_A: GroupedLinear
    lora_B: GroupedLinear
    scaling: float
    dropout: RowDropout | None

    @classmethod
    def attach(
        cls, linear: GroupedLinear, rank: int, scaling: float, dropout: RowDropout | None = None
    ) -> LoraGroupedLinear:
        """Give ``linear``, on the meta device, an adapter without values. Its hooks and parameters stay.

        Args:
            linear: [E, out, in], whole.
            rank: r, of each expert.
            scaling: s.
            dropout: of the input of A; None: none.
        """
        assert type(linear) is GroupedLinear
        linear.__class__ = cls
        assert isinstance(linear, cls)
        (num_experts, outputs, inputs), dtype = linear.weight.shape, linear.weight.dtype
        with torch.device(linear.weight.device):
            linear.lora_A = GroupedLinear(num_experts, inputs, rank).to(dtype)
            linear.lora_B = GroupedLinear(num_experts, rank, outputs).to(dtype)
        linear.scaling, linear.dropout = scaling, dropout
        return linear

    def forward(self, rows_RI: Tensor, ends_E: Tensor) -> Tensor:
        """Map [R, in] rows sorted by expert to [R, out]."""
        base_RO = super().forward(rows_RI, ends_E)
        if self.dropout is not None:
            rows_RI = self.dropout(rows_RI, self.lora_A.weight)
        return base_RO + self.lora_B(self.lora_A(rows_RI, ends_E) * self.scaling, ends_E)


class RowNumbers:
    """Numbers of the rows that experts compute: a different one for each token of the run and each of its experts."""

    def __init__(self, tokens: TokenNumbers, num_experts: int):
        self._tokens, self._num_experts = tokens, num_experts
        self._values: Tensor | None = None

    @property
    def are_training(self) -> bool:
        """Whether the tokens are those of training, which have numbers."""
        return self._tokens.values is not None

    def of_rows(self, count: int) -> Tensor:
        """Return the [count] int64 numbers of the rows that the experts compute now."""
        assert self._values is not None and len(self._values) == count, "the experts compute other rows"
        return self._values

    def see(self, order: RowOrder) -> None:
        """Take the rows that the experts begin to compute."""
        numbers_T = self._tokens.values
        if numbers_T is None:
            return
        ends_E = order.ends_E
        places_R = torch.arange(len(order.choices_R), dtype=ends_E.dtype, device=ends_E.device)
        experts_R = torch.searchsorted(ends_E, places_R, right=True)
        self._values = numbers_T[order.tokens_R] * self._num_experts + experts_R


class RowDropout:
    """Dropout whose mask is a function of the run's seed, the layer, the token, the expert and the feature.

    So it is the same in every layout of ranks, in recomputation and after a resume. Outside of training there is none.

    Args:
        probability: that an element is zero. The others are divided by 1 - probability.
        numbers: of the rows of the layer.
        seed: of the run.
        name: of the linear layers.
        num_features: of their whole input.
        device: of the model.
    """

    def __init__(
        self, probability: float, numbers: RowNumbers, seed: int, name: str, num_features: int, device: torch.device
    ):
        self._probability, self._numbers = probability, numbers
        self._keys = torch.tensor(stream_key(seed, 0, f"{name}.dropout"), dtype=torch.int32, device=device)
        self._features = torch.arange(num_features, device=device)

    def __call__(self, rows_RI: Tensor, weight_ERI: Tensor) -> Tensor:
        """Return [R, in] rows with some elements zero.

        Args:
            rows_RI: the input, of whose features this rank may have a part.
            weight_ERI: that multiplies them and is divided as they are.
        """
        if not self._numbers.are_training:
            return rows_RI
        numbers_R, features = self._numbers.of_rows(len(rows_RI)), self._features
        if isinstance(weight_ERI, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                weight_ERI.shape, weight_ERI.device_mesh, weight_ERI.placements
            )
            features = features[offset[2] : offset[2] + shape[2]]
        kept = token_uniform(numbers_R, features, self._keys) >= self._probability
        return rows_RI * (kept.to(rows_RI.dtype) / (1 - self._probability))
