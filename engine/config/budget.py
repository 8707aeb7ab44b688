"""Convert the length of a run and of its warm-up to tokens, the clock of a run.

A user gives each of them in one unit: tokens, steps, or epochs (warm-up: a ratio). :func:`with_budget` fills in
``training.train_tokens`` and ``training.warmup_tokens``, which everything else reads. :func:`as_written` removes the
derived numbers again, for the files in which a user sees the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from ..errors import UserError
from .settings import RunConfig, TrainingConfig

TRAIN = ("train_tokens", "train_steps", "train_epochs")
WARMUP = ("warmup_tokens", "warmup_steps", "warmup_ratio")
KINDS = (TRAIN, WARMUP)
"""Keys of ``training`` of which a run has one: the number of tokens, and its alternatives."""


def with_budget(config: RunConfig, epoch_tokens: int | None = None) -> RunConfig:
    """Return ``config`` with ``train_tokens`` and ``warmup_tokens`` derived from their alternatives.

    Args:
        config: of a run; one whose numbers are derived already is returned unchanged.
        epoch_tokens: of one epoch of the mixture (:attr:`~retemper.engine.data.catalog.Catalog.epoch_tokens`). None:
            not known yet; what depends on ``train_epochs`` then stays as it is.

    Raises:
        UserError: ``train_epochs`` and another number of tokens are both set.
    """
    training = config.training
    train = _train_tokens(training, epoch_tokens)
    if training.train_epochs is not None and epoch_tokens is not None and training.train_tokens not in (None, train):
        raise UserError(_both(training, TRAIN))
    training = replace(training, train_tokens=train)
    warmup = _warmup_tokens(training, config.optimizer.schedule_start_tokens)
    return replace(config, training=replace(training, warmup_tokens=warmup))


def as_written(config: RunConfig) -> RunConfig:
    """Return ``config`` without the numbers of tokens that :func:`with_budget` has derived."""
    derived: dict[str, Any] = {kind[0]: None for kind in KINDS if alternative(config.training, kind) is not None}
    return replace(config, training=replace(config.training, **derived)) if derived else config


def in_tokens(config: RunConfig) -> RunConfig:
    """Return ``config`` with its derived numbers of tokens as the given ones."""
    alternatives: dict[str, Any] = {key: None for kind in KINDS for key in kind[1:]}
    return replace(config, training=replace(config.training, **alternatives))


def alternative(training: TrainingConfig, kind: tuple[str, ...]) -> str | None:
    """Return the key of ``kind`` that is given instead of tokens; None if tokens, or nothing, are given."""
    return next((key for key in kind[1:] if getattr(training, key) is not None), None)


def conflicts(training: TrainingConfig) -> Iterator[str]:
    """Yield a line for each kind that is given twice. A number of tokens may be the derived one."""
    for kind in KINDS:
        given = [key for key in kind if getattr(training, key) is not None]
        if len(given) > 2 or (len(given) == 2 and kind[0] not in given):
            yield _both(training, kind)
    if training.train_steps is not None and training.train_tokens not in (None, _train_tokens(training, None)):
        yield _both(training, TRAIN)
    if training.warmup_steps is not None and training.warmup_tokens not in (None, _warmup_tokens(training, 0)):
        yield _both(training, WARMUP)


def conflicts_as_written(training: TrainingConfig) -> Iterator[str]:
    """Yield a line for each kind of which a user has given more than one key."""
    for kind in KINDS:
        if sum(getattr(training, key) is not None for key in kind) > 1:
            yield _both(training, kind)


def recorded_budget(training: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> int | None:
    """Return the tokens of a recorded run, None if they are not known.

    Args:
        training: section of its configuration, as it is written.
        saved: that section in a checkpoint of the run, where ``train_tokens`` is derived.
    """
    tokens, steps, epochs = (training.get(key) for key in TRAIN)
    if steps is not None:
        return int(steps * training["global_batch_size"] * training["sequence_length"])
    if epochs is not None:
        known = saved is not None and saved.get("train_epochs") == epochs
        return saved.get("train_tokens") if known and saved else None
    return tokens if type(tokens) is int and tokens > 0 else None


def shown(training: TrainingConfig, kind: tuple[str, ...]) -> str:
    """Return the setting of ``kind`` with its value: ``training.train_steps 5 = 1,280 tokens``."""
    key, tokens = alternative(training, kind), getattr(training, kind[0]) or 0
    if key is None:
        return f"training.{kind[0]} {tokens:,}"
    return f"training.{key} {getattr(training, key):,} = {tokens:,} tokens"


def _both(training: TrainingConfig, kind: tuple[str, ...]) -> str:
    values = {key: getattr(training, key) for key in kind}
    given = " and ".join(f"training.{key} {value:,}" for key, value in values.items() if value is not None)
    return f"{given} are set together; keep one of them"


def _train_tokens(training: TrainingConfig, epoch_tokens: int | None) -> int | None:
    if training.train_steps is not None:
        return training.train_steps * training.tokens_per_step
    if training.train_epochs is not None and epoch_tokens is not None:
        # Computed as the decimal number in the file: 0.29 x 100 tokens are 29, but not in binary fractions.
        return math.ceil(Fraction(str(training.train_epochs)) * epoch_tokens)
    return training.train_tokens


def _warmup_tokens(training: TrainingConfig, schedule_start: int) -> int | None:
    """Return the warm-up of ``training``, whose ``train_tokens`` is derived if it can be."""
    if training.warmup_steps is not None:
        return training.warmup_steps * training.tokens_per_step
    ratio = training.warmup_ratio
    if ratio is not None and math.isfinite(ratio) and training.train_tokens is not None:
        return round(Fraction(str(ratio)) * max(0, training.train_tokens - schedule_start))
    return training.warmup_tokens
