"""Read tiktoken files: byte-pair ranks, one ``base64 rank`` a line, and the settings that such a file lacks.

These are the regular expression that splits text into words, and the special tokens. They are built in for OpenAI's
encodings and Qwen's first generation, by file name. For other files, or to override, put a JSON file with the same stem
next to it:

    {"pattern": "...", "special_tokens": {"<|endoftext|>": 100257}, "normalization": "NFC"}

``normalization`` is optional; the default is no normalization.
"""

from __future__ import annotations

import base64
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, install_command
from .backends import DOCUMENT_END, MAX_ID, FlatIds, one_line
from .fingerprint import fingerprint_of
from .probes import PROBES

_R50K_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)
_O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPECIAL = (DOCUMENT_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


@dataclass(frozen=True)
class Encoding:
    """The settings of an encoding that a tiktoken file does not contain."""

    pattern: str
    special_tokens: dict[str, int]
    num_ranks: int | None = None
    """Number of lines of the file, if known: another number means another encoding with this name."""
    nfc: bool = False
    """True if text is first normalized to Unicode's form C."""


KNOWN_ENCODINGS = {
    "r50k_base": Encoding(_R50K_PATTERN, {DOCUMENT_END: 50256}, 50256),
    "p50k_base": Encoding(_R50K_PATTERN, {DOCUMENT_END: 50256}, 50280),
    "cl100k_base": Encoding(
        _CL100K_PATTERN,
        {
            DOCUMENT_END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        100256,
    ),
    "o200k_base": Encoding(_O200K_PATTERN, {DOCUMENT_END: 199999, "<|endofprompt|>": 200018}, 199998),
    # Qwen (the first, not Qwen2 and later, which have a tokenizer.json): from its tokenization_qwen.py.
    "qwen": Encoding(_QWEN_PATTERN, {token: 151643 + i for i, token in enumerate(_QWEN_SPECIAL)}, 151643, nfc=True),
}
"""Encodings by file stem; OpenAI's as in tiktoken's ``tiktoken_ext/openai_public.py``."""


class TiktokenReference:
    """A tiktoken file, encoded by the ``tiktoken`` library in the calling thread with the GIL released.

    Raises:
        UserError: the file or the JSON file next to it is malformed, the encoding is unknown, or the package is not
            installed.
    """

    def __init__(
        self, name: str, file: Path, content: bytes, description: bytes | None, allow_special_tokens: bool
    ) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise UserError(f"{file}: a .tiktoken file needs tiktoken: {install_command('tiktoken')}") from error

        self._name = name
        self.changes = 0
        ranks = _parse_ranks(file, content)
        encoding = _find_encoding(file, description)
        _check(file, ranks, encoding)
        try:
            self._encoding = tiktoken.Encoding(
                file.stem, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens=encoding.special_tokens
            )
        except ValueError as error:
            raise UserError(
                f"{file.with_suffix('.json')}: pattern is not a regular expression: {one_line(error)}"
            ) from error
        self.library = f"tiktoken {version('tiktoken')}"
        self.special_tokens = encoding.special_tokens
        self._known_ids = {*ranks.values(), *encoding.special_tokens.values()}
        self.vocab_size = max(self._known_ids) + 1
        self._allowed = set(encoding.special_tokens) if allow_special_tokens else set()
        self._nfc = encoding.nfc
        self._content, self._pattern = content, encoding.pattern

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Encode, see :class:`~.backends.Reference`.

        Raises:
            UserError: tiktoken fails on a text, as on a million spaces with Qwen's pattern.
        """
        ids = [np.empty(0, np.uint32)]
        for text in texts:
            if self._nfc:
                text = unicodedata.normalize("NFC", text)
            try:
                # encode_ordinary gives the same ids, as a list, and panics where this raises.
                ids.append(self._encoding.encode_to_numpy(text, allowed_special=self._allowed, disallowed_special=()))
            except UnicodeEncodeError:
                raise
            except ValueError as error:
                raise UserError(
                    f"{self._name}: tiktoken cannot encode the text of {len(text):,} characters that begins with "
                    f"{text[:40]!r}: {one_line(error)}; remove it, or use a tokenizer.json of the same vocabulary"
                ) from error
        lengths = np.fromiter(map(len, ids[1:]), np.int64, len(ids) - 1)
        return np.concatenate(ids).view(np.int32), lengths

    def decode(self, ids: Sequence[int], special_tokens: bool = True) -> str:
        """See :class:`~.backends.Reference`. Bytes that are not UTF-8 become U+FFFD."""
        left_out = set() if special_tokens else set(self.special_tokens.values())
        return self._encoding.decode([token for token in ids if token in self._known_ids and token not in left_out])

    def fingerprint(self) -> str:
        """See :class:`~.backends.Reference`."""
        rules, special = f"{self._pattern}\0{self._nfc}".encode(), sorted(self.special_tokens.items())
        ranks = b"\n".join(sorted(line for line in self._content.splitlines() if line))
        return fingerprint_of("tiktoken", ranks, special, rules, self.encode(PROBES)[0].tolist())

    def document_end(self, token: str | None) -> tuple[str, int]:
        """Return ``token``, or ``<|endoftext|>``: a special token.

        Raises:
            UserError: the encoding has no such special token.
        """
        token = DOCUMENT_END if token is None else token
        if token not in self.special_tokens:
            some = ", ".join(list(self.special_tokens)[:5]) or "none"
            raise UserError(
                f"{self._name}: {token!r} is not a special token of this encoding (it has {some}); give one of these "
                "with --eod-token"
            )
        return token, self.special_tokens[token]

    def id_of(self, token: str) -> int | None:
        """See :class:`~.backends.Reference`. Only special tokens have a text of their own."""
        return self.special_tokens.get(token)

    def unknown_id(self) -> None:
        """See :class:`~.backends.Reference`. Ranks hold all bytes."""


def _parse_ranks(file: Path, content: bytes) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not a tiktoken line, which is a base64 token and its rank") from error
        if not 0 <= int(rank) <= MAX_ID:
            raise UserError(f"{file}:{number}: rank {int(rank)} is not a token id: ids are from 0 to {MAX_ID:,}")
    return ranks


def _find_encoding(file: Path, description: bytes | None) -> Encoding:
    """Return the encoding described by the JSON file next to ``file``, or known by the name of ``file``.

    Args:
        file: the tokenizer's file.
        description: content of the JSON file; None if there is none.
    """
    beside = file.with_suffix(".json")
    if description is None:
        if file.stem in KNOWN_ENCODINGS:
            return KNOWN_ENCODINGS[file.stem]
        raise UserError(
            f"{file}: a tiktoken file does not hold its pattern and special tokens, and those of '{file.stem}' are not "
            f"known ({', '.join(KNOWN_ENCODINGS)} are); write them to {beside} as "
            '{"pattern": "...", "special_tokens": {"<|endoftext|>": ID}}'
        )
    try:
        parsed = json.loads(description)
    except ValueError as error:
        raise UserError(f"{beside}: cannot be read as JSON: {error}") from error
    return _parse_description(beside, parsed)


def _parse_description(beside: Path, description: Any) -> Encoding:
    known = {"pattern", "special_tokens", "normalization"}
    if not isinstance(description, dict) or not isinstance(description.get("pattern"), str):
        raise UserError(f'{beside}: must be a JSON object with "pattern", a regular expression, and "special_tokens"')
    if unknown := set(description) - known:
        raise UserError(f"{beside}: unknown key {min(unknown)!r}; the keys are {', '.join(sorted(known))}")
    special_tokens = description.get("special_tokens")
    if not isinstance(special_tokens, dict) or not all(
        type(token_id) is int and 0 <= token_id <= MAX_ID for token_id in special_tokens.values()
    ):
        raise UserError(f'{beside}: "special_tokens" must map tokens to ids: {{"<|endoftext|>": 100257}}')
    if description.get("normalization") not in (None, "NFC"):
        raise UserError(f'{beside}: "normalization" is {description["normalization"]!r}; "NFC" or null')
    return Encoding(description["pattern"], special_tokens, nfc=description.get("normalization") == "NFC")


def _check(file: Path, ranks: dict[bytes, int], encoding: Encoding) -> None:
    """Refuse rank files with which the library would panic, now or on some text."""
    if encoding.num_ranks not in (None, len(ranks)):
        raise UserError(
            f"{file}: holds {len(ranks):,} ranks, but the encoding '{file.stem}' has {encoding.num_ranks:,}; give the "
            f"file another name, and its pattern and special tokens in a .json file of that name next to it"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{file}: {len(missing)} of the 256 bytes have no rank; the first is 0x{missing[0]:02X}")
    counts = Counter([*ranks.values(), *encoding.special_tokens.values()])
    if twice := [token_id for token_id, count in counts.items() if count > 1]:
        raise UserError(f"{file}: id {min(twice)} belongs to two tokens, special tokens included")
