"""The small files that make weights a Hugging Face folder: config, generation config and tokenizer.

They travel with every checkpoint under ``hf/``, so that a checkpoint alone is enough to export from. A run may also
start from a Hugging Face folder, where they stand beside the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from ...config.settings import ModelConfig
from ...data.tokenizer_identity import TokenizerIdentity
from ...errors import UserError
from ...files.regular import read_regular
from ...model.architecture import CONFIG_FILE, Architecture, architecture_of, parse_architecture, read_hf_config
from ...tokenizer.files import (
    SENTENCEPIECE_FILE,
    TIKTOKEN_SUFFIX,
    TOKENIZER_FILE,
    tokenizer_file_name,
    tokenizer_sha256,
)
from ...tokenizer.tokenizer import load_reference
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
"""Names, and a pattern as of ``fnmatch``. A .tiktoken file brings the JSON file of its stem
with it, which describes it."""
_MOST_BYTES = 1 << 30
"""Of one of the files; the largest tokenizers have some 40 MB."""
MODEL_FILES = (CONFIG_FILE, "generation_config.json")


class HfAssets:
    """File names and contents, held in memory (some MB)."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files

    @classmethod
    def read(cls, folder: str | Path) -> HfAssets:
        """All known asset files in ``folder``, which may lack any of them, or not exist.

        Raises:
            UserError: one of them cannot be read, is larger than any, or is a link that leads out of ``folder``.
        """
        here = path = Path(folder)
        files = {}
        try:
            names = {name for name in (os.listdir(here) if here.is_dir() else ()) if (here / name).is_file()}
            for name in sorted(names):
                if name in MODEL_FILES or _is_of_tokenizer(name, names):
                    path = here / name
                    _require_own(here, path)
                    files[name] = read_regular(path, _MOST_BYTES)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}; make it readable") from None
        return cls(files)

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> HfAssets:
        """The assets that the checkpoint ``folder`` carries.

        Raises:
            UserError: one of them cannot be read, or is a link that leads out of ``folder``.
        """
        assets = cls.read(Path(folder) / ASSET_FOLDER)
        for name in assets.files:
            file_inside(folder, f"{ASSET_FOLDER}/{name}")
        return assets

    def with_config(self, config: dict) -> HfAssets:
        """These assets with another ``config.json``."""
        return HfAssets({**self.files, CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()})

    def with_tokenizer(self, folder: str) -> HfAssets:
        """These assets with the tokenizer files of ``folder`` in place of their own.

        Raises:
            UserError: ``folder`` holds no tokenizer, or one that cannot be read.
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
        """Content of ``config.json``, if there is one."""
        data = self.files.get(CONFIG_FILE)
        if data is None:
            return None
        try:
            config = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{ASSET_FOLDER}/{CONFIG_FILE} of the checkpoint is damaged: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"{ASSET_FOLDER}/{CONFIG_FILE} of the checkpoint is damaged: it holds no JSON object")
        return config

    @property
    def tokenizer(self) -> TokenizerIdentity | None:
        """By which datasets are matched; None without a tokenizer."""
        found = self._tokenizer_files()
        if found is None:
            return None
        name, content, beside = found
        return TokenizerIdentity(
            tokenizer_sha256(content, beside),
            lambda: load_reference(name, Path(name), content, beside).fingerprint(),
        )

    def num_token_ids(self) -> tuple[str, int] | None:
        """Name of the tokenizer's file, and its highest token id plus one; None without a tokenizer.

        Raises:
            UserError: the file cannot be read.
        """
        found = self._tokenizer_files()
        if found is None:
            return None
        name, content, beside = found
        return name, load_reference(name, Path(name), content, beside).vocab_size

    def _tokenizer_files(self) -> tuple[str, bytes, bytes | None] | None:
        """Name and content of the tokenizer's file, and content of the JSON file next to a .tiktoken."""
        name = tokenizer_file_name(self.files)
        if name is None:
            return None
        of_tiktoken = name.endswith(TIKTOKEN_SUFFIX)
        beside = self.files.get(name.removesuffix(TIKTOKEN_SUFFIX) + ".json") if of_tiktoken else None
        return name, self.files[name], beside

    @property
    def tokenizer_sha256(self) -> str | None:
        """That of the tokenizer's file; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.sha256

    def write(self, folder: Path) -> None:
        """Write the files into ``folder``, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def _require_own(folder: Path, file: Path) -> None:
    """Refuse a link by which a downloaded folder would have any file of this machine copied into what is written.

    A snapshot in the Hub's cache consists of links to the blobs of its repository, and older versions of the Hub's
    client make folders of links into the cache.
    """
    real, root = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    if not file.is_symlink() or real.is_relative_to(root):
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    roots = [Path(os.path.realpath(HF_HUB_CACHE))]
    # Where the folder is .../models--NAMESPACE--NAME/snapshots/REVISION, of a cache elsewhere.
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent)
    if not any(real.is_relative_to(each) for each in roots):
        raise UserError(f"{file}: a link to {real}, outside of its folder; copy that file here if it is the model's")


