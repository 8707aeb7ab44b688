"""An optimizer of the user: any subclass of ``torch.optim.Optimizer``, named by its import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..config.import_paths import described, import_class
from ..config.settings import OptimizerConfig
from ..errors import UserError
from .base import TrainingOptimizer
from .local import local_part


class ImportedOptimizer(TrainingOptimizer):
    """Makes an optimizer that knows nothing of this engine skip updates and divide gradients.

    It gets the parameters themselves: DTensors, if ranks share them. Whether an update is skipped is read on the host,
    which waits for the device in every step.

    Args:
        groups: parameter groups of named parameters.
        inner: class of the optimizer; its groups and states are shared.
        small_states: states of a small matrix, see :func:`require_storable`.
        options: of ``inner``.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        inner: type[torch.optim.Optimizer],
        small_states: dict[str, Tensor],
        **options: Any,
    ):
        self._inner, self._small_states = inner(groups, **options), small_states
        super().__init__(self._inner.param_groups, {})
        self.param_groups, self.state = self._inner.param_groups, self._inner.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Waits for the device."""
        assert closure is None
        if self.found_inf is not None and self.found_inf.item() != 0:
            return
        for _, _, parameter in self.named():
            if parameter.grad is None:
                continue
            if self.grad_scale is not None:
                local_part(parameter.grad).div_(self.grad_scale)
            steps = self.state[parameter].get("step")
            if isinstance(steps, Tensor) and steps.item() == 0:
                # Of allocate(): the optimizer itself knows what its first step begins with.
                del self.state[parameter]
        with torch.enable_grad():  # as an optimizer expects
            self._inner.step()

    def allocate(self) -> None:
        """Allocate states by a step with zero gradients, learning rate and weight decay, after which the weights are
        restored. No parameter may have a gradient.

        States have the values that this step leaves, except ``step``, which is zero: the first step with a gradient
        makes them again.
        """
        missing = [parameter for _, _, parameter in self.named() if not self.state.get(parameter)]
        if not missing:
            return
        settings = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        before = [local_part(parameter).detach().clone() for parameter in missing]
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)
        for group, (rate, decay) in zip(self.param_groups, settings, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        for parameter, values in zip(missing, before, strict=True):
            local_part(parameter.detach()).copy_(values)
            if "step" in self.state[parameter]:
                self.state[parameter]["step"].zero_()

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the states of ``parameter``; for one without, states of the right sizes, to count their memory."""
        state = self.state[parameter]
        if not state:
            for name, small in self._small_states.items():
                is_number = small.numel() == 1
                state[name] = torch.zeros_like(small) if is_number else torch.empty_like(parameter, dtype=small.dtype)
        return state


def build_imported(
    groups: list[dict[str, Any]],
    config: OptimizerConfig,
    adapt: Callable[[type[Any]], type[Any]] = lambda kind: kind,
) -> ImportedOptimizer:
    """Return the optimizer whose class ``optimizer.name`` imports.

    Args:
        groups: of its parameters.
        config: of the run.
        adapt: replaces :class:`ImportedOptimizer`.

    Raises:
        UserError: there is no such class, it refuses its options, or a checkpoint cannot store its states.
    """
    kind = imported_class(config)
    states = require_storable(kind, config)
    optimizer: ImportedOptimizer = adapt(ImportedOptimizer)(
        groups, kind, states, lr=config.learning_rate, **_options(config)
    )
    return optimizer


def imported_class(config: OptimizerConfig) -> type[torch.optim.Optimizer]:
    """Return the class that ``optimizer.name`` imports.

    Raises:
        UserError: there is none.
    """
    return import_class("optimizer.name", config.name, torch.optim.Optimizer, "torch.optim.Optimizer")


def require_storable(kind: type[torch.optim.Optimizer], config: OptimizerConfig) -> dict[str, Tensor]:
    """Step two matrices and a vector, and return the states of a matrix by name.

    Raises:
        UserError: the optimizer refuses its options, its step fails, or a state is neither a number in a tensor nor a
            tensor of the parameter's shape.
    """
    with unset_fake_temporarily():  # a dry run has tensors without values
        return _states_of_a_matrix(kind, config)


def _states_of_a_matrix(kind: type[torch.optim.Optimizer], config: OptimizerConfig) -> dict[str, Tensor]:
    # Large enough for optimizers that compress the states of large parameters only.
    shapes = {"matrix": (64, 128), "other": (6, 4), "vector": (6,)}
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    failed = f"optimizer.name {config.name} with optimizer.options {config.options or '{}'}"
    try:
        optimizer = kind([{"params": list(parameters.items())}], lr=config.learning_rate, **_options(config))  # type: ignore[call-arg]
        with torch.compiler.set_stance("force_eager"):  # a compiled update would be compiled for each of these shapes
            optimizer.step()
    except Exception as error:
        raise UserError(
            f"{failed} failed on a small matrix: {described(error)}; its signature is {_signature(kind)}"
        ) from None
    for parameter in parameters.values():
        for state, value in optimizer.state[parameter].items():
            if not isinstance(value, Tensor):
                what = f"a {type(value).__name__}, not a tensor"
            elif value.numel() != 1 and value.shape != parameter.shape:
                what = f"of shape {list(value.shape)} for a parameter of {list(parameter.shape)}"
            elif type(value) is not Tensor:
                what = f"a {type(value).__name__}, not a plain tensor"
            else:
                continue
            raise UserError(
                f"optimizer.name {config.name} keeps a state {state!r} that is {what}, which checkpoints cannot store; "
                "use an optimizer whose states are numbers in tensors, or tensors of the parameter's shape"
            )
        if not optimizer.state[parameter]:
            raise UserError(
                f"optimizer.name {config.name} keeps no states with optimizer.options {config.options or '{}'}; "
                "choose an optimizer or options with momentum"
            )
    return dict(optimizer.state[parameters["matrix"]])


def _options(config: OptimizerConfig) -> dict[str, Any]:
    """Return the options, with lists as tuples: an optimizer compares or unpacks its ``betas``."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()}


def _signature(kind: type) -> str:
    try:
        return str(inspect.signature(kind))
    except (TypeError, ValueError):
        return "(unknown)"
