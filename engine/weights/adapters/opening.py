"""Open a checkpoint with an adapter together with its base model, as one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...model.architecture import Architecture
from ...model.config_file import CONFIG_FILE, read_hf_config
from ...model.implementations import architecture_of_tensors, meta_model
from ..checkpoint.assets import ASSET_FOLDER, is_hf_folder
from ..checkpoint.manifest import Manifest, read_manifest
from ..checkpoint.tensors import STATE_PREFIXES, open_tensors, require_model_tensors
from ..hugging_face.hub_download import is_on_hub
from ..hugging_face.layout import Layout
from ..hugging_face.model import open_hf_model
from ..parts import TensorParts
from .base import BaseRecord
from .merged import merged_parameters
from .peft import PeftExport
from .peft_config import PeftConfig
from .stored import StoredAdapter

BASE_OPTION = "--base"


@dataclass(frozen=True)
class AdaptedModel:
    """A checkpoint with an adapter, and its base model."""

    folder: Path
    """Of the checkpoint."""
    record: BaseRecord
    base_folder: Path
    """Where the base is now."""
    base_name: str
    """The base as PEFT is to find it: a folder, or a name on the Hub."""
    architecture: Architecture
    base: TensorParts
    """The parameters of the base, in the model's order."""
    base_weights: TensorParts
    """The tensors in its files, which its hash is of."""
    adapter: StoredAdapter

    @cached_property
    def layout(self) -> Layout:
        """Of the model."""
        return Layout.of(self.architecture, meta_model(self.architecture))

    @cached_property
    def parameters(self) -> TensorParts:
        """The parameters of the merged model."""
        return merged_parameters(self.base, self.adapter, self.layout)

    @property
    def peft(self) -> PeftExport:
        """The adapter in the terms of PEFT."""
        config = PeftConfig(self.adapter.parameters, self.architecture, self.layout)
        return PeftExport(config, self.adapter, self.base, self.parameters)

    def require_base(self, on_bytes: Callable[[int], object] = lambda count: None) -> None:
        """Refuse a base model that has changed since the training. All of it is read.

        Raises:
            UserError: with both hashes.
        """
        try:
            self.record.require(self.base_weights, self.base_folder, on_bytes)
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from None


def open_adapted(
    folder: Path, manifest: Manifest, stored: TensorParts, config: dict[str, Any], base_folder: str | None = None
) -> AdaptedModel:
    """Open a checkpoint with an adapter, and its base model, whose identity is not checked yet.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        stored: its tensors.
        config: content of its ``config.json``.
        base_folder: folder of the base model, if it is no longer where the run found it.

    Raises:
        UserError: the base is missing, or the adapter does not fit.
    """
    record = BaseRecord.in_manifest(manifest)
    assert record is not None
    model = manifest.config.get("model")
    model = model if isinstance(model, dict) else {}
    requested = model.get("implementation", "auto")
    if not record.folder and base_folder is None:
        raise UserError(f"{folder}: holds an adapter of random weights, which no folder holds; it cannot be merged")
    place, where = Path(base_folder or record.folder), str(folder / ASSET_FOLDER)
    try:
        architecture, base, weights = _open_base(place, config, where, requested)
    except UserError as error:
        remedy = "name another folder" if base_folder else f"put it back, or name its folder with {BASE_OPTION}"
        raise UserError(f"{folder}: holds an adapter and needs its base model: {error}; {remedy}") from None
    settings = manifest.config.get("adapter")
    adapter = StoredAdapter.of_checkpoint(folder, settings if isinstance(settings, dict) else {}, architecture, stored)
    start = str(model.get("initialize_from"))
    name = start if base_folder is None and is_on_hub(start) else str(place.resolve())
    return AdaptedModel(folder, record, place, name, architecture, base, weights, adapter)


def open_parameters(folder: Path, manifest: Manifest, config: dict[str, Any]) -> TensorParts:
    """Return the tensors of the checkpoint ``folder``; if it holds an adapter, the parameters of the merged model.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        config: content of its ``config.json``.

    Raises:
        UserError: it cannot be read, or its base model is missing.
    """
    stored = open_tensors(folder)
    return open_adapted(folder, manifest, stored, config).parameters if manifest.base else stored


def require_base(folder: Path) -> None:
    """Refuse the checkpoint ``folder``, which holds an adapter, if its base has changed. All of the base is read.

    Raises:
        UserError: it is missing, or has changed.
    """
    config = read_hf_config(folder / ASSET_FOLDER / CONFIG_FILE)
    open_adapted(folder, read_manifest(folder), open_tensors(folder), config).require_base()


def _open_base(
    folder: Path, config: dict[str, Any], where: str, requested: Any
) -> tuple[Architecture, TensorParts, TensorParts]:
    """Open the base model in ``folder``, whose configuration is ``config``.

    Returns:
        its architecture, its parameters, and the tensors in its files.
    """
    if is_hf_folder(folder):
        opened = open_hf_model(folder, config=config, requested=requested)
        return opened.architecture, opened.parameters, opened.weights
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    stored = open_parameters(folder, read_manifest(folder), config)
    weights = stored.only(name for name in stored.tensors if not name.startswith(STATE_PREFIXES))
    architecture = architecture_of_tensors(config, where, weights.tensors, requested)
    model = meta_model(architecture)
    require_model_tensors(folder, weights.tensors, model)
    return architecture, weights.only(name for name, _ in model.named_parameters()), weights
