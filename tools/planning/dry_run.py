"""Run the steps of one rank without values: the real model, the real parallel code and the real step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ...engine.batch import Batch
from ...engine.config.settings import RunConfig
from ...engine.model.architecture import Architecture, LayerRange
from ...engine.model.attention_choice import context_kind
from ...engine.optim import allocate_states, build_average, build_optimizer, keep_average
from ...engine.optim.loss_scaling import LossScaler
from ...engine.parallel.build import Choices, build_model, materialize_empty
from ...engine.parallel.forward_backward import ModelParts
from ...engine.parallel.layout import Layout
from ...engine.parallel.mesh import build_mesh
from ...engine.parallel.pipeline import Pipelined
from ...engine.parallel.process_group import Ranks
from ...engine.schedule import plan_batches
from ...engine.step import SkipNonFinite, train_step
from ...kernels.attention import PER_DOCUMENT, VARIABLE_LENGTH, Choice, plan_attention
from .gpu_paths import (
    activations_on_host,
    attention_options,
    fresh_constants,
    labelled,
    read_no_values,
    states_only,
    triton_loss,
)
from .host_memory import pinned_rounding
from .memory import MemoryCounter
from .orthogonalization import Matrices, matrices_of
from .simulated_cluster import has_values, materialize_without_values, simulated_cluster
from .work import NO_EXPERTS, Collective, CollectiveTotal, ExpertWork, WorkCounter, hidden_bytes


@dataclass(frozen=True)
class RankUsage:
    """What one rank holds and does in a step, optimizer states allocated."""

    place: int
    """Place in the pipeline."""
    blocks: int
    """Number of the model's blocks on this rank."""
    parameters: float
    """Number of parameters in this rank's share."""
    trained: float
    """Number of those that are trained."""
    kept: dict[str, float]
    """Bytes by kind between steps."""
    peaks: dict[str, dict[str, float]]
    """Bytes by kind at the peak, for each phase of a step."""
    phase_most: dict[str, dict[str, float]]
    """Maximum bytes of each kind, at different times, for each phase of a step."""
    flops: float
    """Floating-point operations, including those of recomputation."""
    collectives: dict[Collective, CollectiveTotal]
    sent_activations: float = 0.0
    """Bytes of activations that are sent to host memory."""
    host_activations: float = 0.0
    """Bytes of pinned host memory that activations take, at most."""
    host_rounding: float = 0.0
    """Bytes that pinned host memory adds to the sizes of weights and gradients."""
    experts: ExpertWork = NO_EXPERTS
    """Work of the experts, if the model has any."""
    matrices: Matrices = ()
    """What Muon orthogonalizes, whose operations are not in ``flops``."""

    @property
    def most(self) -> dict[str, float]:
        """Return the maximum bytes of each kind in a step."""
        phases = [*self.phase_most.values(), *self.peaks.values()]
        return {kind: max(kinds[kind] for kinds in phases) for kind in self.kept}


@dataclass(frozen=True)
class RankSpec:
    """A rank to dry run, and how much of the model it gets."""

    config: RunConfig
    """``parallel`` agrees with ``layout``."""
    architecture: Architecture
    layout: Layout
    gpus_per_node: int
    capability: tuple[int, int] | None
    """Compute capability of the GPU; None: the run is on CPUs."""
    gpu_memory: int | None = None
    """Bytes that PyTorch may use of it; None: unknown, and the loss has the budget of a small GPU."""
    place: int = 0
    """Place in the pipeline; ranks that differ only in other axes do the same."""
    stage_blocks: tuple[int, ...] | None = None
    """Numbers of the blocks that each stage has, instead of its own."""
    whole_steps: bool = True
    """Make the optimizer's states by a step, as a run does. False: by an empty one, in half the time."""


