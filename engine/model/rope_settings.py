"""Read the rotary position settings of a ``config.json`` as transformers does, and compute their frequencies.

They are spelled in two ways: ``rope_parameters`` (transformers 5), or ``rope_theta`` with ``rope_scaling`` (before). If
a file has both, transformers uses ``rope_scaling`` alone. Here they must agree, or ``rope_parameters`` must be plain
(``rope_type: default``) with the same ``rope_theta``; the latter is the result of adding ``rope_scaling`` to a file of
transformers 5. Every key in these objects is used or refused: transformers ignores unknown ones.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config_reader import ConfigReader, shown
from .family_table import Family

SCALING, PARAMETERS = "rope_scaling", "rope_parameters"
FULL, WINDOWED = "full_attention", "sliding_attention"
_THETA, _ORIGINAL = "rope_theta", "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"
_EVERYWHERE = ("rope_type", "type", _THETA, _PARTIAL)
_QUERY_GROWTH = "llama_4_scaling_beta"
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    # transformers and others do not use the original length for linear scaling, but files contain it.
    "linear": ("factor", _ORIGINAL),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _ORIGINAL),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", _ORIGINAL),
}
"""The implemented rotary types, and the keys of each apart from the common ones."""
ROPE_TYPES = tuple(_KEYS)
_NEUTRAL = {"factor": 1, "attention_factor": 1}
"""Keys without effect if they have this value."""


@dataclass(frozen=True)
class Scaling(ABC):
    """A change of the plain frequencies that lengthens the context."""

    @property
    def attention_factor(self) -> float:
        """Return the factor of cosine and sine, by which the scores grow with its square."""
        return 1.0

    @abstractmethod
    def scaled(self, frequencies: list[float], theta: float, length: int) -> list[float]:
        """Return the frequencies for documents of ``length`` tokens, given the plain ones of base ``theta``."""


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Position interpolation (Chen et al., 2023, https://arxiv.org/abs/2306.15595)."""

    factor: float

    def scaled(self, frequencies: list[float], theta: float, length: int) -> list[float]:
        """See :class:`Scaling`."""
        return [frequency / self.factor for frequency in frequencies]


@dataclass(frozen=True)
class DynamicScaling(Scaling):
    """A base that grows with the length of a document longer than the model's (``rope_type: dynamic``)."""

    factor: float
    max_length: int
    """Of documents that are not scaled."""

    def scaled(self, frequencies: list[float], theta: float, length: int) -> list[float]:
        """See :class:`Scaling`."""
        growth = max(1.0, self.factor * length / self.max_length - (self.factor - 1))
        pairs = zip(frequencies, growth_exponents(len(frequencies)), strict=True)
        return [frequency * growth**exponent for frequency, exponent in pairs]


def growth_exponents(count: int) -> list[float]:
    """Return the exponents with which a growing base changes each of ``count`` frequencies.

    With d = 2 ``count`` dimensions, the base is multiplied by ``growth ** (d / (d - 2))``, and frequency i is
    ``base ** (-2i / d)``.
    """
    return [-2 * i / (2 * count - 2) for i in range(count)]


@dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Llama 3's frequency-dependent scaling of rotary wavelengths (``rope_type: llama3``).

    Wavelengths shorter than ``original / high_freq_factor`` are kept, the frequencies of those longer than ``original /
    low_freq_factor`` are divided by ``factor``, and those in between are interpolated
    (https://arxiv.org/abs/2407.21783, section 3.2).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scaled(self, frequencies: list[float], theta: float, length: int) -> list[float]:
        """See :class:`Scaling`."""
        stretched = []
        for frequency in frequencies:
            rotations = self.original_max_position_embeddings * frequency / (2 * math.pi)
            span = self.high_freq_factor - self.low_freq_factor
            keep = min(1.0, max(0.0, (rotations - self.low_freq_factor) / span))
            stretched.append(keep * frequency + (1 - keep) * frequency / self.factor)
        return stretched


@dataclass(frozen=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al., 2023, https://arxiv.org/abs/2309.00071).

    Pairs with more than ``beta_fast`` rotations within the original length are kept, the frequencies of those with less
    than ``beta_slow`` are divided by ``factor``, and those in between are interpolated.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    """Whether the bounds between these three kinds are rounded to whole pairs."""
    cos_sin_factor: float

    @property
    def attention_factor(self) -> float:
        """See :class:`Scaling`."""
        return self.cos_sin_factor

    def scaled(self, frequencies: list[float], theta: float, length: int) -> list[float]:
        """See :class:`Scaling`."""
        count = len(frequencies)
        low, high = (self._pair_with(rotations, theta, count) for rotations in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * count - 1)
        width = high - low if high != low else 0.001
        divided = [min(1.0, max(0.0, (i - low) / width)) for i in range(count)]
        return [f * (1 - part) + f / self.factor * part for f, part in zip(frequencies, divided, strict=True)]

    def _pair_with(self, rotations: float, theta: float, count: int) -> float:
        """Return the number of the pair, not rounded, that makes ``rotations`` within the original length."""
        return count * math.log(self.original_max_position_embeddings / (rotations * 2 * math.pi)) / math.log(theta)


@dataclass(frozen=True)
class LongRopeScaling(Scaling):
    """LongRoPE (Ding et al., 2024, https://arxiv.org/abs/2402.13753): a divisor for each pair.

    Documents longer than the original length have other divisors than the others.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    cos_sin_factor: float

    @property
    def attention_factor(self) -> float:
        """See :class:`Scaling`."""
        return self.cos_sin_factor

    def scaled(self, frequencies: list[float], theta: float, length: int) -> list[float]:
        """See :class:`Scaling`."""
        divisors = self.long_factor if length > self.original_max_position_embeddings else self.short_factor
        return [frequency / divisor for frequency, divisor in zip(frequencies, divisors, strict=True)]


@dataclass(frozen=True)
class RopeSettings:
    """Rotary positions of a layer."""

    theta: float
    """Base of the frequencies."""
    dim: int
    """Number of dimensions of a head that rotate, the first ones."""
    interleaved: bool = False
    """Whether dimension 2i rotates with 2i + 1, and not i with i + dim / 2."""
    in_fp32: bool = False
    """Whether queries and keys rotate in fp32, and are rounded once; otherwise cosine and sine are rounded first."""
    scaling: Scaling | None = None
    query_growth: float = 0.0
    """Queries are multiplied by ``1 + query_growth * log(1 + floor(position / query_period))``."""
    query_period: int = 1

    @property
    def attention_factor(self) -> float:
        """Return the factor of cosine and sine."""
        return self.scaling.attention_factor if self.scaling else 1.0

    @property
    def unscaled_length(self) -> int | None:
        """Return the length above which frequencies depend on the document's length; None: they never do."""
        if isinstance(self.scaling, DynamicScaling):
            return self.scaling.max_length
        return self.scaling.original_max_position_embeddings if isinstance(self.scaling, LongRopeScaling) else None


def inverse_frequencies(rope: RopeSettings, length: int = 1) -> list[float]:
    """Return radians per position of each of the ``dim / 2`` rotary pairs, for a document of ``length`` tokens."""
    frequencies = [rope.theta ** -(2 * i / rope.dim) for i in range(rope.dim // 2)]
    return rope.scaling.scaled(frequencies, rope.theta, length) if rope.scaling else frequencies


def read_rope(reader: ConfigReader, family: Family, head_dim: int, windowed: bool = False) -> RopeSettings:
    """Return the rotary settings of the config behind ``reader``.

    Args:
        reader: of the whole config.
        family: its family.
        head_dim: size of a head.
        windowed: of layers with a window, in families in which these have settings of their own.

    Raises:
        UserError: a setting is impossible, without effect, or contradicts another one.
        NotNative: it is not implemented.
    """
    if family.rope == "by_layer_type":
        return _read_by_layer_type(_Rope(reader, family, head_dim), windowed)
    rope = _Rope(reader, family, head_dim)
    scaling, parameters = _object(reader, SCALING), _object(reader, PARAMETERS)
    if not scaling and not parameters and family.default_rope is not None:
        parameters = dict(family.default_rope)
    key = SCALING if scaling else PARAMETERS
    settings = rope.read(key, scaling or parameters)
    if scaling and parameters:
        other = rope.read(PARAMETERS, parameters)
        if settings != other and not (other.scaling is None and other.theta == settings.theta):
            reader.fail(
                SCALING,
                scaling,
                f"{PARAMETERS} next to it is {parameters}: transformers then uses {SCALING} alone, and its {_THETA} is "
                f"{settings.theta:g}; write all settings, {_THETA} included, into one of them and remove the other",
            )
    return settings


def _read_by_layer_type(rope: _Rope, windowed: bool) -> RopeSettings:
    """Return the settings of full or windowed layers, which differ; ``rope_scaling`` is of the full ones."""
    reader = rope.reader
    scaling, parameters = _object(reader, SCALING), _object(reader, PARAMETERS)
    for key in parameters:
        if key not in (FULL, WINDOWED):
            reader.fail(PARAMETERS, parameters, f"it must have an object for {FULL} and one for {WINDOWED}")
    layers = ConfigReader(parameters, f"{reader.where}: {PARAMETERS}")
    full, window = _object(layers, FULL), _object(layers, WINDOWED)
    if windowed:
        return rope.read(f"{PARAMETERS}: {WINDOWED}", window, of_windowed=True)
    return rope.read(SCALING if scaling else f"{PARAMETERS}: {FULL}", {**full, **scaling})


def _object(reader: ConfigReader, key: str) -> dict[str, Any]:
    value = reader.config.get(key)
    if value is not None and not isinstance(value, dict):
        reader.fail(key, value, "an object of rotary settings is needed")
    return value or {}


@dataclass(frozen=True)
class _Rope:
    """Reads one object of rotary settings, some of which may be at the top of the config."""

    reader: ConfigReader
    family: Family
    head_dim: int

    def read(self, key: str, settings: Mapping[str, Any], of_windowed: bool = False) -> RopeSettings:
        """Return the settings in the object ``settings``, which is called ``key``."""
        nested = ConfigReader(dict(settings), f"{self.reader.where}: {key}")
        kind = self._kind(nested)
        self._refuse_without_effect(nested, kind)
        theta = self._window_theta(nested) if of_windowed else self._theta(nested)
        dim = self._rotary_dim(nested)
        scaling = self._scaling(nested, kind, dim)
        growth, period = 0.0, 1
        if self.family.grows_queries:
            growth = nested.number(_QUERY_GROWTH, or_zero=True)
            period = self._original_length(nested)
        return RopeSettings(theta, dim, self.family.rope_interleaved, self.family.rope_in_fp32, scaling, growth, period)

    def _kind(self, nested: ConfigReader) -> str:
        """Return ``rope_type``, or ``type``, its former name."""
        older, newer = nested.config.get("type"), nested.config.get("rope_type")
        if older is not None and newer is not None and older != newer:
            nested.fail("type", older, f"rope_type is {newer!r}; both are names of one setting, remove one of them")
        aliases = self.family.rope_aliases
        name = newer if newer is not None or "rope_type" in nested.config else older
        if isinstance(name, str) and name in aliases:
            return aliases[name]
        if "rope_type" not in nested.config and older is not None:
            nested = ConfigReader({"rope_type": older}, nested.where)
        return nested.choice("rope_type", self.family.rope_types or ROPE_TYPES, default="default")

    def _refuse_without_effect(self, nested: ConfigReader, kind: str) -> None:
        used = _EVERYWHERE + _KEYS[kind]
        if self.family.grows_queries:
            used += (_QUERY_GROWTH, _ORIGINAL, "max_position_embeddings")  # the last one repeats the config's
        for key, value in nested.config.items():
            if key in used or value is None or (_NEUTRAL.get(key) == value and not isinstance(value, bool)):
                continue
            if kind == "default" and "rope_type" not in nested.config and "type" not in nested.config:
                nested.fail(key, value, "it has no effect without rope_type; add it (such as yarn), or remove this key")
            near = difflib.get_close_matches(shown(key), used, n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            nested.fail(key, value, f"rope_type {kind!r} has no such setting; {hint}")

    def _theta(self, nested: ConfigReader) -> float:
        """Return ``rope_theta``, which may also be at the top of the config."""
        key = self.family.rope_theta_key
        if key != _THETA and self.reader.config.get(_THETA) is not None:
            self.reader.fail(
                _THETA,
                self.reader.config[_THETA],
                f"it has no effect: the setting is called {key}; rename or remove it",
            )
        inside, outside = nested.config.get(_THETA), self.reader.config.get(key)
        if outside is not None:
            theta = self.reader.number(key)
            if inside is not None and inside != outside:
                nested.fail(
                    _THETA,
                    inside,
                    f"{key} at the top of the config is {outside!r}; keep one of them, or make them equal",
                )
            return theta
        return nested.number(_THETA, default=self.family.rope_theta)

    def _window_theta(self, nested: ConfigReader) -> float:
        """Return the base of layers with a window."""
        key, default = "rope_local_base_freq", self.family.window_rope_theta
        if key in self.family.read_keys:
            default = self.reader.number(key, default=default)
        return nested.number(_THETA, default=default)

    def _rotary_dim(self, nested: ConfigReader) -> int:
        """Return the number of dimensions that rotate."""
        key, default = self.family.partial_rotary_key, self.family.partial_rotary
        if default is None:
            self.reader.refuse_unless(_PARTIAL, 1.0)
            nested.refuse_unless(_PARTIAL, 1.0)
            return self.head_dim
        inside, outside = nested.config.get(_PARTIAL), self.reader.config.get(key)
        if inside is not None and outside is not None and inside != outside:
            nested.fail(_PARTIAL, inside, f"{key} at the top of the config is {outside!r}; make them equal")
        part = nested.number(_PARTIAL) if inside is not None else self.reader.number(key, default=default)
        dim = int(self.head_dim * part)
        if dim % 2 or not 0 < dim <= self.head_dim:
            self.reader.fail(key, part, f"it must make an even number of the {self.head_dim} dimensions of a head")
        return dim

    def _scaling(self, nested: ConfigReader, kind: str, dim: int) -> Scaling | None:
        if kind == "linear":
            return LinearScaling(nested.number("factor"))
        original = self.reader.config.get(_ORIGINAL)
        if kind == "llama3":
            return self._llama3(nested)
        if kind == "yarn":
            return self._yarn(nested)
        if kind == "longrope":
            return self._longrope(nested, dim // 2)
        if original is not None and original != self._max_length() and _ORIGINAL not in self.family.defaults:
            remedy = f"it has no effect with rope_type {kind!r}; remove it, or set rope_type"
            self.reader.fail(_ORIGINAL, original, remedy)
        if kind == "dynamic":
            return DynamicScaling(nested.number("factor"), self._max_length())
        return None

    def _llama3(self, nested: ConfigReader) -> Llama3Scaling:
        scaling = Llama3Scaling(
            factor=nested.number("factor"),
            low_freq_factor=nested.number("low_freq_factor"),
            high_freq_factor=nested.number("high_freq_factor"),
            original_max_position_embeddings=self._original_length(nested),
        )
        if not scaling.low_freq_factor < scaling.high_freq_factor:
            nested.fail("high_freq_factor", scaling.high_freq_factor, "it must be above low_freq_factor")
        return scaling

    def _yarn(self, nested: ConfigReader) -> YarnScaling:
        factor = nested.number("factor")
        truncate = nested.config.get("truncate") is None or nested.flag("truncate")
        if not truncate and self.family.rope == "by_layer_type":
            nested.fail("truncate", False, "transformers does not read it there; remove it")
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=self._original_length(nested),
            beta_fast=nested.number("beta_fast", default=32.0),
            beta_slow=nested.number("beta_slow", default=1.0),
            truncate=truncate,
            cos_sin_factor=nested.number("attention_factor", default=self._yarn_attention_factor(nested, factor)),
        )

    def _yarn_attention_factor(self, nested: ConfigReader, factor: float) -> float:
        """Return the default: of the paper, or the quotient of DeepSeek's ``mscale`` and ``mscale_all_dim``."""

        def scale(of: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * of * math.log(factor) + 1.0

        numerator, denominator = nested.config.get("mscale"), nested.config.get("mscale_all_dim")
        if numerator and denominator:
            return scale(nested.number("mscale")) / scale(nested.number("mscale_all_dim"))
        return scale(1.0)

    def _longrope(self, nested: ConfigReader, count: int) -> LongRopeScaling:
        original = self._original_length(nested)
        factor = nested.number("factor", default=self._max_length() / original)
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return LongRopeScaling(
            short_factor=_numbers(nested, "short_factor", count),
            long_factor=_numbers(nested, "long_factor", count),
            original_max_position_embeddings=original,
            cos_sin_factor=nested.number("attention_factor", default=usual),
        )

    def _max_length(self) -> int:
        return self.reader.integer("max_position_embeddings")

    def _original_length(self, nested: ConfigReader) -> int:
        """Return ``original_max_position_embeddings``: of the object, else of the top of the config, else the model's
        length.
        """
        outside = self.reader.config.get(_ORIGINAL)
        inside = nested.config.get(_ORIGINAL, outside if outside is not None else self._max_length())
        if outside is not None and inside != outside:
            nested.fail(_ORIGINAL, inside, f"{_ORIGINAL} at the top of the config is {outside!r}; make them equal")
        if isinstance(inside, float) and inside.is_integer():
            inside = int(inside)
        return ConfigReader({_ORIGINAL: inside}, nested.where).integer(_ORIGINAL)


def _numbers(nested: ConfigReader, key: str, count: int) -> tuple[float, ...]:
    """Return a list of ``count`` positive numbers."""
    values = nested.config.get(key)
    if not isinstance(values, list) or len(values) != count:
        nested.fail(key, values, f"a list of {count} numbers is needed, one for each rotary pair")
    return tuple(ConfigReader({key: value}, nested.where).number(key) for value in values)
