"""Identifies the language of a text with py3langid: 140 languages, offline, in Python and NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....engine.errors import UserError
from .libraries import import_library

IDENTIFIED_CHARACTERS = 10_000
"""First characters of a text by which its language is identified: more do not change the result, and take longer."""
_OPTION = "--languages"


class LanguageIdentifier:
    """Identifies languages by their ISO 639 codes."""

    def __init__(self) -> None:
        langid: Any = import_library("py3langid.langid", _OPTION)
        self._identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)

    @property
    def known(self) -> list[str]:
        """The codes of all languages."""
        return sorted(self._identifier.labels)

    def identify(self, text: str) -> tuple[str, float]:
        """Return the most probable language of ``text``, and its probability between 0 and 1."""
        language, score = self._identifier.classify(text[:IDENTIFIED_CHARACTERS])
        return str(language), float(score)


def check_languages(wanted: Sequence[str]) -> None:
    """Raise UserError if a language of ``--languages`` is unknown."""
    known = LanguageIdentifier().known
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"{_OPTION} {' '.join(unknown)}: unknown; choose from {' '.join(known)}")
