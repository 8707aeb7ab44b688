"""A sentencepiece ``tokenizer.model``, of BPE or unigram kind: new pieces are appended, with scores below or among the
old ones.

Of a BPE model the score is the order of merges: new pieces get less than the lowest old one, so that all that was
joined before is joined before them. Of a unigram model it is a log-probability: see :mod:`unigram`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...engine.data.tokenizer_files import SENTENCEPIECE_FILE
from ...engine.errors import UserError
from .bpe import learn_bpe
from .splitting import WordSplitter, may_be_piece
from .unigram import learn_unigram
from .vocabulary import WORD_START, Extension, NewToken, Wanted, by_piece, read_object

_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "sentencepiece unigram", _BPE: "sentencepiece BPE"}
NORMAL, _USER_DEFINED = 1, 4
"""Types of pieces: of text, and matched before anything else."""


class SentencePieceModel:
    """The tokenizer of a folder without a tokenizer.json.

    Args:
        files: of the folder, by name.
        where: the path of tokenizer.model, for messages.

    Raises:
        UserError: it is no sentencepiece model, or such a one cannot be extended, or what stands beside it is damaged.
    """

    def __init__(self, files: dict[str, bytes], where: Path):
        self._proto = parse_model(files[SENTENCEPIECE_FILE], where)
        self._type = self._proto.trainer_spec.model_type
        if self._type not in _KINDS:
            raise UserError(f"{where}: a sentencepiece model of words or characters; only BPE and unigram can grow")
        self.kind = _KINDS[self._type]
        self._ids = {piece.piece: place for place, piece in enumerate(self._proto.pieces)}
        self.first_id = len(self._proto.pieces)
        above = _highest_added_id(files, where.parent)
        if above >= self.first_id:
            raise UserError(
                f"{where}: tokens added beside it have ids up to {above:,}, and it holds {self.first_id:,} pieces; "
                "save the tokenizer as tokenizer.json first (transformers: AutoTokenizer.from_pretrained(folder)"
                ".save_pretrained(folder))"
            )
        self._model, self._bare = loaded(self._proto), loaded(_without_normalization(self._proto))
        self._scores = {piece.piece: piece.score for piece in self._proto.pieces if piece.type == NORMAL}
        self._split = WordSplitter(self._scores)

    def words(self, text: str) -> Iterable[str]:
        """See :class:`~retemper.tools.vocabulary.vocabulary.Tokenizer`."""
        return self._split(self._model.Normalize(text))

    def pieces_of(self, piece: str) -> list[int]:
        """What the old model makes of a piece, or of a part of normalized text."""
        return self._bare.EncodeAsIds(piece)

    def learn(
        self, words: Counter[str], held_out: Counter[str], wanted: Wanted, on_token: Callable[[], object]
    ) -> Extension:
        """See :class:`~retemper.tools.vocabulary.vocabulary.Tokenizer`."""
        if self._type == _UNIGRAM:
            found, notes = learn_unigram(self._scores, self._ids, self.pieces_of, words, wanted)
            tokens = [
                self._token(self.first_id + place, piece.text, "piece", piece.count)
                for place, piece in enumerate(found)
            ]
            return Extension(tokens, self._files(tokens, [piece.score for piece in found]), notes)
        vocab = {piece: self._ids[piece] for piece in self._scores}

        def allowed(piece: str) -> bool:
            return may_be_piece(piece, wanted.max_characters)

        learned = learn_bpe(
            vocab, {*self._ids}, self.pieces_of, self.first_id, words, held_out, wanted, allowed, on_token
        )
        tokens = [self._token(merge.token, piece, kind, merge.count) for merge, piece, kind in learned.tokens]
        return Extension(tokens, self._files(tokens), learned.notes, learned.curve)

    def take(self, texts: Sequence[str]) -> Extension:
        """See :class:`~retemper.tools.vocabulary.vocabulary.Tokenizer`. They become user-defined symbols, which
        sentencepiece matches before anything else."""
        new, notes = by_piece(texts, self._ids)
        tokens = [self._token(self.first_id + place, piece, "added") for place, piece in enumerate(new)]
        return Extension(tokens, self._files(tokens), [*notes, f"{len(new)} user-defined symbols, matched in text"])

    def _token(self, token: int, piece: str, kind: Any, count: int = 0) -> NewToken:
        text = piece.replace(WORD_START, " ")
        return NewToken(token, piece, text, tuple(self.pieces_of(piece)), kind, count)

    def _files(self, tokens: list[NewToken], scores: list[float] | None = None) -> dict[str, bytes | None]:
        return {SENTENCEPIECE_FILE: _with_pieces(self._proto, tokens, scores)}


def extended_beside(
    content: bytes, first_id: int, tokens: list[NewToken], scores: list[float] | None = None
) -> tuple[bytes | None, str]:
    """The model that stands beside an extended tokenizer.json, with the same new ids.

    Returns:
        the file, or None where it cannot have these ids; and a line about it.
    """
    try:
        proto = parse_model(content, Path(SENTENCEPIECE_FILE))
    except UserError:
        return None, f"left out {SENTENCEPIECE_FILE}, which is no sentencepiece model"
    if len(proto.pieces) != first_id:
        return None, (
            f"left out {SENTENCEPIECE_FILE}: it holds {len(proto.pieces):,} pieces, and the new ids begin at "
            f"{first_id:,}; tokenizer.json is complete"
        )
    return _with_pieces(proto, tokens, scores), f"{SENTENCEPIECE_FILE} has the new tokens, too"


def parse_model(content: bytes, where: Path) -> Any:
    """The protocol buffer of a sentencepiece model.

    Raises:
        UserError: it is none.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise UserError(f"{where}: not a sentencepiece model ({error}); tiktoken ranks cannot be extended") from None
    if not proto.pieces:
        raise UserError(f"{where}: not a sentencepiece model, it holds no pieces; tiktoken ranks cannot be extended")
    return proto


