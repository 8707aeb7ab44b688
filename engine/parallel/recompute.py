"""Activation recomputation: compute (parts of) a block twice to save the memory of its activations."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..config.settings import ParallelConfig
from ..model.architecture import Architecture
from ..model.attention_choice import context_kind
from ..model.experts import GroupedLinear, Router
from ..model.families import DecoderArchitecture
from ..model.language_model import LanguageModel, SameInput
from ..model.lora import LoraLinear
from .expert import experts_of

_MATMULS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "retemper::grouped_linear", "aten::_grouped_mm")
_EXCHANGES = ("_c10d_functional::all_to_all_single",)
_EXCHANGES_OF_ATTENTION = _EXCHANGES_OF_EXPERTS = 4
"""Of a block, in this order. Attention: queries, keys, values, results. Experts: numbers of rows, rows, weights,
results."""
_ROUTING = ("aten::topk", "aten::sort")
"""The choice of experts and the order of their rows: small, and slow to compute again. Only in the native decoder:
modules of transformers change the results in place."""
_ATTENTIONS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flex_attention",
    "retemper::ring_attention",
)
"""Operators by name, because the existing ones depend on the installation. Attention computed from plain matrix
products (aten::bmm) is not included: its scores are exactly what must not be stored.

FlexAttention is one operator in compiled blocks. Otherwise it is compiled alone; its operators are not visible here,
and are recomputed."""


def apply(model: LanguageModel, config: ParallelConfig, fuse_projections: bool = False) -> None:
    """Let every ``recompute_every``-th block store less and recompute it in the backward pass.

    The block's forward is wrapped rather than the block. So parameter names stay the same, and FSDP's gathering stays
    outside: parameters are gathered once for the recomputation and the backward pass.
    """
    if config.recompute == "none":
        return
    for block in model.blocks[:: config.recompute_every]:
        # A block uses no random numbers, so the generators' states need not be saved.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if config.recompute == "selective":
            # The routers of mixtures are products as well.
            num_linear = sum(isinstance(module, (nn.Linear, GroupedLinear, Router)) for module in block.modules())
            num_linear += sum(m.num_other_products for m in block.modules() if isinstance(m, LoraLinear))
            if fuse_projections:
                fused = [module for module in block.modules() if isinstance(module, SameInput)]
                num_linear -= sum(len(module.layers_with_same_input) - 1 for module in fused)
            # Not a number: torch.compile takes one that differs between blocks for a variable.
            kept = (True,) * (num_linear - 1) + (_reads_last_product(model.architecture),)
            exchanges = _kept_exchanges(block, model.architecture, config)
            others = _ATTENTIONS + (_ROUTING if isinstance(model.architecture, DecoderArchitecture) else ())
            options["context_fn"] = functools.partial(_selective_contexts, kept, exchanges, others)
        block.forward = functools.partial(checkpoint, block.forward, **options)


def _reads_last_product(architecture: Architecture) -> bool:
    """Return whether the backward pass of a block reads the result of its last linear layer: if a norm follows it."""
    return isinstance(architecture, DecoderArchitecture) and architecture.block_norms.after_mlp is not None


def _kept_exchanges(block: nn.Module, architecture: Architecture, config: ParallelConfig) -> tuple[bool, ...]:
    """Return whether the result of each all-to-all of a block is stored: those that bring rows to their experts are.

    Queries, keys and values are not: they are stored once before the exchange, and in a node a stored byte of them
    saves a fifth to a third of the time that one of a product saves (docs/parallelism.md, Traffic and memory).
    """
    by_heads = config.context > 1 and context_kind(config, architecture) == "heads"
    kept = (False,) * (_EXCHANGES_OF_ATTENTION if by_heads else 0)
    if config.expert > 1 and experts_of(block):
        kept += (True,) * (_EXCHANGES_OF_EXPERTS - 1) + (_reads_last_product(architecture),)
    return kept or (False,)


def _selective_contexts(
    kept: tuple[bool, ...], exchanges: tuple[bool, ...], others: tuple[str, ...]
) -> tuple[Any, Any]:
    """Return the contexts of one forward pass and of its recomputation."""
    return create_selective_checkpoint_contexts(_keep_results(kept, exchanges, others))


def _keep_results(
    products: tuple[bool, ...], exchanges: tuple[bool, ...], others: tuple[str, ...]
) -> Callable[..., CheckpointPolicy]:
    """Return the policy of one forward pass of a block; products and exchanges are stored or not in their order.

    It stores their outputs and those of ``others``, which cost most to compute. The last product and the last exchange
    of most blocks are not stored, because their backward pass does not read them.
    """
    # Of the forward pass (False) and of its recomputation (True): before PyTorch 2.13 the policy decides in both.
    seen: Counter[tuple[bool, tuple[str, ...]]] = Counter()

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operator.name().partition(".")[0]
        is_kept = name in others
        for names, kept in ((_MATMULS, products), (_EXCHANGES, exchanges)):
            if name in names:
                seen[context.is_recompute, names] += 1
                is_kept = kept[: seen[context.is_recompute, names]][-1]
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
