"""Read and write the small files of a Hugging Face folder: config, generation config and tokenizer.

Every checkpoint contains them under ``hf/``, so that it can be exported without other files. In a Hugging Face folder
they are next to the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...config.settings import ModelConfig
from ...data.tokenizer_identity import TokenizerIdentity
from ...errors import UserError
from ...files.regular import read_regular
from ...model.architecture import Architecture
from ...model.changed_config import with_settings
from ...model.config_file import CONFIG_FILE, INLINE, read_hf_config
from ...model.implementations import parse_architecture
from ...tokenizer.files import (
    SENTENCEPIECE_FILE,
    TIKTOKEN_SUFFIX,
    TOKENIZER_FILE,
    tokenizer_file_name,
    tokenizer_sha256,
)
from ...tokenizer.reference import load_reference
from ..damage import file_inside
from .manifest import MANIFEST_FILE, read_manifest
from .names import complete_checkpoints

ASSET_FOLDER = "hf"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    SENTENCEPIECE_FILE,
    f"*{TIKTOKEN_SUFFIX}",
    "chat_template.jinja",
)
"""Names, and a pattern for ``fnmatch``. A JSON file with the stem of a .tiktoken file, which describes it, is added."""
_MOST_BYTES = 1 << 30
"""Maximum size of a file; the largest tokenizers have about 40 MB."""
MODEL_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
CODE_FILES = "*.py"
"""Code of a model, kept only if a run has been told to trust it."""
CARRIED_FILE = "carried.json"
"""Only in checkpoints: see :mod:`~retemper.engine.weights.hugging_face.carried`."""


class HfAssets:
    """File names and contents, held in memory (some MB)."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files

    @classmethod
    def read(cls, folder: str | Path) -> HfAssets:
        """Read all known asset files in ``folder``. Missing files and a missing folder are no errors.

        Raises:
            UserError: a file cannot be read, is too large, or is a link to a file outside ``folder``.
        """
        return cls._read(Path(folder), MODEL_FILES)

    @classmethod
    def _read(cls, here: Path, model_files: Collection[str]) -> HfAssets:
        path, files = here, {}
        try:
            names = {name for name in (os.listdir(here) if here.is_dir() else ()) if (here / name).is_file()}
            for name in sorted(names):
                if _matches(name, model_files) or _is_of_tokenizer(name, names):
                    path = here / name
                    _require_own(here, path)
                    files[name] = read_regular(path, _MOST_BYTES)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}; make it readable") from None
        return cls(files)

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> HfAssets:
        """Read the assets of the checkpoint ``folder``.

        Raises:
            UserError: a file cannot be read, or is a link to a file outside ``folder``.
        """
        assets = cls._read(Path(folder) / ASSET_FOLDER, (*MODEL_FILES, CARRIED_FILE, CODE_FILES))
        for name in assets.files:
            file_inside(folder, f"{ASSET_FOLDER}/{name}")
        return assets

    def with_code(self, folder: Path) -> HfAssets:
        """Return these assets with the Python files of ``folder``, which belong to a model."""
        found = HfAssets._read(folder, [CODE_FILES]).files
        return HfAssets({**self.files, **{name: data for name, data in found.items() if _matches(name, [CODE_FILES])}})

    def of_model(self) -> HfAssets:
        """Return the files that belong to a Hugging Face folder."""
        return HfAssets({name: data for name, data in self.files.items() if name != CARRIED_FILE})

    def with_config(self, config: dict) -> HfAssets:
        """Return these assets with another ``config.json``."""
        return HfAssets({**self.files, CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()})

    def with_tokenizer(self, folder: str) -> HfAssets:
        """Return these assets with the tokenizer files of ``folder`` instead of their own.

        Raises:
            UserError: ``folder`` has no tokenizer, or it cannot be read.
        """
        others = {name: data for name, data in self.files.items() if not _is_of_tokenizer(name, self.files)}
        there = HfAssets.read(folder).files
        found = {name: data for name, data in there.items() if _is_of_tokenizer(name, there)}
        if tokenizer_file_name(found) is None:
            raise UserError(
                f"model.tokenizer {folder}: no {TOKENIZER_FILE} there, no {SENTENCEPIECE_FILE} and not one "
                f"*{TIKTOKEN_SUFFIX}; name a Hugging Face folder"
            )
        return HfAssets({**others, **found})

    @property
    def config(self) -> dict | None:
        """Content of ``config.json``; None without one."""
        data = self.files.get(CONFIG_FILE)
        if data is None:
            return None
        try:
            config = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{ASSET_FOLDER}/{CONFIG_FILE} of the checkpoint is damaged: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"{ASSET_FOLDER}/{CONFIG_FILE} of the checkpoint is damaged: it is not a JSON object")
        return config

    @property
    def tokenizer(self) -> TokenizerIdentity | None:
        """Identity that is compared with datasets; None without a tokenizer."""
        found = self._tokenizer_files()
        if found is None:
            return None
        name, content, beside = found
        return TokenizerIdentity(
            tokenizer_sha256(content, beside),
            lambda: load_reference(name, Path(name), content, beside).fingerprint(),
        )

    def num_token_ids(self) -> tuple[str, int] | None:
        """Return the name of the tokenizer's file, and its highest token id plus one; None without a tokenizer.

        Raises:
            UserError: the file cannot be read.
        """
        found = self._tokenizer_files()
        if found is None:
            return None
        name, content, beside = found
        return name, load_reference(name, Path(name), content, beside).vocab_size

    def _tokenizer_files(self) -> tuple[str, bytes, bytes | None] | None:
        """Return name and content of the tokenizer's file, and of the JSON file next to a .tiktoken file."""
        name = tokenizer_file_name(self.files)
        if name is None:
            return None
        of_tiktoken = name.endswith(TIKTOKEN_SUFFIX)
        beside = self.files.get(name.removesuffix(TIKTOKEN_SUFFIX) + ".json") if of_tiktoken else None
        return name, self.files[name], beside

    @property
    def tokenizer_sha256(self) -> str | None:
        """SHA-256 of the tokenizer's file; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.sha256

    def write(self, folder: Path) -> None:
        """Write the files into ``folder``, which is created if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def _require_own(folder: Path, file: Path) -> None:
    """Refuse a link out of ``folder``: a downloaded folder could have any file of this machine copied to the output.

    Links into the Hub's cache are accepted: its snapshots and folders of older versions of its client consist of them.
    """
    real, root = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    if not file.is_symlink() or real.is_relative_to(root):
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    roots = [Path(os.path.realpath(HF_HUB_CACHE))]
    # .../models--NAMESPACE--NAME/snapshots/REVISION of a cache elsewhere.
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent)
    if not any(real.is_relative_to(each) for each in roots):
        raise UserError(f"{file}: a link to {real}, outside its folder; copy that file here if it belongs to the model")


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_of_tokenizer(name: str, names: Collection[str]) -> bool:
    """Return whether the file ``name``, in a folder with the files ``names``, belongs to a tokenizer."""
    if _matches(name, TOKENIZER_FILES):
        return True
    return name.endswith(".json") and name.removesuffix(".json") + TIKTOKEN_SUFFIX in names


