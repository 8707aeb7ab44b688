"""Check by its sidecar that a dataset was made with a given tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..tokenizer.fingerprint import same_tokenizer
from ..tokenizer.tokenizer import load_tokenizer
from .sidecar import Sidecar


@dataclass(frozen=True)
class TokenizerIdentity:
    """The properties of a tokenizer that are compared with datasets."""

    sha256: str
    """SHA-256 of its file."""
    fingerprint: Callable[[], str]
    """Returns the fingerprint; called only if the file differs from the dataset's."""

    def made(self, sidecar: Sidecar) -> bool:
        """Return whether the dataset of ``sidecar`` was made with this tokenizer, or one of the same vocabulary and
        behaviour.
        """
        if sidecar.tokenizer_sha256 == self.sha256:
            return True
        recorded = sidecar.tokenizer_fingerprint or _recovered(sidecar)
        return bool(recorded) and same_tokenizer(recorded, self.fingerprint())


def _recovered(sidecar: Sidecar) -> str:
    """Return the fingerprint that an older sidecar lacks, if the dataset's tokenizer still exists; else empty."""
    name = os.path.expanduser(sidecar.tokenizer)
    if not Path(name).exists():  # never the Hub, which would need a network
        return ""
    try:
        tokenizer = load_tokenizer(name, backend="reference")
        return tokenizer.fingerprint if tokenizer.sha256 == sidecar.tokenizer_sha256 else ""
    except UserError:
        return ""
