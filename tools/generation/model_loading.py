"""Open a Hugging Face folder or a checkpoint for generation: model, tokenizer, and what ends a text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...engine.errors import UserError
from ...engine.model.architecture import Architecture
from ...engine.model.changed_config import without_dropout
from ...engine.model.config_file import CONFIG_FILE, read_hf_config
from ...engine.model.generic.remote_code import register_remote_code
from ...engine.model.implementations import architecture_of_tensors, checked, parse_architecture
from ...engine.model.language_model import LanguageModel
from ...engine.model.wrappers import text_config_of
from ...engine.weights.adapters.opening import AdaptedModel, open_adapted
from ...engine.weights.checkpoint.assets import ASSET_FOLDER, newest_of_run
from ...engine.weights.checkpoint.manifest import MANIFEST_FILE, read_manifest
from ...engine.weights.checkpoint.tensors import (
    load_tensors,
    model_tensors,
    open_tensors,
    require_model_tensors,
    stored_tensors,
)
from ...engine.weights.checkpoint.verify import require_undamaged
from ...engine.weights.damage import METADATA_FILE, TABLE_FILE
from ...engine.weights.hugging_face.hub_download import (
    CONFIGS,
    WANTED,
    check_download,
    find_files,
    require_hub_name,
    require_supported,
)
from ...engine.weights.hugging_face.model import HfModel, meta_model, open_hf_model
from ...engine.weights.hugging_face.weight_dtypes import declared_dtype, dtype_named
from ..tokenizer.handle import TokenizerHandle, load_prompt_tokenizer
from .backend import Backend
from .decoder_backend import own_backend
from .library_backend import library_backend, load_library_model

GENERATION_CONFIG = "generation_config.json"
_GREEDY_SETTINGS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "num_beams": (None, 1),
    "stop_strings": (None, []),
}
"""Settings of a generation config that change greedy text, and the values without effect."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a model.

    Args:
        path: the folder.
        is_checkpoint: whether it is a checkpoint, and not a Hugging Face folder.
    """

    path: Path
    is_checkpoint: bool

    @property
    def assets(self) -> Path:
        """The folder with config.json and tokenizer."""
        return self.path / ASSET_FOLDER if self.is_checkpoint else self.path

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return read_hf_config(self.assets / CONFIG_FILE)

    @property
    def generation_config(self) -> dict[str, Any]:
        """Content of generation_config.json; empty without one."""
        path = self.assets / GENERATION_CONFIG
        return read_hf_config(path) if path.is_file() else {}

    def bos_of_training(self) -> tuple[int, ...] | None:
        """Return the BOS ids of the documents that a checkpoint was trained on; None if unrecorded or different between
        sources.
        """
        recorded = [dataset.get("bos") for dataset in read_manifest(self.path).datasets.values()]
        first: list[int] | None = recorded[0] if recorded else None
        return None if first is None or any(ids != first for ids in recorded) else tuple(first)

    def stop_ids(self) -> set[int]:
        """Return ``eos_token_id`` of config and generation config: a number, a list of them, or nothing."""
        found: set[int] = set()
        for source in (self.config, self.generation_config):
            value = source.get("eos_token_id")
            found.update(value if isinstance(value, list) else [] if value is None else [value])
        return found

    def ignored_settings(self) -> list[str]:
        """Return the settings of the generation config with which transformers would give other greedy text."""
        found = self.generation_config
        return [
            f"{key} {found[key]}"
            for key, neutral in _GREEDY_SETTINGS.items()
            if key in found and found[key] not in neutral
        ]


def find_model(name: str | Path, trust_remote_code: bool = False) -> ModelFolder:
    """Return a model; its own code is registered with transformers if it is trusted.

    Args:
        name: a Hugging Face folder, a checkpoint, a run folder (its newest checkpoint), or a model on the Hub.
        trust_remote_code: whether to run code from the folder.

    Raises:
        UserError: there is no such model, or its code cannot be used.
    """
    folder = _locate(name)
    found = ModelFolder(folder, _is_checkpoint(folder))
    if trust_remote_code:
        register_remote_code(found.config, found.assets)
    return found


def find_device(name: str) -> torch.device:
    """Return the device of ``--device name``.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown kind of device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs; use --device cpu")
    return device


