"""Refuse values that no machine could run, in one line that names key, value and remedy."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from .config import (
    ALLOWABLE_CHANGES,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
)
from .config_effect import refused
from .config_types import Problems
from .errors import UserError

_LARGEST = 10**15
"""Upper limit of all numbers: larger values are typing errors, and would overflow later with a less clear message."""


def validate(config: RunConfig) -> None:
    """Refuse values that no machine could run.

    Raises:
        UserError: names the key, its value and the remedy; one line for each problem.
    """
    found = list(problems(config))
    if found:
        raise UserError(*found)


def problems(config: RunConfig) -> Iterator[str]:
    """Return the problems in the values of ``config``, one line for each.

    If a value is out of its range, its consequences for other values are not reported.
    """
    found = Problems()
    for message in _ranges(config):
        found.add(message, message.split(" ")[0])
    found.add_consequences(_combinations(config))
    yield from found.messages


def _ranges(config: RunConfig) -> Iterator[str]:
    if not config.run_folder.strip() or "\0" in config.run_folder:
        yield f"run_folder is {config.run_folder!r}; name the folder that the run writes to"
    training, optimizer, parallel = config.training, config.optimizer, config.parallel
    yield from _at_least(
        1, training, "training", "train_tokens", "sequence_length", "global_batch_size", "micro_batch_size"
    )
    yield from _at_least(0, training, "training", "max_rewinds", "check_replicas_interval")
    yield from _at_least(1, training, "training", "rewind_steps")
    yield from _at_least(0, training, "training", "warmup_tokens", "eval_interval", "gc_interval", "max_skipped_steps")
    for name in ("loss_spike_zscore", "stop_after_minutes"):
        value = getattr(training, name)
        if value is not None and not 0 < value < math.inf:
            yield f"training.{name} is {value}; it must be positive and finite, or null"
    yield from _at_least(1, training, "training", "eval_tokens")
    yield from _at_least(1, config.data, "data", "prefetch_steps")
    yield from _at_least(
        1, parallel, "parallel", "pipeline", "replicate", "context", "tensor", "pipeline_stages_per_rank"
    )
    yield from _at_least(1, parallel, "parallel", "recompute_every", "timeout_seconds")
    yield from _at_least(0, parallel, "parallel", "prefetch_blocks")
    yield from _at_least(1, config.checkpoint, "checkpoint", "save_interval", "keep_last")
    yield from _at_least(0, config.checkpoint, "checkpoint", "keep_every", "max_failed_saves")
    yield from _upload_name(config.checkpoint)
    yield from _at_least(1, config.logging, "logging", "log_interval")
    yield from _at_least(
        0, optimizer, "optimizer", "learning_rate", "min_learning_rate", "weight_decay", "clip_grad_norm"
    )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"optimizer.{name} is {getattr(optimizer, name)}; it must be in [0, 1)"
    if not 0 < optimizer.eps < math.inf:
        yield f"optimizer.eps is {optimizer.eps}; it must be positive and finite"
    if isinstance(parallel.shard, int) and parallel.shard < 1:
        yield f"parallel.shard is {parallel.shard}; use auto or a number of ranks from 1"
    if not 0 <= config.seed < 2**63:
        yield f"seed is {config.seed}; it must be in [0, 2^63)"
    for change in config.allow_changes:
        if change not in ALLOWABLE_CHANGES:
            yield (
                f"allow_changes has the unknown entry {change!r}; allowed: {', '.join(ALLOWABLE_CHANGES)}; other "
                "settings may change without being listed"
            )
    if not 0 <= config.data.validation_fraction < 1:
        yield f"data.validation_fraction is {config.data.validation_fraction}; it must be in [0, 1)"


def _combinations(config: RunConfig) -> Iterator[str]:
    training = config.training
    yield from refused(config)
    yield from _pipeline(config.parallel)
    yield from _schedule(training, config.optimizer)
    yield from _data(config.data, training)
    if config.model.initialize_from is None and config.model.architecture is None:
        yield (
            "model.initialize_from and model.architecture are both null: name a checkpoint to start from, or describe "
            "the architecture to start from random weights"
        )


def _at_least(bound: int, section: Any, prefix: str, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(section, name)
        if not bound <= value <= _LARGEST:
            yield f"{prefix}.{name} is {value}; it must be at least {bound} and at most {_LARGEST:.0e}"


def _upload_name(checkpoint: CheckpointConfig) -> Iterator[str]:
    name = checkpoint.push_to_hub
    if name is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        yield f"checkpoint.push_to_hub is {name!r}; name a repository on the Hub, such as my-organization/my-model"


def _schedule(training: TrainingConfig, optimizer: OptimizerConfig) -> Iterator[str]:
    start = optimizer.schedule_start_tokens
    if not 0 <= start < training.train_tokens:
        yield (
            f"optimizer.schedule_start_tokens is {start:,}; it must be at least 0 and less than training.train_tokens "
            f"{training.train_tokens:,}"
        )
    behind = f" - optimizer.schedule_start_tokens {start:,}" if start else ""
    if training.warmup_tokens > training.train_tokens - start:
        yield (
            f"training.warmup_tokens {training.warmup_tokens:,} is more than training.train_tokens "
            f"{training.train_tokens:,}{behind}; warm up over a part of the run"
        )
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate {optimizer.min_learning_rate:g} is above optimizer.learning_rate "
            f"{optimizer.learning_rate:g}; lower the minimum"
        )
    if optimizer.decay_tokens is not None and optimizer.schedule == "wsd":
        room = training.train_tokens - start - training.warmup_tokens
        if not 0 < optimizer.decay_tokens <= room:
            yield (
                f"optimizer.decay_tokens is {optimizer.decay_tokens:,}; it must be between 1 and train_tokens - "
                f"warmup_tokens{behind} = {room:,}"
            )


def _pipeline(parallel: ParallelConfig) -> Iterator[str]:
    schedule, stages = parallel.pipeline_schedule, parallel.pipeline_stages_per_rank
    if parallel.pipeline == 1:
        return
    fitting = {"1f1b": stages == 1, "zbv_zero_bubble": stages == 2}.get(schedule, stages >= 2)
    if not fitting:
        wanted = {"1f1b": "1", "zbv_zero_bubble": "2"}.get(schedule, "2 or more")
        yield (
            f"parallel.pipeline_stages_per_rank is {stages}, but parallel.pipeline_schedule {schedule} needs {wanted}"
        )


def _data(data: DataConfig, training: TrainingConfig) -> Iterator[str]:
    if data.train and data.stages:
        yield ("data.train and data.stages are both set; put the blend of data.train into a stage, or remove one")
    if not data.train and not data.stages:
        yield "data.train is empty; name at least one dataset there, or data.stages"
    of_stages = list(_stages(data.stages, training.sequence_length))
    yield from of_stages
    total = sum(stage.train_tokens or 0 for stage in data.stages)
    if data.stages and not of_stages and data.stages[-1].train_tokens is not None and total < training.train_tokens:
        yield (
            f"training.train_tokens is {training.train_tokens:,}, but the train_tokens of data.stages sum to "
            f"{total:,}; leave out those of the last stage, which then lasts until the end, or make the two agree"
        )
    yield from _blend(data.train, "data.train", training.sequence_length)
    if data.validation_fraction > 0 and "held_out" in data.validation:
        yield "data.validation names a set 'held_out', which data.validation_fraction makes; rename it"


def _stages(stages: list[StageConfig], sequence_length: int) -> Iterator[str]:
    paths: dict[str, str] = {}
    for number, stage in enumerate(stages):
        where = f"data.stages[{number}]"
        if not stage.train:
            yield f"{where}.train is empty; name at least one dataset"
        last = number == len(stages) - 1
        if stage.train_tokens is None and not last:
            yield f"{where}.train_tokens is null; only the last stage may leave it out"
        if stage.train_tokens is not None and not sequence_length <= stage.train_tokens <= _LARGEST:
            yield (
                f"{where}.train_tokens is {stage.train_tokens}; it must be at least one sample of "
                f"training.sequence_length {sequence_length:,} and at most {_LARGEST:.0e}"
            )
        yield from _blend(stage.train, f"{where}.train", sequence_length)
        for source in stage.train:
            if paths.setdefault(source.identity, source.path) != source.path:
                yield (
                    f"{where}.train names {source.path} '{source.identity}', but an earlier stage uses this name for "
                    f"{paths[source.identity]}; give one of the two another 'name'"
                )


def _blend(sources: list[SourceConfig], where: str, sequence_length: int) -> Iterator[str]:
    names = Counter(source.identity for source in sources)
    for position, source in enumerate(sources):
        if names[source.identity] > 1:
            yield f"{where} has two sources named '{source.identity}'; give each its own 'name'"
        for key in ("weight", "max_epochs"):
            value = getattr(source, key)
            if value is not None and not 0 < value <= _LARGEST:
                yield f"{where}[{position}].{key} is {value}; it must be positive and finite"
        if source.max_tokens is not None and not sequence_length <= source.max_tokens <= _LARGEST:
            yield (
                f"{where}[{position}].max_tokens is {source.max_tokens}; it must be at least one sample of "
                f"training.sequence_length {sequence_length:,} and at most {_LARGEST:.0e}; to leave the source out, "
                "remove it"
            )
