"""Settings of the layout of the ranks, and of what saves memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the ranks: pipeline x replicate x shard x context x tensor = number of ranks.

    Every layout computes the same numbers, up to the order of sums.
    """

    pipeline: int = 1
    """Number of groups of ranks, each with some consecutive layers, that send hidden states to the next group. A step
    needs at least as many micro-batches, to keep all groups busy."""
    replicate: int = 1
    """Number of copies of the sharded model (hybrid sharding when > 1). With ``shard`` 1: plain data parallelism."""
    shard: int | Literal["auto"] = "auto"
    """Number of ranks over which parameters, gradients and optimizer states are sharded (FSDP2). auto: all ranks that
    the other axes do not use."""
    context: int = 1
    """Number of ranks that share the tokens of the same samples, for long sequences."""
    context_kind: Literal["auto", "heads", "ring"] = "auto"
    """How ranks that share samples compute attention. heads: each rank computes some heads of all tokens, after an
    exchange of heads for tokens. ``context`` must divide the query heads of a tensor rank, and divide its key/value
    heads or be a multiple of them. ring: each rank computes all heads of its own tokens, while keys and values travel
    around the ranks; for any number of heads. A micro-batch must have a multiple of 2 x ``context`` tokens. auto: heads
    where possible, else ring. Results are the same up to rounding. Ring has not been measured on GPUs."""
    tensor: int = 1
    """Number of ranks that share every matrix and, between matrices, the tokens (tensor and sequence parallelism). They
    exchange activations in every block: keep them within one node."""
    expert: int = 1
    """Number of ranks that share the experts of a mixture: each holds some of them, and tokens travel to the ranks of
    their experts (all-to-all). It does not add ranks: it divides ``shard`` x ``context``, and groups neighbouring ones.
    Only for models with experts. See docs/parallelism.md for when it pays."""
    pipeline_schedule: Literal["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"] = "1f1b"
    """Order of the micro-batches' forward and backward passes. 1f1b: one group of layers on each rank. The others:
    several groups on each rank, for less idle time and more communication."""
    pipeline_stages_per_rank: int = 1
    """Groups of layers on each rank: 1 with 1f1b, 2 with zbv_zero_bubble, at least 2 with the interleaved schedules."""
    async_tensor: bool = False
    """Overlap the exchange of activations between tensor-parallel ranks with matrix products, piece by piece. For
    GPUs with NVLink and compiled blocks."""
    cpu_offload: bool | Literal["optimizer", "auto"] = False
    """What is kept in host memory. optimizer: weights in ``training.weight_dtype``, gradients and optimizer states; the
    update runs there, and the GPU holds a copy of the weights in ``training.precision``. For one rank, or one for each
    part of a pipeline. true: the same without that copy; each block's weights are sent to the GPU when they are needed.
    For models that fit in no other way; slow. auto: false, optimizer or true, the first that fits on the GPUs by a
    prediction of ``tools/plan.py`` at the start of the run; false on a CPU."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward pass (ZeRO-3): less memory, one more all-gather in the
    backward pass. False: shard gradients and states only (ZeRO-2). No effect if no other rank shares this rank's
    parameters; with fp32 weights and bf16 computation, such a rank keeps bf16 copies of them."""
    reduce_gradients: Literal["micro_batch", "step"] = "micro_batch"
    """How often ranks sum their gradients. micro_batch: after each micro-batch. step: after the last micro-batch of a
    step. This needs less communication, but until then every rank holds the full gradients of its layers in fp32.
    Pipelines always use step. No effect without other ranks."""
    prefetch_blocks: int = 1
    """Number of blocks whose parameters are gathered ahead of time, while an earlier block computes, in the forward and
    the backward pass. Each needs the memory of one gathered block. 0: PyTorch decides. Results are the same. No effect
    if no other rank shares this rank's parameters."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass of a block recomputes instead of storing them. selective: norms, rotations and
    activation functions; outputs of matrix products and attention are stored, and with ``expert`` the rows that arrive
    at their experts. full: everything except the block's input. Results are the same."""
    recompute_every: int = 1
    """Recompute only every n-th block; the others store everything."""
    offload_activations: bool = False
    """Keep activations in host memory between the forward and the backward pass, except those of the last block. On a
    GPU they are copied while other blocks compute. With ``recompute`` full these are the inputs of the blocks; with
    none, everything that is stored for the backward pass. Results are the same. The gain on a GPU has not been
    measured."""
    timeout_seconds: int = 600
    """Timeout in seconds. The run ends when a collective waits longer, a rank is silent for longer, or a step makes no
    progress for longer; see docs/cluster.md."""
