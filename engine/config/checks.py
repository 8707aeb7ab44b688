"""Refuse values that no machine could run, in one line that names key, value and remedy."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .budget import DECAY, TRAIN, WARMUP, as_written, conflicts, given_key, shown, with_budget
from .effects import refused
from .settings import (
    ALLOWABLE_CHANGES,
    OPTIMIZERS,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
    to_dict,
)
from .types_check import Problems, check

_LARGEST = 10**15
"""Upper limit of all numbers: larger values are typing errors, and would overflow later with a less clear message."""

_EIGHT_BIT = ("adamw_bnb_8bit", "adamw8bit", "paged_adamw_8bit", "paged_adamw8bit")
"""Names in transformers and bitsandbytes."""
IMPORT_PATH = r"[^\W\d]\w*(\.[^\W\d]\w*)+"
"""Pattern of the import path of a class."""


class Range(NamedTuple):
    """The numbers that a setting may have; null is checked by its type."""

    words: str
    holds: Callable[[float], bool]


_FROM_0 = Range(f"at least 0 and at most {_LARGEST:.0e}", lambda value: 0 <= value <= _LARGEST)
_FROM_1 = Range(f"at least 1 and at most {_LARGEST:.0e}", lambda value: 1 <= value <= _LARGEST)
_POSITIVE = Range("positive and finite", lambda value: 0 < value < math.inf)
_POSITIVE_OR_NULL = Range(f"{_POSITIVE.words}, or null", _POSITIVE.holds)
_SHARE = Range("in [0, 1)", lambda value: 0 <= value < 1)
_POWER_OF_TWO = Range(
    "a power of two between 2^-14 and 2^40", lambda value: 2**-14 <= value <= 2**40 and math.frexp(value)[0] == 0.5
)
RANGES = {
    "data.train[].weight": Range(_POSITIVE.words, lambda value: 0 < value <= _LARGEST),
    "data.train[].loss_weight": Range(_POSITIVE.words, lambda value: 0 < value <= _LARGEST),
    "data.train[].max_epochs": Range(_POSITIVE.words, lambda value: 0 < value <= _LARGEST),
    "data.train[].validation_fraction": _SHARE,
    "data.prefetch_steps": _FROM_1,
    "data.validation_fraction": _SHARE,
    "model.rope.factor": _FROM_1,
    "model.rope.theta": Range("above 1, or null", lambda value: 1 < value <= _LARGEST),
    "model.dropout": Range("0, or null", lambda value: value == 0),
    "adapter.rank": _FROM_1,
    "adapter.alpha": _POSITIVE,
    "adapter.dropout": _SHARE,
    "training.train_tokens": _FROM_1,
    "training.train_steps": _FROM_1,
    "training.train_epochs": Range(f"{_POSITIVE.words}, or null", lambda value: 0 < value <= _LARGEST),
    "training.warmup_tokens": _FROM_0,
    "training.warmup_steps": _FROM_0,
    "training.warmup_ratio": Range("in [0, 1], or null", lambda value: 0 <= value <= 1),
    "training.sequence_length": _FROM_1,
    "training.global_batch_size": _FROM_1,
    "training.micro_batch_size": _FROM_1,
    "training.initial_loss_scale": _POWER_OF_TWO,
    "training.min_loss_scale": _POWER_OF_TWO,
    "training.loss_scale_window": _FROM_1,
    "training.neftune_alpha": _POSITIVE_OR_NULL,
    "training.z_loss": _FROM_0,
    "training.router_aux_loss_coef": Range(f"{_FROM_0.words}, or null", _FROM_0.holds),
    "training.router_z_loss_coef": _FROM_0,
    "training.router_bias_update_rate": _FROM_0,
    "training.gc_interval": _FROM_0,
    "training.max_skipped_steps": _FROM_0,
    "training.loss_spike_zscore": _POSITIVE_OR_NULL,
    "training.rewind_steps": _FROM_1,
    "training.max_rewinds": _FROM_0,
    "training.check_replicas_interval": _FROM_0,
    "training.stop_after_minutes": _POSITIVE_OR_NULL,
    "training.early_stopping.patience": _FROM_1,
    "training.early_stopping.min_delta": _FROM_0,
    "training.ema_decay": Range("in (0, 1), or null", lambda value: 0 < value < 1),
    "training.eval_interval": _FROM_0,
    "training.eval_tokens": _FROM_1,
    "optimizer.learning_rate": _FROM_0,
    "optimizer.min_learning_rate": _FROM_0,
    "optimizer.min_learning_rate_ratio": Range("in [0, 1], or null", lambda value: 0 <= value <= 1),
    "optimizer.decay_steps": _FROM_1,
    "optimizer.decay_ratio": Range("in (0, 1], or null", lambda value: 0 < value <= 1),
    "optimizer.weight_decay": _FROM_0,
    "optimizer.beta1": _SHARE,
    "optimizer.beta2": _SHARE,
    "optimizer.eps": _POSITIVE,
    "optimizer.clip_grad_norm": _FROM_0,
    "optimizer.child_tuning": Range("in (0, 1), or null", lambda value: 0 < value < 1),
    "optimizer.groups[].learning_rate": _FROM_0,
    "optimizer.groups[].weight_decay": _FROM_0,
    "optimizer.muon.momentum": _SHARE,
    "optimizer.muon.newton_schulz_steps": Range("in [1, 99]", lambda value: 1 <= value <= 99),
    "optimizer.lion.beta1": _SHARE,
    "optimizer.lion.beta2": _SHARE,
    "parallel.pipeline": _FROM_1,
    "parallel.replicate": _FROM_1,
    "parallel.context": _FROM_1,
    "parallel.tensor": _FROM_1,
    "parallel.expert": _FROM_1,
    "parallel.pipeline_stages_per_rank": _FROM_1,
    "parallel.prefetch_blocks": _FROM_0,
    "parallel.recompute_every": _FROM_1,
    "parallel.timeout_seconds": _FROM_1,
    "checkpoint.save_interval": _FROM_1,
    "checkpoint.max_failed_saves": _FROM_0,
    "checkpoint.keep_last": _FROM_1,
    "checkpoint.keep_every": _FROM_0,
    "logging.log_interval": _FROM_1,
    "logging.sample_tokens": _FROM_1,
    "logging.metrics_port": Range("in [1, 65535], or null", lambda value: value is None or 1 <= value <= 65535),
    "seed": Range("in [0, 2^63)", lambda value: 0 <= value < 2**63),
}
"""The range of every number that has one of its own; ``[]`` is an entry of a list."""


def validate(config: RunConfig) -> None:
    """Refuse values of the wrong type, and those that no machine could run.

    A configuration that was built in Python gets the same lines as one from YAML.

    Raises:
        UserError: names the key, its value and the remedy; one line for each problem.
    """
    found = Problems()
    check(to_dict(config), RunConfig, "", found)
    found.raise_if_any()  # values of another type cannot be compared
    found.add_consequences(problems(config))
    found.raise_if_any()


def with_known_budget(config: RunConfig, epoch_tokens: int | None) -> RunConfig:
    """Return ``config`` with its budget in tokens, now that the data are open.

    Raises:
        UserError: the budget does not fit the schedule.
    """
    config = with_budget(config, epoch_tokens)
    found = Problems()
    found.add_consequences(schedule_problems(config.training, config.optimizer))
    found.raise_if_any()
    return config


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
    written = as_written(config)
    for key, allowed in RANGES.items():
        value = None if "[]" in key else operator.attrgetter(key)(written)
        if value is not None and value != "epoch" and not allowed.holds(value):
            yield f"{key} is {value}; it must be {allowed.words}"
    yield from _upload(config.checkpoint)
    parallel = config.parallel
    if isinstance(parallel.shard, int) and parallel.shard < 1:
        yield f"parallel.shard is {parallel.shard}; use auto or a number of ranks from 1"
    for path in config.callbacks:
        if not re.fullmatch(IMPORT_PATH, path):
            yield f"callbacks has {path!r}; write the import path of a class, such as my_module.MyCallback"
    for change in config.allow_changes:
        if change not in ALLOWABLE_CHANGES:
            yield (
                f"allow_changes has the unknown entry {change!r}; allowed: {', '.join(ALLOWABLE_CHANGES)}; other "
                "settings may change without being listed"
            )


def _combinations(config: RunConfig) -> Iterator[str]:
    yield from conflicts(config)
    config = with_budget(config)  # as far as it is known before the data are open
    training = config.training
    yield from refused(config)
    yield from _precision(training)
    yield from _pipeline(config.parallel)
    if training.trainable == []:
        yield "training.trainable is []; name patterns of parameters, or use all"
    yield from schedule_problems(training, config.optimizer)
    yield from _optimizer(config)
    yield from _data(config.data, training, config.checkpoint.save_interval)
    yield from _profile(config.logging)
    yield from _adapter(config)
    if config.model.initialize_from is None and config.model.architecture is None:
        yield (
            "model.initialize_from and model.architecture are both null: name a checkpoint to start from, or describe "
            "the architecture to start from random weights"
        )
    rope = config.model.rope
    if rope.kind is not None and rope.factor == 1:
        yield f"model.rope.kind is {rope.kind}, but model.rope.factor is 1; set it to a larger number, such as 4"
    if rope.kind == "default" and rope.theta is None:
        yield "model.rope.kind is default, but model.rope.theta is null; set it to the new base, such as 8_000_000"


def _precision(training: TrainingConfig) -> Iterator[str]:
    if training.precision != "fp16":
        return
    if training.weight_dtype != "fp32":
        yield (
            f"training.precision is fp16, but training.weight_dtype is {training.weight_dtype}; fp16 training needs "
            "weights in fp32: set training.weight_dtype to fp32"
        )
    if training.float8:
        yield (
            "training.precision is fp16, but training.float8 is true; GPUs with float8 have bf16: set "
            "training.precision to bf16"
        )
    if training.min_loss_scale > training.initial_loss_scale:
        yield (
            f"training.min_loss_scale {training.min_loss_scale:g} is above training.initial_loss_scale "
            f"{training.initial_loss_scale:g}; lower the minimum"
        )


def _adapter(config: RunConfig) -> Iterator[str]:
    adapter = config.adapter
    if adapter.kind is None:
        return
    if config.training.trainable != "all":
        yield (
            f"training.trainable is {config.training.trainable}, but adapter.kind is lora, with which the adapter and "
            "adapter.modules_to_save train; remove training.trainable, and name parameters in adapter.modules_to_save"
        )
    if not adapter.targets:
        yield 'adapter.targets is empty; write patterns such as "*.q_proj", or remove it for all linear layers'
    if adapter.initialize_from is not None and config.model.initialize_from is None:
        yield (
            f"adapter.initialize_from is {adapter.initialize_from}, but model.initialize_from is null; name the base "
            "of that adapter there"
        )
    yield from _exports_without_base(config)


def _exports_without_base(config: RunConfig) -> Iterator[str]:
    """Checkpoints of an adapter do not contain its base, so exports read it from its folder."""
    keep = config.checkpoint
    keys = {"export_hf": keep.export_hf, "export_best": keep.export_best, "model_folders": keep.model_folders == "on"}
    asked = next((key for key, value in keys.items() if value), None)
    if config.model.initialize_from is None and asked is not None:
        yield (
            f"checkpoint.{asked} is {'on' if asked == 'model_folders' else 'true'}, but adapter.kind is "
            f"{config.adapter.kind} and model.initialize_from is null: the random base is in no folder, and cannot be "
            f"exported; name a base, or remove checkpoint.{asked}"
        )


def _upload(checkpoint: CheckpointConfig) -> Iterator[str]:
    name = checkpoint.push_to_hub
    if name is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        yield f"checkpoint.push_to_hub is {name!r}; name a repository on the Hub, such as my-organization/my-model"
    if checkpoint.hub_message is not None and not checkpoint.hub_message.strip():
        yield "checkpoint.hub_message is empty; write a message, or remove it"


def _profile(logging: LoggingConfig) -> Iterator[str]:
    steps = logging.profile_steps
    if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= _LARGEST):
        yield f"logging.profile_steps is {steps}; name the first and the last step, from 1 on, such as [10, 13]"


def schedule_problems(training: TrainingConfig, optimizer: OptimizerConfig) -> Iterator[str]:
    """Return the problems in the lengths of a run, its warm-up and its decay, one line for each.

    Those in lengths that are not known yet, because ``train_epochs`` needs the data, are left out.
    """
    if all(getattr(training, key) is None for key in TRAIN.keys):
        yield "the length of the run is missing; set training.train_tokens, train_steps or train_epochs"
    if optimizer.min_learning_rate is not None and optimizer.min_learning_rate_ratio is not None:
        yield (
            "optimizer.min_learning_rate and optimizer.min_learning_rate_ratio are both set; keep one of them, and "
            "remove the other or set it to null"
        )
    if optimizer.min_learning_rate is not None and optimizer.min_learning_rate > optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate {optimizer.min_learning_rate:g} is above optimizer.learning_rate "
            f"{optimizer.learning_rate:g}; lower the minimum"
        )
    if training.train_tokens is None:
        return
    budget, warmup, start = training.train_tokens, training.warmup, optimizer.schedule_start_tokens
    train_shown, warmup_shown = shown(training, TRAIN), shown(training, WARMUP)
    if budget > _LARGEST:
        yield f"{train_shown}; a run has at most {_LARGEST:.0e} tokens"
    if not 0 <= start < budget:
        yield f"optimizer.schedule_start_tokens is {start:,}; it must be at least 0 and less than {train_shown}"
    behind = f" - optimizer.schedule_start_tokens {start:,}" if start else ""
    if warmup > budget - start:
        yield f"{warmup_shown} is more than {train_shown}{behind}; lower {given_key(training, WARMUP)}"
    if optimizer.schedule == "inverse_sqrt" and warmup == 0:
        yield (
            "optimizer.schedule inverse_sqrt falls from the end of the warm-up on, by its length; set "
            "training.warmup_tokens, warmup_steps or warmup_ratio"
        )
    if optimizer.decay_tokens is not None and optimizer.schedule == "wsd":
        room = budget - start - warmup
        if not 0 < optimizer.decay_tokens <= room:
            yield (
                f"{shown(optimizer, DECAY)} is not between 1 and the {room:,} tokens after the warm-up "
                f"({train_shown}{behind}, {warmup_shown}); change {given_key(optimizer, DECAY)}"
            )


def _optimizer(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    imported = "." in optimizer.name
    if optimizer.name in _EIGHT_BIT:
        yield f"optimizer.name is {optimizer.name}; use adamw_8bit, which has the same states"
    elif optimizer.name not in OPTIMIZERS and not (imported and re.fullmatch(IMPORT_PATH, optimizer.name)):
        yield (
            f"optimizer.name is {optimizer.name!r}; use {', '.join(OPTIMIZERS[:-1])} or {OPTIMIZERS[-1]}, or the "
            "import path of a class, such as my_module.MyOptimizer"
        )
    if imported and config.training.weight_dtype != "fp32":
        yield (
            f"training.weight_dtype is {config.training.weight_dtype}, but optimizer.name {optimizer.name} is a class "
            "with an import path, which would round its updates to nearest and lose small ones; set it to fp32"
        )
    for key in ("lr", "weight_decay", "params") if imported else ():
        if key in optimizer.options:
            yield (
                f"optimizer.options has {key!r}, which the run passes itself; use optimizer.learning_rate, "
                "optimizer.weight_decay and optimizer.groups"
            )
    for place, group in enumerate(optimizer.groups):
        where = f"optimizer.groups[{place}]"
        for key in ("learning_rate", "weight_decay"):
            value, allowed = getattr(group, key), RANGES[f"optimizer.groups[].{key}"]
            if value is not None and not allowed.holds(value):
                yield f"{where}.{key} is {value}; it must be {allowed.words}"
        if group.match == []:
            yield f"{where}.match is [], which matches no parameter; name patterns, or remove the group"
        if group.learning_rate is None and group.weight_decay is None:
            yield f"{where} sets neither learning_rate nor weight_decay; set one of them, or remove the group"
        if group.learning_rate is not None and optimizer.learning_rate == 0:
            yield (
                f"{where}.learning_rate is {group.learning_rate:g}, but it is relative to optimizer.learning_rate, "
                "which is 0; set that to a positive rate"
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


def _data(data: DataConfig, training: TrainingConfig, save_interval: int | str) -> Iterator[str]:
    if data.train and data.stages:
        yield ("data.train and data.stages are both set; put the mixture of data.train into a stage, or remove one")
    if not data.train and not data.stages:
        yield "data.train is empty; name at least one dataset there, or data.stages"
    of_stages = list(_stages(data.stages, training.sequence_length))
    yield from of_stages
    if data.stages and training.train_epochs is not None:
        yield (
            f"training.train_epochs is {training.train_epochs:g}, but data.stages have different sources, so their "
            "epochs have no common length; use training.train_tokens or training.train_steps"
        )
    if data.stages and "epoch" in (training.eval_interval, save_interval):
        yield (
            "training.eval_interval and checkpoint.save_interval cannot be epoch with data.stages: sources differ, "
            "so their epochs have no common length; use a number of steps"
        )
    total, budget = sum(stage.train_tokens or 0 for stage in data.stages), training.train_tokens or 0
    if data.stages and not of_stages and data.stages[-1].train_tokens is not None and total < budget:
        yield (
            f"{shown(training, TRAIN)} is more than the train_tokens of data.stages, which sum to "
            f"{total:,}; leave out those of the last stage, which then lasts until the end, or make the two agree"
        )
    yield from _mixture(data.train, "data.train", training.sequence_length)
    if data.validation_fraction > 0 and "held_out" in data.validation:
        yield "data.validation names a set 'held_out', which data.validation_fraction makes; rename it"
    for source in (source for mixture in [data.train, *(stage.train for stage in data.stages)] for source in mixture):
        if source.validation_fraction > 0 and source.identity in data.validation:
            yield (
                f"data.validation names a set '{source.identity}', which validation_fraction of the source of this "
                "name makes; rename one of them"
            )
    for name in data.validation:
        whole, slash, _ = name.partition("/")
        if slash and whole in {*data.validation, "held_out"}:
            yield f"data.validation names a set '{name}', as the part of '{whole}' from one source is; rename it"


def _stages(stages: list[StageConfig], sequence_length: int) -> Iterator[str]:
    first: dict[str, SourceConfig] = {}
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
        yield from _mixture(stage.train, f"{where}.train", sequence_length)
        for source in stage.train:
            known = first.setdefault(source.identity, source)
            if known.path != source.path:
                yield (
                    f"{where}.train names {source.path} '{source.identity}', but an earlier stage uses this name for "
                    f"{known.path}; give one of the two another 'name'"
                )
            elif known.loss_weight != source.loss_weight:
                yield (
                    f"{where}.train gives '{source.identity}' the loss_weight {source.loss_weight:g}, but an earlier "
                    f"stage {known.loss_weight:g}; use the same, or give one of the two another 'name'"
                )
            elif known.for_text != source.for_text:
                yield (
                    f"{where}.train reads the text '{source.identity}' with other settings than an earlier stage; use "
                    "the same, or give one of the two another 'name'"
                )


def _mixture(sources: list[SourceConfig], where: str, sequence_length: int) -> Iterator[str]:
    names = Counter(source.identity for source in sources)
    for position, source in enumerate(sources):
        if names[source.identity] > 1:
            yield f"{where} has two sources named '{source.identity}'; give each its own 'name'"
        for key in ("weight", "loss_weight", "max_epochs", "validation_fraction"):
            value, allowed = getattr(source, key), RANGES[f"data.train[].{key}"]
            if value is not None and not allowed.holds(value):
                yield f"{where}[{position}].{key} is {value}; it must be {allowed.words}"
        if source.max_tokens is not None and not sequence_length <= source.max_tokens <= _LARGEST:
            yield (
                f"{where}[{position}].max_tokens is {source.max_tokens}; it must be at least one sample of "
                f"training.sequence_length {sequence_length:,} and at most {_LARGEST:.0e}; to leave the source out, "
                "remove it"
            )
