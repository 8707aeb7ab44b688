"""Fully sharded data parallelism (FSDP2): every rank keeps a shard of parameters, gradients and optimizer states.

A block's parameters are gathered in the compute dtype just before they are needed. Gradients are reduced in fp32 and
*summed*, because the loss is already divided by the number of targets of the global batch. A mean over ranks would be
wrong if ranks hold different numbers of targets.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..config.settings import ParallelConfig
from ..model.language_model import LanguageModel
from ..optim.local import local_part
from .expert import experts_of
from .mesh import Mesh


class FullySharded:
    """See :class:`~retemper.engine.parallel.data_parallel.DataParallel`.

    Shards a model in place: each block, and an embedding that is not the head, separately; the rest with the root.

    Args:
        model: on the meta device.
        mesh: of all ranks. Experts that ranks share are sharded over those that have the same ones.
        config: of the run.
        compute_dtype: of activations and gathered parameters.
    """

    def __init__(self, model: LanguageModel, mesh: Mesh, config: ParallelConfig, compute_dtype: torch.dtype):
        self._model = model
        ranks_of = _shard(model, mesh, config, compute_dtype)
        self._sharded = list(ranks_of)
        for module, ranks in ranks_of.items():
            if ranks.size() > 1:  # on one rank it is 1, and setting it costs a pass over the gradients
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        _prefetch(model, config.prefetch_blocks)

    def on_materialized(self, accumulates: bool) -> None:
        """See the class.

        FSDP casts each reduced gradient to its parameter's dtype. From the first one on, the accumulated gradient is
        fp32.
        """
        for parameter in self._model.parameters():
            # A frozen parameter has no gradient to attach the hook to.
            if accumulates and parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.grad_dtype = None  # of any dtype
                parameter.register_post_accumulate_grad_hook(_widen_gradient)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See the class. Parameters that a forward pass has left gathered are freed at the end.

        Until then the model shows gathered copies in the compute dtype instead of the sharded parameters.
        """
        yield
        for module in self._sharded:
            module.reshard()

    def reduce_gradients(self, now: bool) -> None:
        """See the class."""
        cast(FSDPModule, self._model).set_requires_gradient_sync(now)

    def collect_gradients(self) -> None:
        """See the class. Does nothing: FSDP takes them when it reduces gradients."""


def _shard(
    model: LanguageModel, mesh: Mesh, config: ParallelConfig, compute_dtype: torch.dtype
) -> dict[FSDPModule, DeviceMesh]:
    """Shard the modules of ``model``, and return them with the ranks that share the parameters of each."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    on_gpu = mesh.devices.device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if config.cpu_offload is True else OffloadPolicy()
    constants = {parameter for name, parameter in model.named_parameters() if name in model.constants}
    ranks_of: dict[FSDPModule, DeviceMesh] = {}
    apart = mesh.fsdp_of_experts

    def shard(module: nn.Module, ranks: DeviceMesh, reshard: bool) -> None:
        options: dict[str, Any] = {"mp_policy": policy, "offload_policy": offload, "ignored_params": constants or None}
        options["shard_placement_fn"] = functools.partial(_placement, ranks.size(-1))
        ranks_of[fully_shard(module, mesh=ranks, reshard_after_forward=reshard, **options)] = ranks

    for block in model.blocks:
        if apart is not None:  # the other ranks of the block's group have other experts
            for experts in experts_of(block):
                shard(experts, apart, config.reshard_after_forward)
        shard(block, mesh.fsdp, config.reshard_after_forward)
    embedding = model.embedding
    if embedding is not None and not model.architecture.tie_word_embeddings:
        # In a group with the head, both would be gathered, and their full gradients held, at the same time.
        shard(embedding, mesh.fsdp, config.reshard_after_forward)
    shard(model, mesh.fsdp, False)
    return ranks_of


def _placement(ranks: int, parameter: nn.Parameter) -> Shard | None:
    """Return how FSDP divides ``parameter`` over ``ranks``; None: along the first dimension.

    A stack of experts whose number is no multiple of the ranks would leave some ranks with more experts than others, or
    with none. It is divided along the rows of each expert instead, where that is even and tensor parallelism does not
    divide them already.
    """
    if parameter.ndim != 3:
        return None
    experts, rows = local_part(parameter).shape[:2]
    divided = isinstance(parameter, DTensor) and any(place.is_shard(1) for place in parameter.placements)
    return Shard(1) if experts % ranks and rows % ranks == 0 and not divided else None


def _prefetch(model: LanguageModel, count: int) -> None:
    """Gather the parameters of the next ``count`` blocks while one computes, in the order of each pass."""
    if count == 0:
        return
    blocks, first = cast("list[FSDPModule]", model.blocks), _first_with_backward(model)
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(_groups(blocks[index + 1 : index + 1 + count]))
        block.set_modules_to_backward_prefetch(_groups(blocks[max(first, index - count) : index][::-1]))
    root = cast(FSDPModule, model)
    root.set_modules_to_forward_prefetch(_groups(blocks[:count]))
    root.set_modules_to_backward_prefetch(_groups(blocks[first:][: -count - 1 : -1]))


def _groups(blocks: list[FSDPModule]) -> list[FSDPModule]:
    """Return the modules of ``blocks`` whose parameters are gathered together: each block, and its experts if apart."""
    return [module for block in blocks for module in cast(nn.Module, block).modules() if isinstance(module, FSDPModule)]


def _first_with_backward(model: LanguageModel) -> int:
    """Return the number of the first block through which gradients flow: none do where all before it is frozen."""
    of_blocks = {parameter for block in model.blocks for parameter in block.parameters()}
    before = itertools.takewhile(lambda parameter: parameter not in of_blocks, model.parameters())
    if not model.is_first or any(parameter.requires_grad for parameter in before):
        return 0
    learns = [any(p.requires_grad for p in block.parameters()) for block in model.blocks]
    return learns.index(True) if True in learns else len(learns)


def _widen_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.dtype != torch.float32:
        parameter.grad = parameter.grad.float()
