"""Activation recomputation: trade a second forward pass of each block for the memory of its activations."""

from __future__ import annotations

import functools

from torch.utils.checkpoint import checkpoint

from ..config import ParallelConfig
from ..model.decoder import Decoder


def apply(model: Decoder, config: ParallelConfig) -> None:
    """Let every block keep only its input and run again in the backward pass (``recompute: full``).

    The block's forward is wrapped rather than the block: parameter names stay, and FSDP's gathering stays outside, so
    that parameters are gathered once for the recomputation and the backward pass.
    """
    if config.recompute == "none":
        return
    for block in model.model.layers:
        # Nothing in a block is random, so the generators' states need not be kept.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
