"""The fast path for ``tokenizer.json``: fastokens, 10 to 20 times the speed of ``tokenizers`` with the same ids.

It is an optional package (``pip install fastokens``), and taken only where it was found exact: byte-level BPE, fuzzed
and compared over every code point. It would accept more: converted sentencepiece models, in which it makes the control
token of a literal ``<s>``, are among them, and a sample check need not meet such a text. Hence the list below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from .tokenizer_backends import FlatIds, one_line

_INEXACT_SYNTAX = re.compile(r"\\[wWbBAzZG]|\[:|\(\?[a-z-]")
r"""``\w`` and ``\b`` are other characters in its regular expressions (1,520 code points); ``\s \d \p{..}`` agree. Flags
such as ``(?i)`` are other foldings."""
_EXACT_GROUPS = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")
"""The contractions of Llama 3, Qwen and GPT-4, compared over every code point."""
_CLASS = re.compile(r"\[[^\[\]]*\]")


class NotFast(Exception):
    """The fast path cannot be taken; the message says why."""


class FastEncoder:
    """A ``tokenizer.json`` in fastokens.

    Loading costs a second of CPU time and 150 MB for a vocabulary of 150,000. Encoding releases the GIL and may be
    called from several threads at once; its own threads number ``FASTOKENS_BPE_THREADS`` (environment).

    Args:
        tokenizer_json: as the reference library writes it.

    Raises:
        NotFast: fastokens is missing, does not know such a tokenizer, or is not exact for it.
    """

    def __init__(self, tokenizer_json: str, allow_special_tokens: bool) -> None:
        try:
            from fastokens import Tokenizer
        except ImportError as error:
            raise NotFast("fastokens is not installed: pip install fastokens") from error
        reason = why_not_exact(json.loads(tokenizer_json))
        if reason is not None:
            raise NotFast(f"fastokens is not used: {reason}")
        try:
            self._tokenizer = Tokenizer.from_json_str(tokenizer_json)
            self._encode = self._tokenizer.encode_batch_flat
        except Exception as error:  # ValueError today; whatever it is, the reference can do it
            raise NotFast(f"fastokens {version('fastokens')} refuses the tokenizer: {one_line(error)}") from error
        self.library = f"fastokens {version('fastokens')}"
        self._split_special_tokens = not allow_special_tokens

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Ids of all ``texts``, int32[T], read-only, and the number of ids of each, int64[texts].

        Raises:
            Exception: whatever fastokens raises; ``UnicodeEncodeError`` for a lone surrogate.
        """
        try:
            ids, offsets = self._encode(
                list(texts), add_special_tokens=False, split_special_tokens=self._split_special_tokens
            )
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # of Rust: no Exception, and of no module to import it from
                raise RuntimeError(one_line(error)) from error
            raise
        return np.frombuffer(ids, "<i4"), np.diff(np.frombuffer(offsets, "<i8"))


def why_not_exact(config: dict[str, Any]) -> str | None:
    """Why the ids of fastokens may differ from those of ``tokenizers``; None where they were found equal.

    Args:
        config: content of ``tokenizer.json``.
    """
    model = config["model"]
    if model["type"] != "BPE":
        return f"the model is {model['type']}, not BPE"
    for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"the model has {key}"
    for step in _steps(config.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            return f"the normalizer is {step['type']}"
    cuts = _steps(config.get("pre_tokenizer"), "pretokenizers")
    if not cuts or cuts[-1]["type"] != "ByteLevel":
        return "it is not a byte-level BPE"
    for step in cuts:
        if step["type"] not in ("ByteLevel", "Digits", "Split"):
            return f"the pre-tokenizer is {step['type']}"
        pattern = step.get("pattern", {}).get("Regex", "")
        if _is_read_differently(pattern):
            return f"the libraries read the regular expression of the pre-tokenizer differently: {pattern}"
    missing = 256 - len(_byte_characters() & model["vocab"].keys())
    return f"{missing} of the 256 bytes are not in the vocabulary" if missing else None


def _is_read_differently(pattern: str) -> bool:
    """Whether a regular expression holds what means something else in each library, as far as was found."""
    for group in _EXACT_GROUPS:
        pattern = pattern.replace(group, "")
    if _INEXACT_SYNTAX.search(pattern):
        return True
    rest = re.sub(r"\\.", "", pattern, flags=re.DOTALL)
    while (inner := _CLASS.sub("", rest)) != rest:
        rest = inner
    return "^" in rest or "$" in rest  # of a line in one library, of the text in the other


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences unfolded."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[key] for step in _steps(inner, key)]


def _byte_characters() -> set[str]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 for itself, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return {chr(byte) for byte in printable} | {chr(0x100 + i) for i in range(256 - len(printable))}
