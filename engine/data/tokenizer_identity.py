"""Check by its sidecar that a dataset was made with a given tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError
from ..tokenizer.files import find_local_tokenizer
from ..tokenizer.fingerprint import same_tokenizer
from ..tokenizer.reference import open_reference
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
    try:
        file = find_local_tokenizer(sidecar.tokenizer)  # never the Hub, which would need a network
        if file is None:
            return ""
        reference, sha256 = open_reference(sidecar.tokenizer, file)
        return reference.fingerprint() if sha256 == sidecar.tokenizer_sha256 else ""
    except UserError:
        return ""
