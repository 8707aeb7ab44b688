"""One rank's steps, rehearsed: the real model, the real parallel code and the real step, without values."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ...engine import batch
from ...engine.batch import Batch
from ...engine.config.settings import RunConfig
from ...engine.model.architecture import Architecture
from ...engine.model.decoder import LayerRange
from ...engine.optim import allocate_states, build_optimizer
from ...engine.parallel import pipeline
from ...engine.parallel.build import Choices, build_model
from ...engine.parallel.forward_backward import ModelParts
from ...engine.parallel.layout import Layout
from ...engine.parallel.mesh import build_mesh
from ...engine.parallel.process_group import Ranks
from ...engine.schedule import plan_batches
from ...engine.step import SkipNonFinite, train_step
from ...kernels.attention import PER_DOCUMENT, VARIABLE_LENGTH, Choice, plan_attention
from .cluster import absent_cluster, without_values_from_materializing_on
from .gpu_code import as_on_a_gpu, fresh_constants, labelled, nothing_read
from .memory import MemoryCounter
from .work import Collective, Sent, Work


@dataclass(frozen=True)
class RankRehearsal:
    """What one rank holds and does in a step, optimizer states allocated."""

    place: int
    """Place in the pipeline."""
    blocks: int
    """Of the model, on this rank."""
    parameters: float
    """Of this rank's share."""
    kept: dict[str, float]
    """Bytes by kind between steps."""
    peaks: dict[str, dict[str, float]]
    """Bytes by kind when most is held, for each part of a step."""
    most: dict[str, float]
    """Bytes by kind when most of it is held, at different times."""
    flops: float
    """Floating-point operations, those of recomputation included."""
    collectives: dict[Collective, Sent]


@dataclass(frozen=True)
class Part:
    """Which rank is rehearsed, and with how much of the model."""

    config: RunConfig
    """``parallel`` agrees with ``layout``."""
    architecture: Architecture
    layout: Layout
    gpus_per_node: int
    capability: tuple[int, int] | None
    """Compute capability of the GPU; None rehearses a run on CPUs."""
    place: int = 0
    """In the pipeline; ranks that differ in other axes only do the same."""
    blocks_per_stage: int | None = None
    """Instead of what the model has."""
    whole_steps: bool = True
    """Make the optimizer's states by a step, as a run does. False: by an empty one, in half the time."""


class PhaseCounter(SkipNonFinite):
    """Tells ``counter`` what memory is for in each part of a step.

    Args:
        counter: of memory.
        model: this rank's part of it.
    """

    def __init__(self, counter: MemoryCounter, model: ModelParts):
        self._counter = counter
        modules = (module for decoder in model.decoders for module in decoder.modules())
        self._num_groups, self._num_reduced = sum(isinstance(module, FSDPModule) for module in modules), 0
        counter.on_reduced = self._note_reduced

    def begin_phase(self, phase: str) -> None:
        """See :class:`~retemper.engine.step.StepGuards`."""
        self._counter.begin("activations" if phase in ("forward", "backward") else "temporaries")
        self._counter.enter(phase)

    def _note_reduced(self) -> None:
        """A group of parameters is through its backward pass. Memory falls or rises from block to block; the halves are
        told apart so that either is a straight line in the number of blocks."""
        self._num_reduced += 1
        late = 2 * (self._num_reduced % self._num_groups) >= self._num_groups
        self._counter.enter("backward, second half" if late else "backward, first half")


class RehearsedRank:
    """The model and optimizer of one rank, whose steps read no data and tell ``counter`` what memory is for."""

    def __init__(self, part: Part, ranks: Ranks, counter: MemoryCounter):
        config, architecture = part.config, part.architecture
        self.config, self.counter = config, counter
        self.plan = plan_batches(config.training, part.layout.data_parallel)
        backend = PER_DOCUMENT if part.capability is None else attention_backend(config, architecture)
        choices = Choices(Choice(backend, "planned"), False, self.plan.num_micro_batches)
        counter.begin("parameters")
        with without_values_from_materializing_on():
            mesh = build_mesh(part.layout, ranks.device.type)
            self.model, self.forward_backward = build_model(config, architecture, ranks, mesh, choices)
        self.optimizer = build_optimizer(self.model.named_parameters(), config.optimizer, config.seed)
        counter.declare("parameters", self.model.parameters())
        for parameter in filter(lambda p: p.requires_grad, self.model.parameters()):
            parameter.register_post_accumulate_grad_hook(lambda p: counter.declare("gradients", [p.grad]))
        self._guards = PhaseCounter(counter, self.model)
        self._guards.begin_phase("other")

    def one_step(self) -> None:
        """One optimizer step on samples that are one document each."""
        batches = [self._batch() for _ in range(self.plan.num_micro_batches)]
        settings, targets = self.config.optimizer, float(self.plan.tokens_per_step)
        rate, clip = settings.learning_rate, settings.clip_grad_norm
        train_step(self.model, self.forward_backward, self.optimizer, batches, targets, rate, clip, self._guards)
        self.declare_states()

    def declare_states(self) -> None:
        """Tell the counter of the optimizer's states."""
        values = (value for state in self.optimizer.state.values() for value in state.values())
        self.counter.declare("optimizer states", (value for value in values if isinstance(value, Tensor)))

    def _batch(self) -> Batch:
        length, samples = self.plan.sequence_length, self.plan.micro_batch_size
        with self.counter.making("temporaries"):
            numbers = torch.zeros(samples * length, dtype=torch.int64)
            offsets = torch.arange(0, samples * length + 1, length, dtype=torch.int32)
            return Batch(numbers, numbers.clone(), numbers.clone(), offsets, length, samples * length)


