"""Open a model on disk as the input of a conversion, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...files.hashing import hash_file
from ...model.architecture import Architecture
from ...model.config_file import CONFIG_FILE, read_hf_config
from ...model.implementations import architecture_of_tensors, meta_model
from ...model.wrappers import text_config_of
from ..adapters.opening import BASE_OPTION, AdaptedModel, open_adapted
from ..checkpoint.assets import ASSET_FOLDER, HfAssets
from ..checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from ..checkpoint.tensors import (
    AVERAGE_PREFIX,
    OPTIMIZER_PREFIX,
    STATE_PREFIXES,
    open_tensors,
    require_model_tensors,
)
from ..checkpoint.verify import require_undamaged
from ..hugging_face.carried import Carried
from ..hugging_face.folder import INDEX_FILE
from ..hugging_face.layout import Layout
from ..hugging_face.model import open_hf_model
from ..hugging_face.weight_dtypes import declared_dtype
from ..parts import TensorParts
from ..tensor_source import StoredTensor, TensorSource
from .provenance import file_identity, require_same_source
from .writing import progress

_AVERAGE = "moving average of the weights, which --ema exports"


@dataclass(frozen=True)
class StoredModel:
    """The parameters of a model, and what travels with them."""

    folder: Path
    config: dict[str, Any]
    """Content of a Hugging Face ``config.json``."""
    architecture: Architecture
    parameters: TensorSource
    """Parameters, in the model's order."""
    published: TensorSource
    """The same values as the tensors of Hugging Face files."""
    published_tables: Sequence[str]
    """The names there of the tensors with one row for each token."""
    kept: Collection[str]
    """Names of the parameters and published tensors that keep their dtype when the others are cast."""
    unused: Mapping[str, StoredTensor]
    """The tensors that hold no parameters."""
    left_out: dict[str, list[str]]
    """Their names, by reason."""
    assets: HfAssets
    asset_folder: Path
    """Where the files of ``assets`` are, if there are any."""
    notes: list[str]
    """Remarks about omitted parts and parts that cannot be verified, a line each."""
    identify: Callable[[], dict[str, Any]]
    """Returns what identifies the files now: another value than at the beginning means that they have changed."""
    carried: Callable[[], Carried | None] = lambda: None
    """Returns the record of the tensors that exports take from a Hugging Face folder; reads and hashes them there."""
    export_dtype: torch.dtype | None = None
    """Default dtype of the output; None: each tensor's own."""
    verify: Callable[[int], None] = lambda workers: None
    """Verifies every byte with a number of threads, if there are hashes. Raises UserError on damage."""
    adapted: AdaptedModel | None = None
    """For a checkpoint with an adapter: that and its base, of which ``parameters`` are the merged model."""

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a checkpoint, and not a Hugging Face folder."""
        return self.asset_folder != self.folder

    @property
    def max_length(self) -> int | None:
        """Maximum number of tokens of the model, if known."""
        return text_config_of(self.config)[0].get("max_position_embeddings")


def open_hf(name: str, folder: Path, any_vocab_size: bool = False) -> StoredModel:
    """Open the Hugging Face ``folder`` of the model ``name``; see :func:`open_hf_model`."""
    model, index = open_hf_model(folder, any_vocab_size), folder / INDEX_FILE
    float32 = float32_names(model.layout, model.architecture)

    def identify() -> dict[str, Any]:
        return {
            "name": name,
            "folder": str(folder.resolve()),
            "config_xxh3_128": hash_file(folder / CONFIG_FILE),
            "index_xxh3_128": hash_file(index) if index.is_file() else None,
            "files": {path.name: file_identity(path) for path in model.weights.files},
        }

    return StoredModel(
        folder=folder,
        config=model.config,
        architecture=model.architecture,
        parameters=model.parameters,
        published=model.with_carried(),
        published_tables=[
            model.exported_name(name) for name in model.layout.published_names(model.architecture.tables)
        ],
        kept={*float32, *map(model.exported_name, float32), *model.carried},
        unused={name: model.weights.tensors[name] for names in model.left_out.values() for name in names},
        left_out=model.left_out,
        assets=HfAssets.read(folder),
        asset_folder=folder,
        notes=model.notes,
        identify=identify,
        carried=lambda: Carried.of(model) if model.carried else None,
    )


def open_checkpoint(folder: Path, ema: bool = False, base: str | None = None) -> StoredModel:
    """Open the checkpoint ``folder`` and check that it holds exactly the parameters that its config requires.

    Args:
        folder: of the checkpoint.
        ema: take the moving average of the parameters that have one, instead of these.
        base: of a checkpoint with an adapter: folder of the base model, if it has been moved.

    Raises:
        UserError: it is incomplete, has no config or no average, or holds another model; or its base model is missing.
    """
    manifest, stored = read_manifest(folder), open_tensors(folder)
    stored.require_full_coverage()
    files = _files_of(stored)
    where = folder / ASSET_FOLDER / CONFIG_FILE
    config = read_hf_config(where)
    names = [name for name in stored.tensors if not name.startswith(STATE_PREFIXES)]
    weights = _averaged(folder, stored, names) if ema else stored.only(names)
    adapted = open_adapted(folder, manifest, weights, config, base) if manifest.base else None
    if adapted is not None:
        architecture, layout, parameters = adapted.architecture, adapted.layout, adapted.parameters
    else:
        if base is not None:
            raise UserError(f"{BASE_OPTION} {base}: {folder} holds all parameters, and no adapter; remove it")
        architecture = architecture_of_tensors(config, str(where), stored.tensors)
        model = meta_model(architecture)
        require_model_tensors(folder, weights.tensors, model)
        layout = Layout.of(architecture, model)
        parameters = weights.only(layout.shapes)
    assets = HfAssets.of_checkpoint(folder)
    averages = [name for name in stored.tensors if name.startswith(AVERAGE_PREFIX)]
    optimizer_states = [name for name in stored.tensors if name.startswith(OPTIMIZER_PREFIX)]
    states = optimizer_states if ema else [*optimizer_states, *averages]  # averages are the parameters then
    left_out = {"state of the optimizer": optimizer_states, _AVERAGE: [] if ema else averages}
    left_out = {reason: some for reason, some in left_out.items() if some}

    def identify() -> dict[str, Any]:
        require_same_source(folder, files, lambda: _files_of(stored))
        return _identity(folder, manifest)

    return StoredModel(
        folder=folder,
        config=config,
        architecture=architecture,
        parameters=parameters,
        published=layout.published(parameters),
        published_tables=layout.published_names(architecture.tables),
        kept=float32_names(layout, architecture),
        unused={name: stored.tensors[name] for name in states},
        left_out=left_out,
        assets=assets,
        asset_folder=folder / ASSET_FOLDER,
        notes=[*_notes(folder, manifest, left_out), *_notes_on_base(adapted)],
        identify=identify,
        carried=lambda: Carried.in_checkpoint(assets, folder),
        export_dtype=_export_dtype(manifest, text_config_of(config)[0], where),
        verify=lambda workers: _verify(folder, manifest, workers, adapted),
        adapted=adapted,
    )


def float32_names(layout: Layout, architecture: Architecture) -> set[str]:
    """Return the names of the parameters and Hugging Face tensors that no option rounds."""
    names = architecture.float32_tensors
    return {*names, *layout.published_names(names)}


def _files_of(stored: TensorParts) -> dict[str, Any]:
    """Return what distinguishes the files with tensors from replacements. The inode also detects a copy."""
    return {path.name: file_identity(path) | {"inode": path.stat().st_ino} for path in sorted(stored.paths)}


def _identity(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the identity of a checkpoint: the manifest has the hash of every file."""
    identity = {
        "folder": str(folder.resolve()),
        "manifest_xxh3_128": hash_file(folder / MANIFEST_FILE),
        "kind": manifest.kind,
        "step": manifest.step,
        "consumed_tokens": manifest.consumed_tokens,
    }
    return identity | ({"base": manifest.base} if manifest.base else {})


