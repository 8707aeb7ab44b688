"""Keys of a turn or a conversation that say whether to train on it.

Templates ignore these keys, so a missed key would train on data that its author excluded. Known keys are applied:
``weight`` (OpenAI, axolotl), ``train`` and ``training`` (axolotl), ``loss`` and ``loss_scale`` (ms-swift), and their
usual variants. Other keys that seem to be about training, such as ``train_detail`` or ``mask``, are refused, because
programs disagree on the meaning of their values.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from ..records.errors import MalformedError

_SWITCHES = frozenset({"train", "training", "trainable", "train_on", "do_train", "loss", "learn"})
"""True: train on it."""
_FACTORS = frozenset({"weight", "loss_weight", "loss_scale", "train_weight", "training_weight"})
"""Factors of the loss."""
_ABOUT_LOSS = frozenset({"mask", "masks", "masked", "masking", "unmasked", "loss", "losses"})
_ABOUT_TRAINING = frozenset(
    {"train", "training", "trained", "trainable", "untrained", "untrainable", "weight", "weights", "weighting"}
    | {"learn", "learned", "learnable", "learning", "supervise", "supervised", "unsupervised", "ignore", "ignored"}
    | {"skip", "skipped", "exclude", "excluded", "backprop", "gradient", "grad"}
)
"""Words of keys that are refused unless their value is a text: training_set: "alpaca" is harmless."""
_WORDS = re.compile(r"[a-z0-9]+|[A-Z]+(?![a-z])|[A-Z][a-z0-9]*")
_YES = frozenset({"true", "yes", "on"})
_NO = frozenset({"false", "no", "off"})
_REMEDY = "write train: true or train: false, or remove or rename the key"

_Kind = Literal["switch", "factor", "about loss", "about training"]


def take_training_mark(item: dict[str, Any], place: str) -> bool | None:
    """Remove the marks from ``item``, a turn or a record, and return whether to train on it.

    Returns:
        None if there is no mark, or only a factor of 1.

    Raises:
        MalformedError: a weight other than 0 and 1, contradicting marks, or an unsupported key about training.
    """
    said: dict[str, bool] = {}
    for key in [key for key in item if _kind(key) is not None]:
        kind, value = _kind(key), item[key]
        if value is None:
            continue
        if value in ("", [], {}):
            del item[key]
            continue
        number = _number(value)
        if kind in ("switch", "factor"):
            if number not in (0, 1):
                raise MalformedError(
                    f"{place}: {key} is {_shown(value)}; only 0 and 1, or false and true, are supported; {_REMEDY}"
                )
            if kind == "switch" or number == 0:
                said[key] = bool(number)
            del item[key]
        elif kind == "about loss" or number is not None or not isinstance(value, str):
            raise MalformedError(
                f"{place}: the key {key} ({_shown(value)}) is not known here and may say what to train on; {_REMEDY}"
            )
    if len(set(said.values())) > 1:
        raise MalformedError(f"{place}: {' and '.join(said)} contradict each other; keep one")
    return next(iter(said.values()), None)


def may_be_mark(key: str) -> bool:
    """Return whether the name of a key is about training."""
    return _kind(key) is not None


@lru_cache(maxsize=4096)
def _kind(key: str) -> _Kind | None:
    words = [word.lower() for word in _WORDS.findall(key)]
    name = "_".join(words)
    if name in _SWITCHES:
        return "switch"
    if name in _FACTORS:
        return "factor"
    if not _ABOUT_LOSS.isdisjoint(words):
        return "about loss"
    return None if _ABOUT_TRAINING.isdisjoint(words) else "about training"


def _number(value: Any) -> float | None:
    """Return a mark's value as a number, also from a boolean or a string; None for other values."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _YES or text in _NO:
            return float(text in _YES)
        try:
            return float(text)
        except ValueError:
            return None
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
