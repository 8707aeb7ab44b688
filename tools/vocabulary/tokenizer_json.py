"""Extend a BPE model in ``tokenizer.json``: byte-level as in Qwen and Llama 3, or made from sentencepiece as in Llama
2.

New tokens are merges after the old ones. The file is changed as JSON, so that everything else in it is preserved.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...engine.errors import UserError
from ...engine.tokenizer.files import SENTENCEPIECE_FILE, TOKENIZER_FILE
from ...engine.tokenizer.json_file import parse_tokenizer
from . import sentencepiece_file
from .bpe import learn_bpe
from .serving import with_added_tokens
from .splitting import WordSplitter, may_be_piece, split_words
from .vocabulary import Extension, NewToken, Wanted, dump_json, read_object, require_ids_as_read

_VOCAB_FILE, _MERGES_FILE = "vocab.json", "merges.txt"
_REMEDY = f"get it again from the model's source, or remove it: {TOKENIZER_FILE} is complete"
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class BpeJson:
    """The tokenizer of a folder.

    Args:
        files: of the folder, by name.
        where: the path of tokenizer.json, for messages.

    Raises:
        UserError: such a BPE cannot be extended, or a file next to it is damaged.
    """

    def __init__(self, files: dict[str, bytes], where: Path):
        self._files, self._where = files, where
        self._content: dict[str, Any] = json.loads(files[TOKENIZER_FILE])
        model = self._content["model"]
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise UserError(f"{where}: its BPE has a {key}, {model[key]!r}: such vocabularies cannot be extended")
        self._tokenizer = parse_tokenizer(json.dumps(self._content), where)
        self._model = self._tokenizer.model
        self._vocab: dict[str, int] = model["vocab"]
        self._added: dict[str, int] = {token["content"]: token["id"] for token in self._content.get("added_tokens", [])}
        require_ids_as_read(self._tokenizer, self._added, where)
        self._vocab_beside = read_object(files, where.with_name(_VOCAB_FILE), _REMEDY)
        self._merges_beside = _read_lines(files, where.with_name(_MERGES_FILE))
        self.first_id = max([*self._vocab.values(), *self._added.values()]) + 1
        self._byte_of = _bytes_by_character() if _has_step(self._content, "ByteLevel") else None
        self._split = None if self._byte_of else WordSplitter(self._vocab)
        self.kind = "byte-level BPE" if self._byte_of else "BPE made from sentencepiece"

    def text_of(self, piece: str) -> str:
        """See :class:`~retemper.tools.vocabulary.vocabulary.ExtensibleTokenizer`."""
        if self._byte_of is None or all(character in self._byte_of for character in piece):
            text = self._text_of(piece)
            return piece if "\ufffd" in text else text
        return piece

    def words(self, text: str) -> Iterable[str]:
        """See :class:`~retemper.tools.vocabulary.vocabulary.ExtensibleTokenizer`."""
        words = split_words(self._tokenizer, text)
        return words if self._split is None else [part for word in words for part in self._split(word)]

    # ------------------------------------------------------------------------------------------------------------------
    # Learning

    def learn(
        self, words: Counter[str], held_out: Counter[str], wanted: Wanted, on_token: Callable[[], object]
    ) -> Extension:
        """See :class:`~retemper.tools.vocabulary.vocabulary.ExtensibleTokenizer`."""
        allowed, taken = self._length_bound(wanted.max_characters), {*self._vocab, *self._added}
        learned = learn_bpe(
            self._vocab, taken, self.pieces_of, self.first_id, words, held_out, wanted, allowed, on_token
        )
        tokens = [self._new_token(merge.token, piece, kind, merge.count) for merge, piece, kind in learned.tokens]
        return self._extended(tokens, learned.pairs, [], learned.notes, learned.curve)

    def pieces_of(self, word: str) -> list[int]:
        """Return the old tokenizer's ids of a vocabulary entry, or of a word."""
        return [token.id for token in self._model.tokenize(word)]

    def _length_bound(self, max_characters: int) -> Callable[[str], bool]:
        byte_of = self._byte_of
        if byte_of is None:
            return lambda piece: may_be_piece(piece, max_characters)
        # Bytes of the form 10xxxxxx continue a character.
        begins = {character: byte & 0xC0 != 0x80 for character, byte in byte_of.items()}
        return lambda piece: sum(begins.get(character, True) for character in piece) <= max_characters

    def _new_token(self, token: int, piece: str, kind: Any, count: int = 0) -> NewToken:
        return NewToken(token, piece, self._text_of(piece), tuple(self.pieces_of(piece)), kind, count)

    def _text_of(self, piece: str) -> str:
        if self._byte_of is None:
            return piece.replace("\u2581", " ")
        return bytes(self._byte_of[character] for character in piece).decode("utf-8", "replace")

    # ------------------------------------------------------------------------------------------------------------------
    # Taking listed tokens

    def take(self, texts: Sequence[str]) -> Extension:
        """Add listed tokens, see :class:`~retemper.tools.vocabulary.vocabulary.ExtensibleTokenizer`.

        A text that the tokenizer's own rules keep together gets the merges that lead to it, and the intermediate
        tokens; any other text becomes an added token.
        """
        tokens: list[NewToken] = []
        pairs: list[tuple[str, str]] = []
        added: list[NewToken] = []
        notes: list[str] = []
        ranks: dict[tuple[str, str], int] = {}
        known = {*self._vocab, *self._added}
        phrases: set[str] = set()
        for text in texts:
            piece = self._piece_of(text)
            # In sentencepiece a space and U+2581 are the same.
            entry = text if self._byte_of else sentencepiece_file.escaped(text)
            if text in self._added or entry in phrases or (piece is not None and piece in known):
                notes.append(f"{text!r} is a token already")
                continue
            chain = None if piece is None else self._chain(piece, ranks)
            # If an intermediate step were an old token, old merges could follow new ones.
            if piece is None or chain is None or any(left + right in known for left, right in chain):
                token = self.first_id + len(tokens)
                subtokens = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
                tokens.append(NewToken(token, text, text, subtokens, "added"))
                added.append(tokens[-1])
                known.add(text)
                phrases.add(entry)
                notes.append(
                    f"{text!r} becomes an added token: no merges of the tokenizer's words lead to it; it is matched in "
                    "text"
                )
                continue
            for left, right in chain:
                known.add(left + right)
                ranks[left, right] = len(ranks)
                pairs.append((left, right))
                kind = "merge" if left + right == piece else "part"
                tokens.append(self._new_token(self.first_id + len(tokens), left + right, kind))
        if not tokens:
            raise UserError("--tokens: all of them are tokens already; there is nothing to add")
        return self._extended(tokens, pairs, added, notes, [])

    def _piece_of(self, text: str) -> str | None:
        """Return ``text`` as a vocabulary entry, if it is a single word of the tokenizer."""
        if self._byte_of is None:
            return text.replace(" ", "\u2581") if may_be_piece(text.replace(" ", "\u2581"), len(text)) else None
        words = list(self.words(text))
        return words[0] if len(words) == 1 and self._text_of(words[0]) == text else None

    def _chain(self, piece: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]] | None:
        """Return the pairs that, after the old merges and those of ``ranks``, join ``piece`` to one token, from the
        left.
        """
        tokens = [token.value for token in self._model.tokenize(piece)]
        if "".join(tokens) != piece:  # bytes or unknown characters
            return None
        while found := [pair for pair in itertools.pairwise(tokens) if pair in ranks]:
            tokens = _joined(tokens, min(found, key=ranks.__getitem__))
        return [("".join(tokens[:count]), tokens[count]) for count in range(1, len(tokens))]

    # ------------------------------------------------------------------------------------------------------------------
    # Files

    def _extended(
        self,
        tokens: list[NewToken],
        pairs: list[tuple[str, str]],
        added: list[NewToken],
        notes: list[str],
        curve: list[int],
    ) -> Extension:
        content = json.loads(self._files[TOKENIZER_FILE])
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        # The library numbers added tokens itself, after the highest id of the vocabulary, unless they are in it.
        vocab |= self._added
        vocab |= {token.piece: token.id for token in tokens}
        if self._byte_of is None:
            pairs = _all_splits([token for token in tokens if token.kind != "added"], vocab, self._added)
        as_text = bool(merges) and isinstance(merges[0], str)
        merges += [f"{left} {right}" if as_text else [left, right] for left, right in pairs]
        entries = list(map(self._added_entry, added))
        content["added_tokens"] = [*content.get("added_tokens", []), *entries]
        files: dict[str, bytes | None] = {TOKENIZER_FILE: dump_json(content)}
        files |= with_added_tokens(self._files, entries, self._where.parent)
        if _VOCAB_FILE in self._files:
            files[_VOCAB_FILE] = dump_json(self._vocab_beside | vocab)
        if _MERGES_FILE in self._files:
            lines = [*self._merges_beside, *(f"{left} {right}" for left, right in pairs)]
            files[_MERGES_FILE] = ("\n".join(lines) + "\n").encode()
        if SENTENCEPIECE_FILE in self._files:
            before = self._files[SENTENCEPIECE_FILE]
            files[SENTENCEPIECE_FILE], note = sentencepiece_file.extended_beside(before, self.first_id, tokens)
            notes = [*notes, note]
        return Extension(tokens, files, notes, curve)

    def _added_entry(self, token: NewToken) -> dict[str, Any]:
        # Normalizers of sentencepiece put a space before the token, too, which would then be part of it.
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
        return {"id": token.id, "content": token.piece, **flags, "normalized": self._byte_of is not None}


