"""Time the real trainer: its loop and its step, on random weights, without reports, evaluations or checkpoints.

Nothing is written except a temporary dataset of random data. Nothing is read except the model's config (and
the datasets with ``--real-data``): no weights, and no run folder.
"""

from __future__ import annotations

import gc
import io
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...engine.config import DataConfig, RunConfig, SourceConfig
from ...engine.data.loader import Prefetcher
from ...engine.data.packing import MicroBatch
from ...engine.dtypes import DTYPES
from ...engine.errors import UserError
from ...engine.hugging_face.config_source import architecture_source
from ...engine.model.architecture import Architecture, architecture_of
from ...engine.observe.flops import Trainable, named_peak, training_flops
from ...engine.parallel.process_group import Ranks
from ...engine.run_state import StepResult
from ...engine.trainer import Trainer
from .matmul import MatmulRate, matmul_rates
from .options import BenchmarkOptions
from .phases import PhaseClock, StepTime
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
    """The trainer's messages at its start."""
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


def measure_step(config: RunConfig, options: BenchmarkOptions, ranks: Ranks) -> Measurement:
    """Time the steps of the run described by ``config``; all ranks call this.

    Raises:
        UserError: training with the configuration is impossible, or memory runs out.
    """
    before = _memory(ranks.device)
    with tempfile.TemporaryDirectory(prefix="retemper-benchmark-") as name, _out_of_memory_is_a_user_error():
        folder = Path(name)
        trainer = TimedTrainer(ranks.everywhere(lambda: prepare_config(config, options, folder)), options, ranks)
        steps, warmup_seconds = trainer.time_steps()
        found = _describe(trainer, steps, warmup_seconds, before)
        # Last, so that it does not count as the training's memory, and on a machine as warm as after the training.
        del trainer
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        ranks.sum(0.0)  # together, as in a step: cores, power and heat are shared
        rates = matmul_rates(ranks.device, DTYPES, options.matmul_seconds) if options.matmul_seconds else []
    return replace(found, matmul=rates)


def prepare_config(config: RunConfig, options: BenchmarkOptions, folder: Path) -> RunConfig:
    """Return ``config`` with a budget of the requested steps, random weights and, without ``real_data``, random data.

    The data is written to ``folder``.

    Raises:
        UserError: the model has no config.
    """
    source = architecture_source(config.model)
    architecture = architecture_of(source)
    training, data = config.training, config.data
    num_steps = options.warmup_steps + options.steps
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
            training, train_tokens=samples * training.sequence_length, warmup_tokens=0, eval_at_start=False
        ),
        optimizer=replace(config.optimizer, schedule="constant", decay_tokens=None, schedule_start_tokens=0),
        checkpoint=replace(config.checkpoint, asynchronous=False, export_hf=False, push_to_hub=None),
        logging=replace(config.logging, tensorboard=False),
    )


def _only_random(data: DataConfig, prefix: Path) -> DataConfig:
    return replace(data, train=[SourceConfig(path=str(prefix))], stages=[], weights="tokens")


