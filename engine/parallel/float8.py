"""Compute linear layers in float8: torchao scales inputs, weights and gradients per tensor and multiplies in 8 bits.

Parameters keep their names, dtype and sharding; only the products change. The head is excluded, since the loss is most
sensitive there.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from ..config.settings import TrainingConfig
from ..errors import UserError, install_command
from ..model.language_model import LanguageModel

_OLDEST = (8, 9)
"""First compute capability with float8 matrix products (Ada; Hopper is 9.0)."""

_MULTIPLE = 16
"""Both widths of a float8 product must be multiples of this."""


def enabled(config: TrainingConfig, device: torch.device) -> bool:
    """Return whether the run computes in float8.

    Raises:
        UserError: it is requested, but torchao is missing or the device has no float8 matrix products.
    """
    if not config.float8:
        return False
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"training.float8 is true, but torchao is not installed; {install_command('torchao')}, or set "
            "training.float8 to false"
        )
    if device.type != "cuda":
        raise UserError(f"training.float8 is true, but the run is on {device.type}; use a GPU or set it to false")
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        raise UserError(
            f"training.float8 is true, but {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and float8 needs {_OLDEST[0]}.{_OLDEST[1]}; set training.float8 to false"
        )
    return True


def apply(model: LanguageModel, config: TrainingConfig, device: torch.device) -> None:
    """Give the blocks of ``model`` (on the meta device) float8 linear layers if configured; call before sharding."""
    if enabled(config, device):
        convert(model)


def convert(model: LanguageModel, emulate: bool = False) -> None:
    """Replace the blocks' linear layers whose widths are multiples of 16 by float8 ones.

    Args:
        model: on any device, including the meta device.
        emulate: compute the float8 result in the original dtype, on any device; for tests.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=emulate)
    for block in model.blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=lambda module, _: _fits(module))


def _fits(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear) and module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0
    )
