"""Make tensors without values take a GPU's code paths, and record the purpose of memory.

Tensors of a dry run are nominally on the CPU. If our code queries the device, this module answers for the GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from ...engine.model import decoder
from ...engine.optim import TrainingOptimizer
from ...engine.parallel.activation_offload import ActivationOffload
from ...engine.parallel.pipeline import Pipelined
from ...engine.parallel.unsharded import Unsharded, UsedWeight
from ...kernels import attention
from ...kernels import linear_cross_entropy as loss
from ...kernels.attention import flash
from ...kernels.attention.per_document import apply_sinks
from ...kernels.linear_cross_entropy import chunked
from .host_memory import HostActivations
from .memory import MemoryCounter
from .simulated_cluster import replaced


@contextlib.contextmanager
def labelled(counter: MemoryCounter) -> Iterator[None]:
    """Make ``counter`` recognise loss buffers and communication buffers; works on real tensors as well."""

    def inside(make_context: Callable[[], contextlib.AbstractContextManager[None]], function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with make_context():
                return function(*args, **kwargs)

        return call

    def in_loss() -> contextlib.AbstractContextManager[None]:
        return counter.making("loss buffers")

    def in_communication() -> contextlib.AbstractContextManager[None]:
        return counter.making("communication buffers")

    reduce = inside(in_communication, FSDPParamGroup.post_backward)

    def post_backward(group: FSDPParamGroup, *args: Any) -> None:
        reduce(group, *args)
        counter.on_reduced()
        # Gradients that are reduced once in a step are kept here unreduced.
        waiting = (one for one in group.fsdp_params if getattr(one, "unsharded_accumulated_grad", None) is not None)
        counter.declare("gradients", (getattr(one, "unsharded_accumulated_grad_data", None) for one in waiting))

    take_gradient = UsedWeight.take_gradient

    def take_and_declare(weight: UsedWeight) -> None:
        take_gradient(weight)
        if weight.transfers is not None:
            weight.transfers.finish()  # a gradient is in the memory of the device until it has been copied
        counter.declare("gradients", [weight.weight.grad])

    on_materialized = Unsharded.on_materialized

    def materialized(wrapped: Unsharded, accumulates: bool) -> None:
        on_materialized(wrapped, accumulates)
        counter.declare("communication buffers", wrapped.copies_of_host_weights)

    def with_copies(function: Callable[..., Any]) -> Callable[..., Any]:
        """Count what CPUOffloadPolicy copies to a GPU before it casts and gathers: a group's shards."""

        def call(group: FSDPParamGroup, *args: Any, **kwargs: Any) -> Any:
            offloaded = [one for one in group.fsdp_params if one.offload_to_cpu] if group.is_sharded else []
            copies = [torch.empty_like(one._sharded_param_data) for one in offloaded]
            result = function(group, *args, **kwargs)
            del copies
            return result

        return inside(in_communication, call)

    gathers = {name: with_copies(getattr(FSDPParamGroup, name)) for name in ("unshard", "wait_for_unshard")}
    # An operator does not say what its memory is for, so the functions that allocate it are replaced:
    # - `compute` and `_scaled` allocate all buffers of the loss, in its forward and in its backward pass.
    # - Without FSDP, a gradient is moved from a copy to its weight. Weights in host memory have copies on the GPU.
    # - FSDP has no hooks around its gathers and reductions, which also run outside of modules' own hooks.
    # - DTensor runs operators on whole tensors without values, to learn a result's shape. No rank holds these tensors,
    #   and nothing distinguishes them from a rank's own in a dry run.
    learn = "_propagate_tensor_meta_non_cached"
    with (
        replaced(chunked, compute=inside(in_loss, chunked.compute)),
        replaced(loss, _scaled=inside(in_loss, loss._scaled)),
        replaced(UsedWeight, take_gradient=take_and_declare),
        replaced(Unsharded, on_materialized=materialized),
        replaced(FSDPParamGroup, post_backward=post_backward, **gathers),
        replaced(ShardingPropagator, **{learn: inside(counter.paused, getattr(ShardingPropagator, learn))}),
    ):
        yield


@contextlib.contextmanager
def activations_on_host(counter: MemoryCounter) -> Iterator[HostActivations]:
    """Do not count activations in host memory as those of the GPU; yield a counter of them."""
    on_host, to_host = HostActivations(), ActivationOffload._to_host

    def separately(offload: ActivationOffload, whole: Tensor) -> Tensor:
        with counter.paused():
            copy = to_host(offload, whole)
        on_host.add(copy)
        return copy

    with replaced(ActivationOffload, _to_host=separately):
        yield on_host


@contextlib.contextmanager
def fresh_constants() -> Iterator[None]:
    """Rebuild the model's cached constants inside, and again afterwards: with and without values do not mix."""
    decoder._frequencies_on.cache_clear()
    try:
        yield
    finally:
        decoder._frequencies_on.cache_clear()


