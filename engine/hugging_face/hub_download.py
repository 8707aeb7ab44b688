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


def find_model_folder(name: str) -> Path:
    """The folder ``name``, or the local copy of the Hub repository of that name, fetched when it is not there.

    Raises:
        UserError: there is no such folder, and the Hub has no such model or cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not _HUB_NAME.fullmatch(name):
        raise UserError(f"--hf {name}: no such folder; name a Hugging Face folder or a Hub name such as Qwen/Qwen2-7B")
    return _fetch(name)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError:
        raise UserError(f"--hf {name}: the Hub asks for a licence to be accepted first (`hf auth login`)") from None
    except RepositoryNotFoundError:
        raise UserError(f"--hf {name}: no such folder, and no such model on the Hub; check the name") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"--hf {name}: no folder of that name, not in the Hugging Face cache, and the Hub cannot be reached; pass "
            "--hf with a folder that holds config.json and model.safetensors, or connect once to fill the cache"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--hf {name}: the Hub gave no model: {error}; pass --hf with a folder") from error
