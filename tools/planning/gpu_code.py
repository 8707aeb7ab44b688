"""Make tensors without values take a GPU's code paths, and record the purpose of memory.

Tensors of a rehearsal are nominally on the CPU. If our code queries the device, this module answers for the GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from ...engine.model import decoder
from ...engine.optim.adamw import CompactAdamW
from ...engine.parallel.pipeline import Pipelined
from ...kernels import linear_cross_entropy as loss
from ...kernels.linear_cross_entropy import chunked
from .memory import MemoryCounter


@contextlib.contextmanager
def labelled(counter: MemoryCounter) -> Iterator[None]:
    """Make ``counter`` recognise loss buffers and communication buffers; works on real tensors as well."""
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, inside: Callable[[], contextlib.AbstractContextManager]) -> None:
            original = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                with inside():
                    return original(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, name, call))

        for owner, name in ((chunked, "compute"), (loss, "_scaled")):
            patch(owner, name, lambda: counter.making("loss buffers"))
        for name in ("unshard", "wait_for_unshard", "post_backward"):
            patch(FSDPParamGroup, name, lambda: counter.making("communication buffers"))
        # Operators that DTensor runs on whole tensors without values, to learn a result's shape.
        patch(ShardingPropagator, "_propagate_tensor_meta_non_cached", counter.paused)
        reduce = FSDPParamGroup.post_backward

        def post_backward(group: FSDPParamGroup, *args: Any) -> None:
            reduce(group, *args)
            counter.on_reduced()
            # Gradients that are reduced once in a step are kept here unreduced.
            counter.declare(
                "gradients", (getattr(one, "unsharded_accumulated_grad_data", None) for one in _waiting(group))
            )

        stack.enter_context(mock.patch.object(FSDPParamGroup, "post_backward", post_backward))
        yield


def _waiting(group: FSDPParamGroup) -> list[Any]:
    return [one for one in group.fsdp_params if getattr(one, "unsharded_accumulated_grad", None) is not None]


@contextlib.contextmanager
def as_on_a_gpu(capability: tuple[int, int], count_flops: Callable[[float], None]) -> Iterator[None]:
    """Take the GPU's paths on tensors without values.

    Args:
        capability: compute capability of the GPU.
        count_flops: called with floating-point operations that no operator shows.
    """
    with _triton_loss(capability, count_flops):
        yield


@contextlib.contextmanager
def nothing_read() -> Iterator[None]:
    """Replace the code of a run that reads tensors' values on the host."""
    with contextlib.ExitStack() as stack:
        # The update with random rounding is compiled on a GPU and works in place; only the states persist.
        stack.enter_context(mock.patch.object(CompactAdamW, "_update", lambda *_: None))
        stack.enter_context(mock.patch.object(CompactAdamW, "_state_of", _state_with_counted_steps))
        # A micro-batch's number has no value here. All of them have the same shape.
        stack.enter_context(mock.patch.object(Pipelined, "_fill_in", _fill_in_first))
        if hasattr(_PipelineSchedule, "_warmup_p2p"):
            stack.enter_context(mock.patch.object(_PipelineSchedule, "_warmup_p2p", _agree_on_static_shapes))
        yield


@contextlib.contextmanager
def fresh_constants() -> Iterator[None]:
    """Rebuild the model's cached constants inside, and again afterwards: with and without values do not mix."""
    decoder._frequencies_on.cache_clear()
    try:
        yield
    finally:
        decoder._frequencies_on.cache_clear()


@contextlib.contextmanager
def _triton_loss(capability: tuple[int, int], count_flops: Callable[[float], None]) -> Iterator[None]:
    """Run the Triton path of the linear cross-entropy, without its kernel."""
    triton_kernels = _import_triton_kernels()
    on_cpu = chunked.compute

    def compute(hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
        *others, _, need_hidden, need_weight = rest
        if hidden.dtype != torch.bfloat16:
            return on_cpu(hidden, weight, *rest)
        return triton_kernels.compute(hidden, weight, *others, loss.TRITON_LOGIT_BYTES, need_hidden, need_weight)

    def launch(hidden: Tensor, weight: Tensor, *rest: Any, second: bool) -> None:
        # The second launch repeats what the first could not compute: usually nothing.
        if not second:
            count_flops(2.0 * hidden.shape[0] * hidden.shape[1] * weight.shape[0])

    def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
        count_flops(2.0 * a.shape[0] * a.shape[1] * b.shape[1])
        return torch.empty(a.shape[0], b.shape[1], dtype=torch.float32)

    def add_product(total: Tensor | None, a: Tensor, b: Tensor, block_bytes: int) -> Tensor:
        if total is None:
            return matmul_fp32(a, b)
        count_flops(2.0 * a.shape[0] * a.shape[1] * b.shape[1])
        return total

    tiles = triton_kernels.HOPPER_TILES if capability[0] >= 9 else triton_kernels.OTHER_TILES
    with (
        mock.patch.multiple(
            triton_kernels,
            _launch=launch,
            matmul_fp32=matmul_fp32,
            add_product=add_product,
            _tiles_for=lambda device: tiles,
        ),
        mock.patch.object(chunked, "compute", compute),
    ):
        yield


def _import_triton_kernels() -> Any:
    """Return the module of the kernels, with an importable stand-in for Triton if it is not installed."""
    if importlib.util.find_spec("triton") is not None:
        from ...kernels.linear_cross_entropy import triton_kernels

        return triton_kernels
    language = types.ModuleType("triton.language")
    language.constexpr = int  # type: ignore[attr-defined]
    triton = types.ModuleType("triton")
    triton.language = language  # type: ignore[attr-defined]
    triton.jit = lambda *_, **__: lambda function: function  # type: ignore[attr-defined]
    triton.cdiv = lambda a, b: -(-a // b)  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"triton": triton, "triton.language": language}):
        from ...kernels.linear_cross_entropy import triton_kernels

        return triton_kernels


class _Steps:
    """The optimizer's count of steps, which it reads on the host."""

    def __init__(self) -> None:
        self.count = 0

    def __iadd__(self, other: int) -> _Steps:
        self.count += other
        return self

    def zero_(self) -> None:
        """Do the same as a tensor's method."""
        self.count = 0

    def item(self) -> float:
        """Do the same as a tensor's method."""
        return float(self.count)


_state_of = CompactAdamW._state_of


def _state_with_counted_steps(self: CompactAdamW, parameter: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = _state_of(self, parameter)
    if isinstance(state["step"], Tensor):
        state["step"] = _Steps()
    return state


def _agree_on_static_shapes(_: Any, stages: list[Any], has_backward: bool, *__: Any) -> None:
    """Return the result of the stages' vote, since each of ours knows its shapes; before PyTorch 2.13 there was no
    vote.
    """
    from torch.distributed.pipelining._utils import InferenceMode

    for stage in stages:
        assert not InferenceMode.needs_dynamic(stage._user_meta, has_backward)
        stage._inference_mode = InferenceMode.STATIC


def _fill_in_first(self: Pipelined, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    return (self._prepare(self._batches[0]), None if module.is_first else arguments[0]), {}