@contextlib.contextmanager
def triton_loss(
    capability: tuple[int, int], gpu_memory: int | None, count_flops: Callable[[float], None]
) -> Iterator[None]:
    """Run the Triton path of the linear cross-entropy, without its kernels, on tensors without values.

    Args:
        capability: compute capability of the GPU.
        gpu_memory: its memory in bytes, which limits the memory of the loss.
        count_flops: called with floating-point operations that no operator shows.
    """
    path, kernels = _import_triton_path()
    in_pytorch, bytes_per_chunk = chunked.compute, loss.triton_budget(gpu_memory)
    persistent = capability in kernels.DESCRIPTOR_CAPABILITIES

    def compute(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: Any,
        budget: int,
        needs: Any,
        weights_T: Tensor | None = None,
    ) -> Any:
        if hidden.dtype != torch.bfloat16:
            return in_pytorch(hidden, weight, bias, targets, options, loss.LOGIT_BYTES, needs, weights_T)
        path_options = {"persistent": persistent, "weights_T": weights_T}
        return path.compute(hidden, weight, bias, targets, options, bytes_per_chunk, needs, **path_options)

    def launch(hidden: Tensor, head: Any, *rest: Any) -> None:
        # The second launch repeats what the first could not compute: usually nothing.
        if not isinstance(rest[-1], kernels.FarBlocks):
            count_flops(2.0 * hidden.shape[0] * hidden.shape[1] * head.weight_VH.shape[0])

    def target_products(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        return torch.empty(hidden.shape[0], dtype=torch.float32)

    def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
        count_flops(2.0 * a.shape[0] * a.shape[1] * b.shape[1])
        return torch.empty(a.shape[0], b.shape[1], dtype=torch.float32)

    def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        if total is None:
            return matmul_fp32(a, b)
        count_flops(2.0 * a.shape[0] * a.shape[1] * b.shape[1])
        return total

    # A launch of a Triton kernel is no operator, so it has no implementation for tensors without values. The products
    # use an fp32 result of bf16 factors, which PyTorch has only on a GPU. The tiles and the choice of `compute` depend
    # on the device, and a dry run's tensors are nominally on the CPU.
    tiles = kernels.DESCRIPTOR_TILES if persistent else kernels.SMALL_TILES
    functions = {"launch_exponentials": launch, "target_products": target_products}
    functions |= {"matmul_fp32": matmul_fp32, "add_product": add_product}
    with replaced(path, **functions, tiles_for=lambda *_: tiles), replaced(chunked, compute=compute):
        yield


@contextlib.contextmanager
def attention_options() -> Iterator[None]:
    """Make ``varlen_attn`` take as much memory as the kernels that it represents if the model has softcap or sinks.

    Those compute a soft cap inside, and sinks by a factor on the output.
    """
    run = flash.varlen_attention

    def varlen_attention(
        *args: Any, softcap: float | None = None, sinks: Tensor | None = None, **options: Any
    ) -> Tensor:
        output = run(*args, **options).transpose(0, 1)
        if sinks is not None:
            output = apply_sinks(output, torch.zeros(output.shape[:-1]), sinks)
        return output.transpose(0, 1)

    every = tuple(attention.BACKENDS)
    with (
        replaced(flash, varlen_attention=varlen_attention, _shares_heads=True),
        replaced(attention, WITH_SOFTCAP=every, WITH_SINKS=every),
    ):
        yield


def _import_triton_path() -> tuple[Any, Any]:
    """Return the modules of the path and of its kernels, with a stand-in for Triton if it is not installed."""
    names = ("triton", "triton.language")
    if importlib.util.find_spec("triton") is not None:
        return _triton_path()
    before = {name: sys.modules.get(name) for name in names}
    language, triton = (types.ModuleType(name) for name in reversed(names))
    language.constexpr = int  # type: ignore[attr-defined]
    triton.language = language  # type: ignore[attr-defined]
    triton.jit = lambda *_, **__: lambda function: function  # type: ignore[attr-defined]
    sys.modules.update(zip(names, (triton, language), strict=True))
    try:
        return _triton_path()
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if module is not None})


def _triton_path() -> tuple[Any, Any]:
    from ...kernels.linear_cross_entropy import triton_kernels, triton_loss

    return triton_loss, triton_kernels


def states_only(kind: type[Any]) -> type[Any]:
    """Return a subclass of an optimizer that has its states, but updates nothing: on a GPU the update is compiled, and
    works in place.
    """
    return type(f"StatesOnly{kind.__name__}", (_StatesOnly, kind), {})


class _StatesOnly:
    def step(self) -> None:
        """Allocate the states of the parameters that have a gradient."""
        for _, _, parameter in self.named():  # type: ignore[attr-defined]
            if parameter.grad is not None:
                self.state_of(parameter)  # type: ignore[attr-defined]

    def allocate(self) -> None:
        """See the base class: a step with zero gradients, as of imported optimizers, needs values."""
        TrainingOptimizer.allocate(self)  # type: ignore[arg-type]


def read_no_values(pipelined: Pipelined) -> None:
    """Make the passes of a pipeline work on tensors without values.

    A micro-batch's number has no value, but all micro-batches have the same shape. Since PyTorch 2.13 the stages vote
    whether their shapes are fixed; without a vote, each of ours knows them.
    """
    pipelined.batch_of = lambda number: pipelined._batches[0]  # type: ignore[method-assign]
    if not hasattr(pipelined._schedule, "_warmup_p2p"):
        return
    from torch.distributed.pipelining._utils import InferenceMode

    def warm_up(stages: list[Any], has_backward: bool, *_: Any) -> None:
        for stage in stages:
            assert not InferenceMode.needs_dynamic(stage._user_meta, has_backward)
            stage._inference_mode = InferenceMode.STATIC

    pipelined._schedule._warmup_p2p = warm_up