class TimedTrainer(Trainer):
    """The trainer with a clock, without the work at the end of a step (reports, evaluations, checkpoints)."""

    def __init__(self, config: RunConfig, options: BenchmarkOptions, ranks: Ranks) -> None:
        self._clock = PhaseClock(ranks.device)
        self._warmup_steps, self._num_steps = options.warmup_steps, options.warmup_steps + options.steps
        self.boundaries: list[Tensor] = []
        """``cu_seqlens`` of this rank's micro-batches in the timed steps, on the host."""
        self._began_at = self._warm_at = 0.0
        super().__init__(config, ranks)
        self.plan_lines: list[str] = []
        """The trainer's messages at its start."""
        self._said = io.StringIO()

    def time_steps(self) -> tuple[list[StepTime], float]:
        """Train; return the timed steps, and the duration of the warm-up in seconds.

        Raises:
            KeyboardInterrupt: the run was asked to stop.
        """
        with redirect_stdout(self._said):
            self.run()
        if self.progress.step < self._num_steps:
            raise KeyboardInterrupt
        return self._clock.steps()[self._warmup_steps :], self._warm_at - self._began_at

    def on_phase(self, name: str) -> None:
        self._clock.mark(name)

    def test_destination(self) -> list[str]:
        return []  # no checkpoint is written

    def _next_batches(self, prefetcher: Prefetcher) -> tuple[list[MicroBatch], float]:
        timed = self.progress.step >= self._warmup_steps
        if self.progress.step == 0:
            self.plan_lines = self._said.getvalue().splitlines()
            self._began_at = time.perf_counter()
        if self.progress.step == self._warmup_steps:
            self._warm_at = time.perf_counter()
        batches, num_targets = super()._next_batches(prefetcher)
        if timed:
            self.boundaries += [batch.cu_seqlens for batch in batches]
        return batches, num_targets

    def _report(self, *_: object) -> None:
        """Do nothing: a report would wait for the device."""

    def _evaluate_and_save(self, result: StepResult, last: bool, stopping: bool) -> bool:
        if last or stopping:
            self._clock.close()
        return stopping


def _describe(
    trainer: TimedTrainer, steps: list[StepTime], warmup_seconds: float, before: dict[str, int]
) -> Measurement:
    ranks, architecture, plan = trainer.ranks, trainer.inputs.architecture, trainer.plan
    memory = _memory(ranks.device)
    if ranks.device.type == "cpu":
        memory["resident_before"] = before["resident"]
    lengths = [boundaries.diff() for boundaries in trainer.boundaries]
    # Boundaries may be padded to a fixed number by documents without tokens.
    documents = ranks.sum(sum(int((length > 0).sum()) for length in lengths)) / len(steps)
    pairs = ranks.sum(sum(int((length.long() ** 2).sum()) for length in lengths)) / len(steps)
    tokens = plan.tokens_per_step
    all_pairs, trainable = tokens * plan.sequence_length, trainer.config.training.trainable
    return Measurement(
        # Notes about the random dataset are irrelevant.
        plan=[line for line in trainer.plan_lines if str(Path(trainer.config.run_folder).parent) not in line],
        ranks=ranks.world_size,
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        precision=trainer.config.training.precision,
        parameters=architecture.num_parameters,
        tokens_per_step=tokens,
        documents_per_step=documents,
        flops_per_step={
            name: training_flops(architecture, tokens, counted, trainable)
            for name, counted in (
                ("all pairs of positions", all_pairs),
                ("causal pairs (halved)", all_pairs / 2),
                ("causal pairs within documents", pairs / 2),
            )
        },
        flops_formula=formula(architecture, plan.sequence_length, trainable),
        steps=steps,
        warmup_seconds=warmup_seconds,
        memory=_largest(memory, ranks),
        datasheet=named_peak(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None,
    )


def formula(architecture: Architecture, sequence_length: int, trainable: Trainable = "all") -> str:
    """Return the formula of :func:`training_flops` per token, in symbols and with this model's numbers."""
    a, d = architecture, architecture.head_dim
    q, kv = a.num_attention_heads * d, a.num_key_value_heads * d
    block = "L (h (q + 2 kv) + q h + 3 h f)"
    weights = f"6 ({block} + h v)" if trainable == "all" else f"4 {block} (frozen) + 6 h v"
    return (
        f"FLOPs per token = {weights} + 12 L q s, the last term halved where causal pairs count; layers L "
        f"{a.num_layers}, hidden h {a.hidden_size}, heads x size q {q}, kv {kv}, feed-forward f "
        f"{a.intermediate_size}, vocabulary v {a.vocab_size}, s {sequence_length} (within documents: the mean of "
        "length^2 over the mean length)"
    )


def _memory(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
            "total": torch.cuda.get_device_properties(device).total_memory,
        }
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


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
