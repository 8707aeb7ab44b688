"""``--bins``: a dataset for each value of a key, and the weights with which a run mixes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ....engine.errors import UserError
from ..records.errors import MalformedError
from ..records.text_choice import json_type, look_up

MAX_BINS = 64
"""Several files are open for each."""
OTHER = "other"
"""Bin of the documents without a value."""
_UNSAFE = re.compile(r"[^\w-]+")
_MAX_NAME = 100
_STEPS = 10_000
"""Weights are exact to 1/10,000, as in the order of samples."""
_CHOICES = "choose balanced, proportional or alpha=A with A between 0 and 1"


def bin_of(record: Any, key: str) -> str:
    """Return the value of ``key`` in a record as a text; ``OTHER`` if it has none.

    Raises:
        MalformedError: the value is an object or array.
    """
    try:
        value = look_up(record, key) if isinstance(record, dict) else None
    except MalformedError:
        value = None
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or (isinstance(value, str) and not value.strip()):
        return OTHER
    if not isinstance(value, str | int | float):
        raise MalformedError(f"the value of {key!r} for --bins is {json_type(value)}, not a string")
    return str(value)


def require_few(number: int, key: str) -> None:
    """Raise UserError for too many bins."""
    if number > MAX_BINS:
        raise UserError(
            f"--bins {key}: more than {MAX_BINS} different values; choose a key with few values, such as a category, "
            "or join values before"
        )


def name_bins(values: Iterable[str], key: str) -> dict[str, str]:
    """Return the names of all bins in alphabetical order, by value: what no file name may contain becomes "_".

    Raises:
        UserError: there are too many, or two values have the same name, also apart from case.
    """
    names = {value: _UNSAFE.sub("_", value)[:_MAX_NAME] for value in set(values)}
    require_few(len(names), key)
    owners: dict[str, str] = {}
    for value, name in sorted(names.items()):
        other = owners.setdefault(name.casefold(), value)
        if other != value:
            raise UserError(
                f"--bins {key}: the values {other!r} and {value!r} would share the file name {name}; rename one of them"
            )
    return dict(sorted(names.items(), key=lambda item: item[1]))


def parse_weights(argument: str) -> float:
    """Return the exponent A of ``--bin-weights``: bins have weights in proportion to size ** A. Raise UserError."""
    known = {"balanced": 0.0, "proportional": 1.0}
    if argument in known:
        return known[argument]
    name, _, number = argument.partition("=")
    try:
        exponent = float(number)
    except ValueError:
        exponent = -1.0
    if name != "alpha" or not 0 <= exponent <= 1:
        raise UserError(f"--bin-weights {argument}: {_CHOICES}")
    return exponent


def weights_of(sizes: Sequence[int], exponent: float) -> list[float]:
    """Return weights in proportion to size ** exponent. They have four digits, are not 0, and sum to 1."""
    powers = [size**exponent for size in sizes]
    exact = [_STEPS * power / sum(powers) for power in powers]
    steps = [max(int(share), 1) for share in exact]
    # The largest remainders get what is missing; if weights were raised to one step, the largest weights give it.
    for place in sorted(range(len(steps)), key=lambda place: int(exact[place]) - exact[place]):
        if sum(steps) < _STEPS:
            steps[place] += 1
    while sum(steps) > _STEPS:
        steps[steps.index(max(steps))] -= 1
    return [step / _STEPS for step in steps]


def mixture_yaml(train: Mapping[str, int], validation: Mapping[str, str], exponent: float) -> str:
    """Return the ``data`` section of a run that mixes the bins.

    Args:
        train: size of each training dataset by its path.
        validation: paths of validation datasets by name.
        exponent: see :func:`parse_weights`.
    """
    weights = weights_of(list(train.values()), exponent)
    lines = ["data:", "  train:"]
    lines += [
        f"    - {{path: {_quoted(path)}, weight: {weight:.4f}}}" for path, weight in zip(train, weights, strict=True)
    ]
    if validation:
        lines.append("  validation:")
        lines += [f"    {_quoted(name)}: {_quoted(path)}" for name, path in validation.items()]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Return ``text`` as a scalar of YAML."""
    plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", text, re.ASCII) and text.lower() not in _YAML_WORDS
    return text if plain else "'" + text.replace("'", "''") + "'"


_YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
