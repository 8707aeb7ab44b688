"""Convert the lengths of a run, its warm-up and its decay to tokens, the clock of a run.

A user gives each of them in one unit: tokens, steps, or epochs (warm-up and decay: a ratio). :func:`with_budget` fills
in ``training.train_tokens``, ``training.warmup_tokens`` and ``optimizer.decay_tokens``, which everything else reads.
:func:`as_written` removes the derived numbers again, for the files in which a user sees the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from ..errors import UserError
from .settings import OptimizerConfig, RunConfig, TrainingConfig


class Kind(NamedTuple):
    """A length, such as that of the warm-up, and the keys that set it. A user sets one of them."""

    section: str
    """Section of the configuration that has the keys."""
    keys: tuple[str, ...]
    """The number of tokens, then its alternatives."""


TRAIN = Kind("training", ("train_tokens", "train_steps", "train_epochs"))
WARMUP = Kind("training", ("warmup_tokens", "warmup_steps", "warmup_ratio"))
DECAY = Kind("optimizer", ("decay_tokens", "decay_steps", "decay_ratio"))
KINDS = (TRAIN, WARMUP, DECAY)

Section = TrainingConfig | OptimizerConfig


def with_budget(config: RunConfig, epoch_tokens: int | None = None) -> RunConfig:
    """Return ``config`` with ``train_tokens``, ``warmup_tokens`` and ``decay_tokens`` derived from their alternatives.

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
        raise UserError(_both(config, TRAIN))
    training = replace(training, train_tokens=train)
    optimizer = config.optimizer
    training = replace(training, warmup_tokens=_warmup_tokens(training, optimizer.schedule_start_tokens))
    return replace(
        config, training=training, optimizer=replace(optimizer, decay_tokens=_decay_tokens(training, optimizer))
    )


def as_written(config: RunConfig) -> RunConfig:
    """Return ``config`` without the numbers of tokens that :func:`with_budget` has derived."""
    return _without(config, [(kind.section, kind.keys[0]) for kind in KINDS if alternative(config, kind) is not None])


def in_tokens(config: RunConfig) -> RunConfig:
    """Return ``config`` with its derived numbers of tokens as the given ones."""
    return _without(config, [(kind.section, key) for kind in KINDS for key in kind.keys[1:]])


def alternative(config: RunConfig | Section, kind: Kind) -> str | None:
    """Return the key of ``kind`` that is given instead of tokens; None if tokens, or nothing, are given."""
    return next((key for key in kind.keys[1:] if _given(config, kind)[key] is not None), None)


def given_key(config: RunConfig | Section, kind: Kind) -> str:
    """Return the dotted key of ``kind`` that the user has set; the key of the tokens if none is set."""
    return f"{kind.section}.{alternative(config, kind) or kind.keys[0]}"


def conflicts(config: RunConfig) -> Iterator[str]:
    """Yield a line for each kind that is given twice. A number of tokens may be the derived one."""
    derived = {
        "train_steps": _train_tokens(config.training, None),
        "warmup_steps": _warmup_tokens(config.training, 0),
        "decay_steps": _decay_tokens(config.training, config.optimizer),
    }
    for kind in KINDS:
        tokens, *others = _given(config, kind).items()
        given = [key for key, value in others if value is not None]
        differs = len(given) == 1 and tokens[1] not in (None, derived.get(given[0], tokens[1]))
        if len(given) > 1 or differs:
            yield _both(config, kind)


def conflicts_as_written(config: RunConfig) -> Iterator[str]:
    """Yield a line for each kind of which a user has given more than one key."""
    for kind in KINDS:
        if sum(value is not None for value in _given(config, kind).values()) > 1:
            yield _both(config, kind)


def recorded_budget(training: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> int | None:
    """Return the tokens of a recorded run, None if they are not known.

    Args:
        training: section of its configuration, as it is written.
        saved: that section in a checkpoint of the run, where ``train_tokens`` is derived.
    """
    tokens, steps, epochs = (training.get(key) for key in TRAIN.keys)
    if steps is not None:
        return int(steps * training["global_batch_size"] * training["sequence_length"])
    if epochs is not None:
        known = saved is not None and saved.get("train_epochs") == epochs
        return saved.get("train_tokens") if known and saved else None
    return tokens if type(tokens) is int and tokens > 0 else None


def shown(config: RunConfig | Section, kind: Kind) -> str:
    """Return the setting of ``kind`` with its value: ``training.train_steps 5 = 1,280 tokens``.

    Args:
        config: of a run, or its section with the keys.
        kind: of length.
    """
    values, key = _given(config, kind), alternative(config, kind)
    tokens = values[kind.keys[0]] or 0
    text = given_key(config, kind)
    return f"{text} {tokens:,}" if key is None else f"{text} {values[key]:,} = {tokens:,} tokens"


def _given(config: RunConfig | Section, kind: Kind) -> dict[str, Any]:
    section = getattr(config, kind.section) if isinstance(config, RunConfig) else config
    return {key: getattr(section, key) for key in kind.keys}


def _without(config: RunConfig, keys: Iterable[tuple[str, str]]) -> RunConfig:
    """Return ``config`` with the ``keys`` of sections set to null."""
    for section, key in keys:
        config = replace(config, **{section: replace(getattr(config, section), **{key: None})})
    return config


def _both(config: RunConfig, kind: Kind) -> str:
    values = _given(config, kind)
    given = " and ".join(f"{kind.section}.{key} {value:,}" for key, value in values.items() if value is not None)
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
    return _share(training, training.warmup_ratio, schedule_start, training.warmup_tokens)


def _decay_tokens(training: TrainingConfig, optimizer: OptimizerConfig) -> int | None:
    """Return the decay of ``optimizer``; at least one token of a ratio, because zero would mean no decay."""
    if optimizer.decay_steps is not None:
        return optimizer.decay_steps * training.tokens_per_step
    share = _share(training, optimizer.decay_ratio, optimizer.schedule_start_tokens, optimizer.decay_tokens)
    return share if optimizer.decay_ratio is None or share is None else max(1, share)


def _share(training: TrainingConfig, ratio: float | None, schedule_start: int, otherwise: int | None) -> int | None:
    """Return ``ratio`` of the tokens of the schedule; ``otherwise`` if there is none, or its length is not known."""
    if ratio is None or not math.isfinite(ratio) or training.train_tokens is None:
        return otherwise
    return round(Fraction(str(ratio)) * max(0, training.train_tokens - schedule_start))
