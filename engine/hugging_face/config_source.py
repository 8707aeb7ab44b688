"""Where the ``config.json`` of a run's model is, for commands that need the model's shape and not its weights."""

from __future__ import annotations

import os

from ..checkpoint.assets import asset_folder
from ..config import ModelConfig
from ..errors import UserError
from .hub_download import could_be_hub_name, find_config_folder


def architecture_source(model: ModelConfig) -> dict | str:
    """Return ``model.architecture``, or else the folder that holds the ``config.json`` of ``model.initialize_from``.

    Of a model on the Hub, ``config.json`` alone is fetched.

    Raises:
        UserError: there is no such folder, or the Hub has no such model or cannot be reached.
    """
    if model.architecture is not None:
        return model.architecture
    name = model.initialize_from or ""
    if not os.path.lexists(name) and "/" in name and could_be_hub_name(name):
        return str(find_config_folder(name, "model.initialize_from"))
    folder = asset_folder(name)
    if not folder.is_dir():
        raise UserError(
            f"model.initialize_from {name}: there is no {folder}; name a checkpoint, a Hugging Face folder or a model "
            "on the Hub, or set model.architecture to a config.json: weights are not needed here"
        )
    return str(folder)
