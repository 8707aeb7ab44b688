"""Determine the tokens that a tokenizer adds to a text: the BOS before it, and the tokens after it.

The rules are those of ``tokenizer(text)`` in transformers 5:

- tokenizer.json: its post-processor decides; add_bos_token and add_eos_token of tokenizer_config.json are ignored. Two
  tokenizer classes of transformers replace the post-processor (``_OWN_RULES``); for the class in use see
  :func:`~.auto_class.loaded_class`.
- a sentencepiece model: add_bos_token and add_eos_token of tokenizer_config.json decide; without them nothing is added.
- tiktoken files: nothing is added.

Chat templates are not handled here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ..errors import UserError
from ..files.regular import read_regular
from .auto_class import loaded_class
from .files import (
    CONFIG_FILES,
    MODEL_CONFIG,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    TokenizerKind,
    read_config,
    token_text,
    tokenizer_file_name,
    tokenizer_kind,
)

BOS_CHOICES = ("auto", "yes", "no")

Token = tuple[str, int]
"""Text and id of a token."""

_OWN_RULES = ("GPTNeoXTokenizer", "CodeLlamaTokenizer")
"""Classes of transformers 5.23 that ignore the post-processor of tokenizer.json: GPT-NeoX adds nothing, CodeLlama the
BOS. tests/tokenizer/test_document_frame.py compares every class with transformers."""
_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenizerFrame:
    """The tokens that a tokenizer adds to a text, according to its files."""

    prefix: tuple[Token, ...] = ()
    suffix: tuple[Token, ...] = ()
    bos: Token | None = None
    """The BOS in the files, even if it is not put in front of a text."""
    remark: str = ""
    """A difference between the files and the behaviour that a user may not expect; empty if there is none."""

    def documents_begin_with(self, bos: str) -> tuple[Token, ...]:
        """Return the tokens that ``--bos`` (one of ``BOS_CHOICES``) puts in front of a document.

        Raises:
            UserError: ``yes``, but the files have no BOS.
        """
        if bos == "no":
            return ()
        if bos == "auto" or self.prefix:
            return self.prefix
        if self.bos is None:
            raise UserError(
                "--bos yes: the tokenizer has no BOS (bos_token in tokenizer_config.json or special_tokens_map.json, "
                "bos_token_id in config.json); add one of these to the tokenizer's folder, or use --bos no"
            )
        return (self.bos,)


def ids_of(tokens: tuple[Token, ...]) -> tuple[int, ...]:
    """Return only the ids."""
    return tuple(token_id for _, token_id in tokens)


def name_of(tokens: tuple[Token, ...]) -> str:
    """Return only the texts, separated by spaces."""
    return " ".join(text for text, _ in tokens)


def describe_tokens(tokens: tuple[Token, ...]) -> str:
    """Return texts and ids, such as ``<s> (1)``."""
    return " ".join(f"{text} ({token_id})" for text, token_id in tokens)


def read_tokenizer_frame(
    file: Path, special_tokens: Mapping[str, int] | None = None, model: Mapping[str, Any] | None = None
) -> TokenizerFrame:
    """Return the frame of the tokenizer ``file``, with the configuration files of its folder.

    Args:
        file: result of :func:`~.files.find_tokenizer_file`.
        special_tokens: of a tiktoken encoding, whose file does not hold them.
        model: the model's config.json if it is elsewhere; None or empty: that of the folder.

    Raises:
        UserError: one of the files cannot be read.
    """
    try:
        content = read_regular(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    config, special_map = (read_config(file.parent / name) for name in CONFIG_FILES)
    model = model or read_config(file.parent / MODEL_CONFIG)
    return tokenizer_frame(tokenizer_kind(file), content, config, special_map, model, special_tokens)


def frame_of_files(files: Mapping[str, bytes]) -> TokenizerFrame | None:
    """Return the frame of the tokenizer among the ``files`` (name to content) of a model.

    None if there is no tokenizer, or an unreadable one.
    """
    name = tokenizer_file_name(files)
    if name is None:
        return None
    try:
        configs = [_json_object(files.get(config, b"{}")) for config in (*CONFIG_FILES, MODEL_CONFIG)]
        return tokenizer_frame(tokenizer_kind(Path(name)), files[name], *configs)
    except (ValueError, ImportError, UserError):  # code that needs the tokenizer reports the damage
        return None


def tokenizer_frame(
    kind: TokenizerKind,
    content: bytes,
    config: Mapping[str, Any],
    special_map: Mapping[str, Any],
    model: Mapping[str, Any],
    special_tokens: Mapping[str, int] | None = None,
) -> TokenizerFrame:
    """Return the frame of a tokenizer.

    Args:
        kind: of the tokenizer's file.
        content: of the tokenizer's file.
        config: of tokenizer_config.json; ``special_map``: of special_tokens_map.json; ``model``: of config.json. Empty
            if there is no such file.
        special_tokens: see :func:`read_tokenizer_frame`.

    Raises:
        UserError: the file is not a tokenizer of that kind.
    """
    names = [token_text(source.get("bos_token")) for source in (config, special_map)]
    named = next((name for name in names if name is not None), None)
    tokenizer_class = loaded_class(config, model)
    if kind == "sentencepiece":
        return _sentencepiece_frame(content, config, named, tokenizer_class)
    if kind == "tiktoken":
        return TokenizerFrame(bos=_find_bos((special_tokens or {}).items(), named, model))
    try:
        bos = _find_bos(_vocabulary(content), named, model)
        prefix, suffix = _around(_part(content, "post_processor"))
        if tokenizer_class in _OWN_RULES:
            prefix, suffix = (), ()
        if tokenizer_class == "CodeLlamaTokenizer":
            bos = bos or _find_bos(_vocabulary(content), "<s>", {})
            prefix = () if bos is None else (bos,)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{TOKENIZER_FILE}: not a tokenizer of the tokenizers library ({error!r})") from None
    return TokenizerFrame(prefix, suffix, bos, _disagreement(config, prefix, suffix))


def _disagreement(config: Mapping[str, Any], prefix: tuple[Token, ...], suffix: tuple[Token, ...]) -> str:
    """Return a sentence about settings in tokenizer_config.json that transformers 5 ignores; empty if there are
    none.
    """
    for key, tokens in (("add_bos_token", prefix), ("add_eos_token", suffix)):
        if isinstance(config.get(key), bool) and config[key] != bool(tokens):
            does = f"adds {describe_tokens(tokens)}" if tokens else "adds none"
            return (
                f"tokenizer_config.json has {key}: {str(config[key]).lower()}, but the tokenizer {does}; transformers "
                "5 does the same"
            )
    return ""


def _sentencepiece_frame(
    content: bytes, config: Mapping[str, Any], named: str | None, tokenizer_class: str
) -> TokenizerFrame:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except Exception as error:  # RuntimeError, or others in other versions
        raise UserError(f"{SENTENCEPIECE_FILE}: not a sentencepiece model: {' '.join(str(error).split())}") from error

    def token(name: str | None, own_id: int) -> tuple[Token, ...]:
        found = int(own_id if name is None else model.PieceToId(name))
        if name is not None and model.IdToPiece(found) != name:  # missing pieces are looked up as the unknown piece
            found = int(own_id)
        return () if found < 0 else ((str(model.IdToPiece(found)), found),)

    bos = token(named, model.bos_id())
    add_bos = config.get("add_bos_token", tokenizer_class == "CodeLlamaTokenizer")
    add_eos = config.get("add_eos_token", False)
    remark = ""
    if bos and "add_bos_token" not in config and not add_bos:
        remark = (
            f"the model has the BOS {describe_tokens(bos)}, but no tokenizer_config.json next to it has add_bos_token; "
            "as in transformers 5, no BOS is added; --bos yes adds it"
        )
    eos = token(token_text(config.get("eos_token")), model.eos_id())
    return TokenizerFrame(bos if add_bos else (), eos if add_eos else (), bos[0] if bos else None, remark)


def _around(post_processor: Any) -> tuple[tuple[Token, ...], tuple[Token, ...]]:
    """Return the tokens that a tokenizer.json's post-processor puts before a single text, and after it."""
    if not isinstance(post_processor, dict):
        return (), ()
    kind = post_processor.get("type")
    if kind == "Sequence":
        prefix: tuple[Token, ...] = ()
        suffix: tuple[Token, ...] = ()
        for part in post_processor.get("processors", ()):
            front, behind = _around(part)
            prefix, suffix = (*front, *prefix), (*suffix, *behind)
        return prefix, suffix
    if kind in ("BertProcessing", "RobertaProcessing"):
        (cls, cls_id), (sep, sep_id) = post_processor["cls"], post_processor["sep"]
        return ((cls, cls_id),), ((sep, sep_id),)
    if kind != "TemplateProcessing":
        return (), ()
    sides: list[list[Token]] = [[]]
    for piece in post_processor.get("single", ()):
        if "Sequence" in piece:
            sides.append([])
            continue
        special = post_processor["special_tokens"][piece["SpecialToken"]["id"]]
        sides[-1] += zip(special["tokens"], special["ids"], strict=True)
    return tuple(sides[0]), tuple(sides[-1]) if len(sides) > 1 else ()


