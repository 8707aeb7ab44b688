"""The compiled forms of the Triton kernels that real models use, so that they can be inspected without a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows import Options
from .triton_kernels import (
    DESCRIPTOR_CAPABILITIES,
    DESCRIPTOR_TILES,
    POINTER_TILES,
    SMALL_TILES,
    Buffers,
    FarBlocks,
    Head,
    Tiles,
    _exponentials_kernel,
    _target_products_kernel,
    exponentials_arguments,
    target_arguments,
)

NUM_TOKENS = 8192


class KernelVariant(NamedTuple):
    """A kernel with arguments that decide how it is compiled."""

    name: str
    kernel: Any
    """Triton's ``JITFunction``."""
    arguments: dict[str, Any]
    """Those of its launch, with tensors without values."""


def kernel_variants(capability: tuple[int, int]) -> list[KernelVariant]:
    """Return the variants for GPUs of a compute capability."""
    tiles = {"pointers": SMALL_TILES}
    if capability in DESCRIPTOR_CAPABILITIES:
        tiles = {"persistent": DESCRIPTOR_TILES, "pointers": POINTER_TILES}
    variants = []
    for reads, chosen in tiles.items():
        persistent = reads == "persistent"
        for (model, hidden, vocab), options, bias in _HEADS:
            for launch in ("first", "far blocks", *(["evaluation"] if model == "qwen2.5-7b" else [])):
                arguments = _arguments(hidden, vocab, options, bias, chosen, persistent, launch)
                name = f"exponentials, {reads}, {model} {hidden} x {vocab}, {launch}"
                variants.append(KernelVariant(name, _exponentials_kernel, arguments))
    # Rows of 1,800 bytes do not begin at multiples of 16, and 900 is no multiple of the depth of a tile.
    arguments = _arguments(900, 32000, Options(), False, tiles["pointers"], False, "first")
    variants.append(
        KernelVariant("exponentials, pointers, odd width 900 x 32000, first", _exponentials_kernel, arguments)
    )
    for hidden, vocab in ((896, 151936), (3584, 152064)):
        weight = _without_values(torch.bfloat16, vocab, hidden)
        tokens = _without_values(torch.bfloat16, NUM_TOKENS, hidden)
        index, products = (_without_values(dtype, NUM_TOKENS) for dtype in (torch.int64, torch.float32))
        arguments = target_arguments(tokens, weight, index, products)
        variants.append(KernelVariant(f"target products, {hidden} x {vocab}", _target_products_kernel, arguments))
    return variants


_HEADS = (
    (("qwen2.5-0.5b", 896, 151936), Options(), False),
    (("qwen2.5-7b", 3584, 152064), Options(), False),
    (("gemma2-2b", 2304, 256000), Options(logit_softcap=30.0), False),
    (("granite", 2048, 49152), Options(logit_scale=1 / 8), False),
    (("phi-2", 2560, 51200), Options(), True),
)
"""(model, hidden size, vocabulary), options of the loss, and whether the head has a bias."""


def _arguments(
    hidden: int, vocab: int, options: Options, bias: bool, tiles: Tiles, persistent: bool, launch: str
) -> dict[str, Any]:
    num_columns, num_blocks = -(-vocab // tiles.columns), -(-NUM_TOKENS // tiles.rows)
    stored = 0 if launch == "evaluation" else -(-vocab // 64) * 64
    sums, maxima = (_without_values(torch.float32, num_columns, NUM_TOKENS) for _ in range(2))
    buffers = Buffers(_without_values(torch.bfloat16, NUM_TOKENS, stored), sums, maxima)
    blocks, number = (_without_values(torch.int32, count) for count in (num_blocks, 1))
    far = FarBlocks(_without_values(torch.float32, NUM_TOKENS), blocks, number) if launch == "far blocks" else None
    head = Head(_without_values(torch.bfloat16, vocab, hidden), _without_values(torch.float32, vocab) if bias else None)
    tokens = _without_values(torch.bfloat16, NUM_TOKENS, hidden)
    return exponentials_arguments(tokens, head, buffers, options, tiles, persistent, far)


def _without_values(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
