"""Time the steps of a run on random weights: its batches and its training step, without reports or checkpoints.

Nothing is written except a temporary dataset of random data. Nothing is read except the model's config (and
the datasets with ``--real-data``): no weights, and no run folder.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ...engine.config.budget import in_tokens
from ...engine.config.settings import DataConfig, EarlyStoppingConfig, RunConfig, SourceConfig
from ...engine.data.loader import Prefetcher
from ...engine.errors import UserError
from ...engine.guards.run_guards import RunGuards
from ...engine.model.architecture import Architecture
from ...engine.model.decoder import Decoder
from ...engine.model.dtypes import DTYPES
from ...engine.observe.flops import named_peak, training_flops
from ...engine.observe.start_summary import describe_start
from ...engine.optim.local import local_part
from ...engine.parallel.process_group import Ranks
from ...engine.parallel.trainable import ALL, Learning, learning
from ...engine.pretrain import build, next_batches, one_step
from ...engine.run import Run
from ...engine.weights.hugging_face.config_source import architecture_source, configured_architecture
from ..hardware_limits import MatmulRate, matmul_rates
from ..timing import peak_bytes
from .options import StepBenchmarkOptions
from .phases import PhaseClock, StepTime
from .profile import PROFILED_STEPS, WARMUP_STEPS, profiled_steps
from .synthetic import DocumentLengths, write_random_dataset

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Measurement:
    """The results. Times are the main rank's; ranks step together."""

    plan: list[str]
    """What a run logs about itself at its start."""
    ranks: int
    device: str
    precision: str
    parameters: int
    tokens_per_step: int
    """Number of tokens, over all ranks."""
    documents_per_step: float
    """Number of documents, or pieces of them, that attend only to themselves; mean over the timed steps, over all
    ranks."""
    flops_per_step: dict[str, float]
    """FLOPs of all ranks, by convention: all pairs of positions in a sample, causal pairs, and causal pairs in
    documents."""
    flops_formula: str
    steps: list[StepTime]
    """The timed steps."""
    warmup_seconds: float
    """Host time from the first step's beginning to the first timed step's; it includes compilation."""
    memory: dict[str, int]
    """Bytes of the rank with the most. On a GPU: the peaks ``allocated`` and ``reserved``, and the total memory. On a
    CPU: the resident set's peak, and its peak before the model was built. For the whole run, warm-up included."""
    matmul: list[MatmulRate] = field(default_factory=list)
    datasheet: tuple[str, float] | None = None
    """Name and dense bf16 peak in FLOP/s of the GPU."""


def measure_step(config: RunConfig, options: StepBenchmarkOptions, ranks: Ranks) -> Measurement:
    """Time the steps of the run described by ``config``; all ranks call this.

    Raises:
        UserError: training with the configuration is impossible, or memory runs out.
    """
    before = _memory(ranks.device)
    with tempfile.TemporaryDirectory(prefix="retemper-benchmark-") as name, _out_of_memory_is_a_user_error():
        folder = Path(name)
        timed = time_steps(ranks.fail_together(lambda: prepare_config(config, options, folder)), options, ranks)
        found = _describe(timed, before)
        # Last, so that it does not count as the training's memory, and on a machine as warm as after the training.
        del timed
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        ranks.all_reduce(0.0)  # together, as in a step: cores, power and heat are shared
        rates = matmul_rates(ranks.device, DTYPES, options.matmul_seconds) if options.matmul_seconds else []
    return replace(found, matmul=rates)


