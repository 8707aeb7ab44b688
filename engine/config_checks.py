"""Values that no machine could run are refused, in one line that names key, value and remedy."""

from __future__ import annotations

import math
import re
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
from .errors import UserError

_LARGEST = 10**15
"""Beyond any run: more is a slip of the keyboard, and would overflow somewhere less clear."""


def validate(config: RunConfig) -> None:
    """Refuse values that no machine could run.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    if not config.run_folder.strip() or "\0" in config.run_folder:
        raise UserError(f"run_folder is {config.run_folder!r}; name the folder that the run shall write to")
    training, optimizer, parallel = config.training, config.optimizer, config.parallel
    _at_least(1, training, "training", "train_tokens", "sequence_length", "global_batch_size", "micro_batch_size")
    _at_least(0, training, "training", "max_rewinds", "check_replicas_interval")
    _at_least(0, training, "training", "warmup_tokens", "eval_interval", "gc_interval", "max_skipped_steps")
    for name in ("loss_spike_zscore", "stop_after_minutes"):
        value = getattr(training, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"training.{name} is {value}; it must be positive and finite, or null")
    _at_least(1, training, "training", "eval_tokens")
    _at_least(1, config.data, "data", "prefetch_steps")
    _at_least(1, parallel, "parallel", "pipeline", "replicate", "context", "tensor", "pipeline_stages_per_rank")
    _at_least(1, parallel, "parallel", "recompute_every", "timeout_seconds")
    _at_least(0, parallel, "parallel", "prefetch_blocks")
    _at_least(1, config.checkpoint, "checkpoint", "save_interval", "keep_last")
    _at_least(0, config.checkpoint, "checkpoint", "keep_every", "max_failed_saves")
    _validate_upload(config.checkpoint)
    _at_least(1, config.logging, "logging", "log_interval")
    _at_least(0, optimizer, "optimizer", "learning_rate", "min_learning_rate", "weight_decay", "clip_grad_norm")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise UserError(f"optimizer.{name} is {getattr(optimizer, name)}; it must be in [0, 1)")
    if not 0 < optimizer.eps < math.inf:
        raise UserError(f"optimizer.eps is {optimizer.eps}; it must be positive and finite")
    if isinstance(parallel.shard, int) and parallel.shard < 1:
        raise UserError(f"parallel.shard is {parallel.shard}; use auto or a number of ranks from 1")
    _validate_pipeline(parallel)
    _validate_rewind(training)
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed is {config.seed}; it must be in [0, 2^63)")
    for change in config.allow_changes:
        if change not in ALLOWABLE_CHANGES:
            raise UserError(
                f"allow_changes names {change!r}; it knows {', '.join(ALLOWABLE_CHANGES)}; what else can change "
                "needs no leave"
            )
    _validate_schedule(training, optimizer)
    _validate_data(config.data, training)
    if config.model.initialize_from is None and config.model.architecture is None:
        raise UserError(
            "model.initialize_from and model.architecture are both null: name a checkpoint to start from, or describe "
            "the architecture to start from random weights"
        )


def _at_least(bound: int, section: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not bound <= value <= _LARGEST:
            raise UserError(f"{prefix}.{name} is {value}; it must be at least {bound} and at most {_LARGEST:.0e}")


def _validate_upload(checkpoint: CheckpointConfig) -> None:
    name = checkpoint.push_to_hub
    if name is None:
        return
    if not checkpoint.export_hf:
        raise UserError(
            f"checkpoint.push_to_hub is {name}, but checkpoint.export_hf is false: there would be nothing to upload; "
            "set it to true, or remove checkpoint.push_to_hub"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise UserError(
            f"checkpoint.push_to_hub is {name!r}; name a repository on the Hub, such as my-organization/my-model"
        )


def _validate_schedule(training: TrainingConfig, optimizer: OptimizerConfig) -> None:
    start = optimizer.schedule_start_tokens
    if not 0 <= start < training.train_tokens:
        raise UserError(
            f"optimizer.schedule_start_tokens is {start:,}; it must be at least 0 and less than training.train_tokens "
            f"{training.train_tokens:,}"
        )
    behind = f" - optimizer.schedule_start_tokens {start:,}" if start else ""
    if training.warmup_tokens > training.train_tokens - start:
        raise UserError(
            f"training.warmup_tokens {training.warmup_tokens:,} is more than training.train_tokens "
            f"{training.train_tokens:,}{behind}; warm up over a part of the run"
        )
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise UserError(
            f"optimizer.min_learning_rate {optimizer.min_learning_rate:g} is above optimizer.learning_rate "
            f"{optimizer.learning_rate:g}; lower the minimum"
        )
    if optimizer.decay_tokens is not None:
        room = training.train_tokens - start - training.warmup_tokens
        if optimizer.schedule != "wsd":
            raise UserError(
                f"optimizer.decay_tokens is {optimizer.decay_tokens:,}, but schedule '{optimizer.schedule}' does not "
                "use it; remove it or set optimizer.schedule to wsd"
            )
        if not 0 < optimizer.decay_tokens <= room:
            raise UserError(
                f"optimizer.decay_tokens is {optimizer.decay_tokens:,}; it must be between 1 and train_tokens - "
                f"warmup_tokens{behind} = {room:,}"
            )


def _validate_rewind(training: TrainingConfig) -> None:
    _at_least(1, training, "training", "rewind_steps")
    if training.loss_spike_action == "rewind" and training.loss_spike_zscore is None:
        raise UserError(
            "training.loss_spike_action is rewind, but training.loss_spike_zscore is null, so that nothing is a spike; "
            "set it to a number such as 10, or remove loss_spike_action"
        )


def _validate_pipeline(parallel: ParallelConfig) -> None:
    schedule, stages = parallel.pipeline_schedule, parallel.pipeline_stages_per_rank
    if parallel.pipeline == 1:
        if schedule != "1f1b" or stages != 1:
            raise UserError(
                f"parallel.pipeline_schedule is {schedule} with {stages} stages per rank, but parallel.pipeline is 1; "
                "set it to 2 or more, or remove them"
            )
        return
    fitting = {"1f1b": stages == 1, "zbv_zero_bubble": stages == 2}.get(schedule, stages >= 2)
    if not fitting:
        wanted = {"1f1b": "1", "zbv_zero_bubble": "2"}.get(schedule, "2 or more")
        raise UserError(
            f"parallel.pipeline_stages_per_rank is {stages}, but parallel.pipeline_schedule {schedule} needs {wanted}"
        )


def _validate_data(data: DataConfig, training: TrainingConfig) -> None:
    if data.train and data.stages:
        raise UserError(
            "data.train and data.stages are both set; put the blend of data.train into a stage, or remove one"
        )
    if not data.train and not data.stages:
        raise UserError("data.train is empty; name at least one dataset there, or data.stages")
    _validate_stages(data.stages, training)
    _validate_blend(data.train, "data.train", training.sequence_length)
    if not 0 <= data.validation_fraction < 1:
        raise UserError(f"data.validation_fraction is {data.validation_fraction}; it must be in [0, 1)")
    if data.validation_fraction > 0 and "held_out" in data.validation:
        raise UserError("data.validation names a set 'held_out', which data.validation_fraction makes; rename it")


def _validate_stages(stages: list[StageConfig], training: TrainingConfig) -> None:
    sequence_length = training.sequence_length
    paths: dict[str, str] = {}
    for number, stage in enumerate(stages):
        where = f"data.stages[{number}]"
        if not stage.train:
            raise UserError(f"{where}.train is empty; name at least one dataset")
        last = number == len(stages) - 1
        if stage.train_tokens is None and not last:
            raise UserError(f"{where}.train_tokens is null; only the last stage may leave it out")
        if stage.train_tokens is not None and not sequence_length <= stage.train_tokens <= _LARGEST:
            raise UserError(
                f"{where}.train_tokens is {stage.train_tokens}; it must be at least one sample of "
                f"training.sequence_length {sequence_length:,} and at most {_LARGEST:.0e}"
            )
        _validate_blend(stage.train, f"{where}.train", sequence_length)
        for source in stage.train:
            if paths.setdefault(source.identity, source.path) != source.path:
                raise UserError(
                    f"{where}.train names {source.path} '{source.identity}', as a former stage names "
                    f"{paths[source.identity]}; give one of the two another 'name'"
                )
    if stages and stages[-1].train_tokens is not None:
        total = sum(stage.train_tokens or 0 for stage in stages)
        if total < training.train_tokens:
            raise UserError(
                f"training.train_tokens is {training.train_tokens:,}, but the train_tokens of data.stages sum to "
                f"{total:,}; leave out those of the last stage, which then lasts for the rest, or make the two agree"
            )


def _validate_blend(sources: list[SourceConfig], where: str, sequence_length: int) -> None:
    names = [source.identity for source in sources]
    for position, source in enumerate(sources):
        if names.count(source.identity) > 1:
            raise UserError(f"{where} has two sources named '{source.identity}'; give each its own 'name'")
        for key in ("weight", "max_epochs"):
            value = getattr(source, key)
            if value is not None and not 0 < value <= _LARGEST:
                raise UserError(f"{where}[{position}].{key} is {value}; it must be positive and finite")
        if source.max_tokens is not None and not sequence_length <= source.max_tokens <= _LARGEST:
            raise UserError(
                f"{where}[{position}].max_tokens is {source.max_tokens}; it must be at least one sample of "
                f"training.sequence_length {sequence_length:,} and at most {_LARGEST:.0e}; to leave the source out, "
                "remove it"
            )
