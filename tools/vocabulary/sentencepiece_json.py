"""Convert a sentencepiece ``tokenizer.model`` to a ``tokenizer.json`` with the same ids.

Programs read a folder with only a tokenizer.model in different ways. transformers applies merges in the order of ids,
and omits the space before a text unless the folder names the model's class. It never matches a user-defined symbol that
begins with a space. A tokenizer.json is unambiguous, so an extended tokenizer has one.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engine.errors import UserError
from ...engine.tokenizer.files import ADDED_TOKENS_FILE, CONFIG_FILES, SENTENCEPIECE_FILE
from ...engine.tokenizer.json_file import parse_tokenizer
from ...engine.tokenizer.probes import PROBES
from .sentencepiece_file import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, loaded, parse_model
from .serving import STRIP_STEPS
from .vocabulary import WORD_START, dump_json, read_object

_UNIGRAM, _BPE = 1, 2
_DIFFERENCES_ALLOWED = 0.01
_REMEDY = (
    "save the tokenizer as tokenizer.json first (transformers: AutoTokenizer.from_pretrained(folder)"
    ".save_pretrained(folder))"
)


def converted(files: Mapping[str, bytes], where: Path) -> tuple[bytes, list[str]]:
    """Return the tokenizer.json of a tokenizer.model, and lines about it for the console.

    Args:
        files: of the folder, by name.
        where: the path of tokenizer.model, for messages.

    Raises:
        UserError: it is not a sentencepiece model, tokenizer.json cannot express it, or a file next to it is damaged.
    """
    proto = parse_model(files[SENTENCEPIECE_FILE], where)
    kind = proto.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE):
        raise UserError(
            f"{where}: a sentencepiece model of words or characters; only BPE and unigram models can be extended"
        )
    _require_convertible(proto, where)
    above = _highest_added_id(files, where.parent)
    if above >= len(proto.pieces):
        raise UserError(
            f"{where}: tokens added in files next to it have ids up to {above:,}, but it holds {len(proto.pieces):,} "
            f"pieces; {_REMEDY}"
        )
    config = read_object(files, where.with_name(CONFIG_FILES[0]), _REMEDY)
    content = dump_json({**_content(proto), "post_processor": _post_processor(proto, config)})
    notes = _require_same_ids(proto, content, where)
    return content, [f"note: the output has a tokenizer.json made from {where}; programs read it first", *notes]


def _content(proto: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    closed = (UNKNOWN, CONTROL, USER_DEFINED)
    added = [
        {"id": place, "content": piece.piece, **flags, "special": piece.type != USER_DEFINED}
        for place, piece in enumerate(proto.pieces)
        if piece.type in closed
    ]
    prefix = [{"type": "Prepend", "prepend": WORD_START}] if proto.normalizer_spec.add_dummy_prefix else []
    map_ = proto.normalizer_spec.precompiled_charsmap
    precompiled = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(map_).decode()}
    one = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    fewer = [one, *STRIP_STEPS] if proto.normalizer_spec.remove_extra_whitespaces else []
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unescape = {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [*([precompiled] if map_ else []), *fewer, *prefix, escape]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _unigram(proto) if proto.trainer_spec.model_type == _UNIGRAM else _bpe(proto),
    }


def _post_processor(proto: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the post-processor that adds the BOS as transformers does, if tokenizer_config.json enables it."""
    place = proto.trainer_spec.bos_id
    if place < 0 or config.get("add_bos_token") is not True:
        return None
    bos = proto.pieces[place].piece
    first, text, other = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        *({"Sequence": {"id": i, "type_id": 0}} for i in "AB"),
    )
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, other],
        "special_tokens": {bos: {"id": bos, "ids": [place], "tokens": [bos]}},
    }


def _unigram(proto: Any) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": proto.trainer_spec.unk_id,
        "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _bpe(proto: Any) -> dict[str, Any]:
    """Return a BPE model in which every way to make a piece of two is a merge, in the order of the pieces' scores."""
    vocab = {piece.piece: place for place, piece in enumerate(proto.pieces)}
    text = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    by_score = sorted((piece for piece in proto.pieces if piece.type == NORMAL), key=lambda piece: -piece.score)
    merges = [
        [left, right]
        for piece in (piece.piece for piece in by_score)
        for left, right in ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if left in text and right in text
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _require_convertible(proto: Any, where: Path) -> None:
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED and WORD_START in piece.piece]
    reasons = (
        (not proto.normalizer_spec.escape_whitespaces, "does not escape spaces"),
        (proto.trainer_spec.treat_whitespace_as_suffix, "puts spaces behind words"),
        (any(piece.type == UNUSED for piece in proto.pieces), "has unused pieces"),
        (bool(symbols), f"has user-defined symbols with spaces ({symbols[:1]})"),
        (len({piece.piece for piece in proto.pieces}) < len(proto.pieces), "has a piece twice"),
    )
    for holds, reason in reasons:
        if holds:
            raise UserError(
                f"{where}: the sentencepiece model {reason}, which tokenizer.json cannot express; {_REMEDY}"
            )


def _require_same_ids(proto: Any, content: bytes, where: Path) -> list[str]:
    """Compare the ids of both on a fixed set of texts.

    A handful may differ: the tokenizers library normalizes letters with several combining marks in another order.

    Returns:
        A line for the console if one differs.
    """
    ours, theirs = parse_tokenizer(content, where), loaded(proto)
    ours.encode_special_tokens = True
    texts = [*PROBES, " the cat", "  a", " ", f"{WORD_START}x"]
    found = [encoding.ids for encoding in ours.encode_batch(texts, add_special_tokens=False)]
    expected = theirs.Encode(texts, out_type=int)
    differing = [text for text, *ids in zip(texts, found, expected, strict=True) if ids[0] != ids[1]]
    if len(differing) > _DIFFERENCES_ALLOWED * len(texts):
        raise UserError(
            f"{where}: as tokenizer.json it would give {len(differing)} of {len(texts)} test texts other ids than "
            f"sentencepiece does, the first {differing[0][:40]!r}; {_REMEDY}"
        )
    return [f"note: {differing[0][:40]!r} gets other ids from it than from {SENTENCEPIECE_FILE}"] if differing else []


def _highest_added_id(files: Mapping[str, bytes], folder: Path) -> int:
    """Return the highest id of tokens in files next to a sentencepiece model; -1 if there are none."""
    added, config = folder / ADDED_TOKENS_FILE, folder / CONFIG_FILES[0]
    remedy = "get it again from the model's source: its tokens' ids are needed"
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
