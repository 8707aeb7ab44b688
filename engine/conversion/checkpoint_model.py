"""Read and write checkpoints for the converters: the parameters of an existing one, and the files of a new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ..checkpoint.assets import ASSET_FOLDER, CONFIG_FILE, HfAssets
from ..checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest, write_manifest
from ..checkpoint.tensors import OPTIMIZER_PREFIX, StoredTensor, check_model_tensors
from ..checkpoint.verify import require_undamaged
from ..hugging_face.weight_dtypes import declared_dtype
from ..model.architecture import Architecture, parse_architecture, read_hf_config
from ..model.decoder import meta_decoder
from ..streaming.block_copy import OutputFile, WrittenFile
from ..streaming.tensor_files import CheckpointRows, begin_tensor_file, write_metadata
from .record import file_hash, file_identity, require_same_source
from .run import progress


@dataclass(frozen=True)
class CheckpointModel:
    """The parameters of a decoder in a checkpoint, and its other contents."""

    folder: Path
    manifest: Manifest
    config: dict[str, Any]
    """Content of the checkpoint's ``config.json``."""
    architecture: Architecture
    stored: CheckpointRows
    """All tensors."""
    weights: CheckpointRows
    """Parameters, in the decoder's order."""
    left_out: dict[str, list[str]]
    """Names of the tensors that are not parameters, by reason."""
    assets: HfAssets
    files: dict[str, Any]
    """Size, time and inode of every file with tensors, at the time the checkpoint was opened."""

    def require_unchanged(self) -> None:
        """Refuse a checkpoint whose files have changed since it was opened: the tensors read would be a mixture.

        Raises:
            Worthless: names the folder.
        """
        require_same_source(self.folder, self.files, lambda: _files_of(self.folder))

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the checkpoint: the manifest has the hash of every file."""
        return {
            "folder": str(self.folder.resolve()),
            "manifest_xxh3_128": file_hash(self.folder / MANIFEST_FILE),
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
    manifest, files = read_manifest(folder), _files_of(folder)
    where = folder / ASSET_FOLDER / CONFIG_FILE
    config = read_hf_config(where)
    architecture = parse_architecture(config, str(where))
    decoder = meta_decoder(architecture)
    check_model_tensors(folder, decoder)
    stored = CheckpointRows(folder)
    weights = stored.only(name for name, _ in decoder.named_parameters())
    states = [name for name in stored.tensors if name not in weights.tensors]
    assert all(name.startswith(OPTIMIZER_PREFIX) for name in states)
    left_out = {"state of the optimizer": states} if states else {}
    assets = HfAssets.of_checkpoint(folder)
    return CheckpointModel(folder, manifest, config, architecture, stored, weights, left_out, assets, files)


def _files_of(folder: Path) -> dict[str, Any]:
    """Return what distinguishes the files with tensors from replacements. The inode also detects a copy."""
    return {path.name: file_identity(path) | {"inode": path.stat().st_ino} for path in sorted(folder.glob("*.distcp"))}


class CheckpointPlan:
    """The files of a checkpoint to write, one for each tensor.

    Args:
        tensors: names, shapes and dtypes.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors
        self.files = [
            OutputFile(f"__0_{number}.distcp", {name: tensor}, partial(_begin, name, tensor))
            for number, (name, tensor) in enumerate(tensors.items())
        ]
        """For :func:`~retemper.engine.streaming.block_copy.copy_files`."""

    def write_metadata(self, folder: Path, done: Iterable[WrittenFile]) -> None:
        """Write the metadata, which maps tensors to files, after all files are ``done``."""
        places = {name: (file.name, file.record.bytes) for file in done for name in file.tensors}
        write_metadata(folder, self._tensors, places)


def _begin(name: str, tensor: StoredTensor, path: Path) -> dict[str, int]:
    return {name: begin_tensor_file(path, tensor)}


def seal(folder: Path, done: Iterable[WrittenFile]) -> None:
    """Write the manifest, which completes a checkpoint of the files ``done`` and all other files in ``folder``.

    Raises:
        UserError: a file is missing, or has another size than was written.
    """
    hashed = {file.name: file.record for file in done}
    write_manifest(folder, Manifest(kind="converted", retemper_version=__version__), hashed)
