"""The tokenizer, loaded once for all workers.

Loading takes a second of CPU and 150 MB for a large vocabulary. The fork server imports this module before it starts
workers, which inherit the loaded tokenizer and share its memory.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from ....engine.errors import UserError
from ...tokenizer.handle import TokenizerHandle, TokenizerSpec

_VARIABLE = "RETEMPER_PRELOADED_TOKENIZER"
_loaded: tuple[TokenizerSpec, TokenizerHandle] | None = None


def announce(spec: TokenizerSpec) -> None:
    """Set which tokenizer a fork server that is started later loads."""
    os.environ[_VARIABLE] = json.dumps(asdict(spec), default=str)


def use_one_thread() -> None:
    """Make the tokenizer libraries use one thread, here and in workers, since there are as many workers as cores.

    The libraries read these variables when they are loaded.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = os.environ["FASTOKENS_BPE_THREADS"] = "1"


def load_tokenizer_once(spec: TokenizerSpec, sha256: str) -> TokenizerHandle:
    """Return the inherited tokenizer if it is that of ``spec``, else load it. Raise UserError if its hash differs."""
    if _loaded is not None:
        inherited, tokenizer = _loaded
        if replace(inherited, eod_token=spec.eod_token) == spec and tokenizer.sha256 == sha256:
            if spec.eod_token is not None:
                tokenizer.eod(spec.eod_token)
            return tokenizer
    tokenizer = spec.load()
    if tokenizer.sha256 != sha256:
        raise UserError(f"{spec.file}: changed during the run; start again")
    return tokenizer


if announced := os.environ.get(_VARIABLE):
    # The worker that needs it reports errors.
    with suppress(Exception):
        record = json.loads(announced)
        spec = TokenizerSpec(**{**record, "file": Path(record["file"])})
        tokenizer = spec.load()
        tokenizer.eod(spec.eod_token)  # before the fast path, which would be loaded again for some tokens
        _ = tokenizer.encoder  # loads the fast path too
        _loaded = (spec, tokenizer)
