"""Choose between the implementations of a model, and build it.

The native decoder (:mod:`.decoder`) computes the families of :mod:`.families`, with all kinds of parallelism. The
transformers library computes every other causal language model (:mod:`.generic`).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from .architecture import Architecture, LayerRange
from .config_file import CONFIG_FILE, INLINE, read_hf_config
from .config_reader import NotNative
from .families import DecoderArchitecture, parse_decoder_architecture
from .family_table import FAMILIES
from .wrappers import TEXT_CONFIG, text_config_of

if TYPE_CHECKING:
    from .language_model import LanguageModel

Requested = Literal["auto", "native", "transformers"]
"""``model.implementation``."""
SETTING = "model.implementation"


def architecture_of(source: dict[str, Any] | str | Path, requested: Requested = "auto") -> Architecture:
    """Return the architecture that ``source`` describes: see :func:`read_hf_config`.

    Raises:
        UserError: names the file, or ``model.architecture`` for a dictionary.
    """
    config = read_hf_config(source)
    if isinstance(source, dict):
        return parse_architecture(config, INLINE, requested)
    where = str(Path(source) / CONFIG_FILE if os.path.isdir(source) else source)
    return parse_architecture(config, where, requested)


def parse_architecture(config: dict[str, Any], where: str = INLINE, requested: Requested = "auto") -> Architecture:
    """Parse ``config``, the content of a Hugging Face ``config.json``; ``where`` names it in errors.

    Of a model with several parts, this is the architecture of the text model.

    Args:
        config: see above.
        where: see above.
        requested: an implementation; auto is the native one if it computes the model exactly, else transformers.

    Raises:
        UserError: a missing or impossible value, or a setting that no implementation supports.
    """
    config, is_wrapped = text_config_of(config)
    if is_wrapped:
        where = f"{where}: {TEXT_CONFIG}"
    if requested == "transformers":
        return _transformers_architecture(config, where, f"{SETTING} is transformers")
    try:
        return parse_decoder_architecture(config, where)
    except NotNative as error:
        if requested == "native":
            raise UserError(f"{error}; or set {SETTING} to transformers") from None
        known = config.get("model_type") in FAMILIES
        reason = str(error).removeprefix(f"{where}: ") if known else "the native decoder has no such family"
        try:
            return _transformers_architecture(config, where, reason)
        except UserError as refusal:
            other = str(refusal).removeprefix(f"{where}: ")
            raise UserError(f"{error}; transformers cannot compute it either: {other}") from None


def unread_keys(config: dict[str, Any], where: str) -> list[str]:
    """Return the keys of ``config`` without effect: see :meth:`Architecture.unread_keys`. Empty if it is refused."""
    try:
        return parse_architecture(config, where).unread_keys(text_config_of(config)[0])
    except UserError:
        return []


def architecture_of_tensors(
    config: dict[str, Any], where: str, names: Collection[str], requested: Requested = "auto"
) -> Architecture:
    """Return the architecture of ``config`` whose parameters have these ``names``, as a checkpoint stores them.

    A family may get a native implementation after a checkpoint was written, with other names. ``requested`` is as for
    :func:`parse_architecture`.

    Raises:
        UserError: see :func:`parse_architecture`.
    """
    chosen = parse_architecture(config, where, requested)
    if requested != "auto" or chosen.implementation == "transformers" or _has_names(chosen, names):
        return chosen
    try:
        other = parse_architecture(config, where, "transformers")
    except UserError:
        return chosen
    return other if _has_names(other, names) else chosen


def _has_names(architecture: Architecture, names: Collection[str]) -> bool:
    return {name for name, _ in meta_model(architecture).named_parameters()} <= set(names)


def _transformers_architecture(config: dict[str, Any], where: str, reason: str) -> Architecture:
    from .generic.architecture import parse_transformers_architecture

    return parse_transformers_architecture(config, where, reason)


def meta_model(architecture: Architecture, layers: LayerRange | None = None) -> LanguageModel:
    """Return the model, or the part of it with ``layers``, on the meta device: without values."""
    if isinstance(architecture, DecoderArchitecture):
        import torch

        from .decoder import Decoder

        with torch.device("meta"):
            return Decoder(architecture, layers)
    from .generic.architecture import TransformersArchitecture
    from .generic.model import TransformersModel

    assert isinstance(architecture, TransformersArchitecture)
    assert layers in (None, (0, architecture.num_layers))
    return TransformersModel(architecture)


def checked(architecture: Architecture) -> Architecture:
    """Return ``architecture`` with an exact way to keep documents apart, which takes up to two seconds to find.

    Raises:
        UserError: there is none.
    """
    if isinstance(architecture, DecoderArchitecture):
        return architecture
    from .generic.architecture import TransformersArchitecture
    from .generic.self_check import with_exact_documents

    assert isinstance(architecture, TransformersArchitecture)
    return with_exact_documents(architecture)