def is_hf_folder(folder: str | Path) -> bool:
    """Return whether ``folder`` has weights or a config, but no manifest of a checkpoint.

    Raises:
        UserError: it may not be read.
    """
    here = Path(folder)
    try:
        if (here / MANIFEST_FILE).exists():
            return False
        return (here / CONFIG_FILE).is_file() or next(here.glob("*.safetensors"), None) is not None
    except OSError as error:
        raise UserError(f"{here}: cannot be read: {error.strerror or error}; make it readable") from None


def newest_of_run(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint if ``folder`` is a run folder, else None.

    Raises:
        UserError: the run has no complete checkpoint.
    """
    checkpoints = Path(folder) / "checkpoints"
    if (Path(folder) / MANIFEST_FILE).exists() or not checkpoints.is_dir() or is_hf_folder(folder):
        return None
    complete = complete_checkpoints(checkpoints)
    if not complete:
        raise UserError(f"{folder}: the folder of a run without a complete checkpoint; name a checkpoint")
    return str(complete[-1])


def asset_folder(folder: str | Path) -> Path:
    """Return the folder with the assets of a checkpoint, a run's newest checkpoint, or a Hugging Face folder."""
    folder = newest_of_run(folder) or folder
    return Path(folder) if is_hf_folder(folder) else Path(folder) / ASSET_FOLDER


def find_assets(config: ModelConfig) -> HfAssets:
    """Return config and tokenizer of a new run; ``initialize_from`` must be a folder if it is set.

    Raises:
        UserError: there is no config, or the configured architecture is not that of the checkpoint.
    """
    folder = config.initialize_from
    if folder is not None:
        folder = newest_of_run(folder) or folder
    if folder is None or is_hf_folder(folder):
        read = HfAssets({}) if folder is None else HfAssets.read(folder)
    else:
        read_manifest(folder)
        read = HfAssets.of_checkpoint(folder)
    return complete_assets(config, read, folder)


def complete_assets(
    config: ModelConfig, assets: HfAssets, folder: str | Path | None, resuming: bool = False
) -> HfAssets:
    """Return ``assets`` with the tokenizer of ``config``, and with its architecture if they have none.

    Args:
        config: of the model.
        assets: of the checkpoint or folder that the run starts from.
        folder: its path.
        resuming: whether it is a checkpoint of the run itself.

    Raises:
        UserError: there is no config, or the configured architecture differs from that of ``assets``.
    """
    if config.architecture is not None and assets.config is None:
        assets = assets.with_config(read_hf_config(config.architecture))
    if assets.config is not None:
        changed = with_settings(assets.config, config, f"{folder or 'model.architecture'}")
        assets = assets if changed == assets.config else assets.with_config(changed)
    if config.architecture is not None and folder is not None:
        remedy = "remove model.architecture or name the right checkpoint"
        _require_same(_architecture(config, config.architecture), "model.architecture", assets, folder, remedy)
    start = _former_start(config) if resuming else None
    if start is not None:
        # Its weights are no longer read, but it must be the same model.
        key = f"the model of model.initialize_from {config.initialize_from}"
        remedy = "choose another run_folder for that model, or remove model.initialize_from to continue this one"
        _require_same(_architecture(config, start), key, assets, folder, remedy)
    if assets.config is None:
        raise UserError(f"{folder}: has no hf/{CONFIG_FILE}; set model.architecture")
    return assets.with_tokenizer(config.tokenizer) if config.tokenizer is not None else assets


def _architecture(config: ModelConfig, source: dict[str, Any] | str | Path) -> Architecture:
    """Return the architecture that ``source`` describes, with the changes of the run's settings."""
    where = INLINE if isinstance(source, dict) else str(source)
    return parse_architecture(with_settings(read_hf_config(source), config, where), where)


def _former_start(config: ModelConfig) -> Path | None:
    """Return the ``config.json`` of the model that a resumed run started from, if it still exists."""
    if config.initialize_from is None or not os.path.isdir(config.initialize_from):
        return None
    with suppress(UserError):
        path = asset_folder(config.initialize_from) / CONFIG_FILE
        return path if path.is_file() else None
    return None


def _require_same(here: Architecture, key: str, assets: HfAssets, folder: str | Path | None, remedy: str) -> None:
    if assets.config is None:
        return
    there = parse_architecture(assets.config, str(folder))
    ours, theirs = here.facts(), there.facts()
    differing = [name for name in ours if ours[name] != theirs.get(name)]
    if differing:
        raise UserError(
            f"{key} differs from the config.json kept in {folder}: "
            + ", ".join(f"{name} {ours[name]} is {theirs.get(name)} there" for name in differing)
            + f"; {remedy}"
        )
