"""Compile each block with torch.compile: fewer, fused kernels for norms, rotations, activations and residuals."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx.experimental import sym_node

from ...kernels.attention import PER_DOCUMENT
from ..config.settings import RunConfig
from ..errors import UserError
from ..model.language_model import LanguageModel

_RECOMPILE_LIMIT = 64
"""Limit of graphs. Blocks share them: there is one for each kind of block (window, recomputation), training or
evaluation, and backend of the attention."""

_DYNAMIC_INT = getattr(sym_node, "DynamicInt", int)  # PyTorch 2.10


def enabled(config: RunConfig, device: torch.device, attention_backend: str) -> bool:
    """Return whether the blocks of this run are compiled.

    Raises:
        UserError: compilation is requested but impossible.
    """
    choice = config.training.compile
    # Attention that reads document lengths on the host cannot be part of a graph, and a recomputed block is one graph.
    breaks = attention_backend == PER_DOCUMENT
    if choice == "on" and breaks and config.parallel.recompute != "none":
        raise UserError(
            f"training.compile is on with parallel.recompute {config.parallel.recompute}, but PyTorch SDPA per "
            "document, which this run uses for attention, cannot be compiled inside a recomputed block; set "
            "parallel.recompute to none or training.compile to auto"
        )
    # The sizes of the exchange of tokens are read on the host as well, which only divides the graph of other blocks.
    exchanges = config.parallel.expert > 1 and config.parallel.recompute != "none"
    if choice == "on" and exchanges:
        raise UserError(
            f"training.compile is on with parallel.recompute {config.parallel.recompute}, but the exchange of tokens "
            f"of parallel.expert {config.parallel.expert} cannot be compiled inside a recomputed block; set "
            "parallel.recompute to none or training.compile to auto"
        )
    quantized = config.adapter.quantize_base
    if choice == "on" and quantized != "none":
        raise UserError(
            f"training.compile is on, but adapter.quantize_base is {quantized}, whose products are not compiled; set "
            "training.compile to auto"
        )
    breaks = breaks or exchanges or quantized != "none"
    return choice == "on" or (choice == "auto" and device.type == "cuda" and not breaks)


def apply(model: LanguageModel, backend: Any = "inductor") -> None:
    """Compile the forward pass of every block, with its recomputation if applied before; ``backend`` is of
    torch.compile.

    The forward is compiled rather than the module, so that FSDP's hooks stay outside of the graph. All blocks of a kind
    share one graph, since parameters are its inputs.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend)
    model.register_forward_pre_hook(_take_any_packing)


def _take_any_packing(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Prevent compiled blocks from making a graph for each number of documents, or for each longest document."""
    batch, *others = inputs
    torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)
    if batch.attention is not None and batch.attention.offsets is not None:
        torch._dynamo.maybe_mark_dynamic(batch.attention.offsets, 0)
    # A plain int is a constant of the first graph, and variable only in a second one.
    return batch._replace(max_seqlen=_DYNAMIC_INT(batch.max_seqlen)), *others
