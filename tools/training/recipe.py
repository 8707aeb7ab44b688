"""Choose the settings of a run that a user leaves open, from the size of the data and of the machine.

Settings that the user gives are kept. The rules are listed in docs/one_command.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...engine.config.budget import TRAIN
from ...engine.config.budget import WARMUP as WARMUP_KEYS
from ...engine.config.settings import OptimizerConfig, TrainingConfig

STEPS = 200
"""Optimizer steps that a budget is divided into, between the limits of the batch."""
MOST_TOKENS_PER_STEP = 524_288
LONGEST_SEQUENCE = 2048
SHORTEST_SEQUENCE = 64
CHUNKS_OF_SMALLEST = 4
"""Sequences that the smallest source must hold at least."""
WARMUP = 0.1
EVALUATIONS = 10
EVALUATED_SHARE = 0.05
"""Tokens of one evaluation as a share of the budget; ten evaluations then cost about a sixth of the training."""
LEAST_EVALUATED = 16_384
SAVES = 5
LOGGED_STEPS = 100
LORA_RANK = 64
"""Continued pretraining changes more of a model than instruction tuning, for which ranks of 8 to 16 are usual."""
LORA_ALPHA_PER_RANK = 2
LORA_RATE_FACTOR = 10
QLORA_FORMAT: Literal["nf4"] = "nf4"


@dataclass(frozen=True)
class Situation:
    """What the settings depend on."""

    train_tokens: int
    smallest_source: int
    """Tokens of the smallest training source."""
    all_tokens: int
    """Tokens of all training sources."""
    longest_sequence: int | None
    """Positions that the model was trained with, if it says so."""
    ranks: int
    on_gpu: bool
    evaluates: bool = True
    """Whether there is a validation set."""


def choose_training(now: Situation, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section ``training`` of the configuration.

    Args:
        now: the situation.
        given: keys of the section that the user has set; they are kept.
    """
    length = given.get("sequence_length") or _sequence_length(now)
    micro = given.get("micro_batch_size")
    batch = given.get("global_batch_size") or _global_batch(now, length, micro or 1)
    micro = micro or _micro_batch(now, batch)
    steps = math.ceil(now.train_tokens / (batch * length))
    evaluated = max(LEAST_EVALUATED, round(EVALUATED_SHARE * now.train_tokens))
    chosen: dict[str, Any] = {
        **({} if _gives(given, TRAIN.keys) else {"train_tokens": now.train_tokens}),
        **({} if _gives(given, WARMUP_KEYS.keys) else {"warmup_tokens": round(WARMUP * now.train_tokens)}),
        "sequence_length": length,
        "global_batch_size": batch,
        "micro_batch_size": micro,
    }
    evaluation = {
        "eval_interval": max(1, steps // EVALUATIONS),
        "eval_tokens": min(TrainingConfig.eval_tokens, evaluated),
        "eval_at_start": True,
    }
    return {**chosen, **(evaluation if now.evaluates else {}), **given}


def adapter_settings(
    rank: int | None, given: Mapping[str, Mapping[str, Any]], quantized: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the sections ``adapter`` and ``optimizer`` of a run with LoRA, or with ``quantized`` of one with QLoRA.

    alpha is twice the rank, and learning rates are ten times those of full training (Biderman et al., 2024,
    https://arxiv.org/abs/2405.09673).

    Args:
        rank: of the adapter; None: the one that is given, else :data:`LORA_RANK`.
        given: settings of the user, by section; they are kept.
        quantized: whether the base is held in 4 bits (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314).
    """
    adapter, optimizer = given.get("adapter", {}), given.get("optimizer", {})
    rank = rank or adapter.get("rank") or LORA_RANK
    chosen = {"kind": "lora", "rank": rank, "alpha": LORA_ALPHA_PER_RANK * rank}
    rate = {"learning_rate": LORA_RATE_FACTOR * OptimizerConfig.learning_rate}
    chosen |= {"quantize_base": QLORA_FORMAT} if quantized else {}
    chosen |= {key: value for key, value in adapter.items() if key not in ("kind", "rank")}
    return {"adapter": chosen, "optimizer": {**rate, **optimizer}}


def intervals(training: Mapping[str, Any], train_tokens: int) -> tuple[int, int]:
    """Return the steps between checkpoints, and between lines of the log, of a run on ``train_tokens`` tokens.

    Checkpoints are at evaluations, because only these can be kept as the best one.
    """
    steps = math.ceil(train_tokens / (training["global_batch_size"] * training["sequence_length"]))
    save, evaluation = max(1, math.ceil(steps / SAVES)), training.get("eval_interval") or 1
    if type(evaluation) is int and evaluation <= steps:
        save = math.ceil(save / evaluation) * evaluation
    return save, max(1, steps // LOGGED_STEPS)


def _gives(given: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    return any(given.get(key) is not None for key in keys)


def _sequence_length(now: Situation) -> int:
    longest = min(LONGEST_SEQUENCE, now.longest_sequence or LONGEST_SEQUENCE)
    fitting = _power_of_two(max(SHORTEST_SEQUENCE, now.smallest_source // CHUNKS_OF_SMALLEST))
    return min(longest, fitting)


def _global_batch(now: Situation, length: int, micro: int) -> int:
    """Return samples of a step: a power of two times what the ranks take at once."""
    wanted = min(now.train_tokens / STEPS, MOST_TOKENS_PER_STEP, now.all_tokens / 2) / length
    at_once = now.ranks * micro
    return at_once * _power_of_two(int(wanted / at_once))


def _micro_batch(now: Situation, batch: int) -> int:
    """Return 1 on a GPU, where a plan may raise it; up to 4 samples on a CPU."""
    each = batch // now.ranks
    return 1 if now.on_gpu else math.gcd(4, each)


def _power_of_two(number: int) -> int:
    """Return the largest power of two up to ``number``."""
    return 1 << (max(1, number).bit_length() - 1)