def _is_of_tokenizer(name: str, names: Collection[str]) -> bool:
    """Whether the file ``name`` of a folder that holds ``names`` is the tokenizer's."""
    if any(fnmatchcase(name, pattern) for pattern in TOKENIZER_FILES):
        return True
    return name.endswith(".json") and name.removesuffix(".json") + TIKTOKEN_SUFFIX in names


def is_hf_folder(folder: str | Path) -> bool:
    """Whether ``folder`` is a Hugging Face folder: weights or a config, and not a checkpoint's manifest beside them.

    Raises:
        UserError: this user may not look into it.
    """
    here = Path(folder)
    try:
        if (here / MANIFEST_FILE).exists():
            return False
        return (here / CONFIG_FILE).is_file() or next(here.glob("*.safetensors"), None) is not None
    except OSError as error:
        raise UserError(f"{here}: cannot be read: {error.strerror or error}; make it readable") from None


def newest_of_run(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint where ``folder`` is a run's; None where it is anything else.

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
    """Where the assets of a checkpoint, of a run's newest checkpoint, or of a Hugging Face folder, are."""
    folder = newest_of_run(folder) or folder
    return Path(folder) if is_hf_folder(folder) else Path(folder) / ASSET_FOLDER


def find_assets(config: ModelConfig) -> HfAssets:
    """Config and tokenizer of a new run; ``initialize_from`` is a folder where it is set.

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
    """``assets`` with what ``config`` sets: the architecture where they have none, and the tokenizer.

    Args:
        config: of the model.
        assets: of what the run starts from.
        folder: that they are from.
        resuming: whether it is a checkpoint of the run itself.

    Raises:
        UserError: there is no config, or the configured architecture is not that of ``assets``.
    """
    if config.architecture is not None and assets.config is None:
        assets = assets.with_config(read_hf_config(config.architecture))
    elif config.architecture is not None:
        remedy = "remove model.architecture or name the right checkpoint"
        _require_same(architecture_of(config.architecture), "model.architecture", assets, folder, remedy)
    start = _former_start(config) if resuming else None
    if start is not None:
        # It is not read any more, but must not be another model than the one that is trained.
        key = f"the model of model.initialize_from {config.initialize_from}"
        remedy = "choose another run_folder for that model, or remove model.initialize_from to continue this one"
        _require_same(architecture_of(start), key, assets, folder, remedy)
    if assets.config is None:
        raise UserError(f"{folder}: carries no hf/{CONFIG_FILE}; set model.architecture")
    return assets.with_tokenizer(config.tokenizer) if config.tokenizer is not None else assets


def _former_start(config: ModelConfig) -> Path | None:
    """``config.json`` of what a run that resumes once started from, if it is still there."""
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
    differing = [name for name in vars(here) if getattr(here, name) != getattr(there, name)]
    if differing:
        raise UserError(
            f"{key} differs from the config.json kept in {folder}: "
            + ", ".join(f"{name} {getattr(here, name)} is {getattr(there, name)} there" for name in differing)
            + f"; {remedy}"
        )
