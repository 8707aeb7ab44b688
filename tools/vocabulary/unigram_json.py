"""Extend a unigram model in ``tokenizer.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...engine.errors import UserError
from ...engine.tokenizer.files import SENTENCEPIECE_FILE, TOKENIZER_FILE
from ...engine.tokenizer.json_file import parse_tokenizer
from . import sentencepiece_file
from .serving import with_added_tokens
from .splitting import WordSplitter, may_be_piece, split_words
from .unigram import learn_unigram, rarest_part
from .vocabulary import WORD_START, Extension, NewToken, Wanted, by_piece, dump_json, require_ids_as_read


class UnigramJson:
    """The tokenizer of a folder.

    Args:
        files: of the folder, by name.
        where: the path of tokenizer.json, for messages.

    Raises:
        UserError: the ids of its added tokens follow the pieces, whose index in the list is their id; or it has no
            unknown token.
    """

    kind = "unigram"

    def __init__(self, files: dict[str, bytes], where: Path):
        self._files, self._where = files, where
        self._content: dict[str, Any] = json.loads(files[TOKENIZER_FILE])
        self._tokenizer = parse_tokenizer(json.dumps(self._content), where)
        pieces = self._content["model"]["vocab"]
        self._ids = {piece: place for place, (piece, _) in enumerate(pieces)}
        self.first_id = len(pieces)
        added = {token["content"]: token["id"] for token in self._content.get("added_tokens", [])}
        above = max(added.values(), default=-1)
        if above >= self.first_id:
            raise UserError(
                f"{where}: a unigram model of {self.first_id:,} pieces with added tokens up to id {above:,}; the next "
                "piece would get the id of one of them, so it cannot be extended"
            )
        require_ids_as_read(self._tokenizer, added, where)
        unknown = self._content["model"].get("unk_id")
        if unknown is None:
            raise UserError(
                f"{where}: a unigram model without model.unk_id: the library fails at every unknown character; set it "
                "to the index of the unknown token in model.vocab"
            )
        special = {*added, pieces[unknown][0]}
        self._scores = {piece: score for piece, score in pieces if piece not in special}
        self._split = WordSplitter(self._scores)

    def text_of(self, piece: str) -> str:
        """See :class:`~retemper.tools.vocabulary.vocabulary.ExtensibleTokenizer`."""
        return piece.replace(WORD_START, " ")

    def words(self, text: str) -> Iterable[str]:
        """See :class:`~retemper.tools.vocabulary.vocabulary.ExtensibleTokenizer`."""
        return [part for word in split_words(self._tokenizer, text) for part in self._split(word)]

    def pieces_of(self, piece: str) -> list[int]:
        """Return the old model's ids of a piece."""
        return [token.id for token in self._tokenizer.model.tokenize(piece)]

    def learn(
        self, words: Counter[str], held_out: Counter[str], wanted: Wanted, on_token: Callable[[], object]
    ) -> Extension:
        """See :class:`~retemper.tools.vocabulary.vocabulary.ExtensibleTokenizer`."""
        found, notes = learn_unigram(self._scores, self._ids, self.pieces_of, words, wanted)
        return self._extended([(piece.text, piece.score, piece.count) for piece in found], notes)

    def take(self, texts: Sequence[str]) -> Extension:
        """Add listed tokens, see :class:`~retemper.tools.vocabulary.vocabulary.ExtensibleTokenizer`.

        A single word becomes a piece, as likely as the rarest of its parts; several words become an added token.
        """
        new, notes = by_piece(texts, self._ids)
        words = [piece for piece in new if may_be_piece(piece, len(piece))]
        phrases = [text for piece, text in new.items() if not may_be_piece(piece, len(piece))]
        notes += [
            f"{text!r} becomes an added token: it consists of several words; it is matched in text" for text in phrases
        ]
        pieces = [(piece, rarest_part(self._scores, self._texts_of(piece)), 0) for piece in words]
        return self._extended(pieces, notes, phrases)

    def _texts_of(self, piece: str) -> list[str]:
        return [token.value for token in self._tokenizer.model.tokenize(piece)]

    def _extended(self, new: list[tuple[str, float, int]], notes: list[str], added: Sequence[str] = ()) -> Extension:
        tokens = [
            NewToken(
                self.first_id + place,
                piece,
                piece.replace(WORD_START, " "),
                tuple(self.pieces_of(piece)),
                "piece",
                count,
            )
            for place, (piece, _, count) in enumerate(new)
        ]
        for place, text in enumerate(added, self.first_id + len(new)):
            subtokens = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
            tokens.append(NewToken(place, text, text, subtokens, "added"))
        scores = [score for _, score, _ in new] + [0.0] * len(added)
        content = json.loads(self._files[TOKENIZER_FILE])
        content["model"]["vocab"] += [[piece, score] for piece, score, _ in new]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        entries = [{"id": token.id, "content": token.piece, **flags} for token in tokens if token.kind == "added"]
        content["added_tokens"] = [*content.get("added_tokens", []), *entries]
        files: dict[str, bytes | None] = {TOKENIZER_FILE: dump_json(content)}
        files |= with_added_tokens(self._files, entries, self._where.parent)
        if SENTENCEPIECE_FILE in self._files:
            files[SENTENCEPIECE_FILE], note = sentencepiece_file.extended_beside(
                self._files[SENTENCEPIECE_FILE], self.first_id, tokens, scores
            )
            notes = [*notes, note]
        return Extension(tokens, files, notes)
