"""Fully sharded data parallelism (FSDP2): every rank keeps a shard of parameters, gradients and optimizer states.

A block's parameters are gathered in the compute dtype just before they are needed. Gradients are reduced in fp32 and
*summed*: the loss is already divided by the number of targets of the global batch, so a mean over ranks would be wrong
wherever ranks hold different numbers of targets.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import ParallelConfig
from ..model.decoder import Decoder


def apply(model: Decoder, mesh: DeviceMesh, config: ParallelConfig, compute_dtype: torch.dtype) -> None:
    """Shard ``model`` in place: each block by itself, the rest (embeddings, final norm, head) with the root."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = mesh if mesh["replicate"].size() > 1 else mesh["shard"]
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _prefetch(model, config.prefetch_blocks)


def _prefetch(model: Decoder, count: int) -> None:
    """Gather the parameters of the next ``count`` blocks while one computes, in the order of either pass."""
    if count == 0:
        return
    blocks = cast("list[FSDPModule]", list(model.model.layers))
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + count])
        block.set_modules_to_backward_prefetch(blocks[max(0, index - count) : index][::-1])
    root = cast(FSDPModule, model)
    root.set_modules_to_forward_prefetch(blocks[:count])
    root.set_modules_to_backward_prefetch(blocks[: -count - 1 : -1])


def accumulate_in_fp32(model: Decoder) -> None:
    """Let the gradients of bf16 parameters be fp32, for adding up several micro-batches; call after materializing.

    FSDP casts each reduced gradient to its parameter's dtype. From the first one on, what the next ones are added to is
    fp32.
    """
    for parameter in model.parameters():
        parameter.grad_dtype = None  # of any dtype
        parameter.register_post_accumulate_grad_hook(_widen_gradient)


def _widen_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.dtype != torch.float32:
        parameter.grad = parameter.grad.float()


def reshard(model: Decoder) -> None:
    """Free the parameters that a forward pass without a backward pass has left gathered.

    Until then the model shows gathered copies in the compute dtype in place of the sharded parameters, which are what
    an optimizer steps and a checkpoint holds.
    """
    for module in _sharded_modules(model):
        module.reshard()


def copy_full_(parameter: Tensor, values: Tensor) -> None:
    """Write the whole tensor ``values``, the same on every rank, into a sharded parameter: each rank takes its part."""
    assert isinstance(parameter, DTensor)
    values = values.to(parameter.device)
    parameter.copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None))


def local_shard(parameter: Tensor) -> Tensor:
    """The part of a sharded parameter that this rank holds."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def _sharded_modules(model: Decoder) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