def prepare_config(config: RunConfig, options: StepBenchmarkOptions, folder: Path) -> RunConfig:
    """Return ``config`` with a budget of the requested steps, random weights and, without ``real_data``, random data.

    The data is written to ``folder``.

    Raises:
        UserError: the model has no config.
    """
    source = architecture_source(config.model)
    architecture = configured_architecture(config.model)
    config = in_tokens(config)
    training, data = config.training, config.data
    num_steps = options.warmup_steps + options.steps + (WARMUP_STEPS + PROFILED_STEPS if options.profile else 0)
    samples = num_steps * training.global_batch_size
    if not options.real_data:
        prefix = folder / "random"
        lengths = DocumentLengths.parse(options.documents)
        write_random_dataset(
            prefix,
            lengths,
            architecture.vocab_size,
            training.sequence_length,
            samples,
            training.global_batch_size,
            config.seed,
        )
        data = _only_random(data, prefix)
    return replace(
        config,
        # Empty, so that the run does not resume.
        run_folder=str(folder / "run"),
        resume="auto",
        model=replace(
            config.model,
            initialize_from=None,
            architecture=source,
            tokenizer=config.model.tokenizer if options.real_data else None,
        ),
        data=replace(data, validation={}, validation_fraction=0.0),
        training=replace(
            training,
            train_tokens=samples * training.sequence_length,
            warmup_tokens=0,
            eval_at_start=False,
            early_stopping=EarlyStoppingConfig(),
        ),
        adapter=replace(config.adapter, export="merged"),
        optimizer=replace(
            config.optimizer, schedule="constant", decay_tokens=None, decay_shape="linear", schedule_start_tokens=0
        ),
        checkpoint=replace(
            config.checkpoint,
            asynchronous=False,
            export_hf=False,
            export_best=False,
            model_folders="off",
            push_to_hub=None,
        ),
        logging=replace(config.logging, tensorboard=False),
    )


def _only_random(data: DataConfig, prefix: Path) -> DataConfig:
    return replace(data, train=[SourceConfig(path=str(prefix))], stages=[], weights="tokens")


class TimedGuards:
    """The guards of a run, which also tell a clock when a phase of the step begins."""

    def __init__(self, guards: RunGuards, clock: PhaseClock):
        self._guards, self._clock = guards, clock

    def begin_phase(self, phase: str) -> None:
        """See :class:`~retemper.engine.step.StepGuards`."""
        self._guards.begin_phase(phase)
        self._clock.mark(phase)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guards, name)


@dataclass
class Timed:
    """What was measured of the steps of ``run``."""

    run: Run
    plan: list[str]
    """What the run logs about itself at its start."""
    steps: list[StepTime]
    """The timed steps."""
    warmup_seconds: float
    boundaries: list[Tensor]
    """``cu_seqlens`` of this rank's micro-batches in the timed steps, on the host."""


def time_steps(config: RunConfig, options: StepBenchmarkOptions, ranks: Ranks) -> Timed:
    """Build a run and make its steps; what is due between them (reports, evaluations, checkpoints) is left out.

    Raises:
        UserError: the configuration cannot be trained with.
        KeyboardInterrupt: the run was asked to stop.
    """
    with quick_initialization(ranks.device):
        run, clock = build(config, ranks, check_room=False), PhaseClock(ranks.device)
    described, guards = describe_start(run), run.guards
    run.guards = cast(RunGuards, TimedGuards(guards, clock))
    boundaries: list[Tensor] = []
    warm_at = began_at = time.perf_counter()
    first_samples = range(0, run.end_sample, run.plan.global_batch_size)
    prefetcher = Prefetcher(run.data.micro_batches, first_samples, config.data.prefetch_steps)

    def step() -> list[Tensor]:
        batches, num_targets = next_batches(run, prefetcher)
        one_step(run, batches, num_targets)
        if run.stop.agreed():
            raise KeyboardInterrupt
        return [batch.cu_seqlens for batch in batches]

    with run.stop, guards, prefetcher:
        for number in range(options.warmup_steps + options.steps):
            if number == options.warmup_steps:
                warm_at = time.perf_counter()
            clock.mark("data")
            used = step()
            if number >= options.warmup_steps:
                boundaries += used
        clock.close()
        steps = clock.steps()[options.warmup_steps :]
        if options.profile is not None:
            _profile(step, Path(options.profile), ranks)
    return Timed(run, described, steps, warm_at - began_at, boundaries)


@contextmanager
def quick_initialization(device: torch.device) -> Iterator[None]:
    """Let decoders draw their random weights on a GPU, where this costs no time.

    A run draws on the host, so that its weights do not depend on the device; 7 billion of them take a minute. No
    measurement depends on the values.
    """

    @torch.no_grad()
    def initialize_(self: Decoder, seed: int, copy_: object = None) -> None:
        torch.manual_seed(seed)
        for name, parameter in self.named_parameters():
            values = local_part(parameter)
            if name.endswith("norm.weight"):
                values.fill_(0.0 if self.architecture.norm == "rms_plus_one" else 1.0)
            elif name.endswith("bias"):
                values.zero_()
            else:
                values.normal_(0.0, self.architecture.initializer_range)

    on_the_host = Decoder.initialize_
    if device.type == "cuda":
        Decoder.initialize_ = initialize_  # type: ignore[method-assign]
    try:
        yield
    finally:
        Decoder.initialize_ = on_the_host  # type: ignore[method-assign]


