"""A model by folder or by its name on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..checkpoint.assets import TOKENIZER_FILES
from ..errors import UserError

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WANTED = ["*.safetensors", "*.json", *TOKENIZER_FILES]
# Repositories keep further copies of the weights: consolidated.safetensors beside Mistral's, original/ beside Llama's.
_UNWANTED = ["*/*", "consolidated*"]


def find_model_folder(name: str, key: str = "--hf", revision: str | None = None) -> Path:
    """The folder ``name``, or the local copy of the Hub repository of that name, fetched when it is not there.

    Args:
        name: of a folder, or on the Hub.
        key: the option or setting that gives the name, for errors.
        revision: commit of the repository; None: its newest.

    Raises:
        UserError: there is no such folder, and the Hub has no such model or cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not _HUB_NAME.fullmatch(name):
        raise UserError(f"{key} {name}: no such folder; name a Hugging Face folder or a Hub name such as Qwen/Qwen2-7B")
    return _fetch(name, f"{key} {name}", revision)


def _fetch(name: str, said: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError:
        raise UserError(f"{said}: the Hub asks for a licence to be accepted first (`hf auth login`)") from None
    except RepositoryNotFoundError:
        raise UserError(f"{said}: no such folder, and no such model on the Hub; check the name") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{said}: no folder of that name, not in the Hugging Face cache, and the Hub cannot be reached; name a "
            "folder that holds config.json and model.safetensors, or connect once to fill the cache"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{said}: the Hub gave no model: {error}; name a folder") from error
