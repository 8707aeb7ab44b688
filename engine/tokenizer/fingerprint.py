"""Compare tokenizers by vocabulary and behaviour, not by the bytes of their files.

``save_pretrained`` of transformers rewrites tokenizer.json: merges as lists instead of strings, other defaults written
out, rules for spaces moved from the normalizer to the pre-tokenizer. The model and its dataset still match. A
fingerprint therefore covers what the ids of a dataset depend on:

- every id and its token, added tokens included, and how added tokens are matched in text;
- the rules of the model: the order of merges, or the scores of pieces;
- the ids of a fixed set of texts (:mod:`~.probes`).

It leaves out special tokens' flags (they are ordinary text in a dataset's text), post-processor, decoder, truncation,
padding and dropout. It also leaves out how a text that begins with a space is encoded, where transformers' classes
differ from the files that they were made from.

A sentencepiece ``.model`` and the tokenizer.json made from it have different rules, but the same vocabulary and ids:
:func:`same_tokenizer` compares rules within one kind only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

SCHEME = 1
"""Version of the hashed content. Fingerprints of different schemes never match."""


def fingerprint_of(kind: str, vocab: bytes, added: Iterable[Any], rules: bytes, probe_ids: Iterable[int]) -> str:
    """Return the fingerprint, ``scheme:kind:rules:ids``.

    Args:
        kind: of the rules, such as BPE.
        vocab: of the model, as written by :func:`vocab_text`.
        added: further tokens, as JSON values in a fixed order.
        rules: merges in their order, or scores in the order of ids.
        probe_ids: ids of :data:`~.probes.PROBES`, concatenated.
    """
    ids = _digest(vocab, json.dumps(list(added)).encode(), ",".join(map(str, probe_ids)).encode())
    return f"{SCHEME}:{kind}:{_digest(rules)}:{ids}"


def vocab_text(vocab: Mapping[str, int]) -> bytes:
    """Return a vocabulary as the ``tokenizers`` library writes it into tokenizer.json: by id, without spaces."""
    by_id = dict(sorted(vocab.items(), key=lambda item: item[1]))
    return json.dumps(by_id, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def fingerprint_of_json(tokenizer: Any, state: bytes, matched: Iterable[Any], probe_ids: Iterable[int]) -> str:
    """Return the fingerprint of a ``tokenizers.Tokenizer``.

    Args:
        state: its model's part of tokenizer.json, as the library writes it.
        matched: added tokens that are matched in text, with their flags, as JSON values.
        probe_ids: see :func:`fingerprint_of`.
    """
    model = tokenizer.model
    kind = type(model).__name__
    outside = sorted(
        (token_id, token.content)
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if model.token_to_id(token.content) != token_id
    )
    if kind == "BPE":
        # Quotes within tokens are escaped, so these can only be keys.
        vocab, rules = state[state.index(b'"vocab":') + 8 :].rsplit(b',"merges":', 1)
    else:
        content = json.loads(state)
        entries = content["vocab"]
        if isinstance(entries, list):  # pieces with their scores
            entries = {piece: place for place, (piece, _) in enumerate(entries)}
        vocab, rules = vocab_text(entries), state
    return fingerprint_of(kind, vocab, [*outside, *matched], rules, probe_ids)


def same_tokenizer(one: str, other: str) -> bool:
    """Return whether two fingerprints, both of which may be empty, belong to the same tokenizer."""
    if one.count(":") != 3 or other.count(":") != 3:
        return False
    scheme, kind, rules, ids = one.split(":")
    other_scheme, other_kind, other_rules, other_ids = other.split(":")
    return (scheme, ids) == (other_scheme, other_ids) and (kind != other_kind or rules == other_rules)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]
