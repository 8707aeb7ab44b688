"""Count the UTF-8 bytes of text that each token of a vocabulary stands for.

A byte-level token may be a part of a character, so decoding tokens one by one cannot count their bytes. The table is
made from the vocabulary and the kind of the tokenizer's decoder, and is checked on texts.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engine.tokenizer.backends import Reference, TokenizersReference
from ...engine.tokenizer.files import tokenizer_kind
from ...engine.tokenizer.probes import PROBES
from ...engine.tokenizer.reference import open_reference

_SPACE = "\u2581"
"""Stands for a space in the pieces of sentencepiece."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class TokenBytes:
    """The text of every token id below V."""

    num_bytes_V: npt.NDArray[np.int32]
    """[V] UTF-8 bytes; zero for a token without text."""
    has_text_V: npt.NDArray[np.bool_]
    """[V] False for control tokens, the unknown token, and ids that the tokenizer does not have."""
    starts_with_space_V: npt.NDArray[np.bool_]
    """[V]."""
    drops_first_space: bool
    """Whether the space with which the first token of a text begins is not part of the text."""

    def count(self, ids: npt.NDArray[np.integer], are_first: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """Return the bytes of each of ``ids``; ``are_first`` marks those that are the first token of a text."""
        dropped = are_first & self.starts_with_space_V[ids] if self.drops_first_space else 0
        return self.num_bytes_V[ids] - dropped

    def without(self, ids: Collection[int]) -> TokenBytes:
        """Return the same table, in which ``ids`` have no text."""
        num_bytes, has_text = self.num_bytes_V.copy(), self.has_text_V.copy()
        num_bytes[[*ids]], has_text[[*ids]] = 0, False
        return replace(self, num_bytes_V=num_bytes, has_text_V=has_text)


def read_token_bytes(file: Path, vocab_size: int) -> TokenBytes | str:
    """Return the table of the tokenizer in ``file``, or the reason why there is none.

    Args:
        file: ``tokenizer.json``, a sentencepiece ``.model`` or a ``.tiktoken``.
        vocab_size: V, at least that of the model.

    Raises:
        UserError: the file is not a tokenizer.
    """
    reference, _ = open_reference(str(file), file)
    if isinstance(reference, TokenizersReference):
        texts, drops_first_space = _of_tokenizers(reference)
    else:
        read = _of_sentencepiece if tokenizer_kind(file) == "sentencepiece" else _of_tiktoken
        texts, drops_first_space = read(file)
    size = max(vocab_size, reference.vocab_size)
    num_bytes, has_text, spaces = np.zeros(size, np.int32), np.zeros(size, bool), np.zeros(size, bool)
    for token_id, text in texts:
        num_bytes[token_id], has_text[token_id], spaces[token_id] = len(text), True, text.startswith(b" ")
    if (unknown := reference.unknown_id()) is not None:
        num_bytes[unknown], has_text[unknown] = 0, False
    table = TokenBytes(num_bytes, has_text, spaces, drops_first_space)
    kept = all(_keeps_bytes(table, reference, probe) for probe in PROBES)
    return table if kept else f"{file}: its decoder does not keep the bytes of tokens"


def _keeps_bytes(table: TokenBytes, reference: Reference, probe: str) -> bool:
    """Return whether the bytes of the tokens of a text are those that the library decodes."""
    ids = reference.encode([probe])[0]
    if not len(ids) or not table.has_text_V[ids].all():
        return True
    whole = reference.decode(ids.tolist(), False).encode("utf-8", "surrogatepass")
    whole = whole.removeprefix(b" ") if table.drops_first_space else whole  # no probe begins with a space
    return int(table.count(ids, np.arange(len(ids)) == 0).sum()) == len(whole)


_Texts = tuple[Iterator[tuple[int, bytes]], bool]
"""Id and bytes of every token with text, and :attr:`TokenBytes.drops_first_space`."""


def _of_tokenizers(reference: TokenizersReference) -> _Texts:
    tokenizer, rules = reference.library_tokenizer, reference.outline([])
    decoders = list(_parts(rules["decoder"], "decoders"))
    kinds = {one["type"] for one in decoders}
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = {place: token for token, place in tokenizer.get_vocab(with_added_tokens=False).items()}

    def texts() -> Iterator[tuple[int, bytes]]:
        for place, token in vocabulary.items():
            if place not in added:
                yield place, _byte_level(token) if "ByteLevel" in kinds else _piece(token, "ByteFallback" in kinds)
        for place, one in added.items():
            if not one.special:
                yield place, one.content.encode()

    before = [one for one in _parts(rules["pre_tokenizer"], "pretokenizers") if one["type"] == "ByteLevel"]
    drops = any(one.get("add_prefix_space") for one in before) or any(map(_drops_first_space, decoders))
    return texts(), drops


def _parts(rule: Any, key: str) -> Iterator[dict[str, Any]]:
    """Yield a rule of a tokenizer.json, or the parts of a sequence of them."""
    if rule is not None and rule["type"] == "Sequence":
        for part in rule[key]:
            yield from _parts(part, key)
    elif rule is not None:
        yield rule


def _drops_first_space(decoder: dict[str, Any]) -> bool:
    if decoder["type"] == "Metaspace":
        return bool(decoder.get("prepend_scheme", "always") != "never")
    return decoder["type"] == "Strip" and decoder["content"] == " " and decoder["start"] > 0


def _byte_level(token: str) -> bytes:
    """Return the bytes of a token of GPT-2's alphabet, in which a character stands for a byte."""
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def _byte_alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _piece(piece: str, has_bytes: bool) -> bytes:
    if has_bytes and _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace(_SPACE, " ").encode()


def _of_sentencepiece(file: Path) -> _Texts:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(file.read_bytes())
    ids = range(model.GetPieceSize())
    without = [model.IsControl(i) or model.IsUnknown(i) or model.IsUnused(i) for i in ids]
    pieces = {i: model.IdToPiece(i) for i in ids if not without[i]}
    spaced = next((i for i, piece in pieces.items() if piece.startswith(_SPACE)), None)
    drops = spaced is not None and not model.Decode([spaced]).startswith(" ")
    return ((i, _piece(piece, bool(model.IsByte(i)))) for i, piece in pieces.items()), drops


def _of_tiktoken(file: Path) -> _Texts:
    lines = (line.split() for line in file.read_bytes().splitlines() if line.strip())
    return ((int(rank), base64.b64decode(token)) for token, rank in lines), False
