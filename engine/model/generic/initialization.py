"""Initialize a model of transformers randomly, as the library does, and the same on any number of ranks.

Each module is initialized from its own stream of random numbers, a block at a time, so that no more than a block has
values that are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from .library import Parts


class Initializer:
    """Computes initial values of the parameters of ``model``, which is on the meta device.

    Args:
        model: has the modules of ``parts`` under their names.
        parts: of the library's model.
        constructed: see :func:`.library.constructed_values`.
        seed: of all streams.
    """

    def __init__(self, model: nn.Module, parts: Parts, constructed: Mapping[str, Tensor], seed: int):
        self._model, self._parts, self._constructed = model, parts, constructed
        self._names = {module: name for name, module in model.named_modules()}
        self._wanted = {name for name, _ in model.named_parameters()}  # a parameter of several modules has one name
        self._seeds = {module: (seed * 1_000_003 + place) % 2**63 for place, module in enumerate(self._names)}

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of every parameter, on the CPU.

        Raises:
            UserError: neither the constructor of a module nor the library's initialization gives a parameter values.
        """
        owners = dict(_owners(self._model, self._parts.model))
        done: set[nn.Module] = {self._model}
        for unit in [*self._parts.blocks, self._model]:
            inside = set(unit.modules()) - done
            done |= inside
            yield from self._of_modules({module: owner for module, owner in owners.items() if module in inside})

    def _of_modules(self, owners: Mapping[nn.Module, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the values of modules, which are initialized in their order by the methods of their ``owners``."""
        on_meta = {module: dict(module._parameters) for module in owners}
        for module, parameters in on_meta.items():
            module._parameters.update(self._begin(module, parameters))
        if self._parts.head in owners:
            self._parts.head._parameters.setdefault("weight", nn.Parameter(torch.zeros(1, 1)))  # of a tied head
        with torch.random.fork_rng(devices=[]):
            for module, owner in owners.items():
                torch.manual_seed(self._seeds[module])
                owner._init_weights(module)
        for module, parameters in on_meta.items():
            values = dict(module._parameters)
            module._parameters.clear()
            module._parameters.update(parameters)
            yield from self._known(module, {name: values[name] for name in parameters})

    def _begin(self, module: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> dict[str, nn.Parameter]:
        """Return parameters with the values that the constructor has given them, else NaN."""
        begun = {}
        for name, parameter in parameters.items():
            if parameter is not None and self._name(module, name) in self._wanted:
                values = self._constructed.get(self._name(module, name))
                values = torch.full(parameter.shape, math.nan) if values is None else values.clone()
                begun[name] = nn.Parameter(values, parameter.requires_grad)
        return begun

    def _known(self, module: nn.Module, values: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        for attribute, value in values.items():
            name = self._name(module, attribute)
            if value is None or name not in self._wanted:
                continue
            if value.isnan().any():
                raise UserError(
                    f"model_type {self._parts.model.config.model_type}: transformers does not initialize {name}; set "
                    "model.initialize_from"
                )
            yield name, value.detach()

    def _name(self, module: nn.Module, attribute: str) -> str:
        return f"{self._names[module]}.{attribute}"


def _owners(module: nn.Module, owner: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Yield every module inside ``module``, children first, with the model of transformers that initializes it."""
    from transformers import PreTrainedModel

    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        yield from _owners(child, owner)
    yield module, owner
