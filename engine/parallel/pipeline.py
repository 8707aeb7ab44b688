"""Pipeline parallelism: ranks hold consecutive layers, and the micro-batches of a step flow through them.

The schedules are PyTorch's (``torch.distributed.pipelining``). This module divides layers into stages and provides a
stage's inputs. It also keeps an embedding that is also the head, and so is at both ends, one parameter.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor

from ..batch import Batch
from ..config.settings import ParallelConfig, RunConfig
from ..errors import UserError
from ..model.architecture import Architecture, LayerRange
from ..model.language_model import LanguageModel
from .data_parallel import DataParallel
from .forward_backward import BatchPreparer, counted_once

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": ScheduleZBVZeroBubble,
}
"""Schedule classes by ``parallel.pipeline_schedule``. 1F1B and its interleaving: Narayanan et al., 2021,
https://arxiv.org/abs/2104.04473; zero bubble: Qi et al., 2023, https://arxiv.org/abs/2401.10241."""


def check(architecture: Architecture, config: RunConfig, num_micro_batches: int, compiled: bool) -> None:
    """Refuse pipelines in which some stage would be empty or idle.

    Raises:
        UserError: with both sides of the arithmetic.
    """
    parallel = config.parallel
    if parallel.pipeline == 1:
        return
    stages = parallel.pipeline * parallel.pipeline_stages_per_rank
    if stages > architecture.num_layers:
        raise UserError(
            f"parallel.pipeline {parallel.pipeline} x parallel.pipeline_stages_per_rank "
            f"{parallel.pipeline_stages_per_rank} = {stages} stages, but the model has {architecture.num_layers} "
            "layers; use fewer stages"
        )
    if parallel.pipeline_schedule.endswith("zero_bubble"):
        _check_zero_bubble(architecture, parallel, compiled)
    wanted = stages if parallel.pipeline_schedule == "zbv_zero_bubble" else parallel.pipeline
    if num_micro_batches < wanted:
        raise UserError(
            f"a step has {num_micro_batches} micro-batches, but a pipeline of {wanted} stages needs at least {wanted} "
            "to keep all busy; raise training.global_batch_size or lower training.micro_batch_size or "
            "parallel.pipeline"
        )
    rounds = max(1, num_micro_batches // parallel.pipeline)
    if parallel.pipeline_schedule.startswith("interleaved") and num_micro_batches % rounds:
        raise UserError(
            f"a step has {num_micro_batches} micro-batches, which {parallel.pipeline_schedule} cannot distribute "
            f"evenly over {parallel.pipeline} ranks; make it a multiple of {parallel.pipeline} by "
            "training.global_batch_size"
        )


def _check_zero_bubble(architecture: Architecture, parallel: ParallelConfig, compiled: bool) -> None:
    """Refuse settings that conflict with zero-bubble schedules.

    These split the backward pass of a stage, whose parameters and graph must be unchanged until the second part.
    """
    schedule = parallel.pipeline_schedule
    needs = {
        "parallel.reshard_after_forward false": not parallel.reshard_after_forward,
        "parallel.recompute none": parallel.recompute == "none",
        "blocks that are not compiled (training.compile off)": not compiled,
    }
    for need, met in needs.items():
        if not met:
            raise UserError(
                f"parallel.pipeline_schedule {schedule} needs {need}, because it computes gradients of inputs and of "
                "weights separately; set it, or use interleaved_1f1b"
            )
    if schedule == "zbv_zero_bubble":
        _check_zbv(architecture)


def _check_zbv(architecture: Architecture) -> None:
    """Refuse the schedule that puts two consecutive stages, and both ends of the model, on one rank."""
    if architecture.tie_word_embeddings:
        raise UserError(
            "parallel.pipeline_schedule zbv_zero_bubble puts both ends of the model on one rank, but the model's "
            "embedding is also its head; use interleaved_zero_bubble"
        )
    # Before 2.13 a stage sends the shapes of its outputs to the next stage even if both are on one rank.
    if torch.__version__ < "2.13" and dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        raise UserError(
            f"parallel.pipeline_schedule zbv_zero_bubble sends from a rank to itself with PyTorch {torch.__version__}, "
            "which gloo (the communication of CPUs) cannot; use interleaved_zero_bubble, or PyTorch 2.13 or newer"
        )


def stage_numbers(schedule: str, place: int, pipeline: int, stages_per_rank: int) -> list[int]:
    """Return the stages of the rank at ``place`` of the pipeline.

    These are every ``pipeline``-th stage; or one of each half, from the ends inwards (the V of zbv_zero_bubble).
    """
    if schedule == "zbv_zero_bubble":
        return [place, 2 * pipeline - 1 - place]
    return [place + turn * pipeline for turn in range(stages_per_rank)]


def cut_layers(architecture: Architecture, num_stages: int) -> list[LayerRange]:
    """Return the layers of each stage, divided to minimize the work of the slowest stage, and then to balance weights.

    The work is that of matrix products: blocks, and the head with its loss, count by the parameters that a token uses.
    The embedding costs no work and counts only by its weights.
    """
    vocabulary = architecture.vocab_size * architecture.hidden_size
    layers, sizes = architecture.num_layers, architecture.block_sizes

    def cost(start: int, stop: int) -> tuple[int, int]:
        head = vocabulary if stop == layers else 0
        embedding = vocabulary if start == 0 else 0
        weights = sum(size.parameters for size in sizes[start:stop]) + head + embedding
        return sum(size.active for size in sizes[start:stop]) + head, weights**2

    @functools.cache
    def best(start: int, stages: int) -> tuple[int, int, tuple[int, ...]]:
        """Return (most work, sum of squared weights, first layers of the later stages) for layers ``start`` and on."""
        if stages == 1:
            return *cost(start, layers), ()
        options = []
        for stop in range(start + 1, layers - stages + 2):
            work, weights = cost(start, stop)
            most, squares, cuts = best(stop, stages - 1)
            options.append((max(work, most), weights + squares, (stop, *cuts)))
        return min(options)

    cuts = best(0, num_stages)[2]
    return [LayerRange(start, stop) for start, stop in itertools.pairwise((0, *cuts, layers))]


class _Stage(PipelineStage):
    """A stage for zero-bubble schedules, which assign gradients of ``parameters`` without autograd's hooks.

    An evaluation by zbv_zero_bubble also passes gradients between the stages of a rank, and there are none.
    """

    def __init__(self, parameters: DataParallel, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._parameters = parameters

    def backward_weight_one_chunk(self, *arguments: Any, **named: Any) -> None:
        """Compute the gradients of weights of one micro-batch, and collect them."""
        super().backward_weight_one_chunk(*arguments, **named)
        self._parameters.collect_gradients()

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Return the gradients of this stage's inputs for the preceding one on the same rank."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Take the gradients of this stage's outputs from the following one on the same rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class Pipelined:
    """Run the passes of a rank that holds some layers only.

    See :class:`~retemper.engine.parallel.forward_backward.ForwardBackward`.

    Args:
        decoders: this rank's stages, in their order.
        wrapped: the parameters of each.
        numbers: their numbers, see :func:`stage_numbers`.
        config: of the run.
        prepare: prepares micro-batches for the model.
        num_micro_batches: of a step on this rank.
        compute_dtype: of tensors exchanged between stages.
    """

    def __init__(
        self,
        decoders: list[LanguageModel],
        wrapped: list[DataParallel],
        numbers: list[int],
        config: RunConfig,
        prepare: BatchPreparer,
        num_micro_batches: int,
        compute_dtype: torch.dtype,
    ):
        self._decoders, self._wrapped, self._prepare = decoders, wrapped, prepare
        self._num_micro_batches = num_micro_batches
        self._batches: list[Batch] = []
        self._num_targets: float | Tensor = 1.0
        self._losses: list[tuple[Tensor, Tensor]] = []
        """Number and loss of each micro-batch; without values in a dry run."""
        layout = prepare.mesh.layout
        tokens = config.training.micro_batch_size * config.training.sequence_length // (layout.context * layout.tensor)
        width = decoders[0].architecture.hidden_size
        hidden = torch.empty(tokens, width, dtype=compute_dtype, device="meta", requires_grad=True)
        index, loss = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
        stages = []
        for decoder, parameters, number in zip(decoders, wrapped, numbers, strict=True):
            decoder.register_forward_pre_hook(self._fill_in, with_kwargs=True, prepend=True)
            stages.append(
                _Stage(
                    parameters,
                    decoder,
                    number,
                    layout.pipeline * len(numbers),
                    prepare.device,
                    input_args=index if decoder.is_first else hidden,
                    output_args=loss if decoder.is_last else hidden,
                    group=prepare.mesh.devices["pipeline"].get_group(),
                )
            )
        schedule = SCHEDULES[config.parallel.pipeline_schedule]
        self._schedule = schedule(
            stages[0] if len(stages) == 1 else stages,
            n_microbatches=num_micro_batches,
            loss_fn=self._scaled_loss,
            scale_grads=False,
        )

    def accumulate_gradients(
        self, batches: list[Batch], num_targets: float | Tensor, on_phase: Callable[[str], None]
    ) -> Tensor:
        """Train, see :class:`~retemper.engine.parallel.forward_backward.ForwardBackward`.

        Forward and backward passes alternate: all of them are the phase "forward".
        """
        on_phase("forward")
        self._num_targets = num_targets
        with self._computing():
            self._run(self._schedule.step, batches)
        self._join_tied_embedding()
        return self._loss() / num_targets

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Tensor:
        """Evaluate, see :class:`~retemper.engine.parallel.forward_backward.ForwardBackward`."""
        losses = torch.zeros(len(batches), dtype=torch.float64, device=self._prepare.device)
        count = self._num_micro_batches
        with self._computing():
            for first in range(0, len(batches), count):
                some = batches[first : first + count]
                # The schedule has a fixed length: the remaining micro-batches are copies without targets.
                self._run(self._schedule.eval, some + [some[0].without_targets()] * (count - len(some)))
                for number, loss in self._losses:
                    if int(number) < len(some):
                        losses[first + int(number)] = loss
        return counted_once(losses, self._prepare.mesh)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for parameters in self._wrapped:
                stack.enter_context(parameters.computing())
            yield

    def _run(self, run: Callable[..., Any], batches: list[Batch]) -> None:
        self._batches, self._losses = batches, []
        # Stages look up their micro-batch by its number: documents differ in number, so one tensor cannot hold them
        # all.
        numbers = torch.arange(len(batches))
        holds_first = self._decoders[0].is_first
        holds_last = self._decoders[-1].is_last
        inputs = [numbers] if holds_first else []
        run(*inputs, target=numbers if holds_last else None, number=numbers, return_outputs=False)
        self._batches = []

    def _fill_in(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        """Convert the schedule's arguments for a stage to those of a decoder."""
        batch = self._prepare(self.batch_of(named["number"]))
        return (batch, None if module.is_first else arguments[0]), {}

    def batch_of(self, number: Tensor) -> Batch:
        """Return the micro-batch with this number, [1] int64 on the host."""
        return self._batches[int(number)]

    def _scaled_loss(self, loss_sum: Tensor, number: Tensor) -> Tensor:
        self._losses.append((number, loss_sum.detach()))
        return loss_sum / self._num_targets

    def _loss(self) -> Tensor:
        """Return the sum of the losses of all micro-batches on the rank with the last stage, zero elsewhere."""
        total = torch.zeros((), device=self._prepare.device)
        for _, loss in self._losses:
            total += loss
        return counted_once(total, self._prepare.mesh)

    def _join_tied_embedding(self) -> None:
        """Sum the gradients of an embedding that is also the head: each end of the pipeline has one of them."""
        architecture, group = self._decoders[0].architecture, self._prepare.mesh.embedding_group
        if not architecture.tie_word_embeddings or not (self._decoders[0].is_first or self._decoders[-1].is_last):
            return
        end = self._decoders[0] if self._decoders[0].is_first else self._decoders[-1]
        if not end.head_weight.requires_grad:
            return
        gradient = end.head_weight.grad
        assert gradient is not None
        dist.all_reduce(gradient.to_local() if isinstance(gradient, DTensor) else gradient, group=group)