class PhaseCounter(SkipNonFinite):
    """Tells ``counter`` the purpose of memory in each phase of a step of ``model``."""

    def __init__(self, counter: MemoryCounter, model: ModelParts, loss_scaler: LossScaler | None = None):
        super().__init__(loss_scaler)
        self._counter = counter
        modules = (module for decoder in model.decoders for module in decoder.modules())
        self._num_groups, self._num_reduced = sum(isinstance(module, FSDPModule) for module in modules), 0
        if self._num_groups:
            counter.on_reduced = self._count_reduced
        else:
            blocks = list(model.blocks())
            self._num_groups = len(blocks)
            for block in blocks:
                block.register_full_backward_hook(lambda *_: self._count_reduced())

    def begin_phase(self, phase: str) -> None:
        """See :class:`~retemper.engine.step.StepGuards`."""
        self._counter.begin("activations" if phase in ("forward", "backward") else "temporaries")
        self._counter.enter(phase)

    def _count_reduced(self) -> None:
        """Begin a half of the backward pass when a group of parameters, or without FSDP a block, has been through it.

        Memory falls or rises from block to block. The halves are separate phases, so that the peak of either is linear
        in the number of blocks.
        """
        self._num_reduced += 1
        late = 2 * (1 + (self._num_reduced - 1) % self._num_groups) >= self._num_groups
        self._counter.enter("backward, second half" if late else "backward, first half")


class SimulatedRank:
    """The model and optimizer of one rank, whose steps read no data and tell ``counter`` the purpose of memory."""

    def __init__(self, spec: RankSpec, ranks: Ranks, counter: MemoryCounter):
        config, architecture = spec.config, spec.architecture
        self.config, self.counter, self._windows = config, counter, architecture.sliding_windows
        self.plan = plan_batches(config.training, spec.layout.data_parallel)
        self._backend = PER_DOCUMENT if spec.capability is None else attention_backend(config, architecture)
        self._in_blocks = context_kind(config.parallel, architecture) == "ring"
        choices = Choices(Choice(self._backend, "planned"), False, self.plan.num_micro_batches)
        counter.begin("parameters")
        materialize = materialize_without_values() if not has_values() else materialize_empty
        # Meshes are tables of ranks, and need values. The model has none until it is materialized.
        with unset_fake_temporarily():
            mesh = build_mesh(spec.layout, ranks.device.type, config.parallel.expert)
            built = build_model(config, architecture, ranks, mesh, choices, even_stages(spec), materialize)
        self.model, self.forward_backward = built
        if isinstance(self.forward_backward, Pipelined) and not has_values():
            read_no_values(self.forward_backward)
        adapt = states_only if not has_values() else (lambda kind: kind)
        named, tables = list(self.model.named_parameters()), self.model.table_names
        self.optimizer = build_optimizer(named, config.optimizer, config.seed, tables, adapt)
        self.average = build_average(named, config.training, config.seed)
        if has_values():  # an update has many small chunks, and allocates nothing that stays
            keep_average(self.optimizer, self.average)
        counter.declare("parameters", self.model.parameters())
        for parameter in filter(lambda p: p.requires_grad, self.model.parameters()):
            parameter.register_post_accumulate_grad_hook(lambda p: counter.declare("gradients", [p.grad]))
        in_fp16 = config.training.precision == "fp16"
        scaler = LossScaler(config.training, ranks.device) if in_fp16 else None
        self._guards = PhaseCounter(counter, self.model, scaler)
        self._guards.begin_phase("other")

    def one_step(self) -> None:
        """Make one optimizer step on samples that are one document each."""
        batches = [self._batch() for _ in range(self.plan.num_micro_batches)]
        settings, targets = self.config.optimizer, float(self.plan.tokens_per_step)
        rate, clip = settings.learning_rate, settings.clip_grad_norm
        train_step(self.model, self.forward_backward, self.optimizer, batches, targets, rate, clip, self._guards)
        self.declare_states()

    def declare_states(self) -> None:
        """Tell the counter which tensors are the optimizer's states."""
        values = (value for state in self.optimizer.state.values() for value in state.values())
        self.counter.declare("optimizer states", (value for value in values if isinstance(value, Tensor)))
        self.counter.declare("optimizer states", self.average.tensors().values() if self.average else ())

    def _batch(self) -> Batch:
        length, samples = self.plan.sequence_length, self.plan.micro_batch_size
        with self.counter.making("temporaries"):
            numbers = torch.zeros(samples * length, dtype=torch.int64)
            offsets = torch.arange(0, samples * length + 1, length, dtype=torch.int32)
            # Some backends read the offsets on the host, so the plan is made with values.
            with unset_fake_temporarily():
                on_host = torch.arange(0, samples * length + 1, length, dtype=torch.int32)
                device, in_blocks = on_host.device, self._in_blocks
                plan = plan_attention(self._backend, on_host, self._windows, device, in_blocks=in_blocks)
            tokens, targets, positions = numbers, numbers.clone(), numbers.clone()
            return Batch(tokens, targets, positions, offsets, length, samples * length, plan, numbers.clone())


