"""Check that packages which settings need are installed, without importing them."""

from __future__ import annotations

import importlib.util

from ..errors import UserError, install_command
from .settings import AdapterConfig, LoggingConfig

MODULES = {"wandb": "wandb", "mlflow": "mlflow", "swanlab": "swanlab", "trackio": "trackio", "comet": "comet_ml"}
"""Module of each of ``logging.trackers`` that needs one."""


def require_trackers(logging: LoggingConfig) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        UserError: names each, and the command that installs it.
    """
    missing = [name for name in logging.trackers if name in MODULES and not _is_installed(MODULES[name])]
    if missing:
        commands = {name: install_command(MODULES[name]) for name in missing}
        raise UserError(*(f"logging.trackers: {name} is not installed: {commands[name]}" for name in missing))


def require_quantization(adapter: AdapterConfig) -> None:
    """Refuse a quantized base if the package with its formats is not installed.

    Raises:
        UserError: names the command that installs it.
    """
    if adapter.quantize_base != "none" and not _is_installed("bitsandbytes"):
        raise UserError(
            f"adapter.quantize_base is {adapter.quantize_base}, but bitsandbytes is not installed: "
            f"{install_command('bitsandbytes')}, or set adapter.quantize_base to none"
        )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
