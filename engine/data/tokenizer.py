"""Loading a tokenizer for pretraining data, and nothing that models or chat need.

A tokenizer is its ``tokenizer.json``, read by the ``tokenizers`` library itself: what stands in the file is what
encodes. Text is data here: special tokens written out in a document stay ordinary text, no BOS or EOS is added, and
truncation or padding that the file was saved with is switched off.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Where the EOS token is named, in the order in which it is looked for."""
DOCUMENT_END = "<|endoftext|>"
"""The document end of GPT-2, Qwen and many others. Qwen's chat models name another token as EOS: ``<|im_end|>``."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class TokenizerHandle:
    """A tokenizer for documents.

    Args:
        name: folder, file or Hub name, as the user gave it.
        file: the ``tokenizer.json``.

    Raises:
        UserError: the file is not a tokenizer that the ``tokenizers`` library can read.
    """

    def __init__(self, name: str, file: Path) -> None:
        from tokenizers import Tokenizer

        self.name = name
        self.file = file
        try:
            content = file.read_bytes()
            self._tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        except Exception as error:  # the library raises bare Exception for a file that it cannot parse
            raise UserError(f"{file}: not a tokenizer that the tokenizers library can read: {error}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        """SHA-256 of tokenizer.json, in hexadecimal."""
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """Every id is below it, those of added tokens and after holes in the numbering included."""
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Only recent versions of the library have the variant that does not track character offsets.
        self._encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)

    @property
    def folder(self) -> Path:
        """The folder of ``tokenizer.json``."""
        return self.file.parent

    def encode_flat(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Ids of all ``texts`` laid end to end, int32[T], and the number of ids of each, int64[len(texts)]."""
        ids = [encoding.ids for encoding in self._encode(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Ids of each text, int32."""
        if not texts:
            return []
        flat, lengths = self.encode_flat(texts)
        return np.split(flat, np.cumsum(lengths)[:-1])

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Text of ``ids``, special tokens written out."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def eod(self, eod_token: str | None = None) -> tuple[str, int]:
        """The token that ends a document, and its id. From here on, that token in a text is ordinary text.

        ``eod_token`` where it is given; else ``<|endoftext|>`` where the vocabulary has it; else the EOS that
        tokenizer_config.json or special_tokens_map.json beside the tokenizer names.

        Raises:
            UserError: the tokenizer has no such token, or names none.
        """
        token = eod_token if eod_token is not None else self._document_end()
        if token is None:
            raise UserError(
                f"{self.name}: no {DOCUMENT_END} in the vocabulary and no eos_token in {' or '.join(CONFIG_FILES)} of "
                f"{self.folder}; name the token that ends a document with --eod-token"
            )
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"{self.name}: {token!r} is not in the vocabulary; name a token that is with --eod-token")
        # Tokens that are not flagged as special would be recognized in a document's text and end it early.
        self._tokenizer.add_special_tokens([token])
        return token, token_id

    def _document_end(self) -> str | None:
        if self._tokenizer.token_to_id(DOCUMENT_END) is not None:
            return DOCUMENT_END
        for name in CONFIG_FILES:
            eos = _read_config(self.folder / name).get("eos_token")
            token = eos.get("content") if isinstance(eos, dict) else eos
            if isinstance(token, str):
                return token
        return None


def load_tokenizer(name: str | os.PathLike[str]) -> TokenizerHandle:
    """Load a tokenizer from a folder that holds ``tokenizer.json``, from such a file, or by its Hugging Face Hub name.

    A Hub name is looked up in the local cache first: a cached tokenizer needs no network and does not change.

    Raises:
        UserError: nothing is found there, or the Hub cannot be reached and has not been cached.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_dir():
        file = path / TOKENIZER_FILE
        if not file.is_file():
            raise UserError(
                f"{text}: no {TOKENIZER_FILE} in this folder; save the tokenizer in the fast format (transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)) or name another with --tokenizer"
            )
        return TokenizerHandle(text, file)
    if path.is_file():
        return TokenizerHandle(text, path)
    if not _HUB_NAME.fullmatch(text):
        raise UserError(
            f"{text}: no such tokenizer folder or file; name one that exists, or a Hub name, with --tokenizer"
        )
    return TokenizerHandle(text, _find_on_hub(text))


def _find_on_hub(name: str) -> Path:
    """Path of ``tokenizer.json`` of the Hub repository ``name``, downloaded when it is not in the cache."""
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
        for config in CONFIG_FILES:
            with suppress(EntryNotFoundError):
                hf_hub_download(name, config)
        return file
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(f"{name}: the Hub asks for a licence to be accepted (`hf auth login`), or {remedy}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: no such folder, and no such repository on the Hub; {remedy}") from None
    except LocalEntryNotFoundError:
        raise UserError(_unreachable(name)) from None
    except EntryNotFoundError:
        raise UserError(f"{name}: this Hub repository has no {TOKENIZER_FILE}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: the Hub gave no tokenizer: {error}; {remedy}") from error


def _require_hub(name: str) -> None:
    """Fail at once when the Hub cannot be reached: a download would retry for half a minute first."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # whatever the HTTP library raises: its exceptions differ between versions of the Hub client
        raise UserError(_unreachable(name)) from None


def _unreachable(name: str) -> str:
    return (
        f"tokenizer {name}: no folder of that name, not in the Hugging Face cache, and the Hub cannot be reached; pass "
        "--tokenizer with a folder that holds tokenizer.json, or connect once to fill the cache"
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty when the file is absent."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    return config if isinstance(config, dict) else {}
