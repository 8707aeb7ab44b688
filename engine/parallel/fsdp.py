"""Fully sharded data parallelism (FSDP2): every rank keeps a shard of parameters, gradients and optimizer states.

A block's parameters are gathered in the compute dtype just before they are needed. Gradients are reduced in fp32 and
*summed*, because the loss is already divided by the number of targets of the global batch. A mean over ranks would be
wrong if ranks hold different numbers of targets.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..config.settings import ParallelConfig
from ..model.language_model import LanguageModel


def apply(model: LanguageModel, mesh: DeviceMesh, config: ParallelConfig, compute_dtype: torch.dtype) -> None:
    """Shard ``model`` in place: each block, and an embedding that is not the head, separately; the rest with the root.

    Args:
        mesh: the ranks that share parameters; with two axes, parameters are copied over the first.
        config: of the run.
        compute_dtype: of activations and gathered parameters.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    on_gpu = mesh.device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if config.cpu_offload else OffloadPolicy()
    constants = {parameter for name, parameter in model.named_parameters() if name in model.constants}
    shard = functools.partial(
        fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=constants or None
    )
    for block in model.blocks:
        shard(block, reshard_after_forward=config.reshard_after_forward)
    embedding = model.embedding
    if embedding is not None and not model.architecture.tie_word_embeddings:
        # In a group with the head, both would be gathered, and their full gradients held, at the same time.
        shard(embedding, reshard_after_forward=config.reshard_after_forward)
    shard(model, reshard_after_forward=False)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _prefetch(model, config.prefetch_blocks)


def _prefetch(model: LanguageModel, count: int) -> None:
    """Gather the parameters of the next ``count`` blocks while one computes, in the order of each pass."""
    if count == 0:
        return
    blocks = cast("list[FSDPModule]", model.blocks)
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + count])
        block.set_modules_to_backward_prefetch(blocks[max(0, index - count) : index][::-1])
    root = cast(FSDPModule, model)
    root.set_modules_to_forward_prefetch(blocks[:count])
    root.set_modules_to_backward_prefetch(blocks[: -count - 1 : -1])


def accumulate_in_fp32(model: LanguageModel) -> None:
    """Make gradients of bf16 parameters fp32, to accumulate several micro-batches; call after materializing.

    FSDP casts each reduced gradient to its parameter's dtype. From the first one on, the accumulated gradient is fp32.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue  # without a gradient to attach the hook to
        parameter.grad_dtype = None  # of any dtype
        parameter.register_post_accumulate_grad_hook(_widen_gradient)


def _widen_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.dtype != torch.float32:
        parameter.grad = parameter.grad.float()


def reshard(model: LanguageModel) -> None:
    """Free the parameters that a forward pass without a backward pass has left gathered.

    Until then the model shows gathered copies in the compute dtype instead of the sharded parameters, which optimizers
    and checkpoints need.
    """
    for module in _sharded_modules(model):
        module.reshard()


def copy_full_(parameter: Tensor, values: Tensor) -> None:
    """Write the whole tensor ``values``, the same on every rank, into a parameter: each rank takes its part."""
    if not isinstance(parameter, DTensor):  # a constant, which is not sharded
        parameter.copy_(values)
        return
    # Not distribute_tensor, which does not support rows that two axes shard one after the other.
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    mine = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    parameter.to_local().copy_(values[mine])


def reduce_gradients(model: LanguageModel, now: bool) -> None:
    """Set whether the next backward pass sums gradients over ranks, or only over micro-batches on this rank (in
    fp32).
    """
    cast(FSDPModule, model).set_requires_gradient_sync(now)


def _sharded_modules(model: LanguageModel) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
