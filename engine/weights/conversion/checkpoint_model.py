"""Read and write checkpoints for the converters: the parameters of an existing one, and the files of a new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .... import __version__
from ...files.hashing import hash_file
from ...model.architecture import Architecture, parse_architecture, read_hf_config
from ...model.decoder import meta_decoder
from ..block_copy import WrittenFile
from ..checkpoint.assets import ASSET_FOLDER, CONFIG_FILE, HfAssets
from ..checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest, write_manifest
from ..checkpoint.tensors import OPTIMIZER_PREFIX, check_model_tensors, open_tensors
from ..checkpoint.verify import require_undamaged
from ..hugging_face.shards import safetensors_file
from ..hugging_face.weight_dtypes import declared_dtype
from ..parts import TensorParts
from ..safetensors_format import SUFFIX
from ..table import TableEntry, write_table
from ..tensor_source import StoredTensor
from .provenance import file_identity, require_same_source
from .writing import progress


@dataclass(frozen=True)
class CheckpointModel:
    """The parameters of a decoder in a checkpoint, and its other contents."""

    folder: Path
    manifest: Manifest
    config: dict[str, Any]
    """Content of the checkpoint's ``config.json``."""
    architecture: Architecture
    stored: TensorParts
    """All tensors."""
    weights: TensorParts
    """Parameters, in the decoder's order."""
    left_out: dict[str, list[str]]
    """Names of the tensors that are not parameters, by reason."""
    assets: HfAssets
    files: dict[str, Any]
    """Size, time and inode of every file with tensors, at the time the checkpoint was opened."""

    def require_unchanged(self) -> None:
        """Refuse a checkpoint whose files have changed since it was opened: the tensors read would be a mixture.

        Raises:
            DiscardOutput: names the folder.
        """
        require_same_source(self.folder, self.files, lambda: _files_of(self.stored))

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the checkpoint: the manifest has the hash of every file."""
        return {
            "folder": str(self.folder.resolve()),
            "manifest_xxh3_128": hash_file(self.folder / MANIFEST_FILE),
            "kind": self.manifest.kind,
            "step": self.manifest.step,
            "consumed_tokens": self.manifest.consumed_tokens,
        }

    @property
    def notes(self) -> list[str]:
        """Remarks about omitted parts and parts that cannot be verified, a line each."""
        lines = [f"left out {len(names)} tensors: {reason}" for reason, names in self.left_out.items()]
        if not self.manifest.records:
            lines.append(f"{self.folder} is not verified: it was written before manifests had hashes")
        return lines

    def export_dtype(self) -> torch.dtype | None:
        """Return the default dtype of exported parameters. None: each keeps its own.

        A training checkpoint has more precision than the model needs, so the default is the config's dtype, else
        float32.

        Raises:
            UserError: the config declares a dtype that weights cannot have.
        """
        if self.manifest.kind != "training":
            return None
        return declared_dtype(self.config, str(self.folder / ASSET_FOLDER / CONFIG_FILE)) or torch.float32

    def verify(self, workers: int) -> None:
        """Verify every byte under a progress bar, ``workers`` files at a time.

        Raises:
            UserError: names the first file that differs from what was written.
        """
        num_bytes = sum(file.bytes for file in self.manifest.records.values())
        with progress("verifying", num_bytes) as advance:
            require_undamaged(self.folder, advance, workers)


def open_checkpoint_model(folder: Path) -> CheckpointModel:
    """Open the checkpoint ``folder`` and check that it holds exactly the parameters that its config requires.

    Raises:
        UserError: it is incomplete, has no config, or holds another model.
    """
    manifest, stored = read_manifest(folder), open_tensors(folder)
    stored.require_full_coverage()
    files = _files_of(stored)
    where = folder / ASSET_FOLDER / CONFIG_FILE
    config = read_hf_config(where)
    architecture = parse_architecture(config, str(where))
    decoder = meta_decoder(architecture)
    check_model_tensors(folder, decoder)
    weights = stored.only(name for name, _ in decoder.named_parameters())
    states = [name for name in stored.tensors if name not in weights.tensors]
    assert all(name.startswith(OPTIMIZER_PREFIX) for name in states)
    left_out = {"state of the optimizer": states} if states else {}
    assets = HfAssets.of_checkpoint(folder)
    return CheckpointModel(folder, manifest, config, architecture, stored, weights, left_out, assets, files)


def _files_of(stored: TensorParts) -> dict[str, Any]:
    """Return what distinguishes the files with tensors from replacements. The inode also detects a copy."""
    return {path.name: file_identity(path) | {"inode": path.stat().st_ino} for path in sorted(stored.paths)}


class CheckpointPlan:
    """The files of a checkpoint to write, one for each tensor.

    Args:
        tensors: names, shapes and dtypes.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors
        self.files = [
            safetensors_file(f"tensor-{number:05d}{SUFFIX}", {name: tensor})
            for number, (name, tensor) in enumerate(tensors.items())
        ]
        """The files, for :func:`~retemper.engine.weights.block_copy.copy_files`."""

    def write_table(self, folder: Path, done: Iterable[WrittenFile]) -> None:
        """Write the table, which maps tensors to files, after all files are ``done``."""
        files = {name: file.name for file in done for name in file.tensors}
        write_table(
            folder,
            {
                name: TableEntry(tensor, [(files[name], ((0,) * len(tensor.shape), tensor.shape))])
                for name, tensor in self._tensors.items()
            },
        )


def write_converted_manifest(folder: Path, done: Iterable[WrittenFile]) -> None:
    """Write the manifest, which completes a checkpoint of the files ``done`` and all other files in ``folder``.

    Raises:
        UserError: a file is missing, or has another size than was written.
    """
    hashed = {file.name: file.record for file in done}
    write_manifest(folder, Manifest(kind="converted", retemper_version=__version__), hashed)
