"""Encode with fastokens, the fast path for ``tokenizer.json``: 10 to 20 times the speed of ``tokenizers``, same ids.

It is an optional package (the extra ``fast``), and used only for the configurations in :data:`EXACT`. These were
compared with ``tokenizers`` over every code point, alone and next to letters, digits, spaces and punctuation, and
fuzzed. tests/tools/tokenizer/test_tokenizer_fast_code_points.py repeats the comparison. fastokens also accepts other
configurations, but gives other ids for some: ``add_prefix_space``, word classes in regular expressions, or
sentencepiece models, where a literal ``<s>`` becomes the control token. A sample of text need not reveal this, so
configurations not listed are encoded by the reference.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from ...engine.errors import install_command
from ...engine.tokenizer.backends import FlatIds, TokenizersReference, is_panic, one_line

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
_QWEN2, _LLAMA3 = (
    [
        {"type": "Split", "pattern": {"Regex": _WORDS % digits}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    for digits in (r"\p{N}", r"\p{N}{1,3}")
)
EXACT: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "GPT-2": ([], _GPT2),
    "Qwen2": ([{"type": "NFC"}], _QWEN2),
    "Llama 3": ([], _LLAMA3),
}
"""Steps of normalizer and pre-tokenizer of tokenizer.json, with sequences flattened, without settings that do not
change ids. The model is a BPE with all 256 bytes."""
_NO_EFFECT = ("trim_offsets",)
_MODEL_OFF = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


class NotFast(Exception):
    """The fast path cannot be used; the message gives the reason."""


class FastEncoder:
    """A ``tokenizer.json`` loaded in fastokens.

    Loading costs a second of CPU time and 150 MB for a vocabulary of 150,000. Encoding releases the GIL and may be
    called from several threads at once; ``FASTOKENS_BPE_THREADS`` (environment) sets the number of its own threads.

    Args:
        reference: the tokenizer in the library that defines its ids.

    Raises:
        NotFast: fastokens is missing, does not support such a tokenizer, or is not exact for it.
    """

    def __init__(self, reference: TokenizersReference, allow_special_tokens: bool) -> None:
        try:
            from fastokens import Tokenizer
        except ImportError as error:
            raise NotFast(f"fastokens is not installed: {install_command('fastokens')}") from error
        reason = why_not_exact(reference.outline(_byte_characters()))
        if reason is not None:
            raise NotFast(f"fastokens is not used: {reason}")
        try:
            self._tokenizer = Tokenizer.from_json_str(reference.to_json())
            self._encode = self._tokenizer.encode_batch_flat
        except Exception as error:  # ValueError today; in any case the reference can encode
            raise NotFast(f"fastokens {version('fastokens')} rejects the tokenizer: {one_line(error)}") from error
        self.library = f"fastokens {version('fastokens')}"
        self._split_special_tokens = not allow_special_tokens

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Return the ids of all ``texts``, int32[T], read-only, and the number of ids of each, int64[texts].

        Raises:
            Exception: any error of fastokens; ``UnicodeEncodeError`` for a lone surrogate.
        """
        try:
            ids, offsets = self._encode(
                list(texts), add_special_tokens=False, split_special_tokens=self._split_special_tokens
            )
        except BaseException as error:
            if is_panic(error):
                raise RuntimeError(one_line(error)) from error
            raise
        return np.frombuffer(ids, "<i4"), np.diff(np.frombuffer(offsets, "<i8"))


def is_missing_for(reference: TokenizersReference) -> bool:
    """Return whether fastokens is not installed, and would be used for this tokenizer if it were."""
    return find_spec("fastokens") is None and why_not_exact(reference.outline(_byte_characters())) is None


def why_not_exact(config: dict[str, Any]) -> str | None:
    """Return why the ids of fastokens may differ from those of ``tokenizers``; None if they were found equal.

    Args:
        config: content of ``tokenizer.json``, or its outline with the single characters of the vocabulary.
    """
    model = config["model"]
    if model["type"] != "BPE":
        return f"the model is {model['type']}, not BPE"
    for key in _MODEL_OFF:
        if model.get(key):
            return f"the model has {key}"
    parts = (
        rule_steps(config.get("normalizer")),
        rule_steps(config.get("pre_tokenizer")),
    )
    if parts not in EXACT.values():
        shown = "; ".join(json.dumps(part, ensure_ascii=False) for part in parts)
        return (
            f"its normalizer and pre-tokenizer are not among those verified to be exact ({', '.join(EXACT)}): {shown}"
        )
    for token in config.get("added_tokens") or ():
        # Two added tokens with the same normalized form would be resolved in another way.
        if not unicodedata.is_normalized("NFC", token["content"]):
            return f"the added token {token['content']!r} is not in Unicode's form C"
    missing = 256 - len(_byte_characters() & model["vocab"].keys())
    return f"{missing} of the 256 bytes are not in the vocabulary" if missing else None


def rule_steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, with sequences flattened, without settings that do not change
    ids.
    """
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [{name: value for name, value in part.items() if name not in _NO_EFFECT}]
    steps = part["normalizers"] if "normalizers" in part else part["pretokenizers"]
    return [step for inner in steps for step in rule_steps(inner)]


def _byte_characters() -> set[str]:
    """Return GPT-2's characters for the 256 bytes: printable Latin-1 unchanged, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return {chr(byte) for byte in printable} | {chr(0x100 + i) for i in range(256 - len(printable))}
