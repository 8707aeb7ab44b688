"""Marks of what not to train on, next to a turn or a whole conversation, and keys that may be such marks.

No template reads these keys, so a key that is overlooked here is trained on against the author's word. Known keys are
obeyed: ``weight`` (OpenAI, axolotl), ``train`` and ``training`` (axolotl), ``loss`` and ``loss_scale`` (ms-swift), and
their usual variants. Keys of other names that speak of training, such as ``train_detail`` or ``mask``, are refused by
name: which value means what differs between programs.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from ..records.errors import MalformedError

_SWITCHES = frozenset({"train", "training", "trainable", "train_on", "do_train", "loss", "learn"})
"""True: to be trained on."""
_FACTORS = frozenset({"weight", "loss_weight", "loss_scale", "train_weight", "training_weight"})
"""What the loss is multiplied by."""
_ABOUT_LOSS = frozenset({"mask", "masks", "masked", "masking", "unmasked", "loss", "losses"})
_ABOUT_TRAINING = frozenset(
    {"train", "training", "trained", "trainable", "untrained", "untrainable", "weight", "weights", "weighting"}
    | {"learn", "learned", "learnable", "learning", "supervise", "supervised", "unsupervised", "ignore", "ignored"}
    | {"skip", "skipped", "exclude", "excluded", "backprop", "gradient", "grad"}
)
"""Words of keys that are refused unless their value is a text: "alpaca" in training_set decides nothing."""
_WORDS = re.compile(r"[a-z0-9]+|[A-Z]+(?![a-z])|[A-Z][a-z0-9]*")
_YES = frozenset({"true", "yes", "on"})
_NO = frozenset({"false", "no", "off"})
_REMEDY = "write train: true or train: false, or remove or rename the key"

_Kind = Literal["switch", "factor", "about loss", "about training"]


def take_training_mark(item: dict[str, Any], place: str) -> bool | None:
    """Remove the marks from ``item``, a turn or a record, and return what they say.

    Returns:
        False: not to be trained on. True: explicitly to be trained on. None: nothing is said; so says a factor of 1.

    Raises:
        MalformedError: a weight other than 0 and 1, two marks that contradict each other, or a key that speaks of
            training in a way that is not supported.
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
    """Whether the name of a key speaks of training."""
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
    """The number that a mark is, however it is stored; None for everything else."""
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
