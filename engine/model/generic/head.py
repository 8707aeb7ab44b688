"""Compute logits from hidden states as a model of transformers does.

Its head is a matrix, possibly with a bias, with a function of single numbers before and after it. That function is
measured once: known numbers go through the model, with stand-ins for its backbone and its matrix. If it is a scale and
a softcap, the fused loss computes it. Otherwise the model itself computes the logits.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .library import Parts

_RELATED = ("logit", "multiplier", "scal", "softcap", "soft_cap")
"""Parts of the names of settings whose values heads use."""
_NUMBERS = torch.linspace(-90, 90, 64)


@dataclass(frozen=True)
class HeadForm:
    """Logits are ``softcap * tanh(logit_scale * (W h + bias) / softcap)``; without a softcap the argument of tanh."""

    logit_scale: float = 1.0
    softcap: float | None = None


class _Fixed(nn.Module):
    """Calls a function instead of a module."""

    def __init__(self, function: Callable[[Any], Any], instead_of: nn.Module):
        super().__init__()
        self._function, self._instead_of = function, (instead_of,)  # in a tuple, so that it is not a child

    def forward(self, argument: Any = None, *arguments: Any, **named: Any) -> Any:
        """Call the function."""
        return self._function(argument)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module that this one replaces."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_instead_of"][0], name)


class _BackboneOutput:
    """The output of a backbone of which only hidden states exist; every other field is None."""

    def __init__(self, hidden: Tensor | None):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class LibraryHead:
    """The head of a model of transformers. Replaces the backbone inside the model by a stand-in.

    Args:
        parts: of the model; its backbone must not be taken from the model any more.
    """

    def __init__(self, parts: Parts):
        self._model, self._matrix = parts.model, parts.head
        self._hidden: Tensor | None = None
        stand_in = _Fixed(lambda _: _BackboneOutput(self._hidden), parts.backbone)
        _replace(parts.model, parts.backbone_name, stand_in, copy_owners=True)

    def __call__(self, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        """Map [n, H] hidden states to [n, V] logits; ``weight_VH`` is the matrix, which a tied head does not have."""
        self._hidden = hidden_NH[None]
        tied = "weight" not in self._matrix._parameters
        if tied:
            self._matrix.__dict__["weight"] = weight_VH
        try:
            tokens = torch.zeros(1, len(hidden_NH), dtype=torch.int64, device=hidden_NH.device)
            return self._model(input_ids=tokens, use_cache=False).logits[0]
        finally:
            self._hidden = None
            if tied:
                del self._matrix.__dict__["weight"]

    @torch.no_grad()
    def form(self) -> HeadForm | None:
        """Return the function around the matrix; None if it is not a scale and a softcap."""
        if not isinstance(self._matrix, nn.Linear):
            return None
        given: list[Tensor] = []

        def known_numbers(hidden: Tensor) -> Tensor:
            given.append(hidden)
            return _NUMBERS[None, None]

        try:
            with self._matrix_replaced(known_numbers):
                logits = self(_NUMBERS[None], _NUMBERS[None])[0]
        except RuntimeError:  # there are other matrices, without values
            return None
        numbers = [1.0, *self._settings()]
        scales = [*numbers, *(1 / number for number in numbers)]
        before = next((scale for scale in scales if _same(given[0][0, 0], _NUMBERS * scale)), None)
        if before is None or (before != 1.0 and self._matrix.bias is not None):
            return None
        for scale, cap in itertools.product(scales, [None, *numbers]):
            scaled = _NUMBERS * scale
            if _same(logits, scaled if cap is None else cap * torch.tanh(scaled / cap)):
                return HeadForm(before * scale, cap)
        return None

    @contextmanager
    def _matrix_replaced(self, function: Callable[[Any], Any]) -> Iterator[None]:
        name = next(name for name, module in self._model.named_modules() if module is self._matrix)
        _replace(self._model, name, _Fixed(function, self._matrix))
        try:
            yield
        finally:
            _replace(self._model, name, self._matrix)

    def _settings(self) -> list[float]:
        settings = self._model.config.to_dict()
        return [
            float(value)
            for name, value in settings.items()
            if any(part in name for part in _RELATED) and type(value) in (int, float) and value > 0 and value != 1
        ]


def _replace(model: nn.Module, name: str, module: nn.Module, copy_owners: bool = False) -> None:
    """Put ``module`` at ``name`` in ``model``; with ``copy_owners`` the modules between the two are copies."""
    first, _, rest = name.partition(".")
    if not rest:
        model._modules[first] = module
        return
    owner = model.get_submodule(first)
    if copy_owners:
        owner = copy.copy(owner)
        owner._modules = dict(owner._modules)
        model._modules[first] = owner
    _replace(owner, rest, module, copy_owners)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-6, atol=1e-6)
