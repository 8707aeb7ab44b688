"""Find the ``config.json`` of a run's model, for commands that need the model's shape without its weights."""

from __future__ import annotations

from ...config.settings import ModelConfig
from ...errors import UserError
from ...model.architecture import Architecture
from ...model.changed_config import with_settings
from ...model.config_file import CONFIG_FILE, INLINE, read_hf_config
from ...model.implementations import parse_architecture
from ..checkpoint.assets import asset_folder
from .hub_download import find_files, is_on_hub


def architecture_source(model: ModelConfig) -> dict | str:
    """Return ``model.architecture``, or else the folder that holds the ``config.json`` of ``model.initialize_from``.

    For a model on the Hub, only ``config.json`` is downloaded.

    Raises:
        UserError: there is no such folder, or the Hub has no such model or cannot be reached.
    """
    if model.architecture is not None:
        return model.architecture
    name = model.initialize_from or ""
    if is_on_hub(name):
        return str(find_files(name, "model.initialize_from", [CONFIG_FILE]))
    folder = asset_folder(name)
    if not folder.is_dir():
        raise UserError(
            f"model.initialize_from {name}: {folder} does not exist; name a checkpoint, a Hugging Face folder or a "
            "model on the Hub, or set model.architecture to a config.json: weights are not needed here"
        )
    return str(folder)


def configured_architecture(model: ModelConfig) -> Architecture:
    """Return the architecture of a run, with the changes of its settings: see :func:`architecture_source`.

    Raises:
        UserError: the model has no config, or no implementation computes it.
    """
    source = architecture_source(model)
    where = INLINE if isinstance(source, dict) else str(source)
    return parse_architecture(with_settings(read_hf_config(source), model, where), where, model.implementation)