def attention_backend(config: RunConfig, architecture: Architecture) -> str:
    """A backend that takes as much memory as the one that a GPU would take, and that can be rehearsed anywhere: of all
    that read document offsets on the device, PyTorch's own."""
    asked = config.training.attention_backend
    if asked in ("sdpa", PER_DOCUMENT):
        return asked
    fits = architecture.head_dim % 8 == 0 and architecture.head_dim <= 256
    return VARIABLE_LENGTH[-1] if config.training.precision == "bf16" and fits else PER_DOCUMENT


def rehearse_rank(part: Part) -> RankRehearsal:
    """A step of a rank whose optimizer has its states.

    Raises:
        UserError: the layout is impossible for the model.
    """
    part = _shortened(part)
    rank = part.place * part.layout.world_size // part.layout.pipeline
    with absent_cluster(part.layout.world_size, rank) as ranks, contextlib.ExitStack() as stack:
        stack.enter_context(nothing_read())
        stack.enter_context(_offsets_with_values(part.config))
        if part.blocks_per_stage is not None:
            stack.enter_context(_even_stages(part.blocks_per_stage))
        return count_step(part, ranks)


def count_step(part: Part, ranks: Ranks) -> RankRehearsal:
    """What ``ranks`` holds and does in a step. On tensors with values as well as on such without."""
    work = Work(part.layout, part.gpus_per_node, part.config.training.sequence_length)
    counter = MemoryCounter(work.see)
    with contextlib.ExitStack() as stack:
        stack.enter_context(fresh_constants())
        if part.capability is not None:
            stack.enter_context(as_on_a_gpu(part.capability, work.add_flops))
        stack.enter_context(labelled(counter))
        stack.enter_context(counter)
        rehearsed = RehearsedRank(part, ranks, counter)
        if part.whole_steps:
            rehearsed.one_step()
        else:
            allocate_states(rehearsed.optimizer)
            rehearsed.declare_states()
        counter.reset_peaks()
        kept, work.flops, work.collectives = dict(counter.bytes), 0.0, {}
        rehearsed.one_step()
    parameters = sum(_local(parameter).numel() for parameter in rehearsed.model.parameters())
    blocks = sum(1 for _ in rehearsed.model.blocks())
    return RankRehearsal(
        part.place, blocks, parameters, kept, counter.peaks, counter.most, work.flops, work.collectives
    )


def _shortened(part: Part) -> Part:
    """With a model of ``blocks_per_stage``."""
    if part.blocks_per_stage is None:
        return part
    parallel, windows = part.config.parallel, part.architecture.sliding_windows
    count = part.blocks_per_stage * parallel.pipeline * parallel.pipeline_stages_per_rank
    return replace(part, architecture=replace(part.architecture, num_layers=count, sliding_windows=windows[:1] * count))


def _even_stages(blocks: int) -> Any:
    """Give every stage this many blocks."""

    def cut(_: Architecture, num_stages: int) -> list[LayerRange]:
        return [LayerRange(stage * blocks, (stage + 1) * blocks) for stage in range(num_stages)]

    return mock.patch.object(pipeline, "cut_layers", cut)


def _offsets_with_values(config: RunConfig) -> Any:
    """Attention that reads document offsets on the host reads those of samples that are one document each."""
    length, samples = config.training.sequence_length, config.training.micro_batch_size
    with unset_fake_temporarily():
        offsets = torch.arange(0, samples * length + 1, length, dtype=torch.int32)

    def plan(backend: str, _: Tensor, *rest: Any) -> Any:
        with unset_fake_temporarily():
            return plan_attention(backend, offsets, *rest)

    return mock.patch.object(batch, "plan_attention", plan)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