def attention_backend(config: RunConfig, architecture: Architecture) -> str:
    """Return a backend that takes as much memory as the one of a GPU, and that can run without values.

    Of all that read document offsets on the device, this is PyTorch's own.
    """
    requested = config.training.attention_backend
    if not architecture.packs_documents:
        return PER_DOCUMENT
    if requested in ("sdpa", PER_DOCUMENT):
        return requested
    head_dim = max(architecture.head_dim, architecture.value_head_dim or 0)
    fits = head_dim % 8 == 0 and head_dim <= 256
    return VARIABLE_LENGTH[-1] if config.training.precision in ("bf16", "fp16") and fits else PER_DOCUMENT


def dry_run(spec: RankSpec) -> RankUsage:
    """Count a step of a rank whose optimizer has its states.

    Raises:
        UserError: the layout is impossible for the model.
    """
    spec = _shortened(spec)
    rank = spec.place * spec.layout.world_size // spec.layout.pipeline
    with simulated_cluster(spec.layout.world_size, rank) as ranks:
        return count_step(spec, ranks)


def count_step(spec: RankSpec, ranks: Ranks) -> RankUsage:
    """Return what ``ranks`` holds and does in a step, on tensors with or without values."""
    length, expert = spec.config.training.sequence_length, spec.config.parallel.expert
    work = WorkCounter(spec.layout, spec.gpus_per_node, length, expert)
    counter = MemoryCounter(work.count_operator, hidden_bytes=hidden_bytes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(fresh_constants())
        if spec.capability is not None:
            stack.enter_context(triton_loss(spec.capability, spec.gpu_memory, work.add_flops))
            stack.enter_context(attention_options())
        stack.enter_context(labelled(counter))
        stack.enter_context(counter)
        on_host = stack.enter_context(activations_on_host(counter))
        rank = SimulatedRank(spec, ranks, counter)
        if spec.whole_steps:
            rank.one_step()
        else:
            allocate_states(rank.optimizer)
            rank.declare_states()
        counter.reset_peaks()
        on_host.reset()
        kept, work.flops, work.collectives, work.experts = dict(counter.bytes), 0.0, {}, NO_EXPERTS
        rank.one_step()
    sizes = [(_local(parameter).numel(), parameter.requires_grad) for parameter in rank.model.parameters()]
    parameters, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    blocks = sum(1 for _ in rank.model.blocks())
    peaks, most = counter.peaks, counter.most
    host = on_host.sent, on_host.most, pinned_rounding(rank.model.decoders, spec.config)
    matrices = matrices_of(rank.optimizer, rank.model.blocks())
    work_done = work.flops, work.collectives, *host, work.experts, matrices
    return RankUsage(spec.place, blocks, parameters, trained, kept, peaks, most, *work_done)


def _num_stages(spec: RankSpec) -> int:
    return spec.config.parallel.pipeline * spec.config.parallel.pipeline_stages_per_rank


def _shortened(spec: RankSpec) -> RankSpec:
    """Return the spec with a model of ``stage_blocks``."""
    if spec.stage_blocks is None:
        return spec
    return replace(spec, architecture=spec.architecture.shortened(spec.stage_blocks * _num_stages(spec)))


def even_stages(spec: RankSpec) -> list[LayerRange] | None:
    """Return the layers of each stage, if all have ``stage_blocks``."""
    if spec.stage_blocks is None:
        return None
    blocks = len(spec.stage_blocks)
    return [LayerRange(stage * blocks, (stage + 1) * blocks) for stage in range(_num_stages(spec))]


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
