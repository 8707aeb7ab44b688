"""Choose the tokenizer that decodes a dataset: the given one, or that of the sidecar."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ....engine.data.sidecar import Sidecar
from ....engine.data.tokenizer_identity import TokenizerIdentity
from ....engine.errors import UserError
from ...tokenizer.handle import TokenizerHandle, load_tokenizer


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer used for decoding."""

    name: str
    kind: str
    """tokenizer.json, sentencepiece or tiktoken."""
    sha256: str
    vocab_size: int


def choose_tokenizer(name: str | None, sidecar: Sidecar | None, prefix: str) -> TokenizerHandle:
    """Return the tokenizer ``name``, or that of the sidecar.

    Raises:
        UserError: there is neither, or the sidecar's tokenizer has changed since.
    """
    if name is not None:
        tokenizer = load_tokenizer(name)
        if sidecar is not None and not _identity(tokenizer).made(sidecar):
            print(f"{prefix}: made with {sidecar.tokenizer}, which differs from this one", file=sys.stderr)
        return tokenizer
    if sidecar is None:
        raise UserError(
            f"{prefix}: it has no sidecar, so its tokenizer is unknown; pass it with --tokenizer to decode documents"
        )
    tokenizer = load_tokenizer(sidecar.tokenizer)
    if not _identity(tokenizer).made(sidecar):
        raise UserError(
            f"{prefix}: made with a tokenizer file of SHA-256 {sidecar.tokenizer_sha256[:12]}..., but that of "
            f"{tokenizer.name} is now {tokenizer.sha256[:12]}...; pass the original tokenizer with --tokenizer"
        )
    return tokenizer


def _identity(tokenizer: TokenizerHandle) -> TokenizerIdentity:
    return TokenizerIdentity(tokenizer.sha256, lambda: tokenizer.fingerprint)


def find_eod_id(tokenizer: TokenizerHandle | None, sidecar: Sidecar | None) -> int | None:
    """Return the id of the token that ends documents: that of the sidecar, or the tokenizer's default."""
    if sidecar is not None:
        return sidecar.eod_id
    if tokenizer is None:
        return None
    try:
        return tokenizer.eod()[1]
    except UserError:  # it has no default
        return None


def describe_tokenizer(tokenizer: TokenizerHandle) -> TokenizerFacts:
    """Return the facts about ``tokenizer``."""
    return TokenizerFacts(tokenizer.name, tokenizer.kind, tokenizer.sha256, tokenizer.vocab_size)