def loaded(proto: Any) -> Any:
    """A processor of the model."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def _without_normalization(proto: Any) -> Any:
    """The same pieces for text that is normalized already."""
    bare = type(proto)()
    bare.CopyFrom(proto)
    spec = bare.normalizer_spec
    spec.name, spec.precompiled_charsmap = "identity", b""
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    return bare


def _with_pieces(proto: Any, tokens: list[NewToken], scores: list[float] | None) -> bytes:
    """``proto`` with the new pieces at its end; without scores each has less than all pieces before it."""
    new = type(proto)()
    new.CopyFrom(proto)
    lowest = min((piece.score for piece in proto.pieces if piece.type == NORMAL), default=0.0)
    for place, token in enumerate(tokens):
        assert token.id == len(new.pieces)
        user_defined = token.kind == "added"
        score = 0.0 if user_defined else lowest - 1 - place if scores is None else scores[place]
        new.pieces.add(piece=escaped(token.piece), score=score, type=_USER_DEFINED if user_defined else NORMAL)
    new.trainer_spec.vocab_size = len(new.pieces)
    return new.SerializeToString()


def escaped(text: str) -> str:
    """``text`` as a piece."""
    return text.replace(" ", WORD_START)


def _highest_added_id(files: dict[str, bytes], folder: Path) -> int:
    """Of the tokens that transformers keeps beside a sentencepiece model; -1 without any."""
    added, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    remedy = "get it anew from where the model came from: its tokens' ids are needed"
    ids = [-1]
    ids += [token for token in read_object(files, added, remedy).values() if isinstance(token, int)]
    decoder = read_object(files, config, remedy).get("added_tokens_decoder") or {}
    try:
        ids += map(int, decoder)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{config}: added_tokens_decoder: the keys of an object must be ids ({error}); {remedy}"
        ) from None
    return max(ids)