def _profile(step: Callable[[], object], folder: Path, ranks: Ranks) -> None:
    """Make further steps, which the main rank profiles."""
    context = profiled_steps(folder, ranks.device) if ranks.is_main else nullcontext(lambda: None)
    with context as step_done:
        for _ in range(WARMUP_STEPS + PROFILED_STEPS):
            step()
            step_done()


def _describe(timed: Timed, before: dict[str, int]) -> Measurement:
    run, steps = timed.run, timed.steps
    config, ranks, architecture, plan = run.config, run.ranks, run.start.architecture, run.plan
    memory = _memory(ranks.device)
    if ranks.device.type == "cpu":
        memory["resident_before"] = before["resident"]
    lengths = [boundaries.diff() for boundaries in timed.boundaries]
    # Boundaries may be padded to a fixed number by documents without tokens.
    documents = ranks.all_reduce(sum(int((length > 0).sum()) for length in lengths)) / len(steps)
    pairs = ranks.all_reduce(sum(int((length.long() ** 2).sum()) for length in lengths)) / len(steps)
    tokens = plan.tokens_per_step
    all_pairs, learned = tokens * plan.sequence_length, learning(architecture, config.training, config.adapter)
    return Measurement(
        # Notes about the random dataset are irrelevant.
        plan=[line for line in timed.plan if str(Path(config.run_folder).parent) not in line],
        ranks=ranks.world_size,
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        precision=config.training.precision,
        parameters=architecture.num_parameters,
        tokens_per_step=tokens,
        documents_per_step=documents,
        flops_per_step={
            name: training_flops(architecture, tokens, counted, learned)
            for name, counted in (
                ("all pairs of positions", all_pairs),
                ("causal pairs (halved)", all_pairs / 2),
                ("causal pairs within documents", pairs / 2),
            )
        },
        flops_formula=formula(architecture, plan.sequence_length, learned),
        steps=steps,
        warmup_seconds=timed.warmup_seconds,
        memory=_largest(memory, ranks),
        datasheet=named_peak(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None,
    )


def formula(architecture: Architecture, sequence_length: int, learned: Learning = ALL) -> str:
    """Return the formula of :func:`training_flops` per token, in symbols and with this model's numbers."""
    a = architecture
    q = a.num_attention_heads * a.head_dim
    of_blocks = 2 + 2 * learned.inputs + 2 * learned.weights
    of_head = 2 + 2 * learned.head_input + 2 * learned.head_weight
    frozen = " (frozen)" if learned.weights == 0 else ""
    weights = "6 (m + h v)" if of_blocks == of_head == 6 else f"{of_blocks:.3g} m{frozen} + {of_head} h v"
    weights += f" + 6 x {learned.added:,} (matrices of the adapter)" if learned.added else ""
    return (
        f"FLOPs per token = {weights} + {4 + 8 * learned.backward:.3g} L q s, the last term halved where causal pairs "
        f"count; elements of the blocks' matrices m {a.block_matrices:,}, layers L {a.num_layers}, hidden h "
        f"{a.hidden_size}, heads x size q {q}, vocabulary v {a.vocab_size}, s {sequence_length} (within documents: the "
        "mean of length^2 over the mean length)"
    )


def _memory(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
            "total": torch.cuda.get_device_properties(device).total_memory,
        }
    return {"resident": peak_bytes(device)}


def _largest(memory: dict[str, int], ranks: Ranks) -> dict[str, int]:
    """Return the largest of each number over the ranks."""
    everybody: list[Any] = [memory] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(everybody, memory)
    return {name: max(one[name] for one in everybody) for name in memory}


@contextmanager
def _out_of_memory_is_a_user_error() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"out of memory: {first}; lower training.micro_batch_size, set parallel.recompute, or use more ranks"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory has run out, on the GPU or the host; libraries report it in several ways."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
