"""Adapted linear layers whose frozen matrix is held in 4 or 8 bits (QLoRA).

Dettmers et al., 2023 (https://arxiv.org/abs/2305.14314): every pass computes the matrix from its codes, and multiplies
in the dtype of the run. Only the codes are stored for the backward pass. bitsandbytes has the formats and kernels.
"""

from __future__ import annotations

import logging
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import LoraLinear

NF4_BLOCK, SCALE_BLOCK = 64, 256
"""Elements of a matrix that share a scale, and scales that share a scale of scales (double quantization), as in the
paper's section 3."""

Buffers = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes by name."""


class QuantizedLoraLinear(LoraLinear):
    """An adapted layer without a parameter ``weight``; :meth:`quantize_` gives its codes values."""

    computes_in: torch.dtype
    """Dtype of the matrix in products."""

    @staticmethod
    @abstractmethod
    def buffers_of(out_features: int, in_features: int) -> Buffers:
        """Return what holds the codes of an [out, in] matrix."""

    @abstractmethod
    def quantize_(self, weight: Tensor) -> None:
        """Take the values of ``weight`` [out, in], rounded to codes. The same values give the same codes."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:  # type: ignore[override]
        """The [out, in] matrix in :attr:`computes_in`, computed from the codes at each access."""

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return next(iter(self._buffers.values())).device  # type: ignore[union-attr]

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`LoraLinear`. The matrix is computed again in the backward pass."""
        product: Tensor = _Product.apply(x, self, bias)
        return product


class Nf4LoraLinear(QuantizedLoraLinear):
    """4-bit NormalFloat in blocks of 64 with a scale each; scales have 8 bits (double quantization)."""

    nf4: Tensor
    scales: Tensor
    scales_mean: Tensor
    scales_of_scales: Tensor
    nf4_values: Tensor
    scale_values: Tensor

    @staticmethod
    def buffers_of(out_features: int, in_features: int) -> Buffers:
        """See :class:`QuantizedLoraLinear`."""
        count = out_features * in_features
        scales = math.ceil(count / NF4_BLOCK)
        return {
            "nf4": ((math.ceil(count / 2), 1), torch.uint8),  # two codes in a byte
            "scales": ((scales,), torch.uint8),
            "scales_mean": ((), torch.float32),
            "scales_of_scales": ((math.ceil(scales / SCALE_BLOCK),), torch.float32),
            "nf4_values": ((16,), torch.float32),
            "scale_values": ((256,), torch.float32),
        }

    @torch.no_grad()
    def quantize_(self, weight: Tensor) -> None:
        """See :class:`QuantizedLoraLinear`."""
        functional = import_bitsandbytes().functional
        codes, state = functional.quantize_4bit(
            weight, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
        )
        self.nf4.copy_(codes)
        self.scales.copy_(state.absmax)
        self.scales_mean.copy_(state.offset)
        self.scales_of_scales.copy_(state.state2.absmax)
        self.nf4_values.copy_(state.code)
        self.scale_values.copy_(state.state2.code)

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:  # type: ignore[override]
        """See :class:`QuantizedLoraLinear`."""
        functional = import_bitsandbytes().functional
        of_scales = functional.QuantState(
            absmax=self.scales_of_scales, code=self.scale_values, blocksize=SCALE_BLOCK, dtype=torch.float32
        )
        state = functional.QuantState(
            absmax=self.scales,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.nf4_values,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.computes_in,
            offset=self.scales_mean,
            state2=of_scales,
        )
        values: Tensor = functional.dequantize_4bit(self.nf4, state)
        return values


class Int8LoraLinear(QuantizedLoraLinear):
    """8-bit integers with a scale for each row: LLM.int8() without quantized activations.

    Dettmers et al., 2022 (https://arxiv.org/abs/2208.07339).
    """

    int8: Tensor
    scales: Tensor

    @staticmethod
    def buffers_of(out_features: int, in_features: int) -> Buffers:
        """See :class:`QuantizedLoraLinear`."""
        return {"int8": ((out_features, in_features), torch.int8), "scales": ((out_features,), torch.float32)}

    @torch.no_grad()
    def quantize_(self, weight: Tensor) -> None:
        """See :class:`QuantizedLoraLinear`."""
        codes, scales, _ = import_bitsandbytes().functional.int8_vectorwise_quant(weight.to(torch.float16))
        self.int8.copy_(codes)
        self.scales.copy_(scales)

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:  # type: ignore[override]
        """See :class:`QuantizedLoraLinear`."""
        return (self.int8 * (self.scales / 127)[:, None]).to(self.computes_in)


class _Product(torch.autograd.Function):
    """x W^T + b with a frozen matrix that only the layer holds: nothing of it is stored for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLoraLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.weight, None, None


KINDS: dict[str, type[QuantizedLoraLinear]] = {"nf4": Nf4LoraLinear, "int8": Int8LoraLinear}
"""Class for each value of ``adapter.quantize_base`` but none."""


def hold_quantized(linear: LoraLinear, kind: str, computes_in: torch.dtype) -> None:
    """Replace the matrix of ``linear``, on the meta device, by memory for its codes of ``kind``."""
    assert type(linear) is LoraLinear and (linear.bias is None or linear.bias.is_meta)
    device = linear.weight.device
    del linear.weight
    linear.__class__ = KINDS[kind]
    assert isinstance(linear, QuantizedLoraLinear)
    linear.computes_in = computes_in
    for name, (shape, dtype) in linear.buffers_of(linear.out_features, linear.in_features).items():
        linear.register_buffer(name, torch.empty(shape, dtype=dtype, device=device), persistent=False)


def quantized_bytes(kind: str, out_features: int, in_features: int) -> int:
    """Return the bytes of an [out, in] matrix in ``kind``."""
    buffers = KINDS[kind].buffers_of(out_features, in_features)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in buffers.values())


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLoraLinear]:
    """Return the layers of ``model`` that hold codes, by the name of their matrix in the base."""
    return {
        f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, QuantizedLoraLinear)
    }