def _read_lines(files: dict[str, bytes], path: Path) -> list[str]:
    """Return the lines of a file next to the tokenizer; empty if the file does not exist."""
    try:
        return files.get(path.name, b"").decode("utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: {error}; {_REMEDY}") from None


def _joined(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    place = 0
    while place < len(tokens):
        if tuple(tokens[place : place + 2]) == pair:
            out.append("".join(pair))
            place += 2
        else:
            out.append(tokens[place])
            place += 1
    return out


def _all_splits(tokens: list[NewToken], vocab: dict[str, int], closed: Container[str]) -> list[tuple[str, str]]:
    """Return every way to make a new token of two entries, and an old one with the help of a new one.

    sentencepiece joins any two parts that make a piece, and transformers converts its models so. Ways to old tokens
    come first.

    Args:
        tokens: the new ones that merges make.
        vocab: ids of old and new entries.
        closed: old entries that no text produces.
    """
    first_id = min((token.id for token in tokens), default=0)
    old = [piece for piece, place in vocab.items() if place < first_id and piece not in closed]
    pieces = [*(piece for piece in old if not _BYTE.fullmatch(piece)), *(token.piece for token in tokens)]
    ways: list[tuple[str, str]] = []
    for piece in pieces:
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(vocab[left], vocab[right], left, right) for left, right in halves if left in vocab and right in vocab]
        # Ways from old pieces to old pieces exist already.
        new = [way for way in known if max(vocab[piece], *way[:2]) >= first_id]
        ways += [(left, right) for _, _, left, right in sorted(new)]
    return ways


def _has_step(content: dict[str, Any], kind: str) -> bool:
    """Return whether the pre-tokenizer is, or contains, a step of this kind."""
    waiting = [content.get("pre_tokenizer") or {}]
    while waiting:
        step = waiting.pop()
        if step.get("type") == kind:
            return True
        waiting += step.get("pretokenizers", [])
    return False


def _bytes_by_character() -> dict[str, int]:
    """Return GPT-2's characters for the 256 bytes: printable Latin-1 unchanged, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
