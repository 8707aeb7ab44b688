"""Read the rotary position settings of a ``config.json`` as transformers does.

They are spelled in two ways: ``rope_parameters`` (transformers 5), or ``rope_theta`` with ``rope_scaling`` (before). If
a file has both, transformers uses ``rope_scaling`` alone. Here they must agree, or ``rope_parameters`` must be plain
(``rope_type: default``) with the same ``rope_theta``; the latter is the result of adding ``rope_scaling`` to a file of
transformers 5. Every key in these objects is used or refused: transformers ignores unknown ones.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from .config_reader import ConfigReader, shown

SCALING, PARAMETERS = "rope_scaling", "rope_parameters"
_THETA, _ORIGINAL = "rope_theta", "original_max_position_embeddings"
_DEFAULT_THETA = 10_000.0
_EVERYWHERE = ("rope_type", "type", _THETA, "partial_rotary_factor")
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    # transformers and others do not use the original length for linear scaling, but files contain it.
    "linear": ("factor", _ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}
"""The implemented rotary types, and the keys of each apart from the common ones."""
_NEUTRAL = {"factor": 1, "attention_factor": 1}
"""Keys without effect if they have this value."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent scaling of rotary wavelengths (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class RopeSettings:
    """Rotary positions of a model."""

    theta: float
    linear_factor: float = 1.0
    scaling: RopeScaling | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the frequencies follow from theta alone."""
        return self.linear_factor == 1.0 and self.scaling is None


def read_rope(reader: ConfigReader, max_position_embeddings: int) -> RopeSettings:
    """Return the rotary settings of the config behind ``reader``.

    Args:
        reader: of the whole config.
        max_position_embeddings: of the model; the default original length of a llama3 object.

    Raises:
        UserError: a setting is impossible, not implemented, without effect, or contradicts another one.
    """
    reader.refuse_unless("partial_rotary_factor", 1.0)
    scaling, parameters = _object(reader, SCALING), _object(reader, PARAMETERS)
    key = SCALING if scaling else PARAMETERS
    settings = _read(reader, key, scaling or parameters, max_position_embeddings)
    if scaling and parameters:
        other = _read(reader, PARAMETERS, parameters, max_position_embeddings)
        if settings != other and not (other.is_plain and other.theta == settings.theta):
            reader.fail(
                SCALING,
                scaling,
                f"{PARAMETERS} next to it is {parameters}: transformers then uses {SCALING} alone, and its {_THETA} is "
                f"{settings.theta:g}; write all settings, {_THETA} included, into one of them and remove the other",
            )
    return settings


def _object(reader: ConfigReader, key: str) -> dict[str, Any]:
    value = reader.config.get(key)
    if value is not None and not isinstance(value, dict):
        reader.fail(key, value, "an object of rotary settings is needed")
    return value or {}


def _read(reader: ConfigReader, key: str, settings: dict[str, Any], max_positions: int) -> RopeSettings:
    nested = ConfigReader(settings, f"{reader.where}: {key}")
    nested.refuse_unless("partial_rotary_factor", 1.0)
    kind = _kind(nested)
    _refuse_without_effect(nested, kind)
    theta = _theta(reader, nested)
    if kind == "linear":
        return RopeSettings(theta, nested.number("factor"))
    original = reader.config.get(_ORIGINAL)
    if kind != "llama3":
        if original is not None and original != max_positions:
            reader.fail(_ORIGINAL, original, f"it has no effect with rope_type {kind!r}; remove it, or set rope_type")
        return RopeSettings(theta)
    scaling = RopeScaling(
        factor=nested.number("factor"),
        low_freq_factor=nested.number("low_freq_factor"),
        high_freq_factor=nested.number("high_freq_factor"),
        original_max_position_embeddings=_original_length(nested, original, max_positions),
    )
    if not scaling.low_freq_factor < scaling.high_freq_factor:
        nested.fail("high_freq_factor", scaling.high_freq_factor, "it must be above low_freq_factor")
    return RopeSettings(theta, scaling=scaling)


def _kind(nested: ConfigReader) -> str:
    """Return ``rope_type``, or ``type``, its former name."""
    older, newer = nested.config.get("type"), nested.config.get("rope_type")
    if older is not None and newer is not None and older != newer:
        nested.fail("type", older, f"rope_type is {newer!r}; both are names of one setting, remove one of them")
    if "rope_type" not in nested.config and older is not None:
        nested = ConfigReader({"rope_type": older}, nested.where)
    return nested.choice("rope_type", tuple(_KEYS), default="default")


def _refuse_without_effect(nested: ConfigReader, kind: str) -> None:
    used = _EVERYWHERE + _KEYS[kind]
    for key, value in nested.config.items():
        if key in used or value is None or (_NEUTRAL.get(key) == value and not isinstance(value, bool)):
            continue
        if kind == "default" and "rope_type" not in nested.config and "type" not in nested.config:
            nested.fail(key, value, "it has no effect without rope_type; add it (linear or llama3), or remove this key")
        near = difflib.get_close_matches(shown(key), used, n=1)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        nested.fail(key, value, f"rope_type {kind!r} has no such setting; {hint}")


def _theta(reader: ConfigReader, nested: ConfigReader) -> float:
    """Return ``rope_theta``, which may also be at the top of the config."""
    inside, outside = nested.config.get(_THETA), reader.config.get(_THETA)
    if outside is not None:
        theta = reader.number(_THETA)
        if inside is not None and inside != outside:
            nested.fail(
                _THETA,
                inside,
                f"{_THETA} at the top of the config is {outside!r}; keep one of them, or make them equal",
            )
        return theta
    return nested.number(_THETA, default=_DEFAULT_THETA)


def _original_length(nested: ConfigReader, outside: Any, max_positions: int) -> int:
    """Return ``original_max_position_embeddings``: of the object, else of the top of the config, else the model's
    length.
    """
    inside = nested.config.get(_ORIGINAL, outside if outside is not None else max_positions)
    if outside is not None and inside != outside:
        nested.fail(_ORIGINAL, inside, f"{_ORIGINAL} at the top of the config is {outside!r}; make them equal")
    if isinstance(inside, float) and inside.is_integer():
        inside = int(inside)
    return ConfigReader({_ORIGINAL: inside}, nested.where).integer(_ORIGINAL)