def read_architecture(model: ModelFolder) -> Architecture:
    """Return the architecture of a model.

    Raises:
        UserError: its config or its tensors cannot be used.
    """
    config, where = _config_without_dropout(model), str(model.assets / CONFIG_FILE)
    if model.is_checkpoint:
        adapted = _open_adapted(model)
        if adapted is not None:
            return adapted.architecture
        return architecture_of_tensors(config, where, stored_tensors(model.path))
    return parse_architecture(config, where)


def _config_without_dropout(model: ModelFolder) -> dict[str, Any]:
    """Return config.json without dropout, which is for training only; the engine refuses models that have it."""
    return without_dropout(model.config, str(model.assets / CONFIG_FILE))


def load_backend(model: ModelFolder, architecture: Architecture, dtype: str, device: torch.device) -> Backend:
    """Return the model with its weights: checkpoints with our own module, Hugging Face folders with transformers.

    Two kinds of folders run in our own module too: the language model of a vision-language model, and models whose
    positions depend on the length of a text. For the latter, the caches of transformers are wrong for long texts.

    Args:
        dtype: ``auto`` for the dtype in the model's config, else float32; or a name.

    Raises:
        UserError: the weights cannot be used.
    """
    config, where = model.config, str(model.assets / CONFIG_FILE)
    weights_dtype = dtype_named(dtype) or declared_dtype(config, where) or torch.float32
    if model.is_checkpoint:
        return own_backend(_checkpoint_decoder(model, checked(architecture), weights_dtype, device), device)
    weights = open_hf_model(model.path, config=_config_without_dropout(model))
    if text_config_of(config)[1] or architecture.longest_unscaled is not None:
        return own_backend(_hf_decoder(weights, checked(architecture), weights_dtype, device), device)
    return library_backend(load_library_model(model.path, weights_dtype, device), architecture)


def load_tokenizer(name: str | None, model: ModelFolder, vocab_size: int) -> tuple[TokenizerHandle, set[int]]:
    """Return the tokenizer, and the id of the token that ends its documents, if the model knows it."""
    try:
        tokenizer = load_prompt_tokenizer(name if name is not None else model.assets)
    except UserError as error:
        raise error if name is not None else UserError(f"{error}; or name one with --tokenizer") from None
    try:
        _, document_end = tokenizer.eod()
    except UserError:  # it has no EOD token: then only the model's own configuration ends a text
        return tokenizer, set()
    return tokenizer, {document_end} if document_end < vocab_size else set()


def _locate(name: str | Path) -> Path:
    """Return the folder of a model. A model on the Hub is downloaded."""
    if os.path.isdir(name):
        return Path(newest_of_run(name) or name)
    require_hub_name(str(name), "--model")
    check_download(str(name), "--model", find_files(str(name), "--model", CONFIGS), require_supported)
    return find_files(str(name), "--model", WANTED)


def _is_checkpoint(folder: Path) -> bool:
    """Return whether ``folder`` is a checkpoint and not a Hugging Face folder."""
    if any((folder / name).is_file() for name in (MANIFEST_FILE, TABLE_FILE, METADATA_FILE)):
        read_manifest(folder)
        return True
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"--model {folder}: neither a Hugging Face folder ({CONFIG_FILE}) nor a checkpoint ({MANIFEST_FILE}); name "
            "one, such as runs/x/checkpoints/step-00001000"
        )
    return False


def empty_decoder(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """Return the model with weights that are not initialized, in evaluation mode."""
    return meta_model(architecture).cast_parameters(dtype).materialize(device).eval()


def _checkpoint_decoder(
    model: ModelFolder, architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    decoder, adapted = empty_decoder(architecture, dtype, device), _open_adapted(model)
    parts = open_tensors(model.path) if adapted is None else adapted.parameters
    require_model_tensors(model.path, parts.tensors, decoder)
    require_undamaged(model.path)
    if adapted is not None:
        adapted.require_base()
    load_tensors(model.path, model_tensors(decoder), distributed=False, opened=parts)
    return decoder


def _open_adapted(model: ModelFolder) -> AdaptedModel | None:
    """Return the adapter of a checkpoint with its base model; None if the checkpoint holds all parameters."""
    manifest = read_manifest(model.path)
    if not manifest.base:
        return None
    return open_adapted(model.path, manifest, open_tensors(model.path), _config_without_dropout(model))


def _hf_decoder(
    weights: HfModel, architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    decoder = empty_decoder(architecture, dtype, device)
    for name, parameter in model_tensors(decoder).items():
        weights.parameters.load(name, parameter)
    return decoder
