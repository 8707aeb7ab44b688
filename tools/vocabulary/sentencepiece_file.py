"""Add pieces to a sentencepiece ``tokenizer.model`` of BPE or unigram kind, with scores below or among the old ones.

In a BPE model the score is the order of merges: new pieces get lower scores than all old ones, so that old merges come
first. In a unigram model it is a log-probability: see :mod:`unigram`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...engine.errors import UserError
from ...engine.tokenizer.files import SENTENCEPIECE_FILE
from .vocabulary import WORD_START, NewToken

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Types of pieces. Normal ones are text; user-defined ones are matched in a text before anything else."""


def extended_beside(
    content: bytes, first_id: int, tokens: list[NewToken], scores: list[float] | None = None
) -> tuple[bytes | None, str]:
    """Return the sentencepiece model for an extended tokenizer.json, with the same new ids, and a line about it.

    Returns:
        The file, or None if it cannot have these ids; and a line about it.
    """
    try:
        proto = parse_model(content, Path(SENTENCEPIECE_FILE))
    except UserError:
        return None, f"left out {SENTENCEPIECE_FILE}, which is not a sentencepiece model"
    if len(proto.pieces) != first_id:
        return None, (
            f"left out {SENTENCEPIECE_FILE}: it holds {len(proto.pieces):,} pieces, but the new ids begin at "
            f"{first_id:,}; tokenizer.json is complete"
        )
    return _with_pieces(proto, tokens, scores), f"{SENTENCEPIECE_FILE} also has the new tokens"


def parse_model(content: bytes, where: Path) -> Any:
    """Return the protocol buffer of a sentencepiece model.

    Raises:
        UserError: it is not a sentencepiece model.
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
    """Return a processor of the model."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def _with_pieces(proto: Any, tokens: list[NewToken], scores: list[float] | None) -> bytes:
    """Return ``proto`` with the new pieces at its end; without scores, each gets a lower score than all pieces before
    it.
    """
    new = type(proto)()
    new.CopyFrom(proto)
    lowest = min((piece.score for piece in proto.pieces if piece.type == NORMAL), default=0.0)
    for place, token in enumerate(tokens):
        assert token.id == len(new.pieces)
        user_defined = token.kind == "added"
        score = 0.0 if user_defined else lowest - 1 - place if scores is None else scores[place]
        new.pieces.add(piece=escaped(token.piece), score=score, type=USER_DEFINED if user_defined else NORMAL)
    new.trainer_spec.vocab_size = len(new.pieces)
    return new.SerializeToString()


def escaped(text: str) -> str:
    """Return ``text`` as a piece."""
    return text.replace(" ", WORD_START)