def _averaged(folder: Path, stored: TensorParts, names: Iterable[str]) -> TensorParts:
    """Return the parameters ``names``: their averages; frozen ones, which have none, as they are."""
    if not any(name.startswith(AVERAGE_PREFIX) for name in stored.tensors):
        raise UserError(
            f"{folder} holds no moving average of the weights; export the weights, or train with training.ema_decay"
        )
    averages = {name: f"{AVERAGE_PREFIX}{name}" for name in names}
    return stored.renamed({name: mean if mean in stored.tensors else name for name, mean in averages.items()})


def _notes(folder: Path, manifest: Manifest, left_out: Mapping[str, list[str]]) -> list[str]:
    lines = [f"left out {len(names)} tensors: {reason}" for reason, names in left_out.items()]
    if not manifest.records:
        lines.append(f"{folder} is not verified: it was written before manifests had hashes")
    return lines


def _notes_on_base(adapted: AdaptedModel | None) -> list[str]:
    if adapted is None:
        return []
    return [f"the adapter of {len(adapted.adapter.parameters.modules)} layers is for {adapted.base_folder}"]


def _export_dtype(manifest: Manifest, config: dict[str, Any], where: Path) -> torch.dtype | None:
    """Return the dtype of the config, else float32, for a training checkpoint: it has more precision than needed.

    Raises:
        UserError: the config declares a dtype that weights cannot have.
    """
    return (declared_dtype(config, str(where)) or torch.float32) if manifest.kind == "training" else None


def _verify(folder: Path, manifest: Manifest, workers: int, adapted: AdaptedModel | None) -> None:
    base = sum(tensor.num_bytes for tensor in adapted.base.tensors.values()) if adapted is not None else 0
    with progress("verifying", base + sum(file.bytes for file in manifest.records.values())) as advance:
        require_undamaged(folder, advance, workers)
        if adapted is not None:
            adapted.require_base(advance)
