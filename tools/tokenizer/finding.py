"""Find the tokenizer file of a name: in a folder, as a file, or on the Hugging Face Hub."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from ...engine.errors import UserError
from ...engine.tokenizer.files import (
    ADDED_TOKENS_FILE,
    CONFIG_FILES,
    MODEL_CONFIG,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    find_local_tokenizer,
)

_BESIDE = (*CONFIG_FILES, "chat_template.jinja", MODEL_CONFIG)
"""Files to download from the Hub together with the tokenizer."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def find_tokenizer_file(name: str) -> Path:
    """Return the tokenizer file of ``name``: a folder, a file, or a Hub name (its ``tokenizer.json``).

    A Hub name is looked up in the local cache first: a cached tokenizer needs no network and does not change.

    Raises:
        UserError: nothing is found there, or it is not in the cache and the Hub cannot be reached.
    """
    if (file := find_local_tokenizer(name)) is not None:
        return file
    if not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"{name}: no such tokenizer folder or file; give an existing one, or a Hub name, with --tokenizer"
        )
    return _find_on_hub(name)


def companions(file: Path) -> list[Path]:
    """Return the existing files next to a tokenizer's file that may be read with it."""
    names = (*_BESIDE, ADDED_TOKENS_FILE, "vocab.json", "merges.txt", TOKENIZER_FILE)
    paths = [file.with_name(name) for name in (*names, SENTENCEPIECE_FILE, f"{file.stem}.json")]
    return [path for path in dict.fromkeys(paths) if path != file and path.is_file()]


def _find_on_hub(name: str) -> Path:
    """Return the path of ``tokenizer.json`` of the Hub repository ``name``, downloaded if it is not in the cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    remedy = "name a folder that holds tokenizer.json, or another Hub name, with --tokenizer"
    try:
        cached = try_to_load_from_cache(name, TOKENIZER_FILE)
        if isinstance(cached, str):
            return Path(cached)
        _require_hub(name)
        file = Path(hf_hub_download(name, TOKENIZER_FILE))
        for beside in _BESIDE:
            with suppress(EntryNotFoundError):
                hf_hub_download(name, beside)
        return file
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(f"{name}: the Hub requires you to accept a licence (`hf auth login`), or {remedy}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: no such folder, and no such repository on the Hub; {remedy}") from None
    except LocalEntryNotFoundError:
        raise UserError(_unreachable(name)) from None
    except EntryNotFoundError:
        raise UserError(f"{name}: this Hub repository has no {TOKENIZER_FILE}; {remedy}") from None
    except Exception as error:  # HTTP errors, whose types differ between versions of the Hub client
        raise UserError(f"{name}: the Hub gave no tokenizer: {error}; {remedy}") from error


def _require_hub(name: str) -> None:
    """Fail at once if the Hub cannot be reached: a download would retry for half a minute first."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # HTTP errors, whose types differ between versions of the Hub client
        raise UserError(_unreachable(name)) from None


def _unreachable(name: str) -> str:
    return (
        f"tokenizer {name}: no folder of that name, not in the Hugging Face cache, and the Hub cannot be reached; pass "
        "--tokenizer with a folder that holds tokenizer.json, or connect once to fill the cache"
    )
