"""Check the extended tokenizer as other programs read it: transformers' ``AutoTokenizer`` must give the ids of
training.

AutoTokenizer does not simply read tokenizer.json. It takes added tokens from ``added_tokens_decoder`` of
tokenizer_config.json if it exists, otherwise from added_tokens.json and tokenizer.json. Classes such as
LlamaTokenizer build the rules for spaces themselves. So the files next to tokenizer.json get the new tokens too. Then
the ids of AutoTokenizer are compared with our own, for texts with each of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...engine.errors import UserError
from ...engine.tokenizer.files import ADDED_TOKENS_FILE, CONFIG_FILES, TOKENIZER_FILE, read_config
from ..tokenizer.handle import TokenizerHandle, load_tokenizer
from ..tokenizer.serving_check import auto_tokenizer, auto_tokenizer_name
from .vocabulary import WORD_START, NewToken, dump_json, read_object

_CONFIG_FILE = CONFIG_FILES[0]
_REMEDY = "get it again from the model's source"
STRIP_STEPS = tuple({"type": "Replace", "pattern": {"Regex": regex}, "content": ""} for regex in (r"\A +", r" +\z"))
"""Normalizers that strip spaces from both ends of a text."""
_PLAIN_CLASS = "PreTrainedTokenizerFast"


def with_added_tokens(
    files: Mapping[str, bytes], entries: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, bytes | None]:
    """Return the files next to tokenizer.json that list added tokens, with ``entries`` in them.

    Args:
        files: of the folder, by name. Missing files, and files without such a list, are not created.
        entries: as in ``added_tokens`` of tokenizer.json.
        folder: of the files, for messages.

    Raises:
        UserError: one of them cannot be read.
    """
    if not entries:
        return {}
    changed: dict[str, bytes | None] = {}
    config = read_object(files, folder / _CONFIG_FILE, _REMEDY)
    if isinstance(config.get("added_tokens_decoder"), dict):
        new = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in entries}
        changed[_CONFIG_FILE] = dump_json({**config, "added_tokens_decoder": {**config["added_tokens_decoder"], **new}})
    if ADDED_TOKENS_FILE in files:
        added = read_object(files, folder / ADDED_TOKENS_FILE, _REMEDY)
        changed[ADDED_TOKENS_FILE] = dump_json(added | {entry["content"]: entry["id"] for entry in entries})
    return changed


def require_served_alike(folder: Path, tokens: Sequence[NewToken]) -> list[str]:
    """Check that texts with the new tokens are unchanged by a round trip, and that AutoTokenizer gives them our ids.

    Two problems are repaired. If AutoTokenizer's class for the folder has rules of its own, the folder is changed to
    name the class that reads tokenizer.json unchanged. If the tokenizer puts a space before every part of a text, as
    Llama 2's tokenizer.json does, it changes the text after an added token. Then tokenizer.json gets the rule of
    transformers' LlamaTokenizer.

    Args:
        folder: of the extended tokenizer, which may be changed, with the model's config.json.
        tokens: the new ones.

    Returns:
        Lines for the console.

    Raises:
        UserError: a difference remains.
    """
    theirs = auto_tokenizer(folder)
    problem, is_text = _problem(folder, theirs, tokens)
    notes = []
    for repair in (_space_like_llama, _name_plain_class) if is_text else (_name_plain_class, _space_like_llama):
        if problem is not None and (note := repair(folder, theirs)) is not None:
            theirs = auto_tokenizer(folder)
            problem, _ = _problem(folder, theirs, tokens)
            notes.append(note)
    if problem is not None:
        raise UserError(problem)
    return notes if not isinstance(theirs, str) else [*notes, f"note: the new ids were not compared: {theirs}"]


def probes(tokens: Iterable[NewToken]) -> list[str]:
    """Return texts that hold each token alone, inside a word, between words, and twice."""
    texts: dict[str, None] = {}
    for token in tokens:
        text = token.text
        if "\ufffd" not in text:  # a part of a character, which never occurs alone
            texts |= dict.fromkeys([text, f"x{text}y", f"x {text} y", f"x{text} {text}.", f" {text} "])
    return list(texts)


def _problem(folder: Path, theirs: Any, tokens: Sequence[NewToken]) -> tuple[str | None, bool]:
    """Return the problem, if any, and whether it is in the text rather than the ids."""
    ours = load_tokenizer(folder, backend="reference")
    changed = _changed_text(ours, tokens)
    return (_other_ids(ours, theirs, tokens), False) if changed is None else (changed, True)


def _changed_text(ours: TokenizerHandle, tokens: Sequence[NewToken]) -> str | None:
    """Return a message if added tokens change the text around them."""
    for token in tokens:
        probe = f"a{token.text}b c"
        if token.kind == "added" and (back := ours.decode(ours.reference_encode([probe])[0])) != probe:
            return (
                f"--tokens: {token.text!r} can only be an added token, and the tokenizer would change the text around "
                f"it ({probe!r} comes back as {back!r}); list its words one by one, or leave it out"
            )
    return None


def _other_ids(ours: TokenizerHandle, theirs: Any, tokens: Sequence[NewToken]) -> str | None:
    """Return a message if AutoTokenizer can load the tokenizer and gives other ids."""
    if isinstance(theirs, str):
        return None
    texts = probes(tokens)
    for text, mine in zip(texts, ours.encode_batch(texts), strict=True):
        other = theirs.encode(text, add_special_tokens=False)
        if mine.tolist() != other:
            return (
                f"the tokenizer with the new tokens gives {text!r} the ids {mine.tolist()}, but "
                f"{auto_tokenizer_name()} gives {other}, so the served model would get other ids than those of its "
                "training; save the tokenizer with transformers first "
                "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder)), or list other tokens"
            )
    return None


def _name_plain_class(folder: Path, theirs: Any) -> str | None:
    """Make AutoTokenizer read tokenizer.json unchanged. Default special tokens of its class get names."""
    path = folder / _CONFIG_FILE
    config = read_config(path)
    if isinstance(theirs, str) or config.get("tokenizer_class") == _PLAIN_CLASS:
        return None
    names = {name: token for name, token in theirs.special_tokens_map.items() if isinstance(token, str)}
    path.write_bytes(dump_json({**names, **config, "tokenizer_class": _PLAIN_CLASS}))
    return (
        f"note: tokenizer_class in {_CONFIG_FILE} is now {_PLAIN_CLASS}: {type(theirs).__name__} of transformers "
        f"replaces rules of {TOKENIZER_FILE} by its own and would give other ids"
    )


def _space_like_llama(folder: Path, _theirs: Any) -> str | None:
    """Replace Llama 2's rule for spaces by that of transformers, if tokenizer.json has it.

    Llama 2's normalizer puts U+2581 before every part between added tokens. Metaspace puts it only before the whole
    text, and only if this does not begin with a space. Steps that strip spaces from the ends of a text strip them from
    every such part, too, and are removed.
    """
    file = folder / TOKENIZER_FILE
    content = json.loads(file.read_bytes())
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    steps = (content.get("normalizer") or {}).get("normalizers") or []
    if steps[-2:] != [{"type": "Prepend", "prepend": WORD_START}, escape] or content.get("pre_tokenizer") is not None:
        return None
    kept = [step for step in steps[:-2] if step not in STRIP_STEPS]
    normalizer = {"type": "Sequence", "normalizers": kept} if kept else None
    metaspace = {"type": "Metaspace", "replacement": WORD_START, "prepend_scheme": "first", "split": False}
    file.write_bytes(dump_json({**content, "normalizer": normalizer, "pre_tokenizer": metaspace}))
    return (
        f"note: {TOKENIZER_FILE} writes spaces as transformers' LlamaTokenizer does (Metaspace): texts that begin or "
        "end with a space may have one token more or less than before, all others are unchanged"
    )
