"""Stands in for the tokenizer of a run that writes text, with --to-jsonl."""

from __future__ import annotations

from ...tokenizer.handle import TokenizerHandle


class NoTokenizer(TokenizerHandle):
    """A tokenizer with no name and no ids, which nothing encodes with."""

    name = sha256 = encoder = fingerprint = ""
    vocab_size = fast_path_failures = 0
    fallback_reason = None
    is_served_alike = True

    def __init__(self) -> None:
        """There is no file to read."""

    @property
    def notes(self) -> list[str]:
        """See :class:`TokenizerHandle`."""
        return []
