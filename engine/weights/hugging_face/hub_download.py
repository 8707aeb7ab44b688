"""Find a model by its folder, or by its name on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ...errors import UserError
from ...files.hub_errors import call_hub
from ...model.config_file import ADAPTER_FILE, CONFIG_FILE, read_hf_config
from ...model.implementations import parse_architecture
from ..checkpoint.assets import TOKENIZER_FILES

Result = TypeVar("Result")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
CONFIGS = [CONFIG_FILE, ADAPTER_FILE, "params.json", "*.py"]
"""A config, or what tells why there is none; and the code of the model, which runs only if it is trusted."""
WANTED = ["*.safetensors", "*.json", "*.py", *TOKENIZER_FILES]
"""Patterns of a model's files."""
# Repositories hold further copies of the weights: consolidated.safetensors in Mistral's, original/ in Llama's.
_UNWANTED = ["*/*", "consolidated*"]


def could_be_hub_name(name: str) -> bool:
    """Return whether ``name``, which does not exist on this machine, may be looked up on the Hub.

    Not if its first part is an existing folder: then it is probably a misspelt path, which must not download a model of
    that name.
    """
    folder, slash, _ = name.partition("/")
    return _HUB_NAME.fullmatch(name) is not None and not (slash and os.path.isdir(folder))


def is_on_hub(name: str) -> bool:
    """Return whether ``name``, of a folder, a checkpoint or a repository, is to be looked up on the Hub."""
    return "/" in name and not os.path.lexists(name) and could_be_hub_name(name)


def require_supported(folder: Path) -> None:
    """Check the config of the model in ``folder``.

    Raises:
        UserError: it is missing, or the model is not supported.
    """
    parse_architecture(read_hf_config(folder), str(folder / CONFIG_FILE))


def find_model_folder(
    name: str,
    key: str = "--hf",
    revision: str | None = None,
    check: Callable[[Path], object] = require_supported,
) -> Path:
    """Return the folder ``name``, or the local copy of the Hub repository ``name``, downloaded if necessary.

    The config is downloaded and checked first: weights can be hundreds of GB.

    Args:
        name: of a folder, or on the Hub.
        key: the option or setting that gives the name, for errors.
        revision: commit of the repository; None: its newest.
        check: of the folder with the config and without weights.

    Raises:
        UserError: there is no such folder, and the Hub has no such model or cannot be reached; or ``check`` refuses it.
    """
    folder = find_files(name, key, CONFIGS, revision)
    if os.path.isdir(name):
        return folder
    check_download(name, key, folder, check)
    return find_files(name, key, WANTED, folder.name)


def check_download(name: str, key: str, folder: Path, check: Callable[[Path], object]) -> None:
    """Run ``check`` on the local copy of a repository.

    Raises:
        UserError: of ``check``, with the name of the repository instead of a folder of the cache.
    """
    try:
        check(folder)
    except UserError as error:
        raise UserError(f"{key} {name}: {str(error).replace(f'{folder}/', '')}") from None


def find_files(
    name: str, key: str, wanted: Sequence[str], revision: str | None = None, output: Path | None = None
) -> Path:
    """Return the folder ``name``, or the local copy of the ``wanted`` files of the Hub repository ``name``.

    Args:
        name: of a folder, or on the Hub.
        key: the option or setting that gives the name, for errors.
        wanted: patterns of the files to download.
        revision: commit of the repository; None: its newest.
        output: folder for the files; None: the cache of huggingface_hub.

    Raises:
        UserError: there is no such folder, and the Hub has no such model or cannot be reached.
    """
    if os.path.isdir(name):
        return Path(name)
    require_hub_name(name, key)
    return _fetch(name, f"{key} {name}", revision, wanted, output)


def require_hub_name(name: str, key: str) -> None:
    """Refuse a path that does not exist, or is a file.

    Raises:
        UserError: ``name`` is no possible name of a repository.
    """
    if os.path.lexists(name) or not could_be_hub_name(name):
        raise UserError(f"{key} {name}: no such folder; name a Hugging Face folder or a Hub name such as Qwen/Qwen2-7B")


def count_missing(
    name: str, key: str, wanted: Sequence[str], revision: str | None, output: Path | None
) -> tuple[int, int]:
    """Return the number and the bytes of the files that :func:`find_files` would download; 0 if the Hub cannot be
    reached.

    Raises:
        UserError: as :func:`find_files`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, HfHubHTTPError

    def ask() -> tuple[int, int]:
        try:
            files = snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*wanted],
                ignore_patterns=_UNWANTED,
                local_dir=output,
                dry_run=True,
            )
        except DryRunError as error:
            if isinstance(error.__cause__, HfHubHTTPError):
                raise error.__cause__ from None
            return 0, 0  # without a network, the cache may have all files
        missing = [file.file_size or 0 for file in files if file.will_download]
        return len(missing), sum(missing)

    return _ask_hub(ask, f"{key} {name}")


def _fetch(name: str, said: str, revision: str | None, wanted: Sequence[str], output: Path | None) -> Path:
    from huggingface_hub import snapshot_download

    def download() -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=[*wanted], ignore_patterns=_UNWANTED, local_dir=output
            )
        )

    return _ask_hub(download, said)


def _ask_hub(action: Callable[[], Result], said: str) -> Result:
    """Run ``action``, which uses snapshot_download.

    Raises:
        UserError: begins with ``said``.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def attempt() -> Result:
        try:
            return action()
        except GatedRepoError:
            raise UserError(f"{said}: the Hub requires you to accept a licence first (`hf auth login`)") from None
        except RepositoryNotFoundError:
            raise UserError(f"{said}: no such folder, and no such model on the Hub; check the name") from None
        except RevisionNotFoundError:
            raise UserError(
                f"{said}: the repository has no such revision; check its branches, tags and commits"
            ) from None
        except LocalEntryNotFoundError as error:
            if isinstance(error.__cause__, HfHubHTTPError):
                raise  # the Hub was reached, and its answer gives the reason
            raise UserError(
                f"{said}: no folder of that name, not in the Hugging Face cache, and the Hub cannot be reached; name a "
                "folder that holds config.json and model.safetensors, or connect once to fill the cache"
            ) from None

    remedy = "; start again, which fetches only what is missing, or name a folder"
    forbidden = "the token may not read it (403); use one with access"
    return call_hub(attempt, f"{said}: not downloaded", remedy, forbidden)