def _find_bos(vocabulary: Iterable[Token], named: str | None, model: Mapping[str, Any]) -> Token | None:
    """Return the BOS named in the tokenizer's configuration, or else by id in config.json, if it is in the
    vocabulary.
    """
    number = model.get("bos_token_id")
    by_id = None
    if named is None and type(number) is not int:
        return None
    for token in vocabulary:
        if token[0] == named:
            return token
        if token[1] == number:
            by_id = token
    return by_id


def _vocabulary(content: bytes) -> Iterator[Token]:
    """Return the tokens of a tokenizer.json, added ones first: a BOS is nearly always one of these."""
    for token in _part(content, "added_tokens") or ():
        yield token["content"], token["id"]
    vocab = _json_object(content)["model"]["vocab"]
    yield from vocab.items() if isinstance(vocab, dict) else ((piece[0], i) for i, piece in enumerate(vocab))


def _part(content: bytes, key: str) -> Any:
    """Return the value of ``key`` in the object ``content`` without parsing the rest.

    Parsing everything takes 0.1 s for a vocabulary of 150,000.
    """
    match = re.search(rb'(?<!\\)"%s"\s*:\s*' % key.encode(), content)
    if match is not None:
        text = content[match.end() : match.end() + _PART_BYTES].decode("utf-8", "ignore")
        with suppress(ValueError):
            value, _ = json.JSONDecoder().raw_decode(text)
            if value is None or isinstance(value, dict | list):  # a number is the id of a token with that name
                return value
    return _json_object(content).get(key)


def _json_object(content: bytes) -> dict[str, Any]:
    value = orjson.loads(content)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
