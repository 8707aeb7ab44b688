"""The linear layer with a low-rank adapter: LoRA, with rsLoRA's scale and DoRA's magnitudes.

y = W x + s B A x (Hu et al., 2021, https://arxiv.org/abs/2106.09685), where A is [r, in], B is [out, r] and W is
frozen. Names of parameters and initial values are those of the PEFT library. Which layers get an adapter is decided in
:mod:`.adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...kernels.random_bits import stream_key, token_uniform
from ..batch import Batch
from ..errors import UserError
from .adapters import LORA_A, LORA_B, MAGNITUDE


class LoraLinear(nn.Linear):
    """A linear layer of the base, and its adapter. :meth:`attach` makes one of a linear layer.

    The base is frozen, and the parts of all matrices may be those of one rank (DTensor).
    """

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_magnitude_vector: nn.Parameter | None
    """[out], with DoRA."""
    scaling: float
    dropout: TokenDropout | None

    @classmethod
    def attach(
        cls, linear: nn.Linear, rank: int, scaling: float, dora: bool, dropout: TokenDropout | None = None
    ) -> LoraLinear:
        """Give ``linear``, on the meta device, an adapter without values. Its hooks and parameters stay.

        Args:
            linear: [out, in], whole.
            rank: r.
            scaling: s.
            dora: whether the length of every row of W + s B A is a parameter.
            dropout: of the input of A; None: none.
        """
        assert type(linear) is nn.Linear
        linear.__class__ = cls
        assert isinstance(linear, cls)
        device, dtype = linear.weight.device, linear.weight.dtype
        linear.lora_A = nn.Linear(linear.in_features, rank, bias=False, device=device, dtype=dtype)
        linear.lora_B = nn.Linear(rank, linear.out_features, bias=False, device=device, dtype=dtype)
        empty = torch.empty(linear.out_features, device=device, dtype=dtype)
        vector = nn.Parameter(empty) if dora else None
        linear.register_parameter(MAGNITUDE, vector)
        linear.scaling, linear.dropout = scaling, dropout
        return linear

    @property
    def num_other_products(self) -> int:
        """Matrix products of a training pass besides those of the base, A and B."""
        if self.lora_magnitude_vector is None:
            return 0
        return 3 + (self.dropout is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        base = self.base_product(x, self.bias)
        dropped = x if self.dropout is None else self.dropout(x)
        update = self.lora_B(self.lora_A(dropped) * self.scaling)
        if self.lora_magnitude_vector is None:
            return base + update
        ratio = self.lora_magnitude_vector.float() / self._row_norms()
        # As differences from the base, which bf16 represents well.
        if dropped is not x:
            directed = self.base_product(dropped, None)
        else:
            directed = base if self.bias is None else base - self.bias
        return base + (ratio - 1).to(base.dtype) * directed + ratio.to(base.dtype) * update

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product [..., out] of ``x`` [..., in] and the frozen matrix, plus ``bias``."""
        return F.linear(x, self.weight, bias)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Return the [out] fp32 lengths of the rows of W + s B A, without making that matrix.

        They count as constants in the backward pass (Liu et al., 2024, https://arxiv.org/abs/2402.09353, section 4.3).
        """
        weight, a, b = self.weight, self.lora_A.weight, self.lora_B.weight.float()
        both = (weight @ a.t()).float() * b
        square = (b @ (a.float() @ a.float().t())) * b
        total = row_norms(weight).square() + 2 * self.scaling * both.sum(1) + self.scaling**2 * square.sum(1)
        return total.clamp(min=0).sqrt()


def row_norms(weight: Tensor) -> Tensor:
    """Return the [out] fp32 lengths of the rows of ``weight`` [out, in]."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


class TokenNumbers:
    """The numbers of the tokens that a block computes; see :attr:`Batch.token_numbers`."""

    def __init__(self) -> None:
        self.values: Tensor | None = None
        """[T] int64; None outside of training."""

    def see(self, batch: Batch) -> None:
        """Take the numbers of ``batch``, which the block begins to compute."""
        self.values = batch.token_numbers


class TokenDropout:
    """Dropout whose mask is a function of the run's seed, the layer, the token and the feature.

    So it is the same in every layout of ranks, in recomputation and after a resume. Outside of training there is none.

    Args:
        probability: that an element is zero. The others are divided by 1 - probability.
        numbers: of the tokens of the block.
        seed: of the run.
        name: of the layer.
        num_features: of its whole input.
        device: of the model.
    """

    def __init__(
        self, probability: float, numbers: TokenNumbers, seed: int, name: str, num_features: int, device: torch.device
    ):
        self._probability, self._numbers, self._name = probability, numbers, name
        self._keys = torch.tensor(stream_key(seed, 0, f"{name}.dropout"), dtype=torch.int32, device=device)
        self._features = torch.arange(num_features, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x`` [..., T, features], a part of whose features other ranks may have, with some elements zero.

        Raises:
            UserError: the rows of ``x`` are not tokens.
        """
        numbers = self._numbers.values
        if numbers is None:
            return x
        if math.prod(x.shape[:-1]) != len(numbers):
            raise UserError(
                f"adapter.dropout is {self._probability:g}, but {self._name} computes {math.prod(x.shape[:-1])} rows "
                f"of {len(numbers)} tokens at a time, so a mask by token is unknown; set adapter.dropout to 0"
            )
        if not isinstance(x, DTensor):
            return x * self._factors(numbers, self._features, x)
        shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
        features = self._features[offset[-1] : offset[-1] + shape[-1]]
        factors = self._factors(numbers, features, x.to_local())
        return x * DTensor.from_local(factors, x.device_mesh, x.placements, run_check=False)

    def _factors(self, numbers: Tensor, features: Tensor, like: Tensor) -> Tensor:
        """Return the factor of every element of ``like``: 0, or 1 / (1 - probability)."""
        kept = token_uniform(numbers, features, self._keys) >= self._probability
        return (kept.to(like.dtype) / (1 - self._probability)).view(like.shape)


@torch.no_grad()
def initialize_(model: nn.Module, seed: int, copy_: Callable[[Tensor, Tensor], object]) -> None:
    """Initialize the adapters in ``model``, whose base has its values, as PEFT does.

    A is uniform as in ``nn.Linear``, B zero, and magnitudes are the lengths of the base's rows: at first the model
    computes what the base does.

    Every A is drawn whole from its own stream, a function of the seed and its name. ``copy_(parameter, values)`` writes
    a whole tensor into a parameter, of which this rank may hold a part.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(f".{LORA_A}"):
            low, high = stream_key(seed, 0, name)
            generator = torch.Generator().manual_seed((high % 2**31 << 32) + low % 2**32)
            values = torch.empty(parameter.shape)
            # The bound follows from the number of inputs, the last dimension, also of a stack.
            nn.init.kaiming_uniform_(values.flatten(0, -2), a=math.sqrt(5), generator=generator)
            copy_(parameter, values)
        elif name.endswith(f".{LORA_B}"):
            parameter.zero_()
    for module in model.modules():
        if isinstance(module, LoraLinear) and module.lora_magnitude_vector is not None:
            copy_(module.lora_magnitude_vector, row_norms(_whole(module.weight)))


def _whole(weight: Tensor) -> Tensor:
    """Return all of ``weight``. All ranks that share it must call this."""
    if not isinstance(weight, DTensor):
        return weight
    here = weight.to(weight.device_mesh.device_type)  # NCCL has no collectives of host memory
    assert isinstance(here, DTensor)
    return here.full_tensor()
