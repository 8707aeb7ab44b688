"""Choose between the implementations of a model, and build it.

The native decoder (:mod:`.decoder`) computes the families of :mod:`.families`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .config_file import CONFIG_FILE, INLINE, read_hf_config
from .decoder import Decoder
from .families import DecoderArchitecture, parse_decoder_architecture
from .language_model import Architecture, LanguageModel, LayerRange
from .wrappers import TEXT_CONFIG, text_config_of


def architecture_of(source: dict[str, Any] | str | Path) -> Architecture:
    """Return the architecture that ``source`` describes: see :func:`read_hf_config`.

    Raises:
        UserError: names the file, or ``model.architecture`` for a dictionary.
    """
    config = read_hf_config(source)
    if isinstance(source, dict):
        return parse_architecture(config)
    return parse_architecture(config, str(Path(source) / CONFIG_FILE if os.path.isdir(source) else source))


def parse_architecture(config: dict[str, Any], where: str = INLINE) -> Architecture:
    """Parse ``config``, the content of a Hugging Face ``config.json``; ``where`` names it in errors.

    Of a model with several parts, this is the architecture of the text model.

    Raises:
        UserError: a missing or impossible value, or a setting that no implementation supports.
    """
    text_config, is_wrapped = text_config_of(config)
    return parse_decoder_architecture(text_config, f"{where}: {TEXT_CONFIG}" if is_wrapped else where)


def meta_model(architecture: Architecture, layers: LayerRange | None = None) -> LanguageModel:
    """Return the model, or the part of it with ``layers``, on the meta device: without values."""
    assert isinstance(architecture, DecoderArchitecture)
    with torch.device("meta"):
        return Decoder(architecture, layers)
