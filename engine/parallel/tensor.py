"""Tensor parallelism with sequence parallelism: ranks share every matrix, and the tokens outside of the matrices.

Column-wise split projections take all tokens and give some heads or features. Row-wise split ones take these and give
sums; every rank keeps those of its tokens (Korthikanti et al., 2022, https://arxiv.org/abs/2205.05198). Norms and the
residual stream see only a rank's own tokens. The embedding and the head each hold some rows of the vocabulary.

A mixture of experts gathers the tokens once. Every rank routes all of them, and computes its inner features of every
expert. All that follows are sums of ranks' parts, which one reduce-scatter adds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from ...kernels.linear_cross_entropy import linear_cross_entropy, token_losses
from ..config.settings import RunConfig
from ..errors import UserError
from ..model.architecture import Architecture
from ..model.decoder import Decoder, Norm
from ..model.families import DecoderArchitecture
from ..model.language_model import Loss
from ..model.local_copy import local_copy
from .expert import experts_of
from .next_tokens import most_likely_of_all_ranks

TOKENS = 0
"""The dimension of tokens in every activation; there is no batch dimension."""


class Copied(ParallelStyle):
    """Every rank holds all of the module's parameters; see ``local_copy`` for their gradients."""

    placement: Placement = Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:  # a constant: every rank has it anyway
                continue
            part = distribute_tensor(parameter, device_mesh, [self.placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        return module


class SplitExperts(Copied):
    """Every rank has some of the inner features of all experts: the weight [E, out, in] is split along ``dim``."""

    def __init__(self, dim: int):
        super().__init__()
        self.placement = Shard(dim)


class CopiedRouter(Copied):
    """Every rank routes all tokens. Its gradients are parts of sums, like those of the experts' results."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(_on_plain_tensors)
        return super()._apply(module, device_mesh)


class PartsOfSums(ParallelStyle):
    """A module that computes plain tensors, and whose result is to be summed over ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def mark(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return DTensor.from_local(output, device_mesh, [Partial()], run_check=False)

        module.register_forward_pre_hook(_on_plain_tensors)
        module.register_forward_hook(mark)
        return module


def _on_plain_tensors(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert the first input, which all ranks have whole."""
    hidden, *others = inputs
    return local_copy(hidden), *others


class SplitNorm(Copied):
    """Every rank has some of the features that are normalized together: those of its heads, with their weights."""

    placement = Shard(0)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Norm)
        module.average = functools.partial(_average_over_ranks, device_mesh.get_group())
        return super()._apply(module, device_mesh)


def _average_over_ranks(group: dist.ProcessGroup, mean_T1: Tensor) -> Tensor:
    """Return the average of the [T, 1] means of all ranks."""
    return all_gather_tensor_autograd(mean_T1, gather_dim=1, group=group).mean(-1, keepdim=True)


def _gather_tokens(num_inputs: int) -> ParallelStyle:
    """Gather the tokens of the first input, once for all projections that read it."""
    rest = (None,) * (num_inputs - 1)
    return PrepareModuleInput(
        input_layouts=(Shard(TOKENS), *rest), desired_input_layouts=(Replicate(), *rest), use_local_output=False
    )


ATTENTION_PLAN: dict[str, ParallelStyle] = {
    "": _gather_tokens(3),
    "q_proj": ColwiseParallel(),
    "k_proj": ColwiseParallel(),
    "v_proj": ColwiseParallel(),
    "o_proj": RowwiseParallel(output_layouts=Shard(TOKENS)),
}
FEED_FORWARD_PLAN: dict[str, ParallelStyle] = {
    "": _gather_tokens(1),
    "gate_proj": ColwiseParallel(),
    "up_proj": ColwiseParallel(),
    "down_proj": RowwiseParallel(output_layouts=Shard(TOKENS)),
}
MIXTURE_PLAN: dict[str, ParallelStyle] = {
    "": PrepareModuleInputOutput(
        input_layouts=(Shard(TOKENS),),
        desired_input_layouts=(Replicate(),),
        output_layouts=Partial(),
        desired_output_layouts=Shard(TOKENS),
    ),
    "gate": CopiedRouter(),
    "experts": PartsOfSums(),
    "experts.gate_proj": SplitExperts(1),
    "experts.up_proj": SplitExperts(1),
    "experts.down_proj": SplitExperts(2),
    "shared_expert.gate_proj": ColwiseParallel(),
    "shared_expert.up_proj": ColwiseParallel(),
    "shared_expert.down_proj": RowwiseParallel(output_layouts=Partial(), use_local_output=False),
    "shared_expert_gate": Copied(),
}
DECODER_PLAN: dict[str, ParallelStyle] = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(TOKENS)),
    "model.norm": Copied(),
    "lm_head": ColwiseParallel(),
}


def block_plan(architecture: DecoderArchitecture, has_experts: bool = False) -> dict[str, ParallelStyle]:
    """Return how each module of a block is split."""
    of_query_and_key = SplitNorm() if architecture.qk_norm == "full" else Copied()
    attention_plan = {**ATTENTION_PLAN, "q_norm": of_query_and_key, "k_norm": of_query_and_key}
    return {
        **{name: Copied() for name in architecture.block_norms if name is not None},
        **{f"self_attn.{name}".rstrip("."): style for name, style in attention_plan.items()},
        **{
            f"mlp.{name}".rstrip("."): style
            for name, style in (MIXTURE_PLAN if has_experts else FEED_FORWARD_PLAN).items()
        },
    }


def check(architecture: Architecture, config: RunConfig) -> None:
    """Refuse numbers that cannot be divided evenly among ``parallel.tensor`` ranks.

    Raises:
        UserError: with both sides of the division.
    """
    size = config.parallel.tensor
    if size == 1:
        return
    assert isinstance(architecture, DecoderArchitecture)
    parts = {
        "attention heads": architecture.num_attention_heads,
        "key/value heads": architecture.num_key_value_heads,
        "rows of the vocabulary": architecture.vocab_size,
    }
    experts = architecture.experts
    if experts is None or not all(experts.layers):
        parts["features of the feed-forward layer"] = architecture.intermediate_size
    if experts is not None:
        parts["features of an expert"] = experts.intermediate_size
        parts["features of the shared expert"] = experts.shared_intermediate_size
    for name, count in parts.items():
        if count % size:
            raise UserError(
                f"parallel.tensor {size} does not divide the model's {count:,} {name}; use a divisor of {count:,}"
            )
    if config.training.float8:
        raise UserError(
            f"training.float8 is true with parallel.tensor {size}: split matrices cannot be multiplied in float8; "
            "disable one of them"
        )


def apply(model: Decoder, mesh: DeviceMesh, overlap: bool) -> None:
    """Split the matrices of ``model`` (on the meta device) over the ranks of the one-dimensional ``mesh``.

    Args:
        overlap: let torch.compile split products and their exchanges of activations into pieces that run concurrently.
    """
    parallelize_module(model, mesh, _present(model, DECODER_PLAN))
    for block in model.model.blocks:
        parallelize_module(block, mesh, _present(block, block_plan(model.architecture, bool(experts_of(block)))))
    if model.model.embeds and model.model.embed_tokens is not None:
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: _Arrived.apply(output))
    model.loss = _on_whole_vocabulary(mesh, model.architecture, functools.partial(_loss_sum, model))
    model.token_losses = _on_whole_vocabulary(mesh, model.architecture, token_losses)
    model.next_tokens = _on_whole_vocabulary(mesh, model.architecture, most_likely_of_all_ranks)
    if overlap:
        _overlap_exchange(mesh)


class _Arrived(torch.autograd.Function):
    """Waits for the embeddings: a compiled block would treat an unfinished collective's result as a constant without
    gradient.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor) -> Tensor:
        return hidden.trigger_wait() if isinstance(hidden, AsyncCollectiveTensor) else hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad_hidden: Tensor) -> Tensor:
        return grad_hidden


def _overlap_exchange(mesh: DeviceMesh) -> None:
    from torch._inductor import config as inductor_config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor_config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


def _present(module: nn.Module, plan: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """Return the entries of ``plan`` for existing modules of ``module``: some models have no gate, a stage may have no
    embedding.
    """
    there = {name for name, _ in module.named_modules()}
    return {name: style for name, style in plan.items() if name in there}


def _loss_sum(
    model: Decoder,
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None = None,
    **options: Any,
) -> Tensor:
    options |= {"weights_T": weights_T, "z_loss": model.active_z_loss}
    return model.training_loss(linear_cross_entropy(hidden_TH, weight_VH, targets_T, **options))


def _on_whole_vocabulary(mesh: DeviceMesh, architecture: DecoderArchitecture, compute: Callable[..., Tensor]) -> Loss:
    group, options = mesh.get_group(), architecture.head_options

    def loss(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, *weights_T: Tensor | None) -> Tensor:
        """Compute the loss of the whole head: ``hidden_TH`` are this rank's tokens, ``weight_VH`` a DTensor,
        ``targets_T`` and ``weights_T`` those of all.
        """
        assert isinstance(weight_VH, DTensor)
        tokens = DTensor.from_local(hidden_TH, mesh, [Shard(TOKENS)], run_check=False)
        all_TH = tokens.redistribute(placements=[Replicate()]).to_local()
        return compute(all_TH, weight_VH.to_local(), targets_T, *weights_T, vocab_group=group, **options)

    return loss
