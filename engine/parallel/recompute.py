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
from ..model.experts import GroupedLinear, Router
from ..model.families import DecoderArchitecture
from ..model.language_model import LanguageModel, SameInput
from ..model.lora import LoraLinear

_MATMULS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "retemper::grouped_linear", "aten::_grouped_mm")
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
            others = _ATTENTIONS + (_ROUTING if isinstance(model.architecture, DecoderArchitecture) else ())
            options["context_fn"] = functools.partial(_selective_contexts, kept, others)
        block.forward = functools.partial(checkpoint, block.forward, **options)


def _reads_last_product(architecture: Architecture) -> bool:
    """Return whether the backward pass of a block reads the result of its last linear layer: if a norm follows it."""
    return isinstance(architecture, DecoderArchitecture) and architecture.block_norms.after_mlp is not None


def _selective_contexts(kept: tuple[bool, ...], others: tuple[str, ...]) -> tuple[Any, Any]:
    """Return the contexts of one forward pass and of its recomputation."""
    return create_selective_checkpoint_contexts(_keep_products(kept, others))


def _keep_products(kept: tuple[bool, ...], others: tuple[str, ...]) -> Callable[..., CheckpointPolicy]:
    """Return the policy of one forward pass of a block, with matrix products ``kept`` or not in their order.

    It stores their outputs and those of ``others``, which cost most to compute. The last product of most blocks is not
    stored, because their backward pass does not read it.
    """
    # Of the forward pass (False) and of its recomputation (True): before PyTorch 2.13 the policy decides in both.
    products: Counter[bool] = Counter()

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operator.name().partition(".")[0]
        products[context.is_recompute] += name in _MATMULS
        is_kept = kept[: products[context.is_recompute]][-1] if name in _MATMULS else name in others
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
