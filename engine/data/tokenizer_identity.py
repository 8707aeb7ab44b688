"""Whether a dataset was made with a given tokenizer, from what its sidecar says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .sidecar import Sidecar
from .tokenizer import load_tokenizer
from .tokenizer_fingerprint import same_tokenizer


@dataclass(frozen=True)
class TokenizerIdentity:
    """A tokenizer, as far as datasets are compared with it."""

    sha256: str
    """Of its file."""
    fingerprint: Callable[[], str]
    """Computed only where the file is another one than the dataset's."""

    def made(self, sidecar: Sidecar) -> bool:
        """Whether the dataset of ``sidecar`` was made with it, or with one of the same vocabulary and behaviour."""
        if sidecar.tokenizer_sha256 == self.sha256:
            return True
        recorded = sidecar.tokenizer_fingerprint or _recovered(sidecar)
        return bool(recorded) and same_tokenizer(recorded, self.fingerprint())


def _recovered(sidecar: Sidecar) -> str:
    """The fingerprint that an older sidecar lacks, where the dataset's tokenizer is still where it was; else empty."""
    name = os.path.expanduser(sidecar.tokenizer)
    if not Path(name).exists():  # never the Hub: that would need a network
        return ""
    try:
        tokenizer = load_tokenizer(name, backend="reference")
        return tokenizer.fingerprint if tokenizer.sha256 == sidecar.tokenizer_sha256 else ""
    except UserError:
        return ""