def load_each(layers: Mapping[str, QuantizedLoraLinear], load: Callable[[dict[str, Tensor]], object]) -> None:
    """Quantize the matrices of ``layers`` one at a time, so that no more than one of them is whole in memory.

    Args:
        layers: by the name of their matrix.
        load: reads the tensors that it is given by name, in place.
    """
    for name, layer in layers.items():
        weight = torch.empty(layer.out_features, layer.in_features, dtype=layer.computes_in, device=layer.device)
        load({name: weight})
        layer.quantize_(weight)
        del weight  # before the next one is allocated


def stand_ins(layers: Mapping[str, QuantizedLoraLinear]) -> dict[str, Tensor]:
    """Return tensors without memory that have the shapes and dtypes of the matrices."""
    return {
        name: torch.empty(layer.out_features, layer.in_features, dtype=layer.computes_in, device="meta")
        for name, layer in layers.items()
    }


@contextmanager
def shown_as_parameters(
    model: nn.Module, copy_: Callable[[Tensor, Tensor], object]
) -> Iterator[Callable[[Tensor, Tensor], object]]:
    """Inside, ``model`` has the parameters ``weight`` of quantized layers, without memory.

    Yields:
        a function that writes values into a parameter: it quantizes those of such a parameter, and calls ``copy_`` for
        any other.
    """
    layers, shown = quantized_layers(model), stand_ins(quantized_layers(model))
    owners: dict[Tensor, QuantizedLoraLinear] = {}
    for name, layer in layers.items():
        parameter = nn.Parameter(shown[name], requires_grad=False)
        layer._parameters["weight"] = parameter
        owners[parameter] = layer

    def write_(parameter: Tensor, values: Tensor) -> None:
        layer = owners.get(parameter)
        if layer is None:
            copy_(parameter, values)
        else:
            layer.quantize_(values.to(layer.device, layer.computes_in))

    try:
        yield write_
    finally:
        for layer in layers.values():
            del layer._parameters["weight"]


def import_bitsandbytes() -> Any:
    """Return the module bitsandbytes.

    On some CPUs its import downloads a kernel from the Hugging Face Hub and loads it, if the package ``kernels`` is
    installed. That kernel is for products of codes, which are not used here, so the import does without.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    absent, log = object(), logging.getLogger("bitsandbytes.backends.cpu.ops")
    former, level = sys.modules.get("kernels", absent), log.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        log.setLevel(level)
        if former is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = former  # type: ignore[assignment]
    return bitsandbytes
